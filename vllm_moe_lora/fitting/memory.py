"""Memory for what is staged, and quiet while many small objects are made."""

from __future__ import annotations

import gc
import math
import mmap
import threading
from collections.abc import Sequence

import torch

LARGE = 4 << 20  # bytes; below, huge pages do not pay


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in CPU memory, on huge pages where it is large.

    An adapter is gigabytes that are written once: with pages of 4 KiB, the kernel takes longer to
    hand the memory out than the copy takes (5 times on the machine of the README's table).
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class NoCollection:
    """Python's cyclic garbage collector stays off while one of these holds.

    A file of 36,864 tensors makes some 200,000 objects, none of them garbage; each of the
    collections that this sets off walks the whole engine (0.4 s each, as long as the copy). One
    holds as long as the views of the file live, from their reading to the last staged tensor,
    which are two calls of vLLM's. ``with`` releases it at the end of the block.
    """

    _lock = threading.RLock()  # the engine's thread and the one that stages
    _holding = 0
    _was_on = False

    def __init__(self) -> None:
        self._holds = True
        with NoCollection._lock:
            if NoCollection._holding == 0:
                NoCollection._was_on = gc.isenabled()
                gc.disable()
            NoCollection._holding += 1

    def release(self) -> None:
        """Any number of times."""
        with NoCollection._lock:
            if not self._holds:
                return
            self._holds = False
            NoCollection._holding -= 1
            if NoCollection._holding == 0 and NoCollection._was_on:
                gc.enable()

    def __enter__(self) -> NoCollection:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
