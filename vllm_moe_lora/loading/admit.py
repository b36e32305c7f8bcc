"""One load asked for by a front end: room first, then staging, then nobody on the old version.

Requests that began on one version of an adapter end on it: a load that replaces a version waits
for them, and later requests of that adapter wait for the load.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..adapters.errors import AdapterError
from ..log import get_logger
from . import front_end
from .background import MARK

PAUSE = 0.02  # seconds between two questions
PATIENCE = 5.0  # seconds of waiting before it is logged
ROOM = 10.0  # seconds of waiting for adapters that are in use


async def load(engine: Any, request: Any) -> bool:
    """Load ``request`` by an `AsyncLLM`; its lock for this adapter is held.

    Args:
        engine: the `AsyncLLM`, one that `front.of` knows.
        request: the LoRARequest; it is not changed.

    Raises:
        AdapterError: the adapter is refused; an earlier version of it stays.
    """
    known, number = front_end.of(engine), request.lora_int_id
    assert known is not None
    core = engine.engine_core

    def free() -> bool:
        return not known.full(number) or known.idle(front_end.in_flight(engine)) is not None

    # Not for ever: others' steady traffic must not shut this one out. Then the worker drops the
    # one it used longest ago, and reads it again for the requests that it still has.
    await _until(engine, free, "room among --max-cpu-loras adapters, all of them in use", ROOM)
    gone = known.make_room(number, front_end.in_flight(engine))
    replaces = known.replaces(number)
    with _version(known, request) as asked:
        if gone is not None:
            await core.remove_lora_async(gone)
        await _staged(core, asked)
        if replaces:
            waits = f"requests that began on the version of {request.lora_name!r} it replaces"
            await _until(engine, lambda: not front_end.in_flight(engine)[number], waits)
            await _staged(core, asked)  # after a long wait it may have been forgotten
        return bool(await core.add_lora_async(asked))


async def _staged(core: Any, request: Any) -> None:
    marked = copy.copy(request)
    marked.lora_path = MARK + request.lora_path
    while not await core.add_lora_async(marked):
        await asyncio.sleep(PAUSE)


def load_now(engine: Any, request: Any) -> bool:
    """The same by an `LLMEngine`, which cannot wait: its caller makes the steps.

    Raises:
        AdapterError: also if unfinished requests use a version that ``request`` is to replace.
    """
    known, number = front_end.of(engine), request.lora_int_id
    assert known is not None
    used = front_end.in_flight(engine)
    if known.replaces(number) and used[number]:
        raise AdapterError(
            f"LoRA adapter {number}: load_inplace would give {used[number]} unfinished requests "
            f"of {request.lora_name!r} two versions of it. Let them finish, or abort them, first."
        )
    gone = known.make_room(number, used)
    with _version(known, request) as asked:
        if gone is not None:
            engine.engine_core.remove_lora(gone)
        return bool(engine.engine_core.add_lora(asked))


@contextmanager
def _version(known: front_end.Known, request: Any) -> Iterator[Any]:
    """The request to load by; its place is taken meanwhile, and kept if all went well."""
    asked, version = known.begin(request)
    try:
        yield asked
    except BaseException as error:
        known.failed(request, version)
        better = front_end.plainly(error, asked, request)
        if better is error:
            raise
        raise better from error
    known.done(request, version)


async def _until(engine: Any, true: Callable[[], bool], what: str, limit: float = math.inf) -> None:
    """Wait; not while the engine is paused, when nothing in flight would ever end."""
    begun = said = time.monotonic()
    while not true() and not await engine.is_paused():
        await asyncio.sleep(PAUSE)
        now = time.monotonic()
        if now - begun > limit:
            return
        if now - said > PATIENCE:
            said = now
            get_logger(__name__).info("For %.0f s a load waits for %s.", now - begun, what)
