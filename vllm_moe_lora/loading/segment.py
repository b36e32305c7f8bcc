"""A segment: shared memory with the tensors of an adapter, which one process writes, others read.

It begins with the number of the push and the length of the header, 8 bytes each. The header is
JSON: the config, and [dtype, [[name, shape], ...]] of each run of tensors. A run begins at a
multiple of `ALIGNMENT`, and its tensors follow one another.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from multiprocessing import shared_memory
from typing import TYPE_CHECKING, Any

from ..adapters.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from ..fitting.again import KeptTensors

ALIGNMENT = 64  # bytes

_spare: list[shared_memory.SharedMemory] = []  # of the sender, at most one
_attached: dict[str, Attached] = {}  # of the worker, at most one
_closing: list[shared_memory.SharedMemory] = []
_attaching = threading.Lock()


def keep(shared: shared_memory.SharedMemory) -> None:
    """Keep a segment of this process for the next `write`."""
    _spare.append(shared)
    while len(_spare) > 1:
        delete(_spare.pop(0))


def delete(shared: shared_memory.SharedMemory) -> None:
    """Unmap a segment of this process, and remove it from the system."""
    _close(shared)
    shared.unlink()


@atexit.register
def _delete_spare() -> None:
    while _spare:
        shared = _spare.pop()
        if _is_mine(shared):
            delete(shared)


def _is_mine(shared: shared_memory.SharedMemory) -> bool:
    """Whether this process made it, and not the one that this was forked from."""
    return shared.name.split("-")[2] == str(os.getpid())


def _new(size: int) -> shared_memory.SharedMemory:
    """Shared memory of at least ``size`` bytes: the one that was kept, or new."""
    try:
        shared = _spare.pop()
    except IndexError:
        pass
    else:
        if _is_mine(shared) and size <= shared.size <= 2 * size:
            return shared
        if _is_mine(shared):
            delete(shared)
    _check_room(size)
    name = f"moe-lora-{os.getpid()}-{secrets.token_hex(8)}"
    return shared_memory.SharedMemory(name, create=True, size=size)


def write(
    tensors: Mapping[str, torch.Tensor], config: dict[str, Any], number: int
) -> shared_memory.SharedMemory:
    """Copy an adapter into a segment.

    Args:
        tensors: by name, on any device. They are read only.
        config: the content of adapter_config.json.
        number: of the push.

    Raises:
        AdapterError: there is not enough shared memory.
    """
    import torch

    runs: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for key, tensor in tensors.items():
        runs.setdefault((tensor.dtype, tensor.device), []).append(key)
    table = [
        [str(dtype).removeprefix("torch."), [[key, list(tensors[key].shape)] for key in keys]]
        for (dtype, _), keys in runs.items()
    ]
    header = json.dumps([config, table]).encode()
    sizes = [sum(tensors[key].nbytes for key in keys) for keys in runs.values()]
    shared = _new(_aligned(16 + len(header)) + sum(map(_aligned, sizes)))
    try:
        buffer = _buffer(shared)
        buffer[:16] = number.to_bytes(8, "little") + len(header).to_bytes(8, "little")
        buffer[16 : 16 + len(header)] = header
        start, whole = _aligned(16 + len(header)), torch.frombuffer(buffer, dtype=torch.uint8)
        for ((dtype, device), keys), length in zip(runs.items(), sizes, strict=True):
            flat = [tensors[key].detach().reshape(-1) for key in keys]
            target = whole[start : start + length].view(dtype)
            if device.type == "cpu":
                torch.cat(flat, out=target)
            else:
                target.copy_(torch.cat(flat))  # one copy from the device
            start += _aligned(length)
    except BaseException:
        delete(shared)
        raise
    return shared


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _check_room(size: int) -> None:
    """Refuse what does not fit: a write beyond the end of the memory would kill the process."""
    with contextlib.suppress(OSError):
        found = os.statvfs("/dev/shm")
        free = found.f_bavail * found.f_frsize
        if size > free:
            raise AdapterError(
                f"the adapter needs {size / 1e6:.0f} MB of shared memory, but /dev/shm has "
                f"{free / 1e6:.0f} MB. Raise it (docker run --shm-size, or --ipc=host)."
            )


def _buffer(shared: shared_memory.SharedMemory) -> memoryview:
    assert shared.buf is not None, "it is open"
    return shared.buf


class Attached:
    """A segment of another process, and what was read of its header."""

    def __init__(self, segment: str) -> None:
        self.shared = _map(segment)
        self._header = b""
        self._read: tuple[KeptTensors, dict[str, Any]] | None = None

    def number(self) -> int:
        """Which push its content is of."""
        return int.from_bytes(_buffer(self.shared)[:8], "little")

    def read(self) -> tuple[KeptTensors, dict[str, Any]]:
        """Views of the tensors, and the config: the same objects as long as the header is equal."""
        header = _header(self.shared)
        if self._read is None or header != self._header:
            self._read = _read(self.shared, header)
            self._header = header
        return self._read

    def close(self) -> None:
        self._read = None
        _close(self.shared)


def attach(segment: str) -> Attached:
    """Map the segment, and keep it until another one comes."""
    if segment not in _attached:
        attached = Attached(segment)
        while _attached:
            _attached.popitem()[1].close()
        _attached[segment] = attached
    return _attached[segment]


def _map(segment: str) -> shared_memory.SharedMemory:
    if sys.version_info >= (3, 13):
        return shared_memory.SharedMemory(name=segment, track=False)
    from multiprocessing import resource_tracker

    # Up to Python 3.12 whoever attaches is taken for the owner, who is to delete it at exit.
    with _attaching:
        register, resource_tracker.register = resource_tracker.register, _register_nothing
        try:
            return shared_memory.SharedMemory(name=segment)
        finally:
            resource_tracker.register = register


def _register_nothing(name: Any, rtype: Any) -> None:
    pass


def _header(shared: shared_memory.SharedMemory) -> bytes:
    buffer = _buffer(shared)
    return bytes(buffer[16 : 16 + int.from_bytes(buffer[8:16], "little")])


def _read(shared: shared_memory.SharedMemory, header: bytes) -> tuple[KeptTensors, dict[str, Any]]:
    """Views of the tensors in shared memory, and the config; see `write`."""
    import torch

    from ..fitting.again import KeptTensors

    config, table = json.loads(header)
    start = _aligned(16 + len(header))
    # A view of its own, with which the memory cannot be unmapped: torch keeps only a reference.
    whole = torch.frombuffer(memoryview(_buffer(shared)), dtype=torch.uint8)
    tensors = KeptTensors()
    for kind, entries in table:
        dtype: torch.dtype = getattr(torch, kind)
        counts = [math.prod(shape) for _, shape in entries]
        size = sum(counts) * dtype.itemsize
        flat = whole[start : start + size].view(dtype).split(counts)
        for (key, shape), part in zip(entries, flat, strict=True):
            tensors[key] = part.view(shape)
        start += _aligned(size)
    return tensors, config


def _close(shared: shared_memory.SharedMemory) -> None:
    """Unmap shared memory. If a tensor still uses it, as one in a traceback, then later."""
    _closing.append(shared)
    for one in list(_closing):
        with contextlib.suppress(BufferError):
            one.close()
            _closing.remove(one)
