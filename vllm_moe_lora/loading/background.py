"""Reads and stages adapters in a thread of the worker, so that other requests go on meanwhile.

A load has two parts. The first reads, checks and stages the tensors. It may take seconds and does
not touch the engine. The second writes one slot and is fast. Here the first part runs in a thread.
The front end asks for it by calling `add_lora` with a path that has `STAGE_PREFIX` in front, again
and again until the answer is yes (`loading/admit.py`). Then it calls `add_lora` with the real path,
and that load finds the staged adapter.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..adapters.errors import AdapterError
from ..adapters.folder import files_state

# Put before a path, it asks for the first part of the load only. No adapter's own path starts with
# it: neither a folder nor the name of a repository contains "/" at this position.
STAGE_PREFIX = "vllm-moe-lora-stage:/"
# A staged adapter takes memory. It is dropped if nobody has asked for it for so many seconds, for
# example because the client went away.
EXPIRE_SECONDS = 60.0


@dataclass
class _Staging:
    """One adapter that is being staged or is staged.

    Attributes:
        files: `files_state` before reading began.
        future: its result is the staged adapter.
        asked: `time.monotonic` of the last call that asked for it.
    """

    files: tuple[Any, ...] | None
    future: Future[Any]
    asked: float = 0.0


class BackgroundLoader:
    """Stages adapters in a thread, one at a time, and keeps them until they are taken."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="moe-lora-stage")
        self._staged: dict[tuple[int, str], _Staging] = {}  # by adapter id and path
        self._this_thread = threading.local()
        self._removed: OrderedDict[int, tuple[str, Any]] = OrderedDict()  # id -> path, adapter

    def ready(self, lora_id: int, path: str, load: Callable[[], Any]) -> bool:
        """Whether an adapter is staged. The first call starts it.

        It is started again if the files have changed since then.

        Args:
            lora_id: the adapter's id.
            path: its folder, without `STAGE_PREFIX`.
            load: reads and stages the adapter; it is called in the thread.

        Raises:
            Exception: what ``load`` raised. The next call starts again.
        """
        key, now = (lora_id, path), time.monotonic()
        for other in [k for k, s in self._staged.items() if now - s.asked > EXPIRE_SECONDS]:
            if other != key:
                del self._staged[other]
        one = self._staged.get(key)
        # The files are looked at only when it is done, because this is called every few
        # milliseconds, between the engine's steps.
        if one is None or (one.future.done() and one.files != files_state(path)):
            files = files_state(path)
            one = self._staged[key] = _Staging(files, self._threads.submit(self._run, load))
        one.asked = now
        if not one.future.done():
            return False
        if one.future.exception() is not None:
            del self._staged[key]
        one.future.result()
        return True

    def take(self, lora_id: int, path: str) -> Any:
        """Return the staged adapter and forget it. Waits if it is still being staged.

        Returns:
            None if the adapter is not staged, or its files have changed since.
        """
        if getattr(self._this_thread, "is_staging", False):
            return None  # `load` itself calls this: it must not wait for itself
        one = self._staged.pop((lora_id, path), None)
        return None if one is None or one.files != files_state(path) else one.future.result()

    def keep_removed(self, lora_id: int, path: str, lora: Any, limit: int) -> None:
        """Keep an adapter that the worker removed although requests use it.

        Args:
            lora_id: the adapter's id.
            path: the path it was loaded with.
            lora: the loaded adapter.
            limit: how many are kept at most; the oldest is dropped for a new one.
        """
        self._removed[lora_id] = path, lora
        while len(self._removed) > limit:
            self._removed.popitem(last=False)

    def take_removed(self, lora_id: int, path: str) -> Any:
        """Return an adapter that was kept, and forget it; None if this version was not kept.

        Its files may have changed meanwhile. The requests began with this version.
        """
        kept = self._removed.get(lora_id)
        if kept is None or kept[0] != path:
            return None
        del self._removed[lora_id]
        return kept[1]

    def forget(self, lora_id: int) -> None:
        """Forget an adapter that was kept."""
        self._removed.pop(lora_id, None)

    def _run(self, load: Callable[[], Any]) -> Any:
        self._this_thread.is_staging = True
        return load()


def check_same(lora: Any, request: Any, path: str) -> None:
    """Refuse an id under which another front end of the engine loaded another adapter.

    Args:
        lora: the adapter that the worker has under the id of ``request``.
        request: the LoRARequest, for the message.
        path: the folder that it means.

    Raises:
        AdapterError: the adapter is from another folder, or another version.
    """
    loaded = getattr(lora, "moe_lora_path", path)
    if loaded != path:
        raise AdapterError(
            f"LoRA adapter {request.lora_int_id}: another front end of this engine loaded {loaded} "
            f"under the id of {request.lora_name!r} from {path}. Give all API servers the same "
            "adapters with the same ids, or start one with --api-server-count 1."
        )


def loader_of(worker_manager: Any) -> BackgroundLoader:
    """The `BackgroundLoader` of a worker's LoRA manager (vLLM's `WorkerLoRAManager`)."""
    if not hasattr(worker_manager, "moe_lora_background_loader"):
        worker_manager.moe_lora_background_loader = BackgroundLoader()
    found: BackgroundLoader = worker_manager.moe_lora_background_loader
    return found
