"""Shrink and expand against kernels/reference.py."""

from __future__ import annotations

import lora_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_lora.kernels.triton import config, launch
from vllm_moe_lora.kernels.triton.factors import Factors, active_segments
from vllm_moe_lora.kernels.triton.launch import add_lora
from vllm_moe_lora.kernels.triton.route import route

# name: slices, one row of x a pair, router weight
KINDS = {
    "w13": (2, False, False),
    "w13 fused": (1, False, False),
    "w2": (1, True, True),
    "w2 unweighted": (1, True, False),
}
SHARED = [(False, False), (True, False), (False, True), (True, True)]
DTYPES = st.sampled_from(config.DTYPES)


def factors_of(case, experts):
    factors = Factors(case.lora_a, case.lora_b, experts)
    for slot in range(factors.num_slots):
        factors.set_ranks(slot, case.ranks[:, slot])
    return factors


def run(case, experts, topk_ids=None, expert_map=None, active=True):
    """y after the kernels, everything unset being poisoned."""
    factors = factors_of(case, experts)
    y = torch.full((*case.y.shape[:2], case.y.shape[2] + 8), cases.NAN, dtype=case.y.dtype)
    y = y[..., : case.y.shape[2]]
    y.copy_(case.y)
    with cases.poisoned():
        routing = route(
            case.topk_ids if topk_ids is None else topk_ids, case.token_slots,
            factors.num_slots, experts, y.dtype, expert_map,
            active_segments(factors) if active else None,
        )  # fmt: skip
        add_lora(y, case.x, factors, routing, case.weights)
    return y


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check(case, y, effect=20):
    """y + delta within its tolerance, which is far below delta; all else keeps its bits."""
    delta = case.delta()
    touched = delta != 0
    same = bits(y) == bits(case.y)
    assert same[~touched].all(), "a pair without LoRA changed"
    if not touched.any():
        return
    off = case.tolerance(delta)
    error = (y.float() - (case.y.float() + delta)).abs()
    assert not y[touched].isnan().any()
    assert (error <= off)[touched].all(), (error / off)[touched].max()
    assert delta[touched].norm() >= effect * off[touched].norm()


@settings(max_examples=cases.examples(80), deadline=None, derandomize=True)
@given(
    shape=cases.shapes(segments=12),
    dtype=DTYPES,
    kind=st.sampled_from(list(KINDS)),
    shared=st.sampled_from(SHARED),
    width=st.integers(1, 40).map(lambda n: 8 * n),
    out=st.integers(1, 36).map(lambda n: 8 * n),
    max_rank=st.integers(1, 16).map(lambda n: 8 * n),
    counted=st.booleans(),
    many=st.booleans(),
)
def test_grid(shape, dtype, kind, shared, width, out, max_rank, counted, many):
    slices, per_pair, weighted = KINDS[kind]
    case = cases.make(
        shape, dtype, width, out, max_rank, slices, per_pair, weighted, shared
    )  # fmt: skip
    with cases.limits(ranked=0 if counted else 10**6, few=0 if many else 10**6):
        check(case, run(case, shape.experts, active=shape.seed % 2 == 0))


SMALL = cases.Shape(7, 9, 5, 2, 3, 3, 5, 9)
# For sums of many steps: both slots, both experts, and a token without an adapter.
FEW = cases.Shape(14, 5, 2, 2, 2, 2, 2, 5)


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_wide_sums_have_the_same_bits_whole_and_in_parts(dtype, kind):
    """Wide enough for parts, and not a multiple of a step."""
    slices, per_pair, weighted = KINDS[kind]
    width = config.PARTS_FROM_WIDTH + 136
    case = cases.make(FEW, dtype, width, 24, 24, slices, per_pair, weighted)
    results = []
    for few in (10**6, 0):
        with cases.limits(few=few):
            results.append(run(case, FEW.experts))
    check(case, results[0])
    assert torch.equal(bits(results[0]), bits(results[1]))


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
def test_a_request_has_the_same_bits_alone_and_in_a_batch(dtype):
    """Whatever way the batch goes, beside 59 other tokens or none."""
    shape = cases.Shape(11, 60, 4, 2, 3, 3, 4, 60)
    case = cases.make(shape, dtype, config.PARTS_FROM_WIDTH + 8, 16, 40, slices=2)
    with cases.limits(few=20, ranked=20):
        batch = run(case, shape.experts)
        for token in case.token_slots.ge(0).nonzero().flatten()[[0, 20, -1]].tolist():
            one = slice(token, token + 1)
            alone = cases.Case(
                case.y[one], case.x[one], case.lora_a, case.lora_b, case.ranks,
                case.token_slots[one], case.topk_ids[one], None,
            )  # fmt: skip
            assert torch.equal(bits(run(alone, shape.experts)), bits(batch[one]))


@pytest.mark.parametrize("rank", [1, 7, 16, 17, 64, 65, 127, 128])
def test_ranks(rank):
    """Ranks around every tile's edge; what lies past them in the buffers is NaN."""
    case = cases.make(SMALL, torch.bfloat16, 72, 40, 128)
    case.ranks.clamp_(max=0).add_(rank)
    for slot in range(SMALL.slots):
        for expert in range(SMALL.experts):
            g = torch.Generator().manual_seed(slot * 100 + expert)
            case.lora_a[0][slot, expert, :rank] = torch.randn(rank, 72, generator=g) / 72**0.5
            case.lora_b[0][slot, expert, :, :rank] = torch.randn(40, rank, generator=g)
            case.lora_a[0][slot, expert, rank:] = cases.NAN
            case.lora_b[0][slot, expert, :, rank:] = cases.NAN
    check(case, run(case, SMALL.experts))


def test_z_may_pass_the_range_of_fp16():
    case = cases.make(SMALL, torch.float16, 64, 16, 16)
    case.x.mul_(torch.tensor(2.0**15)).clamp_(-6e4, 6e4)
    for b in case.lora_b:
        b.mul_(2.0**-12)
    finite = case.token_slots >= 0
    z = torch.einsum("ti,seri->tser", case.x[finite].float(), case.lora_a[0].float().nan_to_num())
    assert z.abs().max() > torch.finfo(torch.float16).max
    check(case, run(case, SMALL.experts))


def test_slices_have_their_own_ranks():
    """One slice of a pair absent, the other not, both ways round."""
    case = cases.make(SMALL, torch.float32, 40, 16, 24, slices=2)
    case.ranks[0, :, ::2] = 0
    case.ranks[1, :, 1::2] = 0
    check(case, run(case, SMALL.experts))
    changed = (case.delta() != 0).unflatten(2, (2, 16)).any(-1)
    assert changed[..., 0].any()
    assert changed[..., 1].any()
    assert not changed.all(-1).any()


def test_experts_of_other_ranks():
    """Model ids through a map, in another order than here; what is not here keeps its bits."""
    case = cases.make(SMALL, torch.bfloat16, 40, 16, 16, slices=2)
    local = torch.tensor([3, -1, 0, 2, -1, -1, 4, 1], dtype=torch.int32)
    where = torch.tensor([2, 7, 3, 0, 6])  # the inverse
    topk_ids = where[case.topk_ids]
    topk_ids[::3, 0] = torch.tensor([1, 4, 9])
    case.topk_ids[::3, 0] = -1
    check(case, run(case, SMALL.experts, topk_ids, local))


@pytest.mark.parametrize("counted", [False, True])
def test_ids_that_do_not_exist_change_nothing(counted):
    """No slot or expert id of the batch leads outside the factors, whatever it is."""
    case = cases.make(SMALL, torch.float32, 40, 16, 16)
    wraps = -(-(2**32) // SMALL.experts)  # in 32 bits, a segment of the first slots
    case.token_slots[:4] = torch.tensor([3, wraps, -2, -(2**31)])
    case.topk_ids[4:7, 0] = torch.tensor([5, 2**31 - 1, -7])
    y = case.y.clone()
    with cases.limits(ranked=0 if counted else 10**6):
        y.copy_(run(case, SMALL.experts, active=False))
    case.token_slots[:4] = case.topk_ids[4:7, 0] = -1
    check(case, y)


@pytest.mark.parametrize("many", [False, True])
def test_the_delta_alone(many):
    """y holds what it will where a slice of a pair has a factor, and keeps its bits elsewhere."""
    case = cases.make(SMALL, torch.float32, 40, 16, 24, slices=2, weighted=True)
    case.ranks[0, :, ::2] = 0
    delta = case.delta()
    written = (delta != 0).unflatten(2, (2, 16)).any(-1, keepdim=True).expand(-1, -1, 2, 16)
    written = written.flatten(2)
    factors = factors_of(case, SMALL.experts)
    y = case.y.clone()
    y[written] = cases.NAN  # never read
    with cases.poisoned(), cases.limits(few=0 if many else 10**6):
        routing = route(
            case.topk_ids, case.token_slots, SMALL.slots, SMALL.experts, y.dtype,
            active=active_segments(factors),
        )  # fmt: skip
        add_lora(y, case.x, factors, routing, case.weights, add_inputs=False)
    assert written.any()
    assert torch.equal(bits(y)[~written], bits(case.y)[~written])
    alone = cases.Case(
        torch.zeros_like(case.y), case.x, case.lora_a, case.lora_b, case.ranks, case.token_slots,
        case.topk_ids, case.weights,
    )  # fmt: skip
    assert ((y - delta).abs() <= alone.tolerance(delta))[written].all()


def test_ranks_found_in_the_factors():
    """Up to the last at which neither A nor B is zero; NaN is not zero, and what is past stays."""
    a = torch.zeros(2, 4, 8, 16, dtype=torch.bfloat16)
    b = torch.zeros(2, 4, 24, 8, dtype=torch.bfloat16)
    factors = Factors([a], [b], 4)
    factors.set_ranks(0, 5)
    a[1, 0, :3, 7], b[1, 0, 5, :4] = -1, 1  # 3
    a[1, 1], b[1, 1, 0, 7] = 1e-30, float("nan")  # 8
    a[1, 2] = 1  # 0: B is zero
    b[1, 3] = 1  # 0: A is zero
    factors.find_ranks(1)
    assert factors.ranks.tolist() == [[[5] * 4, [3, 8, 0, 0]]]
    shared = Factors([a[:, :1]], [b], 4)
    shared.find_ranks(1)
    assert shared.ranks[0, 1].tolist() == [3, 0, 0, 3]
    with pytest.raises(ValueError, match="slot is 2, but there are 2"):
        factors.find_ranks(2)


def test_ranks_on_the_device_cannot_lead_outside():
    """A rank that was written past set_ranks is cut to the buffers."""
    case = cases.make(SMALL, torch.float32, 40, 16, 24, slices=2)
    case.ranks.fill_(24)
    for t in (*case.lora_a, *case.lora_b):
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) / 8)
    want = run(case, SMALL.experts)
    factors = factors_of(case, SMALL.experts)
    factors.ranks.fill_(10**6)
    y = case.y.clone()
    add_lora(y, case.x, factors, route(case.topk_ids, case.token_slots, 3, 5, torch.float32))
    assert torch.equal(bits(y), bits(want))


@pytest.mark.parametrize("by_pair", [False, True])
@pytest.mark.parametrize("slice_id", [0, 1])
def test_such_ranks_are_not_written_past_the_buffers_either(slice_id, by_pair):
    """What follows a slice's ranks in z is the other slice, here one without any."""
    case = cases.make(SMALL, torch.float32, 40, 16, 24, slices=2)
    for t in (*case.lora_a, case.x):
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(3)))
    factors = factors_of(case, SMALL.experts)
    factors.ranks[slice_id], factors.ranks[1 - slice_id] = 10**6, 0
    with cases.poisoned():
        routing = route(case.topk_ids, case.token_slots, 3, 5, torch.float32)
        z = launch.shrink(case.x, factors, routing, by_pair)
    assert z[:, :, 1 - slice_id].isnan().all()
    live = (case.token_slots >= 0).repeat_interleave(SMALL.top_k)
    assert int((~z[0, :, slice_id].isnan()).all(-1).sum()) == int(live.sum())
