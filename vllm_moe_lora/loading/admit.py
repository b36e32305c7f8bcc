"""Performs one load that the engine's front end needs: makes room, has it staged, then loads it.

Requests that began with one version of an adapter must end with it. So a load that replaces a
version waits for these requests, and later requests for the same adapter wait for the load.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..adapters.errors import AdapterError
from ..log import get_logger
from . import front_end
from .background import STAGE_PREFIX

POLL_SECONDS = 0.02  # between two questions to the worker
LOG_SECONDS = 5.0  # a wait is logged each time it has gone on for so long
ROOM_SECONDS = 10.0  # how long a load waits for room


_refusals: ContextVar[list[str] | None] = ContextVar("moe_lora_refusals", default=None)
_aborting: ContextVar[bool] = ContextVar("moe_lora_aborting", default=False)


@contextmanager
def refusals() -> Iterator[list[str]]:
    """Collect the messages of adapters that are refused inside the block, by this task.

    vLLM's server only logs them if a resolver found the adapter.
    """
    found: list[str] = []
    token = _refusals.set(found)
    try:
        yield found
    finally:
        _refusals.reset(token)


@contextmanager
def aborting(yes: bool) -> Iterator[None]:
    """Whether a load of this task aborts the requests that use the version it replaces."""
    token = _aborting.set(yes)
    try:
        yield
    finally:
        _aborting.reset(token)


async def load(engine: Any, request: Any) -> bool:
    """Load an adapter by an `AsyncLLM`. The caller holds the lock of this adapter.

    Args:
        engine: an `AsyncLLM` for which `front_end.held_adapters` is not None.
        request: the LoRARequest; it is not changed.

    Returns:
        vLLM's answer: whether the adapter was loaded.

    Raises:
        AdapterError: the adapter is refused. If it was to replace a version, that one stays loaded.
    """
    held, lora_id = front_end.held_adapters(engine), request.lora_int_id
    assert held is not None
    core = engine.engine_core

    def has_room() -> bool:
        return not held.needs_room(lora_id) or held.idle(front_end.in_flight(engine)) is not None

    # The wait is limited, so that steady traffic for other adapters cannot keep this one out for
    # ever. After it the worker drops the adapter that was used longest ago, and reads that one
    # again for the requests that still need it.
    room = "room: as many adapters as --max-cpu-loras allows are in use"
    await _wait_until(engine, has_room, room, ROOM_SECONDS)
    dropped = held.make_room(lora_id, front_end.in_flight(engine))
    replaces = held.replaces(lora_id)
    with _loading(held, request) as versioned:
        if dropped is not None:
            await core.remove_lora_async(dropped)
        await _stage(core, versioned)
        if replaces:
            if _aborting.get():
                await engine.abort(front_end.users(engine, lora_id), internal=True)
            old = f"requests that use the version of {request.lora_name!r} that it replaces"
            await _wait_until(engine, lambda: not front_end.in_flight(engine)[lora_id], old)
            await _stage(core, versioned)  # after a long wait it may have expired
        return bool(await core.add_lora_async(versioned))


async def _stage(core: Any, request: Any) -> None:
    """Have the worker stage an adapter in its thread, and wait until it is done."""
    staging = copy.copy(request)
    staging.lora_path = STAGE_PREFIX + request.lora_path
    while not await core.add_lora_async(staging):
        await asyncio.sleep(POLL_SECONDS)


def load_sync(engine: Any, request: Any) -> bool:
    """Load an adapter by an `LLMEngine`, the offline engine.

    It cannot wait for requests in flight, because they go on only when the caller makes the next
    step.

    Args:
        engine: an `LLMEngine` for which `front_end.held_adapters` is not None.
        request: the LoRARequest; it is not changed.

    Returns:
        vLLM's answer: whether the adapter was loaded.

    Raises:
        AdapterError: the adapter is refused, or unfinished requests use the version that
            ``request`` would replace.
    """
    held, lora_id = front_end.held_adapters(engine), request.lora_int_id
    assert held is not None
    used = front_end.in_flight(engine)
    if held.replaces(lora_id) and used[lora_id]:
        raise AdapterError(
            f"LoRA adapter {lora_id}: load_inplace would give {used[lora_id]} unfinished requests "
            f"of {request.lora_name!r} two versions of it. Let them finish, or abort them, first."
        )
    dropped = held.make_room(lora_id, used)
    with _loading(held, request) as versioned:
        if dropped is not None:
            engine.engine_core.remove_lora(dropped)
        return bool(engine.engine_core.add_lora(versioned))


@contextmanager
def _loading(held: front_end.HeldAdapters, request: Any) -> Iterator[Any]:
    """Count the adapter as held while the block loads it, and afterwards if the block succeeds.

    Yields:
        The LoRARequest to load with.

    Raises:
        AdapterError: instead of an error that vLLM's processes wrapped around one.
    """
    versioned, version = held.begin(request)
    try:
        yield versioned
    except BaseException as error:
        held.failed(request, version)
        better = front_end.unwrapped_error(error, versioned, request)
        found = _refusals.get()
        if found is not None and isinstance(better, AdapterError):
            found.append(str(better))
        if better is error:
            raise
        raise better from error
    held.done(request, version)


async def _wait_until(
    engine: Any, condition: Callable[[], bool], what: str, limit: float = math.inf
) -> None:
    """Wait for ``condition``, at most ``limit`` seconds.

    Does not wait while the engine is paused, because requests in flight do not go on then.

    Args:
        what: what is waited for, for the log.
    """
    begun = logged = time.monotonic()
    while not condition() and not await engine.is_paused():
        await asyncio.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - begun > limit:
            return
        if now - logged > LOG_SECONDS:
            logged = now
            get_logger(__name__).info(
                "The load of a LoRA adapter has been waiting %.0f s for %s.", now - begun, what
            )
