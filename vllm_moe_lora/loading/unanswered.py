"""Ends calls of the engine that wait for an answer, when nobody is there to give it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any


def end(waiting: Mapping[int, Any], error: BaseException) -> None:
    """Raise ``error`` in all calls that wait. May be called in any thread.

    Args:
        waiting: number of the call -> vLLM's future of its answer: of asyncio, or of
            `concurrent.futures` in the offline engine.
        error: what the callers get.
    """
    for future in list(waiting.values()):
        if isinstance(future, asyncio.Future):
            loop = future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_fail, future, error)
        else:
            _fail(future, error)


def _fail(future: Any, error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
