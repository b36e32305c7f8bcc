"""Experts of one rank: what it holds, and what it refuses because another rank has to."""

from __future__ import annotations

import pytest
import torch

from vllm_moe_lora.adapters.canonical import Dims, Experts, Part
from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.fitting.stage import Slots, stage

DIMS = Dims(experts=4, hidden=8, inner=6)
RANKS = {"one device": [0, 1, 2, 3], "rank 0": [0, 1], "rank 1": [2, 3]}


def _experts(apart, shared=False):
    """Factors of rank 3; one by one (``apart``) or as one tensor, w1 and w2 of expert 1 missing."""
    g = torch.Generator().manual_seed(4)
    found = Experts("experts", "test")
    for name in ("w1", "w3", "w2"):
        out, inn = DIMS.shape(name)
        numbers = [0, 1, 2, 3] if name == "w3" or shared else [0, 2, 3]
        a, b = torch.randn(len(numbers), 3, inn, generator=g), torch.randn(4, out, 3, generator=g)
        b = b[: len(numbers)]
        if shared:
            a, b = (a, b[:1].repeat(4, 1, 1)) if name == "w2" else (a[:1].repeat(4, 1, 1), b)
        pair = (tuple(a), tuple(b)) if apart else (a, b)
        found.parts[name] = [Part(numbers, *pair, 0.5, f"{name}.lora_A")]
    return found


def _slots(local, **more):
    return Slots(local, fused=False, dims=DIMS, dtype=torch.float16, limit=8, **more)


@pytest.mark.parametrize("rank_multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("local", RANKS.values(), ids=RANKS)
def test_ranks_are_filled_up_with_zeros(local, rank_multiple):
    whole = _experts(apart=False)
    del whole.parts["w1"]
    a, b = stage(whole, _slots(local, rank_multiple=rank_multiple))
    for name, have_a, have_b in zip(("w1", "w2", "w3"), a, b, strict=True):
        assert have_a.shape[1] == have_b.shape[2]
        assert have_a.shape[1] % rank_multiple == 0
        for place, expert in enumerate(local):
            want = torch.zeros(())
            if name in whole.parts and expert in whole.parts[name][0].experts:
                part = whole.parts[name][0]
                at = list(part.experts).index(expert)
                want = 0.5 * part.b[at] @ part.a[at]
            have = have_b[place].float() @ have_a[place].float()
            assert (have - want).abs().max() < 0.03


@pytest.mark.parametrize("value", [float("nan"), 1e6])  # fp16 ends at 65504
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("local", RANKS.values(), ids=RANKS)
def test_every_rank_refuses_what_is_not_finite_on_one(local, apart, side, value):
    whole = _experts(apart)
    stage(whole, _slots(local))
    part = whole.parts["w2"][0]
    getattr(part, side)[1][0, 0] = value  # the second of them is expert 2
    words = rf"w2\.lora_{side.upper()} has NaN or infinite numbers \(expert 2"
    with pytest.raises(AdapterError, match=words):
        stage(whole, _slots(local))


@pytest.mark.parametrize("local", RANKS.values(), ids=RANKS)
def test_every_rank_refuses_factors_that_experts_do_not_share(local):
    whole = _experts(apart=False, shared=True)
    stage(whole, _slots(local, shared=True))
    whole.parts["w1"][0].a[2:] += 1  # alike within each of two ranks
    with pytest.raises(AdapterError, match="experts have different lora_A"):
        stage(whole, _slots(local, shared=True))
