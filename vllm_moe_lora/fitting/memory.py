"""Makes loading fast: huge pages for large tensors, and a way to pause garbage collection."""

from __future__ import annotations

import gc
import math
import mmap
import threading
from collections.abc import Sequence

import torch

HUGE_PAGES_FROM = 4 << 20  # bytes; huge pages do not pay off for smaller tensors


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised CPU tensor, like `torch.empty`. A large one is on huge pages.

    An adapter's tensors are gigabytes that are written once. With pages of 4 KiB, the kernel needs
    longer to provide the memory than the copy itself takes (5 times on the machine of
    docs/performance.md).
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


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
