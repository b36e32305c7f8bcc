"""--enable-return-routed-experts on the CPU's V1 runner: the routes are Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from hf_routes import Model
from routed_cases import request, run

pytestmark = pytest.mark.cpu_engine
LONG = [(7 * i + 3) % 500 for i in range(90)]
PROMPTS = [[1, 2, 3], [5, 9, 11, 300, 17, 44, 2, 8], LONG[:70]]


class Truth:
    """Hugging Face's routes of the merged checkpoints."""

    def __init__(self, case):
        self.models = {None: Model(case.plain)}
        for name in case.adapters:
            case.want(name)
            self.models[name] = Model(case.folder / f"{name}-merged")

    def check(self, asked, got, start=0):
        """Every row of ``got`` names the experts Hugging Face takes there."""
        ids = asked["prompt"] + got["tokens"][:-1]
        _, want = self.models[asked["adapter"]](ids)
        have = got["routes"]
        assert have.shape == want[start:].shape, "prompt + generated - 1 rows"
        assert got["dtype"] == "uint8"
        torch.testing.assert_close(have.sort(-1).values, want[start:].sort(-1).values)
        return want


def test_every_way_a_token_is_computed(make_case):
    """Chunks, mixed batches, prefix hits, aborted requests, preempted ones: base and adapters."""
    case = make_case("qwen2_moe")
    case.add("a", seed=1)
    case.add("b", seed=2)
    names = (None, "a", "b")
    mixed = [request(p, name) for p in PROMPTS for name in names]
    # Prefix hits, on blocks of the same adapter only; one asks for a part.
    again = [request([*LONG[:70], 4, 4], name) for name in names]
    partly = [request([*LONG[:70], 4, 4], "a", start=40)]
    # In the middle of a prompt's chunks, and while it generates.
    aborted = [
        request([*LONG[10:], 9], "a", abort=1),
        request([*LONG[20:], 9], "b"),
        request([8, 8, 8], None, max_tokens=40, abort=5),
        request([8, 8, 9], "a"),
    ]
    after = [request([*LONG[10:], 9], "a"), request([8, 8, 8], None)]
    many = [request([50 + i, *LONG[:60]], names[i % 3], max_tokens=40) for i in range(8)]
    rounds = [mixed, again, partly, aborted, after, many]
    answers, preempted = run(
        case, rounds, max_num_batched_tokens=32, block_size=32, num_gpu_blocks_override=20
    )
    truth = Truth(case)
    seen = []
    for asked, got in zip(rounds, answers, strict=True):
        for one, answer in zip(asked, got, strict=True):
            if one.get("abort") is None:
                assert answer["finished"]
                want = truth.check(one, answer, one.get("start", 0))
                seen.append((one, want))
            else:
                assert not answer["finished"]
    assert all(answer["cached"] >= 64 for answer in answers[1])
    assert preempted, "this round is here to preempt"
    # An adapter changes routes, so rows of the wrong adapter are noticed.
    base, a, b = (want for one, want in seen[6:9])
    n = len(PROMPTS[2])
    for one, other in ((base, a), (base, b), (a, b)):
        assert (one[:n].sort(-1).values != other[:n].sort(-1).values).any(-1).float().mean() > 0.2


def test_dense_layers_are_zeros(make_case):
    """GLM-4: layer 0 is dense; layer 1 routes by sigmoid, groups and a correction bias."""
    case = make_case("glm4_moe")
    case.add("a", seed=1)
    asked = [request(p, name) for p in PROMPTS for name in (None, "a")]
    answers, _ = run(case, [asked])
    truth = Truth(case)
    for one, answer in zip(asked, answers[0], strict=True):
        truth.check(one, answer)
        assert not answer["routes"][:, 0].any()
        assert answer["routes"][:, 1].any()
