"""The kernels on a real GPU, at the sizes of real layers. ci/gpu.sh runs this."""

from __future__ import annotations

from dataclasses import fields, replace

import base_cases
import lora_cases as cases
import pytest
import torch
import triton

from vllm_moe_lora.kernels.triton import checks, config
from vllm_moe_lora.kernels.triton.factors import Factors, active_segments
from vllm_moe_lora.kernels.triton.launch import add_lora
from vllm_moe_lora.kernels.triton.route import route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is on"),
]
DEVICE = "cuda"

# experts, top_k, hidden, intermediate
LAYERS = {
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "kimi": (384, 8, 7168, 2048),
}


def layer(name, tokens, dtype, projection, rank=16, slots=4, skewed=False):
    """A case on the CPU, of one projection of a real layer."""
    experts, top_k, hidden, inner = LAYERS[name]
    shape = cases.Shape(5, tokens, experts, top_k, slots, slots, 4 if skewed else experts, tokens)
    if projection == "w13":
        return experts, cases.make(shape, dtype, hidden, inner, rank, slices=2)
    return experts, cases.make(shape, dtype, inner, hidden, rank, per_pair=True, weighted=True)


def to_device(case):
    def move(value):
        if isinstance(value, list):
            return [one.to(DEVICE) for one in value]
        return value if value is None else value.to(DEVICE)

    return replace(case, **{one.name: move(getattr(case, one.name)) for one in fields(case)})


def factors_of(case, experts):
    factors = Factors(case.lora_a, case.lora_b, experts)
    for slot in range(factors.num_slots):
        factors.set_ranks(slot, case.ranks[:, slot].cpu())
    return factors


def run(case, experts, factors=None):
    factors = factors or factors_of(case, experts)
    y = case.y.clone()
    routing = route(
        case.topk_ids, case.token_slots, factors.num_slots, experts, y.dtype,
        active=active_segments(factors),
    )  # fmt: skip
    add_lora(y, case.x, factors, routing, case.weights)
    return y


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
@pytest.mark.parametrize("projection", ["w13", "w2"])
@pytest.mark.parametrize(
    ("name", "tokens", "rank", "skewed"),
    [
        ("qwen3", 1, 16, False),
        ("qwen3", 33, 64, False),
        ("qwen3", 200, 16, True),  # past the limit between the two ways of a batch
        ("qwen3", 300, 8, False),  # counted, not ranked
        ("mixtral", 40, 128, False),
        ("kimi", 20, 32, False),
    ],
)
def test_against_the_reference(name, tokens, rank, skewed, projection, dtype):
    experts, case = layer(name, tokens, dtype, projection, rank, skewed=skewed)
    y = run(to_device(case), experts).cpu()
    delta = case.delta()
    touched = delta != 0
    assert touched.any()
    assert (bits(y) == bits(case.y))[~touched].all(), "a pair without LoRA changed"
    # tf32 cuts z where the other dtypes round it: twice the error of a rounding.
    allowed = case.tolerance(delta) * (2 if dtype == torch.float16 else 1)
    error = (y.float() - (case.y.float() + delta)).abs()
    assert (error <= allowed)[touched].all(), (error / allowed)[touched].max()


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
@pytest.mark.parametrize("projection", ["w13", "w2"])
def test_bits_do_not_depend_on_the_batch_or_the_run(projection, dtype):
    """600 tokens go the way of many, one token the way of few; atomics may place rows anywhere."""
    experts, case = layer("qwen3", 600, dtype, projection, 64)
    case = to_device(case)
    factors = factors_of(case, experts)
    batch = run(case, experts, factors)
    for _ in range(5):
        assert torch.equal(bits(run(case, experts, factors)), bits(batch))
    per_token = case.x.shape[0] // 600
    for token in case.token_slots.ge(0).nonzero().flatten()[::60].tolist():
        one = slice(token, token + 1)
        alone = replace(
            case,
            y=case.y[one],
            x=case.x[token * per_token : (token + 1) * per_token],
            token_slots=case.token_slots[one],
            topk_ids=case.topk_ids[one],
            weights=None if case.weights is None else case.weights[one],
        )
        assert torch.equal(bits(run(alone, experts, factors)), bits(batch[one]))


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
@pytest.mark.parametrize(("slices", "per_pair", "weighted"), [(2, False, False), (1, True, True)])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_the_base_with_lora_as_its_tail(block, slices, per_pair, weighted, dtype):
    """Against loops; rows without an adapter have the bits they have without LoRA."""
    if config.base_tiles(checks.arch_of(torch.device(DEVICE)), dtype, block) is None:
        pytest.skip(f"no tiles of {block} rows for {dtype}")
    shape = cases.Shape(7, 150, 12, 4, 4, 4, 12, 150)
    base = base_cases.make(shape, dtype, 1536, 264, 40, slices, per_pair, weighted)
    case = base.case
    y = base.run(block, device=DEVICE).cpu()
    plain, off = base.base()
    delta = case.delta()
    unit = torch.finfo(dtype).eps / 2
    case.y = plain.to(dtype)
    # tf32 cuts z where the other dtypes round it: twice the error of a rounding.
    allowed = case.tolerance(delta) * (2 if dtype == torch.float16 else 1)
    allowed += unit * (plain + delta).abs() + off
    error = (y.float() - (plain + delta)).abs()
    assert (error <= allowed).all(), (error / allowed).max()
    without = base.run(block, lora=False, device=DEVICE).cpu()
    base_rows = case.token_slots < 0
    assert torch.equal(bits(y[base_rows]), bits(without[base_rows]))
    again = base.run(block, device=DEVICE).cpu()
    assert torch.equal(bits(y), bits(again))
    few = base.run(block, device=DEVICE, is_sorted=False).cpu()
    assert torch.equal(bits(y), bits(few))


@pytest.mark.parametrize("tokens", [7, 600])
def test_cuda_graph(tokens):
    """Captured with no adapter at all, replayed with other requests: the bits of an eager call."""
    experts, case = layer("qwen3", tokens, torch.bfloat16, "w13")
    case = to_device(case)
    factors = factors_of(case, experts)
    want = run(case, experts, factors)
    active = active_segments(factors)
    y, x, slots, ids = case.y.clone(), case.x.clone(), case.token_slots.clone(), case.topk_ids
    ids = ids.clone()

    def call():
        routing = route(ids, slots, factors.num_slots, experts, y.dtype, active=active)
        add_lora(y, x, factors, routing)

    kept = slots.clone()
    slots.fill_(-1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(2):
        y.copy_(case.y)
        slots.fill_(-1)
        graph.replay()
        assert torch.equal(bits(y), bits(case.y))
        slots.copy_(kept)
        graph.replay()
        assert torch.equal(bits(y), bits(want))
