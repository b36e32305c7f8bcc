"""The routing pass against plain Python: which pair is in which tile, before any number."""

from __future__ import annotations

import lora_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_lora.kernels.triton import config
from vllm_moe_lora.kernels.triton.route import route


def _expected(topk_ids, token_slots, slots, experts, expert_map, active):
    """{segment: pairs} by the definition."""
    segments = {}
    for pair, expert in enumerate(topk_ids.flatten().tolist()):
        slot = int(token_slots[pair // topk_ids.shape[1]])
        if expert_map is not None:
            expert = int(expert_map[expert]) if 0 <= expert < expert_map.numel() else -1
        if not (0 <= slot < slots and 0 <= expert < experts):
            continue
        if active is not None and not active[slot, expert]:
            continue
        segments.setdefault(slot * experts + expert, []).append(pair)
    return segments


def check(routing, expected, stable):
    """Every live pair is in exactly one row of the tiles of its segment, and no other pair is."""
    found = {}
    used = torch.zeros(routing.num_pairs, dtype=torch.int32)
    pieces = {}
    for segment, start, rows in zip(
        routing.tile_segment.tolist(),
        routing.tile_start.tolist(),
        routing.tile_rows.tolist(),
        strict=True,
    ):
        if segment == -1:
            continue
        assert segment in expected, "a tile for a segment that has no pairs"
        assert 1 <= rows <= routing.rows
        used[start : start + rows] += 1
        pieces.setdefault(segment, []).append((start, rows))
        found.setdefault(segment, []).extend(routing.order[start : start + rows].tolist())
    assert int(used.max()) <= 1, "two tiles hold one row"
    assert {s: sorted(pairs) for s, pairs in found.items()} == expected
    for tiles in pieces.values():
        assert all(rows == routing.rows for _, rows in sorted(tiles)[:-1]), "a tile half empty"
    if stable:
        for segment, tiles in pieces.items():
            positions = torch.cat([torch.arange(s, s + n) for s, n in sorted(tiles)])
            assert routing.order[positions].tolist() == expected[segment]


@pytest.mark.parametrize("ranked", [True, False], ids=["ranked", "counted"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=cases.shapes(), draw=st.data())
def test_every_pair_is_in_its_tile(ranked, shape, draw):
    expert_map = active = None
    g = torch.Generator().manual_seed(shape.seed)
    token_slots, topk_ids = cases.routes(shape, g)
    if draw.draw(st.booleans(), "foreign and unknown ids"):
        token_slots = torch.randint(-3, shape.slots + 3, token_slots.shape, generator=g)
        topk_ids = torch.randint(-3, shape.experts + 3, topk_ids.shape, generator=g)
    if draw.draw(st.booleans(), "map"):
        expert_map = torch.randint(-2, shape.experts + 2, (shape.experts,), generator=g)
    if draw.draw(st.booleans(), "active"):
        active = torch.rand(shape.slots, shape.experts, generator=g) < 0.6
    if draw.draw(st.booleans(), "int32"):
        token_slots, topk_ids = token_slots.int(), topk_ids.int()
    dtype = draw.draw(st.sampled_from(config.DTYPES))
    with cases.poisoned(), cases.limits(ranked=10**6 if ranked else 0):
        routing = route(
            topk_ids, token_slots, shape.slots, shape.experts, dtype, expert_map, active
        )
    expected = _expected(topk_ids, token_slots, shape.slots, shape.experts, expert_map, active)
    check(routing, expected, stable=ranked)


@pytest.mark.parametrize("ranked", [True, False], ids=["ranked", "counted"])
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_the_most_tiles_a_batch_can_need_fit(ranked, few):
    """One pair more than full tiles in every segment, and more segments than the scan's block."""
    rows = config.tile_rows("cpu", torch.bfloat16, 1 if few else 10**6)
    slots, experts = 3, 2
    token_slots = torch.arange(slots).repeat_interleave(rows + 1)
    topk_ids = torch.tensor([[0, 1]]).expand(token_slots.numel(), 2).contiguous()
    with cases.poisoned(), cases.limits(ranked=10**6 if ranked else 0, few=10**6 if few else 0):
        routing = route(topk_ids, token_slots, slots, experts, torch.bfloat16)
    assert routing.rows == rows
    assert int((routing.tile_segment >= 0).sum()) == slots * experts * 2
    check(routing, _expected(topk_ids, token_slots, slots, experts, None, None), stable=ranked)


def test_many_segments():
    """More segments than the scan takes at a time, most of them empty."""
    slots, experts = 16, 384
    assert slots * experts > config.SCAN_BLOCK
    g = torch.Generator().manual_seed(0)
    token_slots = torch.randint(-1, slots, (100,), generator=g)
    topk_ids = torch.randint(0, experts, (100, 3), generator=g)
    with cases.poisoned(), cases.limits(ranked=0):
        routing = route(topk_ids, token_slots, slots, experts, torch.bfloat16)
    check(routing, _expected(topk_ids, token_slots, slots, experts, None, None), stable=False)


def test_no_tokens_and_no_adapters():
    empty = route(torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), 2, 4,
                  torch.bfloat16)  # fmt: skip
    assert empty.tile_segment.numel() == 0
    for ranked in (0, 10**6):
        with cases.poisoned(), cases.limits(ranked=ranked):
            none = route(torch.zeros(5, 2, dtype=torch.int32), torch.full((5,), -1), 2, 4,
                         torch.bfloat16)  # fmt: skip
        assert (none.tile_segment == -1).all()
