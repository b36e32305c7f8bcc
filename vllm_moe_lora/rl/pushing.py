"""Pushes an adapter from a trainer's memory into a running engine.

The engine's own rules for adapters hold (`loading/admit.py`): the new version is read, checked and
staged on every worker while requests go on, and swapped between two steps. If it is refused the old
version stays. Requests that began with the old version end with it. Cached prefixes are found by
the version they were computed with.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..adapters.errors import AdapterError
from ..loading import admit, front_end, memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

IN_FLIGHT = ("finish", "abort")
_DOWN = "the engine shut down while {!r} was pushed"
DOWN_SECONDS = 0.5  # between two looks whether the engine was shut down


def push(
    engine: Any,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    lora_int_id: int | None = None,
    in_flight: str = "finish",
    api_key: str | None = None,
) -> Any:
    """Load an adapter from memory, or a new version of one.

    Args:
        engine: an `LLM`, an `LLMEngine`, an `AsyncLLM` (then the result must be awaited), vLLM's
            worker, or the address of a server on this machine ("http://localhost:8000"). It was
            started with `Worker` as its ``worker_extension_cls``; a server also with
            VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
        name: of the adapter. A second push with this name is a new version.
        tensors: the factors, under the names and in any of the layouts that adapter files may have,
            on any device.
        config: the content of adapter_config.json, such as peft's ``config.to_dict()``.
        lora_int_id: the adapter's id; by default one that follows from the name. A server chooses
            its own.
        in_flight: what happens to unfinished requests that use the old version: "finish" waits for
            them (an `LLM` cannot wait and refuses instead), "abort" ends them.
        api_key: of the server.

    Returns:
        The LoRARequest to ask with; for a server the name of the model to ask for.

    Raises:
        AdapterError: the adapter is refused, and nothing has changed.
    """
    if in_flight not in IN_FLIGHT:
        raise ValueError(f"in_flight is {in_flight!r}, must be one of {IN_FLIGHT}")
    plain = _plain_config(config)
    if isinstance(engine, str):
        return _push_to_server(engine, name, tensors, plain, api_key)
    if lora_int_id is None:
        lora_int_id = id_of(name)
    if hasattr(engine, "moe_lora_push"):
        engine.moe_lora_push(name, dict(tensors), plain, lora_int_id)
        return _request(name, lora_int_id)
    engine = getattr(engine, "llm_engine", engine)
    _check(engine)
    if hasattr(engine, "engine_core") and hasattr(engine, "add_lora"):
        if not hasattr(engine, "output_handler"):
            return _push_sync(engine, name, tensors, plain, lora_int_id, in_flight)
        return _push_async(engine, name, tensors, plain, lora_int_id, in_flight)
    raise TypeError(f"{type(engine).__name__} is no engine, worker or address that push knows")


def id_of(name: str) -> int:
    """The id of a pushed adapter: the same in all processes, and unlike the small ones of users."""
    return 2**62 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _request(name: str, lora_int_id: int, path: str = "") -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, lora_int_id, path or memory.path_of(name), load_inplace=bool(path))


def _check(engine: Any) -> None:
    """Refuse an engine that cannot take the adapter."""
    config = getattr(engine, "vllm_config", None)
    if config is None:
        return
    if config.lora_config is None or front_end.held_adapters(engine) is None:
        raise AdapterError("the engine runs no adapters on a MoE model. Start it with enable_lora.")
    if not config.parallel_config.worker_extension_cls:
        raise AdapterError(memory.OFF)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON has it: peft's has sets and enums in it."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    found: dict[str, Any] = json.loads(json.dumps(dict(config), default=plain))
    return found


@contextmanager
def _offered(
    engine: Any, name: str, tensors: Mapping[str, torch.Tensor], config: dict[str, Any]
) -> Iterator[str]:
    one_process = (
        type(engine.engine_core).__name__ == "InprocClient"
        and engine.vllm_config.parallel_config.world_size == 1
    )
    with memory.offered(name, tensors, config, local=one_process) as path:
        yield path


def _push_sync(
    engine: Any,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    lora_int_id: int,
    in_flight: str,
) -> Any:
    with _offered(engine, name, tensors, config) as path:
        if in_flight == "abort":
            engine.abort_request(front_end.users(engine, lora_int_id), internal=True)
        engine.add_lora(_request(name, lora_int_id, path))
    return _request(name, lora_int_id)


async def _push_async(
    engine: Any,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    lora_int_id: int,
    in_flight: str,
) -> Any:
    held = front_end.held_adapters(engine)
    assert held is not None
    async with held.pushing[lora_int_id]:
        offer = _offered(engine, name, tensors, config)
        path = await asyncio.to_thread(offer.__enter__)  # others get their tokens meanwhile
        try:
            with admit.aborting(in_flight == "abort"):
                load = asyncio.ensure_future(engine.add_lora(_request(name, lora_int_id, path)))
            await _until_loaded(engine, name, load)
        except BaseException as error:
            if not offer.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            offer.__exit__(None, None, None)
    return _request(name, lora_int_id)


async def _until_loaded(engine: Any, name: str, load: asyncio.Future[bool]) -> None:
    """Wait for a load, and do not wait for ever if the engine is shut down: it does not answer."""
    try:
        while not (await asyncio.wait({load}, timeout=DOWN_SECONDS))[0]:
            if engine.errored or (engine.output_handler and engine.output_handler.done()):
                raise AdapterError(_DOWN.format(name))
        load.result()
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            raise AdapterError(_DOWN.format(name)) from error
        raise
    finally:
        load.cancel()


def _push_to_server(
    address: str,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    api_key: str | None,
) -> str:
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    with memory.offered(name, tensors, config, local=False) as path:
        body = {"lora_name": name, "lora_path": path, "load_inplace": True}
        request = urllib.request.Request(
            f"{address.rstrip('/')}/v1/load_lora_adapter", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request):
                return name
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                text = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                text = f"HTTP {error.code} {error.reason}: {text}"
            raise AdapterError(text) from error
