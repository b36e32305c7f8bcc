"""Performs one load that the engine's front end needs: makes room, has it staged, then loads it.

Requests that began with one version of an adapter must end with it. So a load that replaces a
version waits for these requests, and later requests for the same adapter wait for the load.

In a data-parallel group all ranks hold the same adapters, in the same slots. So an adapter that any
request uses is never dropped there, and whatever the front end changes, it changes on all ranks.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..adapters.errors import AdapterError
from ..fitting.budget import FULL
from ..log import get_logger
from . import front_end
from .assigned import with_slot
from .background import STAGE_PREFIX
from .slots import GroupSlots

POLL_SECONDS = 0.02  # between two questions to the worker
_PAUSED = (
    "requests of a paused engine use the adapters that would have to make room. Resume it, or "
    "abort these requests, and try again."
)
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
    """Load an adapter by an `AsyncLLM`. The caller holds its lock, and has it `claimed`.

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
    if held.slots is not None:
        return await _load_in_group(engine, request, held.slots)
    core = engine.engine_core

    def has_room() -> bool:
        return not held.needs_room(lora_id) or held.idle(front_end.busy(engine)) is not None

    # The wait is limited, so that steady traffic for other adapters cannot keep this one out for
    # ever. After it the worker drops the adapter that was used longest ago, and reads that one
    # again for the requests that still need it.
    room = "room: as many adapters as --max-cpu-loras allows are in use"
    await _wait_until(engine, has_room, room, ROOM_SECONDS)
    dropped = held.make_room(lora_id, front_end.busy(engine))
    replaces = held.replaces(lora_id)
    with _loading(held, request) as versioned:
        # Other front ends may be using it. The workers then drop one themselves, and keep it.
        if dropped is not None and not held.shared:
            await core.remove_lora_async(dropped)
        await _stage_in_memory(engine, versioned)
        if replaces:
            await _wait_until_unused(engine, versioned)
            await _stage(core, versioned)  # after a long wait it may have expired
        return bool(await core.add_lora_async(versioned))


async def _wait_until_unused(engine: Any, request: Any) -> None:
    lora_id, name = request.lora_int_id, request.lora_name
    if _aborting.get():
        await engine.abort(front_end.users(engine, lora_id), internal=True)
    old = f"requests that use the version of {name!r} that it replaces"
    await _wait_until(engine, lambda: not front_end.in_flight(engine)[lora_id], old)


async def _load_in_group(engine: Any, request: Any, slots: GroupSlots) -> bool:
    """Load an adapter on all ranks of a data-parallel group, into the same slot.

    With its slot it has room, too: the ranks hold at least as many adapters as they have slots.
    """
    held, lora_id, core = engine.moe_lora_held, request.lora_int_id, engine.engine_core
    replaces = held.replaces(lora_id)
    slot = await _slot(engine, lora_id, slots)
    try:
        dropped = held.make_room(lora_id, front_end.busy(engine))
        with _loading(held, request) as versioned:
            if dropped is not None:
                slots.forget(dropped)
                await _settle(core)
                await core.remove_lora_async(dropped)
            await _stage(core, versioned)
            if replaces:
                await _wait_until_unused(engine, versioned)
                await _stage(core, versioned)
            return await _place(engine, versioned, slot)
    except BaseException:
        if not held.replaces(lora_id):  # the ranks have no version of it
            slots.forget(lora_id)
        raise


async def give_slot(engine: Any, request: Any) -> None:
    """Put an adapter that is loaded into a slot, if this is a data-parallel group.

    The caller holds the lock of this adapter, and has it `claimed`.

    Raises:
        AdapterError: there will be no slot for it.
    """
    held, lora_id = front_end.held_adapters(engine), request.lora_int_id
    assert held is not None
    if held.slots is None or held.slots.find(lora_id) is not None:
        return
    slot = await _slot(engine, lora_id, held.slots)
    if held.replaces(lora_id):
        await _place(engine, held.for_scheduler(request), slot)
    else:  # dropped while it waited
        await load(engine, request)


async def _place(engine: Any, request: Any, slot: int) -> bool:
    """Load an adapter into its slot on all ranks. If one refuses it, none has it."""
    core, held, lora_id = engine.engine_core, engine.moe_lora_held, request.lora_int_id
    await _settle(core)
    try:
        return bool(await core.add_lora_async(with_slot(request, slot)))
    except BaseException:
        held.slots.forget(lora_id)
        held.forget(lora_id)
        await core.remove_lora_async(lora_id)
        raise


async def _slot(engine: Any, lora_id: int, slots: GroupSlots) -> int:
    """Return the adapter's slot; if it has none, wait for one, behind others that wait.

    Raises:
        AdapterError: there will be none.
    """
    found = slots.find(lora_id)
    if found is not None:
        return found
    held, begun = engine.moe_lora_held, time.monotonic()
    held.claims[lora_id] -= 1  # while it waits, it may be dropped for those before it
    try:
        with slots.queued(lora_id):
            while (slot := slots.take(lora_id, front_end.busy(engine), held.pinned)) is None:
                if await engine.is_paused():
                    raise AdapterError(f"LoRA adapter {lora_id}: {_PAUSED}")
                if time.monotonic() - begun > ROOM_SECONDS:
                    slots.retire(held.pinned)
                await asyncio.sleep(POLL_SECONDS)
    finally:
        held.claims[lora_id] += 1
    return slot


async def _settle(core: Any) -> None:
    """Wait until no rank computes for a request that the front end counts as ended.

    A rank answers when the step that it may be in has ended, and it has got what was sent before:
    that the request is aborted.
    """
    await core.list_loras_async()


async def remove(engine: Any, lora_id: int, remove_lora: Callable[[], Awaitable[bool]]) -> bool:
    """Remove an adapter from all ranks, when no request uses it. The caller holds its lock.

    Args:
        engine: an `AsyncLLM` of a data-parallel group.
        lora_id: the adapter's id.
        remove_lora: vLLM's own `AsyncLLM.remove_lora`.

    Raises:
        AdapterError: the engine is paused, so the requests of the adapter do not end.
    """
    held = front_end.held_adapters(engine)
    assert held is not None and held.slots is not None  # noqa: PT018
    what = f"requests that use LoRA adapter {lora_id}, before it is removed"
    await _wait_until(engine, lambda: not front_end.busy(engine)[lora_id], what)
    if front_end.busy(engine)[lora_id]:
        raise AdapterError(f"LoRA adapter {lora_id}: {_PAUSED}")
    held.forget(lora_id)
    held.slots.forget(lora_id)
    await _settle(engine.engine_core)
    return await remove_lora()


async def _stage(core: Any, request: Any) -> None:
    """Have the workers stage an adapter in their threads, and wait until all are done."""
    staging = copy.copy(request)
    staging.lora_path = STAGE_PREFIX + request.lora_path
    # vLLM's add_lora_async has the answer of one rank only.
    of_all = getattr(core, "call_utility_all_async", None)
    while not (
        all(await of_all("add_lora", staging)) if of_all else await core.add_lora_async(staging)
    ):
        await asyncio.sleep(POLL_SECONDS)


async def _stage_in_memory(engine: Any, request: Any) -> None:
    """Have an adapter staged; drop idle ones while VLLM_MOE_LORA_MEMORY is full.

    If none is idle, it waits for one, for at most `ROOM_SECONDS`.

    Raises:
        Exception: the adapter is refused, perhaps because there is no room.
    """
    held, lora_id, core = engine.moe_lora_held, request.lora_int_id, engine.engine_core
    end = time.monotonic() + ROOM_SECONDS

    def one_is_idle() -> bool:
        return held.idle(front_end.busy(engine), but=lora_id) is not None

    while True:
        try:
            return await _stage(core, request)
        except Exception as error:
            # Other front ends may be using what is idle here.
            if FULL not in str(error) or held.shared:
                raise
            room = "room: adapters in use take what VLLM_MOE_LORA_MEMORY allows"
            await _wait_until(engine, one_is_idle, room, end - time.monotonic())
            dropped = held.drop_idle(lora_id, front_end.busy(engine))
            if dropped is None:
                raise
            await core.remove_lora_async(dropped)


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
    if held.slots is not None:
        raise AdapterError(
            f"LoRA adapter {lora_id}: with data parallelism it needs the same slot on all ranks, "
            "but the engines of the class LLM do not know one another. Use AsyncLLM or vllm serve."
        )
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
        while True:
            try:
                return bool(engine.engine_core.add_lora(versioned))
            except Exception as error:
                dropped = held.drop_idle(lora_id, used) if FULL in str(error) else None
                if dropped is None:
                    raise
                engine.engine_core.remove_lora(dropped)


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
