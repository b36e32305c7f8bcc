"""Adapters read and staged beside the engine's steps, so that tokens of others go on meanwhile.

A load has two halves: reading, checking and staging, which touch nothing of the engine and may take
seconds, and the write of one slot. The first half runs here in a thread of the worker: the server
asks for it under a marked path (`hooks/v1_engine_async_llm.py`) until it is done, then for the load
itself, which finds the staged adapter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..adapters.folder import state

# No folder has such a name: "/" cannot stand at this place of a path or of a repository's name.
MARK = "vllm-moe-lora-stage:/"
FORGOTTEN = 60.0  # seconds; what nobody asked for so long (a client that went away) holds memory


@dataclass
class _Staging:
    """One load under way or done; ``files`` as they were before it began to read."""

    files: tuple[Any, ...] | None
    future: Future[Any]
    asked: float = 0.0  # when somebody last wanted to know


class Ahead:
    """What is being staged, or is staged and not yet fetched."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="moe-lora-stage")
        self._staged: dict[tuple[int, str], _Staging] = {}
        self._here = threading.local()

    def ready(self, number: int, path: str, load: Callable[[], Any]) -> bool:
        """Begin at the first call, or anew if the files have changed; whether it is done.

        Args:
            number: the adapter's id.
            path: its folder, unmarked.
            load: reads and stages; called in the thread.

        Raises:
            Exception: what ``load`` raised; the next call begins anew.
        """
        key, now = (number, path), time.monotonic()
        for other in [k for k, s in self._staged.items() if now - s.asked > FORGOTTEN]:
            if other != key:
                del self._staged[other]
        one = self._staged.get(key)
        # Looked at when it is done only: this is asked every few milliseconds, between steps.
        if one is None or (one.future.done() and one.files != state(path)):
            files = state(path)
            one = self._staged[key] = _Staging(files, self._threads.submit(self._run, load))
        one.asked = now
        if not one.future.done():
            return False
        if one.future.exception() is not None:
            del self._staged[key]
        one.future.result()
        return True

    def take(self, number: int, path: str) -> Any:
        """The staged adapter, None if there is none of these files; waits if it is under way."""
        if getattr(self._here, "staging", False):
            return None  # this is the load that stages
        one = self._staged.pop((number, path), None)
        return None if one is None or one.files != state(path) else one.future.result()

    def _run(self, load: Callable[[], Any]) -> Any:
        self._here.staging = True
        return load()


def of(worker_manager: Any) -> Ahead:
    """The one `Ahead` of a worker's LoRA manager."""
    if not hasattr(worker_manager, "moe_lora_ahead"):
        worker_manager.moe_lora_ahead = Ahead()
    found: Ahead = worker_manager.moe_lora_ahead
    return found
