"""Batches, decoding, chunked prefill, prefix caching, and base requests that stay as they were."""

from __future__ import annotations

import pytest
import torch
from engine_cases import PROMPTS, TOP, compare_fp32

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine

STEPS = 6
LONG = list(range(100, 180))


@pytest.fixture(scope="module")
def case(make_case):
    case = make_case("qwen2_moe")
    case.add("a", seed=1)
    case.add("b", seed=2, rank=4)
    return case


def _adapters(case):
    return {name: str(path) for name, path in case.adapters.items()}


def test_decode_mixed_batch(case):
    """Greedy tokens of base, a and b side by side are the oracle's own choices at every step."""
    requests = [(p, name) for p in PROMPTS for name in (None, "a", "b")]
    job = engine.Job(
        str(case.model), _adapters(case), [requests], max_tokens=STEPS, options={"dtype": "float32"}
    )
    answers, _, _ = engine.run(job)
    for (prompt, name), (tokens, logprobs) in zip(requests, answers[0], strict=True):
        want = case.forced(name, prompt, tokens)
        assert want.shape == logprobs.shape
        for step in range(STEPS):
            top = want[step].topk(TOP).indices
            assert (logprobs[step] - want[step])[top].abs().max() <= 1e-3, (name, step)
            assert want[step].max() - want[step][tokens[step]] <= 1e-3, (name, step)


def test_chunked_prefill_and_prefix_cache(case):
    """A long prompt in chunks of 32 tokens; asked again, its blocks come from the cache."""
    requests = [(LONG, name) for name in (None, "a", "b")]
    job = engine.Job(
        str(case.model),
        _adapters(case),
        [requests, requests],
        options={
            "dtype": "float32",
            "max_num_batched_tokens": 32,
            "enable_prefix_caching": True,
            "block_size": 32,
        },
    )
    answers, _, _ = engine.run(job)
    for batch in answers:
        for (prompt, name), (tokens, logprobs) in zip(requests, batch, strict=True):
            want = case.forced(name, prompt, tokens)[0]
            top = want.topk(TOP).indices
            assert (logprobs[0] - want)[top].abs().max() <= 1e-3, name


@pytest.mark.parametrize("native", ["1", "0"])
def test_native_kernels_and_torch(case, native):
    """Both ways to compute LoRA give the oracle's numbers; the log says which one runs."""
    requests = [(p, name) for p in PROMPTS for name in (None, "a", "b")]
    job = engine.Job(str(case.model), _adapters(case), [requests], options={"dtype": "float32"})
    answers, _, log = engine.run(job, {"VLLM_MOE_LORA_NATIVE": native})
    assert log.count("native kernels, made in") == int(native)
    for i, name in enumerate((None, "a", "b")):
        compare_fp32([logprobs[-1] for _, logprobs in answers[0][i::3]], case, name)


@pytest.mark.parametrize(
    ("dtype", "quant"),
    [("float32", None), ("bfloat16", None)],
    ids=["fp32", "bf16"],
)
def test_base_requests_keep_their_bits(make_case, dtype, quant):
    """Base requests, alone or beside adapters, give the bits of an engine without LoRA."""
    case = make_case("qwen2_moe", quant)
    case.add("a", seed=1)
    options = {"dtype": dtype, "enable_prefix_caching": False}
    base = [(p, None) for p in PROMPTS]
    # The mixed round has as many tokens as the plain one, so dense layers see the same shapes.
    mixed = [(PROMPTS[0], None), (PROMPTS[1], "a"), (PROMPTS[2], None)]
    plain, _, _ = engine.run(
        engine.Job(str(case.model), {}, [base], options=options), {"VLLM_MOE_LORA": "0"}
    )
    with_lora, _, _ = engine.run(
        engine.Job(str(case.model), _adapters(case), [base, mixed, base], options=options)
    )
    for batch in (with_lora[0], with_lora[2]):  # before and after an adapter came in
        for (_, want), (_, have) in zip(plain[0], batch, strict=True):
            assert torch.equal(have, want)
    for i in (0, 2):
        assert torch.equal(with_lora[1][i][1], plain[0][i][1]), f"base request {i} in a mixed batch"
    assert not torch.equal(with_lora[1][1][1], plain[0][1][1]), "the adapter did nothing"


def test_more_adapters_than_slots(case, make_case):
    """Six adapters through two slots: weights widen, shrink in use, and are reused."""
    names = [f"n{i}" for i in range(6)]
    case = make_case("qwen2_moe")
    for i, name in enumerate(names):
        case.add(name, seed=20 + i, rank=(4, 8, 3, 16, 1, 7)[i])
    order = [*names, *reversed(names)]
    job = engine.Job(
        str(case.model),
        _adapters(case),
        [[(p, name) for p in PROMPTS] for name in order],
        options={"dtype": "float32", "max_loras": 2},
    )
    answers, _, _ = engine.run(job)
    for name, batch in zip(order, answers, strict=True):
        compare_fp32([lp[-1] for _, lp in batch], case, name)


def test_slots_that_grow_inside_a_batch(case):
    """Four large adapters meet for the first time in a step, which runs in inference mode."""
    large, small = ["l1", "l2", "l3", "l4"], ["s1", "s2", "s3", "s4"]
    for seed, name in enumerate([*large, "late", *small], start=10):
        case.add(name, seed=seed, rank=2 if name in small else 16)
    mixed = [["l1", "l2", "s1", "s2"], ["l3", "l4", "s3", "s4"], large]
    job = engine.Job(
        str(case.model),
        {name: str(case.adapters[name]) for name in [*large, *small, "late"]},
        [[(p, name) for p in PROMPTS for name in names] for names in mixed],
        options={"dtype": "float32"},
        load=["late"],
    )
    job.rounds.append([(p, "l1") for p in PROMPTS])
    answers, outcomes, _ = engine.run(job)
    assert outcomes == ["ok"]
    for at, name in enumerate(large):
        compare_fp32([lp[-1] for _, lp in answers[2][at::4]], case, name)
    compare_fp32([lp[-1] for _, lp in answers[3]], case, "l1")
