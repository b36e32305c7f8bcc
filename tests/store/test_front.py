"""The front end's memory of adapters: when a load is due, new versions, whose sentence it is."""

from __future__ import annotations

import asyncio
import types

import pytest
from vllm.lora.request import LoRARequest

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.hooks import v1_engine_async_llm, v1_engine_llm_engine
from vllm_moe_lora.store import front
from vllm_moe_lora.store.ahead import MARK


def request(number, path="/adapters/x", **more):
    return LoRARequest(f"name-{number}", number, path, **more)


def test_as_many_as_the_workers_keep():
    known = front.Known(2)
    for number in (1, 2):
        assert not known.has(request(number))
        known.loaded(request(number))
    assert known.has(request(1))
    known.loaded(request(3))  # 2 was used least recently
    assert known.has(request(1))
    assert known.has(request(3))
    assert not known.has(request(2))


def test_a_new_version_is_loaded_once_and_has_a_name_of_its_own(tmp_path):
    known, path = front.Known(4), str(tmp_path)
    known.loaded(request(1, path))
    spellings = {path}
    again = request(1, path, load_inplace=True)
    for _ in range(3):
        assert not known.has(again), "every load_inplace is a load"
        known.loaded(again)
        assert not again.load_inplace, "the server keeps this object for later requests"
        assert known.has(again)
        assert again.lora_path not in spellings
        assert (tmp_path / again.lora_path).resolve() == tmp_path.resolve()
        spellings.add(again.lora_path)
        again.load_inplace = True
    assert len(again.lora_path) < len(path) + 10, "spellings do not pile up"


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
    found = front.plainly(RuntimeError(text))
    assert isinstance(found, AdapterError)
    assert str(found) == want


def test_other_errors_are_left_alone():
    error = RuntimeError("CUDA out of memory")
    assert front.plainly(error) is error


def engine(is_moe=True, lora=True):
    config = types.SimpleNamespace(max_cpu_loras=2) if lora else None
    return types.SimpleNamespace(
        vllm_config=types.SimpleNamespace(lora_config=config),
        model_config=types.SimpleNamespace(is_moe=is_moe),
    )


@pytest.mark.parametrize("kind", [{"is_moe": False}, {"lora": False}])
def test_dense_models_and_engines_without_lora_are_left_alone(kind):
    seen = []
    add = v1_engine_llm_engine._add_request(lambda self, *a, **k: seen.append((a, k)))
    add(engine(**kind), "id", "prompt", None, lora_request=request(1))
    assert seen == [(("id", "prompt", None), {"lora_request": request(1)})]


def test_a_bad_adapter_never_reaches_a_batch():
    added, one = [], engine()
    one.add_lora = v1_engine_llm_engine._add_lora(_fails).__get__(one)
    add = v1_engine_llm_engine._add_request(lambda self, *a, **k: added.append(a))
    for given in ({"lora_request": request(1)}, {}):
        prompt = types.SimpleNamespace(lora_request=None if given else request(1))
        with pytest.raises(AdapterError, match="LoRA adapter 1: why"):
            add(one, "id", prompt, None, **given)
    with pytest.raises(AdapterError):
        add(one, "id", "prompt", None, None, request(1))
    assert added == []


def _fails(self, lora_request):
    raise RuntimeError("Worker failed with error 'LoRA adapter 1: why', please check the log")


def test_staged_until_ready_then_loaded_once():
    paths, one = [], engine()

    async def original(self, lora_request):
        paths.append(lora_request.lora_path)
        return len(paths) >= 3  # ready at the third question

    add = v1_engine_async_llm._add_lora(original)
    ask = v1_engine_async_llm._add_request(_passed)
    one.add_lora = add.__get__(one)

    async def many():
        requests = [ask(one, str(i), "prompt", None, lora_request=request(7)) for i in range(5)]
        return await asyncio.gather(*requests)

    assert asyncio.run(many()) == ["passed"] * 5
    assert paths[:4] == [f"{MARK}/adapters/x"] * 3 + ["/adapters/x"]


async def _passed(self, *args, **more):
    return "passed"


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
