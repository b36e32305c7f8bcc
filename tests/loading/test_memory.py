"""Adapters in shared memory: the next version in the same place, and memory that is used again."""

from __future__ import annotations

import gc

import pytest
import torch

from vllm_moe_lora.adapters.canonical import Dims, Experts, Part
from vllm_moe_lora.adapters.config import Config
from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.adapters.group import group
from vllm_moe_lora.fitting import fit
from vllm_moe_lora.fitting.again import KeptTensors, are_views
from vllm_moe_lora.fitting.memory import USED_AGAIN_FROM, PausedGC, UsedAgain, empty
from vllm_moe_lora.loading import memory, segment

DIMS = Dims(experts=4, hidden=8, inner=6)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["experts"]}


@pytest.fixture(autouse=True)
def own_memory(monkeypatch):
    monkeypatch.setattr(memory, "_allowed", True)
    for name, value in (("_attached", {}), ("_spare", []), ("_closing", [])):
        monkeypatch.setattr(segment, name, value)
    yield
    while segment._attached:
        segment._attached.popitem()[1].close()
    segment._delete_spare()


def _tensors(seed, rank=2, stacked=False):
    g = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    found = {}
    for expert in range(4):
        found[f"{prefix}.{expert}.up_proj.lora_A.weight"] = torch.randn(rank, 8, generator=g)
        found[f"{prefix}.{expert}.up_proj.lora_B.weight"] = torch.randn(6, rank, generator=g)
    if stacked:  # all experts' lora_A in one tensor, the half of which is read: a copy
        for expert in range(4):
            del found[f"{prefix}.{expert}.up_proj.lora_A.weight"]
        for expert in (1, 3):
            del found[f"{prefix}.{expert}.up_proj.lora_B.weight"]
        found[f"{prefix}.up_proj.lora_A.weight"] = torch.randn(4, rank, 8, generator=g)
    return found


def _read(tensors, config=CONFIG, dims=DIMS):
    """The names that were read, by identity, and the layer's experts, as `fit` finds them."""
    with (
        memory.offered("policy", tensors, config, local=False) as path,
        memory.opened(path) as (found, read_config),
    ):
        assert read_config == config
        layers = group(found).experts
        pending = fit.PendingExperts(layers, {}, Config.from_dict(config), PausedGC(), None, found)
        pending.paused_gc.release()
        (experts,), _ = fit._resolved(pending, layers, dims)
        (part,) = experts.parts["w3"]
        numbers = [
            {number: stack[at].clone() for at, number in enumerate(part.experts)}
            for stack in (part.a, part.b)
        ]
        return id(found), numbers, experts


@pytest.mark.parametrize("stacked", [False, True])
def test_the_next_version_has_its_own_numbers(stacked):
    known, before = None, None
    for seed in (1, 2, 3):
        tensors = _tensors(seed, stacked=stacked)
        found, (a, b), experts = _read(tensors)
        for key, tensor in tensors.items():
            name = key.removeprefix("base_model.model.model.layers.0.mlp.experts.").split(".")
            for number in (a if "lora_A" in key else b) if len(name) == 3 else [int(name[0])]:
                want = tensor[number] if len(name) == 3 else tensor
                assert torch.equal((a if "lora_A" in key else b)[number], want), key
        assert known in (None, found)  # what was read of the names is read once ...
        assert before is None or (experts is before) != stacked  # ... and layers, if not copied
        known, before = found, experts


def test_other_names_shapes_or_configs_are_read_again():
    _, _, first = _read(_tensors(1))
    _, (a, _), experts = _read(_tensors(2, rank=1))
    assert experts is not first
    assert a[0].shape == (1, 8)
    _, _, louder = _read(_tensors(2), {**CONFIG, "lora_alpha": 8})
    assert [part.scale for _, part in louder] == [2 * part.scale for _, part in first]
    found, _, _ = _read(_tensors(1))
    fewer = _tensors(1)
    for side in "AB":
        del fewer[f"base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_{side}.weight"]
    again, (a, _), _ = _read(fewer)
    assert set(a) == {0, 1, 2}
    assert again != found
    with pytest.raises(AdapterError, match="The adapter is for another model"):
        _read(fewer, dims=Dims(experts=4, hidden=8, inner=7))


def test_a_segment_is_closed_with_what_was_read_of_it():
    _read(_tensors(1))
    segment._attached.popitem()[1].close()
    assert segment._closing == []
    with (
        memory.offered("policy", _tensors(2), CONFIG, local=False) as path,
        memory.opened(path) as (found, _),
    ):
        one = next(iter(found.values()))
    del found
    segment._attached.popitem()[1].close()
    assert torch.equal(one, next(iter(_tensors(2).values()))), "in use, so it stays mapped"
    (waiting,) = segment._closing
    del one
    segment._close(waiting)
    assert segment._closing == []


def test_copies_are_not_taken_for_views():
    kept = KeptTensors()
    kept["a"], kept["b"] = torch.ones(16).view(2, 2, 4).unbind()
    whole = torch.empty(0).set_(kept["a"].untyped_storage()).view(2, 2, 4)
    for a, b, want in (
        (whole, whole, True),
        (whole.clone(), whole, False),
        (whole, whole.clone(), False),
        (tuple(whole), whole, False),
    ):
        layer = Experts("experts", "test", {"w1": [Part(range(2), a, b, 1.0, "label")]})
        assert are_views([layer], kept) is want


def test_memory_comes_back_only_when_nothing_refers_to_it():
    used_again, shape = UsedAgain(), (2, USED_AGAIN_FROM // 4)

    def adapter(count=2):
        with used_again.adapter():
            return [empty(shape, torch.float32) for _ in range(count)]

    def places(tensors):
        return {tensor.data_ptr() for tensor in tensors}

    old = adapter()
    new = adapter()
    assert not places(old) & places(new)
    row, before = old[0][1], places(old)
    row.fill_(7)
    del old
    gc.collect()
    third = adapter()
    assert len(places(third) & before) == 1, "a row of the other is still in use"
    third[0].zero_()
    third[1].zero_()
    assert (row == 7).all()
    # No more is kept than the last adapter took.
    del new, third, row
    assert sum(map(len, used_again._kept.values())) == 2
    small = adapter(1)
    assert sum(map(len, used_again._kept.values())) == 1
    with pytest.raises(RuntimeError, match="invalid shape"), used_again.adapter():
        empty(shape, torch.float32).view(-2)
    assert places(adapter(1)).isdisjoint(places(small))
    assert empty(shape, torch.float32).shape == shape  # outside: not kept
    assert sum(map(len, used_again._kept.values())) <= 1
