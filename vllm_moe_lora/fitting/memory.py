"""Makes loading fast: huge pages, memory that is used again, and no garbage collection."""

from __future__ import annotations

import gc
import math
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

USED_AGAIN_FROM = 1 << 20  # bytes; see `UsedAgain`
HUGE_PAGES_FROM = 4 << 20  # bytes; huge pages do not pay off for smaller tensors


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised CPU tensor, like `torch.empty`. A large one is on huge pages.

    An adapter's tensors are gigabytes that are written once. With pages of 4 KiB, the kernel needs
    longer to provide the memory than the copy itself takes (5 times on the machine of
    docs/performance.md).
    """
    size, used_again = math.prod(shape) * dtype.itemsize, _used_again.get()
    smallest = HUGE_PAGES_FROM if used_again is None else USED_AGAIN_FROM
    if size < smallest or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = _mapped(size) if used_again is None else used_again.take(size)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class UsedAgain:
    """Keeps the memory of adapters that are gone for the next one of the same shapes.

    To get memory from the system takes several times as long as to copy into it. At most as much is
    kept as the last adapter has taken.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # an adapter may end in the middle of `take`
        self._kept: dict[int, list[mmap.mmap]] = {}
        self._kept_bytes = 0
        self._limit = 0
        self._taken = 0

    @contextmanager
    def adapter(self) -> Iterator[None]:
        """What `empty` returns inside the block belongs to one adapter, and is kept after it."""
        self._taken = 0
        token = _used_again.set(self)
        try:
            yield
        finally:
            _used_again.reset(token)
        with self._lock:
            self._limit = self._taken
            for size in list(self._kept):
                while self._kept[size] and self._kept_bytes > self._limit:
                    self._kept[size].pop()
                    self._kept_bytes -= size

    def take(self, size: int) -> memoryview:
        """Memory of ``size`` bytes, which comes back when nothing refers to it any more."""
        with self._lock:
            self._taken += size
            kept = self._kept.get(size)
            if kept:
                self._kept_bytes -= size
            memory = kept.pop() if kept else _mapped(size)
        view = memoryview(memory)
        weakref.finalize(view, self._come_back, memory).atexit = False
        return view

    def _come_back(self, memory: mmap.mmap) -> None:
        with self._lock:
            size = len(memory)
            if self._kept_bytes + size <= self._limit:
                self._kept.setdefault(size, []).append(memory)
                self._kept_bytes += size


_used_again: ContextVar[UsedAgain | None] = ContextVar("moe_lora_used_again", default=None)


class PausedGC:
    """Keeps Python's cyclic garbage collector off, from creation until `release`.

    It can be used in a ``with`` statement. Several may exist: the collector is switched on again
    when the last one is released, and only if it was on before the first.

    Reading a file of 36,864 tensors makes some 200,000 objects, and none of them is garbage. They
    would start several collections, each of which walks all objects of the engine and takes 0.4 s,
    as long as copying the tensors. The views of the file live from `read` to `fit`, which are two
    separate calls by vLLM, so that one ``with`` block cannot cover them.
    """

    _lock = threading.RLock()  # the engine's thread and the thread that stages adapters use this
    _count = 0
    _was_enabled = False

    def __init__(self) -> None:
        self._active = True
        with PausedGC._lock:
            if PausedGC._count == 0:
                PausedGC._was_enabled = gc.isenabled()
                gc.disable()
            PausedGC._count += 1

    def release(self) -> None:
        """Undo what creation did. A second call does nothing."""
        with PausedGC._lock:
            if not self._active:
                return
            self._active = False
            PausedGC._count -= 1
            if PausedGC._count == 0 and PausedGC._was_enabled:
                gc.enable()

    def __enter__(self) -> PausedGC:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
