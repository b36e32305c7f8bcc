"""The front end's memory of adapters: when a load is due, new versions, whose sentence it is."""

from __future__ import annotations

import asyncio
import types
from collections import Counter

import pytest
from vllm.lora.request import LoRARequest

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.hooks import v1_engine_async_llm, v1_engine_llm_engine
from vllm_moe_lora.loading import front_end
from vllm_moe_lora.loading.background import STAGE_PREFIX


def request(number, path="/adapters/x", **more):
    return LoRARequest(f"name-{number}", number, path, **more)


def load(held, asked):
    """The path it is loaded by."""
    if held.needs_room(asked.lora_int_id):
        held.make_room(asked.lora_int_id, Counter())
    copy, version = held.begin(asked)
    held.done(asked, version)
    return copy.lora_path


def test_as_many_as_the_workers_keep():
    held = front_end.HeldAdapters(2, 2)
    for number in (1, 2):
        assert not held.is_loaded(request(number))
        load(held, request(number))
    assert held.is_loaded(request(1))
    load(held, request(3))  # 2 was used least recently
    assert held.is_loaded(request(1))
    assert held.is_loaded(request(3))
    assert not held.is_loaded(request(2))


def test_an_adapter_in_use_is_not_the_one_that_goes():
    held = front_end.HeldAdapters(2, 2)
    load(held, request(1))
    load(held, request(2))
    assert held.needs_room(3)
    assert held.idle(Counter({1: 2})) == 2
    assert held.idle(Counter({1: 2, 2: 1})) is None
    assert held.make_room(3, Counter({1: 2})) == 2
    assert not held.needs_room(3)
    _, version = held.begin(request(3))
    assert held.needs_room(4), "the place is taken while the load goes on"
    assert held.idle(Counter({1: 1})) is None, "what is being loaded is not idle"
    held.failed(request(3), version)
    assert not held.needs_room(4)


def test_a_pinned_adapter_is_not_the_one_that_goes():
    held = front_end.HeldAdapters(2, 2)
    load(held, request(1))
    load(held, request(2))
    held.pinned.add(1)
    assert held.idle(Counter()) == 2
    load(held, request(3))
    assert held.is_loaded(request(1))
    in_use = Counter({3: 1})
    assert held.make_room(4, in_use) is None, "the workers drop one that is in use"
    held.done(*held.begin(request(4)))
    assert held.is_loaded(request(1))
    assert not held.is_loaded(request(3))


def weights(folder, text):
    (folder / "adapter_model.safetensors").write_text(text)


def test_each_state_of_the_files_has_a_path_of_its_own(tmp_path):
    held, path = front_end.HeldAdapters(4, 4), str(tmp_path)
    weights(tmp_path, "0")
    spellings = {load(held, request(1, path))}
    again = request(1, path, load_inplace=True)
    for turn in range(3):
        assert held.is_loaded(again), "the files are as they were read"
        weights(tmp_path, "1" * (turn + 2))
        assert not held.is_loaded(again)
        spelled = load(held, again)
        assert again.lora_path == path, "the caller's object is the caller's"
        assert again.load_inplace
        assert spelled not in spellings
        assert (tmp_path / spelled).resolve() == tmp_path.resolve()
        assert held.for_scheduler(again).lora_path == spelled
        assert not held.for_scheduler(again).load_inplace
        assert held.for_scheduler(request(1, path)).lora_path == spelled
        spellings.add(spelled)
    assert len(spelled) < len(path) + 10, "spellings do not pile up"


def test_an_old_name_with_a_new_id_does_not_find_old_prefixes(tmp_path):
    held = front_end.HeldAdapters(1, 1)
    weights(tmp_path, "0")
    one, two = (LoRARequest("name", number, str(tmp_path)) for number in (1, 2))
    first = load(held, one)
    assert load(held, two) == first, "the same weights: their cached prefixes may be used"
    weights(tmp_path, "00")
    assert load(held, one) != first


def test_where_files_cannot_be_seen_every_load_inplace_is_a_load():
    held, asked = (
        front_end.HeldAdapters(4, 4),
        request(1, "owner/repository-that-is-nowhere", load_inplace=True),
    )
    _, version = held.begin(asked)
    held.done(asked, version)
    assert version.files is None
    assert not held.is_loaded(asked)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            "Call to add_lora method failed: Worker failed with error 'LoRA adapter 3: x's rank', "
            "please check the stack trace above for the root cause",
            "LoRA adapter 3: x's rank",
        ),
        ("LoRA adapter 12: two\nlines", "LoRA adapter 12: two\nlines"),
    ],
)
def test_the_sentence_is_found(text, want):
    found = front_end.unwrapped_error(RuntimeError(text), request(3), request(3))
    assert isinstance(found, AdapterError)
    assert str(found) == want


def test_other_errors_are_left_alone():
    error = RuntimeError("CUDA out of memory")
    assert front_end.unwrapped_error(error, request(3), request(3)) is error


def test_an_error_names_the_path_that_was_given():
    error = front_end.unwrapped_error(
        RuntimeError("no adapter at /x/./."), request(3, "/x/./."), request(3, "/x")
    )
    assert str(error) == "no adapter at /x"


class Core:
    """Stands in for the engine core: what is loaded by which path; ready at the third question."""

    def __init__(self, refuse=False):
        self.calls, self.refuse = [], refuse

    def add_lora(self, asked):
        self.calls.append(("add", asked.lora_int_id, asked.lora_path))
        if self.refuse:
            raise RuntimeError("Worker failed with error 'LoRA adapter 1: why', please check x")
        return sum(
            call == self.calls[-1] for call in self.calls
        ) >= 3 or not asked.lora_path.startswith(STAGE_PREFIX)

    def remove_lora(self, number):
        self.calls.append(("remove", number))
        return True

    async def add_lora_async(self, asked):
        await asyncio.sleep(0)
        return self.add_lora(asked)

    async def remove_lora_async(self, number):
        return self.remove_lora(number)


class Engine:
    def __init__(self, hooks, is_moe=True, lora=True, refuse=False, capacity=2):
        config = types.SimpleNamespace(max_cpu_loras=capacity, max_loras=capacity) if lora else None
        parallel = types.SimpleNamespace(data_parallel_size=1)
        self.vllm_config = types.SimpleNamespace(lora_config=config, parallel_config=parallel)
        self.model_config = types.SimpleNamespace(is_moe=is_moe)
        self.output_processor = types.SimpleNamespace(request_states={})
        self.engine_core, self.added, self.paused = Core(refuse), [], False
        passed = _passed if hooks is v1_engine_async_llm else _passed_now
        for name in ("add_request", "add_lora", "remove_lora"):
            setattr(self, name, getattr(hooks, f"_{name}")(passed).__get__(self))

    async def is_paused(self):
        return self.paused

    def start(self, number, asked):
        self.output_processor.request_states[number] = types.SimpleNamespace(lora_request=asked)


async def _passed(self, *args, **more):
    return _passed_now(self, *args, **more)


def _passed_now(self, *args, **more):
    self.added.append((args, more))
    return "passed"


@pytest.mark.parametrize("kind", [{"is_moe": False}, {"lora": False}])
def test_dense_models_and_engines_without_lora_are_left_alone(kind):
    one = Engine(v1_engine_llm_engine, **kind)
    one.add_request("id", "prompt", None, lora_request=request(1))
    assert one.added == [(("id", "prompt", None), {"lora_request": request(1)})]
    assert one.engine_core.calls == []


def test_a_bad_adapter_never_reaches_a_batch():
    one = Engine(v1_engine_llm_engine, refuse=True)
    for given in ({"lora_request": request(1)}, {}):
        prompt = types.SimpleNamespace(lora_request=None if given else request(1))
        with pytest.raises(AdapterError, match="LoRA adapter 1: why"):
            one.add_request("id", prompt, None, **given)
    with pytest.raises(AdapterError):
        one.add_request("id", "prompt", None, None, request(1))
    assert one.added == []


@pytest.mark.parametrize("where", ["keyword", "position", "prompt"])
def test_the_scheduler_gets_the_version_that_is_held(tmp_path, where):
    one, path = Engine(v1_engine_llm_engine), str(tmp_path)
    weights(tmp_path, "0")
    one.add_lora(request(1, path))
    weights(tmp_path, "00")
    asked = request(1, path, load_inplace=True)
    prompt = types.SimpleNamespace(lora_request=asked if where == "prompt" else None)
    args = ("id", prompt, None, None, asked) if where == "position" else ("id", prompt, None)
    one.add_request(*args, **({"lora_request": asked} if where == "keyword" else {}))
    ((args, more),) = one.added
    found = front_end.lora_request_of(args, more)
    assert found.lora_path == f"{path}/."
    assert not found.load_inplace
    assert [call[2] for call in one.engine_core.calls] == [path, f"{path}/."]


def test_offline_requests_in_flight_keep_their_version(tmp_path):
    one, asked = Engine(v1_engine_llm_engine), request(1, str(tmp_path), load_inplace=True)
    weights(tmp_path, "0")
    one.add_request("a", "prompt", None, lora_request=asked)
    one.start("a", asked)
    one.add_request("b", "prompt", None, lora_request=asked)  # the same files: no second version
    one.start("b", asked)
    weights(tmp_path, "00")
    with pytest.raises(AdapterError, match=r"2 unfinished requests of 'name-1' two versions"):
        one.add_request("c", "prompt", None, lora_request=asked)
    assert [args[0] for args, _ in one.added] == ["a", "b"]
    one.output_processor.request_states.clear()
    one.add_request("d", "prompt", None, lora_request=asked)


def test_staged_until_ready_then_loaded_once():
    one = Engine(v1_engine_async_llm)

    async def many():
        asked = [one.add_request(str(i), "p", None, lora_request=request(7)) for i in range(5)]
        return await asyncio.gather(*asked)

    assert asyncio.run(many()) == ["passed"] * 5
    paths = [call[2] for call in one.engine_core.calls]
    assert paths == [f"{STAGE_PREFIX}/adapters/x"] * 3 + ["/adapters/x"]


async def _soon(task):
    done, _ = await asyncio.wait([task], timeout=0.3)
    return bool(done)


@pytest.mark.parametrize("paused", [False, True])
def test_a_new_version_waits_for_requests_in_flight(tmp_path, paused):
    """And later requests for it; a paused engine is not waited for, its requests never end."""
    one, path = Engine(v1_engine_async_llm), str(tmp_path)

    async def scene():
        weights(tmp_path, "0")
        await one.add_request("a", "p", None, lora_request=request(1, path))
        one.start("a", request(1, path))
        weights(tmp_path, "00")
        one.paused = paused
        load = asyncio.create_task(one.add_lora(request(1, path, load_inplace=True)))
        assert await _soon(load) == paused
        later = asyncio.create_task(one.add_request("b", "p", None, lora_request=request(1, path)))
        other = asyncio.create_task(one.add_request("c", "p", None, lora_request=request(2, path)))
        assert await _soon(other), "another adapter's request waits for nobody"
        assert await _soon(later) == paused
        one.output_processor.request_states.clear()
        assert await load
        assert await later
        found = [front_end.lora_request_of(args, more) for args, more in one.added]
        paths = {
            args[0]: asked.lora_path for (args, _), asked in zip(one.added, found, strict=True)
        }
        assert paths == {"a": path, "b": f"{path}/.", "c": path}

    asyncio.run(scene())


def test_a_load_waits_for_room_and_the_idle_one_goes():
    one = Engine(v1_engine_async_llm)

    async def scene():
        for number in (1, 2):
            await one.add_request(str(number), "p", None, lora_request=request(number))
            one.start(number, request(number))
        load = asyncio.create_task(one.add_lora(request(3)))
        assert not await _soon(load)
        del one.output_processor.request_states[1]
        assert await load
        calls = one.engine_core.calls
        assert ("remove", 1) in calls
        assert calls.index(("remove", 1)) < calls.index(("add", 3, f"{STAGE_PREFIX}/adapters/x"))
        assert ("remove", 2) not in calls

    asyncio.run(scene())


def test_steady_traffic_of_others_shuts_nobody_out(monkeypatch):
    monkeypatch.setattr("vllm_moe_lora.loading.admit.ROOM_SECONDS", 0.1)
    one = Engine(v1_engine_async_llm)

    async def scene():
        for number in (1, 2):
            await one.add_request(str(number), "p", None, lora_request=request(number))
            one.start(number, request(number))
        assert await asyncio.wait_for(one.add_lora(request(3)), 2)
        assert not any(call[0] == "remove" for call in one.engine_core.calls)

    asyncio.run(scene())


def test_a_removed_adapter_is_loaded_again():
    one = Engine(v1_engine_llm_engine)
    one.add_lora(request(1))
    one.remove_lora(1)
    one.add_request("id", "prompt", None, lora_request=request(1))
    assert [call[0] for call in one.engine_core.calls] == ["add", "add"]


@pytest.mark.parametrize("before", [False, True])
def test_a_failed_activation_is_undone(before):
    """Upstream up to 0.32 leaves it marked active, so that later requests run the base model."""
    from vllm_moe_lora.hooks import lora_model_manager

    active = {1: None} if before else {}

    def original(self, lora_id):
        active[lora_id] = None
        raise RuntimeError("sizes differ")

    manager = types.SimpleNamespace(
        _is_moe=True,
        _active_adapters=active,
        _registered_adapters={1: "x"},
        deactivate_adapter=lambda lora_id: active.pop(lora_id),
    )
    activate = lora_model_manager._activate_adapter(original)
    with pytest.raises(RuntimeError, match="sizes differ"):
        activate(manager, 1)
    assert (1 in active) == before
    assert bool(manager._registered_adapters) == before
