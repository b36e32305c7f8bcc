"""Columns of slots, aliases of modules, partial adapters: the parts that need no engine."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vllm_moe_lora.layers.aliases import raw_references, rewire
from vllm_moe_lora.layers.columns import ColumnAllocator
from vllm_moe_lora.layers.partial import fill


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


@dataclass
class Weights:
    """What `fill` needs of vLLM's LoRALayerWeights."""

    module_name: str
    rank: int
    lora_alpha: int
    lora_a: Any
    lora_b: Any
    scaling: float = 1.0

    def optimize(self):
        self.lora_b = self.lora_b * self.scaling
        self.scaling = 1


def _weights(name, rank, out, inn, scale=1.0):
    return Weights(name, rank, 16, torch.randn(rank, inn), torch.randn(out, rank), scale)


@pytest.mark.parametrize("present", [[0], [1], [2], [4], [0, 2], [1, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_fill_changes_no_delta(present):
    """Two experts, hidden 6, intermediate 4; absent entries become zeros of the right shape."""
    shape = {0: (4, 6), 1: (6, 4), 2: (4, 6)}
    loras = [
        _weights(str(i), 1 + i % 3, *shape[i % 3], scale=0.5 + i) if i in present else None
        for i in range(6)
    ]
    want = [None if w is None else w.scaling * w.lora_b @ w.lora_a for w in loras]
    filled = fill(loras)
    for i, weights in enumerate(filled):
        delta = weights.lora_b @ weights.lora_a
        assert weights.scaling == 1
        assert weights.lora_alpha == weights.rank, "up to 0.29 the scale is alpha / rank"
        assert delta.shape == shape[i % 3]
        assert torch.allclose(delta, torch.zeros_like(delta) if want[i] is None else want[i])
    for i in range(3):
        assert len({w.lora_a.shape[0] for w in filled[i::3]}) == 1


def test_fill_keeps_the_third_empty_without_a_gate():
    loras = [_weights("up", 2, 4, 6), None, None, None, _weights("down", 2, 6, 4), None]
    filled = fill(loras, is_non_gated=True)
    assert filled[2] is filled[5] is None
    assert all(filled[i] is not None for i in (0, 1, 3, 4))
