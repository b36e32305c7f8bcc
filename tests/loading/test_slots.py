"""The slots of a data-parallel group: given out once, carried out on every rank alike."""

from __future__ import annotations

import asyncio
import random
import types
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.hooks import v1_engine_async_llm, v1_engine_llm_engine
from vllm_moe_lora.loading import admit, assigned, background, front_end
from vllm_moe_lora.loading.slots import GroupSlots


def request(number, path="/adapters/x", **more):
    return LoRARequest(f"name-{number}", number, path, **more)


def take(slots, number, busy=(), pinned=()):
    with slots.queued(number):
        return slots.take(number, Counter(busy), pinned)


def test_who_gets_a_slot():
    slots = GroupSlots(2)
    assert [take(slots, number) for number in (7, 8)] == [0, 1]
    assert slots.find(7) == 0
    assert take(slots, 9, busy=[7, 8]) is None, "both are in use"
    assert take(slots, 9, busy=[7]) == 1, "that of 8, which nobody uses"
    assert slots.find(8) is None
    assert take(slots, 8, busy=[9], pinned={7}) is None
    slots.forget(7)
    assert take(slots, 8, busy=[9]) == 0


def test_a_queue_is_a_queue():
    slots = GroupSlots(1)
    take(slots, 1)
    with slots.queued(2), slots.queued(3):
        assert slots.take(3, {}, ()) is None, "2 is first"
        assert slots.take(2, {1: 1}, ()) is None
        slots.retire(())
        assert slots.find(1) is None, "1 takes no new requests"
        assert slots.take(2, {1: 1}, ()) is None, "but those it has go on"
        assert slots.take(2, {}, ()) == 0
    assert take(slots, 1, busy=[2]) is None


def test_a_retiring_adapter_comes_back_into_its_slot():
    slots = GroupSlots(1)
    take(slots, 1)
    slots.retire(())
    assert take(slots, 1, busy=[1]) == 0


def test_several_front_ends_agree_without_a_word():
    one, two = GroupSlots(3, fixed=True), GroupSlots(3, fixed=True)
    for number in (1, 2, 3):
        assert take(one, number) == number - 1
    for number in (3, 1, 2):
        assert take(two, number) == number - 1
    with pytest.raises(AdapterError, match=r"only ids 1 to 3 have a slot.*--api-server-count 1"):
        take(one, 4)


class Manager:
    """What `assigned` uses of vLLM's LoRAModelManager, with vLLM's way to take a slot."""

    def __init__(self, number):
        self.lora_index_to_id = [None] * number
        self.active = set()
        self._last_mapping = "the last batch's"

    def deactivate_adapter(self, lora_id):
        self.active.remove(lora_id)
        self.lora_index_to_id[self.lora_index_to_id.index(lora_id)] = None

    def activate(self, lora_id):
        if lora_id not in self.active:
            with assigned.only_slot(self, lora_id):
                self.lora_index_to_id[self.lora_index_to_id.index(None)] = lora_id
            self.active.add(lora_id)


def test_a_worker_puts_it_where_it_is_told():
    manager = Manager(3)
    for number, slot in ((5, 2), (6, 0), (7, 2), (6, 1)):
        plain = assigned.note(manager, assigned.with_slot(request(number, "/a/b"), slot))
        assert plain.lora_path == "/a/b"
        assert manager._last_mapping is None
        manager.activate(number)
        assert manager.lora_index_to_id[slot] == number
    assert manager.lora_index_to_id == [None, 6, 7]
    manager.deactivate_adapter(7)
    manager.activate(7)  # as for each request of a batch
    assert manager.lora_index_to_id == [None, 6, 7]
    untold = request(8)
    assert assigned.note(manager, untold) is untold
    manager.activate(8)
    assert manager.lora_index_to_id == [8, 6, 7]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_slot_of_a_rank_s_own_choice_is_refused(ranks):
    """Where experts get tokens of others; not of the warm-up's adapter, which has no path."""
    manager = Manager(2)
    parallel = types.SimpleNamespace(dp_size=ranks)
    layer = types.SimpleNamespace(
        moe_config=types.SimpleNamespace(moe_parallel_config=parallel),
        base_layer=types.SimpleNamespace(moe_config=None, routed_experts=None),
    )
    manager.modules, manager.punica_wrapper = {"experts": layer}, types.SimpleNamespace()
    manager.punica_wrapper.token_mapping_meta = None
    real = types.SimpleNamespace(moe_lora_path="/a")
    manager._registered_adapters = {1: real, 2: types.SimpleNamespace(), 3: real}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_moe_lora.fitting.moe_layers.is_experts", lambda module: True)
        assigned.check(manager, 2)
        assigned.note(manager, assigned.with_slot(request(3), 1))
        assigned.check(manager, 3)
        if ranks == 1:
            return assigned.check(manager, 1)
        with pytest.raises(AdapterError, match=r"adapter 1: .*same slot on all ranks"):
            assigned.check(manager, 1)
    return None


class Group:
    """A core of ranks with managers; each step it checks that all mean the same by a slot."""

    def __init__(self, ranks, slots, refuse=()):
        self.managers = [Manager(slots) for _ in range(ranks)]
        self.refuse, self.held = refuse, [set() for _ in range(ranks)]

    async def call_utility_all_async(self, name, asked):
        assert name == "add_lora"
        return [await self.add_lora_async(asked)]

    async def add_lora_async(self, asked):
        if asked.lora_path.startswith(background.STAGE_PREFIX):
            await asyncio.sleep(0)
            if asked.lora_int_id in self.refuse:
                raise RuntimeError(f"'LoRA adapter {asked.lora_int_id}: why'")
            return True
        for manager, held in zip(self.managers, self.held, strict=True):
            await asyncio.sleep(random.random() / 1000)  # ranks are not at the same point
            assigned.note(manager, asked)
            held.add(asked.lora_int_id)
            manager.activate(asked.lora_int_id)
        return True

    async def remove_lora_async(self, number):
        for manager, held in zip(self.managers, self.held, strict=True):
            await asyncio.sleep(random.random() / 1000)
            held.discard(number)
            if number in manager.active:
                manager.deactivate_adapter(number)
            assigned.forget(manager, number)
        return True

    async def list_loras_async(self):
        await asyncio.sleep(0)


class Engine:
    """An `AsyncLLM` of a group, whose requests last a moment."""

    def __init__(self, slots=2, capacity=3, ranks=2, clients=1, refuse=(), targets=None):
        lora = types.SimpleNamespace(max_cpu_loras=capacity, max_loras=slots)
        parallel = types.SimpleNamespace(data_parallel_size=ranks)
        self.vllm_config = types.SimpleNamespace(lora_config=lora, parallel_config=parallel)
        lora.target_modules = targets
        self.model_config = types.SimpleNamespace(is_moe=True)
        self.output_processor = types.SimpleNamespace(request_states={})
        self.engine_core, self._client_count = Group(ranks, slots, refuse), clients
        self.paused, self.served, self.most = False, Counter(), 0
        for name in ("add_request", "add_lora", "remove_lora", "pin_lora"):
            setattr(
                self, name, getattr(v1_engine_async_llm, f"_{name}")(_upstream(name)).__get__(self)
            )

    async def is_paused(self):
        return self.paused

    async def ask(self, key, asked, moments=3):
        await self.add_request(key, "prompt", None, lora_request=asked)
        where = {tuple(m.lora_index_to_id).index(asked.lora_int_id) for m in self.managers}
        assert len(where) == 1, "one slot, on all ranks"
        (slot,) = where
        for _ in range(moments):
            await asyncio.sleep(random.random() / 500)
            for manager in self.managers:
                assert manager.lora_index_to_id[slot] == asked.lora_int_id, "until it ends"
        del self.output_processor.request_states[key]
        self.served[asked.lora_int_id] += 1

    @property
    def managers(self):
        return self.engine_core.managers


def _upstream(name):
    async def function(self, *args, **more):
        if name == "add_request":
            state = types.SimpleNamespace(lora_request=more["lora_request"])
            self.output_processor.request_states[args[0]] = state
        elif name == "remove_lora":
            await self.engine_core.remove_lora_async(*args)
        return True

    return function


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 3), more=st.integers(0, 2))
def test_whatever_comes_a_slot_means_the_same_everywhere(seed, slots, more):
    """Requests for six adapters, loads that replace, and removals, all at once."""
    chance = random.Random(seed)
    engine = Engine(slots, slots + more, refuse=(6,))

    async def one(key):
        await asyncio.sleep(chance.random() / 100)
        number = chance.randint(1, 6)
        asked, kind = request(number, f"/adapters/{number}"), chance.random()
        try:
            if kind < 0.1:
                await engine.remove_lora(number)
            elif kind < 0.2:
                await engine.add_lora(request(number, asked.lora_path, load_inplace=True))
            else:
                await engine.ask(key, asked)
        except AdapterError as error:
            if number != 6:
                raise AssertionError(number) from error

    async def scene():
        await asyncio.wait_for(asyncio.gather(*(one(key) for key in range(30))), 20)
        held = engine.moe_lora_held
        assert not held.slots._queue
        assert not +held.claims
        assert not +held.entering

    asyncio.run(scene())
    assert sum(engine.served.values()) > 5
    assert engine.served[6] == 0


def test_steady_traffic_of_others_shuts_nobody_out(monkeypatch):
    monkeypatch.setattr(admit, "ROOM_SECONDS", 0.05)
    engine = Engine(slots=1, capacity=1)

    async def traffic(number, until):
        while not until.is_set():
            await engine.ask(f"{number} {random.random()}", request(number), moments=20)

    async def scene():
        until = asyncio.Event()
        others = [asyncio.create_task(traffic(1, until)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(engine.ask("mine", request(2, "/adapters/y")), 5)
        until.set()
        await asyncio.gather(*others)
        assert engine.served[1] > 3

    asyncio.run(scene())


def test_a_paused_group_refuses_what_would_need_its_requests_to_end():
    engine = Engine(slots=1, capacity=2)

    async def scene():
        asked = request(1)
        await engine.add_request("a", "prompt", None, lora_request=asked)
        engine.paused = True
        with pytest.raises(AdapterError, match=r"adapter 2: .*Resume it"):
            await engine.ask("b", request(2, "/adapters/y"))
        with pytest.raises(AdapterError, match=r"adapter 1: .*Resume it"):
            await engine.remove_lora(1)
        assert engine.managers[0].lora_index_to_id == [1]

    asyncio.run(scene())


def test_what_other_front_ends_may_use_is_not_changed():
    """Of one engine, with data parallelism or without."""
    for ranks in (1, 2):
        engine = Engine(slots=2, capacity=2, ranks=ranks, clients=2)

        async def scene(engine=engine):
            with pytest.raises(AdapterError, match=r"adapter 1: load_inplace .*other API servers"):
                await engine.add_lora(request(1, load_inplace=True))
            with pytest.raises(AdapterError, match=r"adapter 1: remove_lora .*other API servers"):
                await engine.remove_lora(1)

        asyncio.run(scene())


def test_an_id_of_another_front_end_is_refused():
    loaded = types.SimpleNamespace(moe_lora_path="/adapters/x")
    background.check_same(loaded, request(1), "/adapters/x")
    with pytest.raises(AdapterError, match=r"adapter 1: .*loaded /adapters/x .*from /adapters/y"):
        background.check_same(loaded, request(1, "/adapters/y"), "/adapters/y")


def test_adapters_that_leave_out_the_experts_are_each_rank_s_own():
    assert front_end.held_adapters(Engine(targets=["q_proj", "gate_proj"])).slots is None
    for targets in (None, ["q_proj", "experts"], ["layers.1.mlp.experts"]):
        assert front_end.held_adapters(Engine(targets=targets)).slots is not None


def test_engines_that_do_not_know_one_another_refuse_adapters():
    engine = Engine()
    engine.add_lora = v1_engine_llm_engine._add_lora(None).__get__(engine)
    with pytest.raises(AdapterError, match=r"adapter 1: with data parallelism .*AsyncLLM"):
        engine.add_lora(request(1))
    assert front_end.held_adapters(engine).slots is not None
