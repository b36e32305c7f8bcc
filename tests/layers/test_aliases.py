"""One LoRA layer for all names of a module (layers/shared_experts/aliases.py)."""

from __future__ import annotations

from torch import nn

from vllm_moe_lora.layers.shared_experts.aliases import (
    drop_duplicates,
    rewire,
    unwrapped_references,
)


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
    assert unwrapped_references(model, wrappers) == {"block.proj": "attn.impl.kv_b_proj (Impl)"}


def test_a_module_keeps_its_first_name_only():
    gate, proj = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second, other = Wrapper(gate), Wrapper(gate), Wrapper(proj)
    wrappers = {"gate": first, "runner.gate": first, "experts.gate": second, "proj": other}
    assert drop_duplicates(wrappers) == ["runner.gate", "experts.gate"]
    assert wrappers == {"gate": first, "proj": other}
