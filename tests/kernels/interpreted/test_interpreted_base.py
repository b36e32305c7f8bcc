"""The base's grouped product with LoRA as its tail, against loops and kernels/reference.py."""

from __future__ import annotations

import base_cases
import lora_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_lora.kernels.triton import config, grouped

# name: slices, one row of x a pair, router weight
KINDS = {
    "w13": (2, False, False),
    "w13 fused": (1, False, False),
    "w2": (1, True, True),
    "w2 of one row a token": (1, False, True),
}
SMALL = cases.Shape(3, 23, 5, 2, 3, 3, 5, 23)
# For sums of many steps: both slots, both experts, and a token without an adapter.
FEW = cases.Shape(3, 6, 2, 2, 2, 2, 2, 6)
BLOCKS = {2: (16, 32, 64, 128), 4: (16, 32)}


@st.composite
def small(draw):
    tokens, experts = draw(st.integers(1, 40), "tokens"), draw(st.integers(2, 9), "experts")
    slots = draw(st.integers(1, 5), "slots")
    adapters, seed = draw(st.integers(0, slots), "adapters"), draw(st.integers(0, 10**6), "seed")
    return cases.Shape(
        seed, tokens, experts, draw(st.integers(1, 3), "top_k"), slots, adapters, experts, tokens
    )


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check(base, y):
    case = base.case
    plain, off = base.base()
    delta = case.delta()
    whole = cases.Case(
        plain, case.x, case.lora_a, case.lora_b, case.ranks, case.token_slots, case.topk_ids,
        case.weights,
    )  # fmt: skip
    # z is rounded to the dtype of y, and the sum once.
    unit = torch.finfo(y.dtype).eps / 2
    whole.y = plain.to(y.dtype)
    allowed = whole.tolerance(delta) + unit * (plain + delta).abs() + off
    error = (y.float() - (plain + delta)).abs()
    assert not y.isnan().any()
    assert (error <= allowed).all(), (error / allowed).max()
    assert not y[case.topk_ids < 0].any(), "an expert of another rank"
    touched = delta != 0
    if touched.any():
        assert delta[touched].norm() >= 20 * allowed[touched].norm()


@settings(max_examples=cases.examples(60), deadline=None, derandomize=True)
@given(
    shape=small(),
    dtype=st.sampled_from(config.DTYPES),
    kind=st.sampled_from(list(KINDS)),
    shared=st.sampled_from([(False, False), (True, False), (False, True)]),
    width=st.integers(1, 40).map(lambda n: 8 * n),
    out=st.integers(1, 20).map(lambda n: 8 * n),
    max_rank=st.integers(1, 6).map(lambda n: 8 * n),
    block=st.integers(0, 3),
    counted=st.booleans(),
    is_sorted=st.booleans(),
)
def test_grid(shape, dtype, kind, shared, width, out, max_rank, block, counted, is_sorted):
    slices, per_pair, weighted = KINDS[kind]
    base = base_cases.make(
        shape, dtype, width, out, max_rank, slices, per_pair, weighted, shared
    )  # fmt: skip
    blocks = BLOCKS[dtype.itemsize]
    with cases.poisoned(), cases.limits(ranked=0 if counted else 10**6):
        y = base.run(blocks[block % len(blocks)], is_sorted=is_sorted)
    check(base, y)


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_sum_in_parts(kind, dtype):
    slices, per_pair, weighted = KINDS[kind]
    width = config.PARTS_FROM_WIDTH + 8
    base = base_cases.make(FEW, dtype, width, 24, 16, slices, per_pair, weighted)
    with cases.poisoned():
        check(base, base.run(16))


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_that_are_not_sorted_have_the_same_bits(kind, dtype):
    slices, per_pair, weighted = KINDS[kind]
    base = base_cases.make(SMALL, dtype, 72, 40, 24, slices, per_pair, weighted)
    with cases.poisoned():
        few, many = base.run(16, is_sorted=False), base.run(16)
    assert torch.equal(bits(few), bits(many))


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
def test_other_tokens_adapters_change_no_bit(dtype):
    """Rows without an adapter have the bits they have without LoRA, and the others their own."""
    base = base_cases.make(SMALL, dtype, 72, 40, 24, slices=2)
    slots = base.case.token_slots
    with cases.poisoned():
        mixed, plain = base.run(16), base.run(16, lora=False)
        assert torch.equal(bits(mixed[slots < 0]), bits(plain[slots < 0]))
        assert not torch.equal(bits(mixed), bits(plain))
        for slot in range(SMALL.slots):
            alone = base.run(16, token_slots=torch.where(slots == slot, slots, -1))
            mine = slots == slot
            assert torch.equal(bits(alone[mine]), bits(mixed[mine]))
            assert torch.equal(bits(alone[~mine]), bits(plain[~mine]))


def test_ids_that_do_not_exist_change_nothing():
    base = base_cases.make(SMALL, torch.float32, 40, 16, 16)
    base.case.token_slots[:4] = torch.tensor([3, 10**9, -2, -(2**31)])
    with cases.poisoned():
        y = base.run(16)
    base.case.token_slots[:4] = -1
    check(base, y)


def test_ranks_on_the_device_cannot_lead_outside(monkeypatch):
    base = base_cases.make(SMALL, torch.float32, 40, 16, 24, slices=2)
    base.case.ranks.fill_(24)
    for t in (*base.case.lora_a, *base.case.lora_b):
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) / 8)
    want = base.run(16)
    real = grouped.shrink

    def shrink(x, factors, *rest, **more):
        factors.ranks.fill_(10**6)
        return real(x, factors, *rest, **more)

    monkeypatch.setattr(grouped, "shrink", shrink)
    assert torch.equal(bits(base.run(16)), bits(want))


WRONG = {
    "no such block": ({"block_m": 48}, ValueError, "order has blocks of 48 rows"),
    "slots of another size": (
        {"token_slots": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "token_slots has shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name):
    change, error, message = WRONG[name]
    base = base_cases.make(SMALL, torch.bfloat16, 40, 16, 16)
    with pytest.raises(error, match=message):
        base.run(**{"block_m": 16, **change})


def test_a_weight_that_does_not_fit_is_refused():
    base = base_cases.make(SMALL, torch.bfloat16, 40, 16, 16)
    base.weight = base.weight.half()
    with pytest.raises(TypeError, match=r"weight is torch\.float16"):
        base.run(16)
    base.weight = base.weight.bfloat16()[:, :8].contiguous()
    with pytest.raises(ValueError, match=r"factors have \(experts, slices, out, in\)"):
        base.run(16)
