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
from typing import Any

from vllm_moe_lora.adapters.folder import state

# No folder has such a name: "/" cannot stand at this place of a path or of a repository's name.
MARK = "vllm-moe-lora-stage:/"
FORGOTTEN = 60.0  # seconds; what nobody asked for so long (a client that went away) holds memory


class Ahead:
    """What is being staged, or is staged and not yet fetched."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="moe-lora-stage")
        self._staged: dict[tuple[Any, ...], Future[Any]] = {}
        self._asked: dict[tuple[Any, ...], float] = {}
        self._here = threading.local()

    def ready(self, number: int, path: str, load: Callable[[], Any]) -> bool:
        """Begin at the first call; whether it is done.

        Args:
            number: the adapter's id.
            path: its folder, unmarked.
            load: reads and stages; called in the thread.

        Raises:
            Exception: what ``load`` raised; the next call begins anew.
        """
        key = (number, path, state(path))  # files that changed since are staged again
        now = time.monotonic()
        self._asked[key] = now
        for old in [one for one, asked in self._asked.items() if now - asked > FORGOTTEN]:
            del self._asked[old]
            self._staged.pop(old, None)
        future = self._staged.get(key)
        if future is None:
            future = self._staged[key] = self._threads.submit(self._run, load)
        if not future.done():
            return False
        if future.exception() is not None:
            del self._staged[key]
        future.result()
        return True

    def take(self, number: int, path: str) -> Any:
        """The staged adapter, None if there is none; waits if it is under way."""
        if getattr(self._here, "staging", False):
            return None  # this is the load that stages
        future = self._staged.pop((number, path, state(path)), None)
        return None if future is None else future.result()

    def _run(self, load: Callable[[], Any]) -> Any:
        self._here.staging = True
        return load()


def of(worker_manager: Any) -> Ahead:
    """The one `Ahead` of a worker's LoRA manager."""
    if not hasattr(worker_manager, "moe_lora_ahead"):
        worker_manager.moe_lora_ahead = Ahead()
    found: Ahead = worker_manager.moe_lora_ahead
    return found
