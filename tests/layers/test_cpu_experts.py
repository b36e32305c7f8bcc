"""Columns of slots, aliases of modules: the parts that need no engine."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vllm_moe_lora.layers.cpu.columns import ColumnAllocator
from vllm_moe_lora.layers.shared_experts.aliases import raw_references, rewire


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40))
def test_columns_never_overlap_and_are_reused(steps):
    columns, widest = ColumnAllocator(), 0
    for slot, width in steps:
        columns.release(slot)
        before = columns.capacity
        first, grows = columns.take(slot, width)
        assert grows == (columns.capacity > before)
        regions = sorted(columns.regions.values())
        for (a, n), (b, _) in itertools.pairwise(regions):
            assert a + n <= b
        assert first + width <= columns.capacity
        assert columns.capacity % columns.granule == 0
        widest = max(widest, sum(n for _, n in regions))
    assert columns.capacity >= widest
    with pytest.raises(ValueError, match="already holds"):
        columns.take(0, 1) if 0 in columns.regions else (columns.take(0, 1), columns.take(0, 1))


class Wrapper(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


class Impl:
    def __init__(self, proj):
        self.kv_b_proj = proj


def test_every_alias_points_at_the_wrapper():
    model, gate, proj = nn.Module(), nn.Linear(2, 2), nn.Linear(2, 2)
    model.block, model.runner, model.attn = nn.Module(), nn.Module(), nn.Module()
    model.block.gate = Wrapper(gate)
    model.block.proj = Wrapper(proj)
    model.runner.own_gate = gate
    model.attn.impl = Impl(proj)
    wrappers = {"block.gate": model.block.gate, "block.proj": model.block.proj}
    assert rewire(model, wrappers) == ["runner.own_gate"]
    assert model.runner.own_gate is model.block.gate
    assert model.block.gate.base_layer is gate, "the wrapper itself keeps what it wraps"
    assert rewire(model, wrappers) == []
    assert raw_references(model, wrappers) == {"block.proj": "attn.impl.kv_b_proj (Impl)"}
