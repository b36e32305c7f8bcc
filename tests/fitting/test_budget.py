"""What VLLM_MOE_LORA_MEMORY means, and what is refused for it."""

from __future__ import annotations

import asyncio
import gc
import types
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.fitting import budget
from vllm_moe_lora.loading import admit, front_end

GIB = 2**30


class Lora:
    """In the place of vLLM's `LoRAModel`."""


VALUES = {
    "0.25": 25,
    "1": 100,
    ".5": 50,
    "8GiB": 8 * GIB,
    "1.5g": 3 * GIB // 2,
    "500 MB": 500 * 2**20,
    "4096": 4096,
    "0": 0,
}


@pytest.mark.parametrize(("value", "bytes_"), VALUES.items())
def test_values(value, bytes_):
    assert budget.limit(value, 100) == bytes_


@pytest.mark.parametrize("value", ["", "much", "-1", "8GiB x", "8XB"])
def test_other_values(value):
    with pytest.raises(ValueError, match="as 8GiB"):
        budget.limit(value, 100)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=30))
def test_never_above_the_limit(steps):
    """Loads and removals in any order; the sum is that of what exists."""
    one, held = budget.Budget(100, "100"), []
    for load, size in steps:
        if not load:
            if held:
                held.pop(size % len(held))
            continue
        if size + sum(n for _, n in held) > 100:
            with pytest.raises(AdapterError, match=budget.FULL):
                one.check(size)
            continue
        one.check(size)
        held.append((Lora(), size))
        one.add(*held[-1])
        assert one.taken() == (sum(n for _, n in held), len(held))


def test_sentences_name_bytes_and_the_variable():
    one, lora = budget.Budget(10 * 2**20, "10M"), Lora()
    with pytest.raises(AdapterError) as refused:
        one.check(11 * 2**20)
    assert budget.FULL not in str(refused.value)  # no other can make room for it
    for part in ("about 11.0 MiB", "10.0 MiB", "VLLM_MOE_LORA_MEMORY=10M"):
        assert part in str(refused.value)
    one.add(lora, 8 * 2**20)
    with pytest.raises(AdapterError, match=r"take about 4.0 MiB, but 8.0 of the 10.0 MiB .* by 1 "):
        one.check(4 * 2**20)
    one.refuses = False
    one.check(4 * 2**20)
    one.refuses = True
    del lora
    gc.collect()
    one.check(4 * 2**20)


def test_bytes_of_a_layer():
    a, b, zero = torch.ones(3, 2, 5), torch.ones(1, 4, 2).expand(3, 4, 2), torch.zeros(1)
    given_ = [a, zero.expand(3, 1, 5)], [b, zero.expand(3, 4, 1)]
    assert budget.size_of(given_) == 4 * (3 * 2 * 5 + 4 * 2 + 1 + 1)
    assert budget.size_of(([a, a], [b, b])) == 4 * (3 * 2 * 5 + 4 * 2)  # one tensor, named twice


class Core:
    """An engine's core with room for one adapter."""

    def __init__(self):
        self.inside = {1}

    async def add_lora_async(self, request):
        if self.inside - {request.lora_int_id}:
            raise RuntimeError(f"LoRA adapter {request.lora_int_id}: but 8 of 9 MiB {budget.FULL}")
        self.inside.add(request.lora_int_id)
        return True

    async def remove_lora_async(self, lora_id):
        self.inside.remove(lora_id)


def _request(number):
    name = f"n{number}"
    return types.SimpleNamespace(
        lora_int_id=number, lora_name=name, lora_path=f"/a/{name}", load_inplace=False
    )


@pytest.mark.parametrize("busy_for", [0.0, 0.1, 9.0])
def test_idle_adapters_make_room(monkeypatch, busy_for):
    """At once; after a wait for the last request; or not, and then it is refused."""
    monkeypatch.setattr(admit, "ROOM_SECONDS", 0.3)
    held, core = front_end.HeldAdapters(4, 4), Core()
    held.done(_request(1), held.begin(_request(1))[1])

    async def paused():
        return False

    engine = types.SimpleNamespace(moe_lora_held=held, engine_core=core, is_paused=paused)

    async def run():
        loop = asyncio.get_running_loop()
        end = loop.time() + busy_for
        monkeypatch.setattr(front_end, "busy", lambda _: Counter({1: int(loop.time() < end)}))
        await admit._stage_in_memory(engine, _request(2))

    if busy_for > 1:
        with pytest.raises(RuntimeError, match=budget.FULL):
            asyncio.run(run())
        assert core.inside == {1}
        assert held.replaces(1)
    else:
        asyncio.run(run())
        assert core.inside == {2}
        assert not held.replaces(1)
