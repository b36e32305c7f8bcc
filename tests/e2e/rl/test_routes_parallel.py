"""Routes of an engine of two real processes, tensor or expert parallel: Hugging Face's own."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hf_routes import Truth
from processes import PROCESSES
from routed_cases import LONG, NAMES, PROMPTS, case_of, request, run

from vllm_moe_lora.rl.convert_routes import to_base64

pytestmark = [pytest.mark.cpu_engine, pytest.mark.long]
LIMIT = 1e-3  # fp32 against fp32, over two ranks' sums, as in engine_cases


@pytest.mark.parametrize("experts", [False, True], ids=["tensor", "expert"])
def test_two_ranks(make_case, experts):
    """Mixed batches, chunks, prefix hits, an abort, preemption, and routes that come back."""
    number = 7 if experts else 8
    case = case_of(make_case, num_experts=number)
    forced = np.random.default_rng(0).random((74, 2, number)).argsort(-1)[..., :2].astype(np.uint8)
    rounds = [
        [request(p, name) for p in PROMPTS for name in NAMES],
        [request([*LONG[:70], 4, 4], name) for name in NAMES],
        [request([*LONG[10:], 9], "a", abort=1), request([8, 8, 8], "b")],
        [request([50 + i, *LONG[:60]], NAMES[i % 3], max_tokens=40) for i in range(8)],
        [request(LONG[:70], n, 5, routes=to_base64(forced), like="answer") for n in NAMES],
    ]
    answers, preempted = run(
        case,
        rounds,
        {**PROCESSES, "VLLM_MOE_LORA_REPLAY": "1"},
        tensor_parallel_size=2,
        enable_expert_parallel=experts,
        max_num_batched_tokens=32,
        block_size=32,
        num_gpu_blocks_override=20,
    )
    truth = Truth(case)
    models = truth.models
    assert preempted, "one round is here to preempt"
    assert all(answer["cached"] >= 64 for answer in answers[1])
    assert not answers[2][0]["finished"]
    seen = {}
    for asked, got in zip(chain(*rounds[:4]), chain(*answers[:4]), strict=True):
        if asked.get("abort") is not None:
            continue
        name = asked["adapter"]
        want = truth.check(name, asked["prompt"] + got["tokens"][:-1], got["routes"])
        if asked["prompt"] == PROMPTS[2]:
            seen[name] = want[:70].sort(-1).values
    for one, other in ((None, "a"), (None, "b"), ("a", "b")):
        assert (seen[one] != seen[other]).any(-1).float().mean() > 0.2, "an adapter's are noticed"
    for name, got in zip(NAMES, answers[4], strict=True):
        assert torch.equal(got["routes"], torch.from_numpy(forced.astype(np.int64)))
        want, _ = models[name](LONG[:70] + got["tokens"][:-1], forced)
        assert (got["logprobs"] - want[69:]).abs().max() <= LIMIT
        free, _ = models[name](LONG[:70] + got["tokens"][:-1])
        assert (free - want)[69:].abs().max() > 100 * LIMIT, "routes matter"
