"""Adapters that come from a trainer's memory, and how they get into vLLM's processes.

vLLM names an adapter by a path. The path of a pushed adapter is `PREFIX` and its name. To load a
version of it, "#", the name of a segment, "@" and a number are appended. A segment has the
adapter's tensors: it is shared memory, which every process of the machine can map, or an entry of
this process. Nothing is written to a file.

Both sides keep one segment for the next push, because to get memory from the system takes several
times as long as to copy into it. The number says which push the content is of.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import shared_memory
from typing import TYPE_CHECKING, Any

from ..adapters.errors import AdapterError, rank_text

if TYPE_CHECKING:
    import torch

PREFIX = "vllm-moe-lora-memory:/"
WORKER = f"{__name__.removesuffix('.loading.memory')}.rl.Worker"
OFF = (
    "this engine takes no adapters from memory. Start it with "
    f"worker_extension_cls={WORKER!r} (--worker-extension-cls {WORKER})."
)
ALIGNMENT = 64  # bytes

_local: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
_spare: list[shared_memory.SharedMemory] = []  # of the sender, at most one
_attached: dict[str, shared_memory.SharedMemory] = {}  # of the worker, at most one
_closing: list[shared_memory.SharedMemory] = []
_numbers = itertools.count(1)
_attaching = threading.Lock()
_allowed = False


def allow() -> None:
    """Let this process load adapters from memory. The worker class of `rl/worker.py` calls it."""
    global _allowed
    _allowed = True


def is_memory(path: str) -> bool:
    """Whether a LoRARequest's path is that of a pushed adapter."""
    return path.startswith(PREFIX)


def path_of(name: str) -> str:
    """The path of the pushed adapter ``name``, in every LoRARequest for it."""
    return PREFIX + name


def without_segment(path: str) -> str:
    """The path of a pushed adapter without its segment. Other paths are returned as they are."""
    return path.rpartition("#")[0] or path if is_memory(path) else path


@contextmanager
def offered(
    name: str, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], *, local: bool
) -> Iterator[str]:
    """Offer an adapter to the loaders of workers inside the block.

    Args:
        name: of the adapter.
        tensors: by name, on any device. They are read only.
        config: the content of adapter_config.json.
        local: the workers are in this process, so nothing has to be copied.

    Yields:
        The path to load it by.

    Raises:
        AdapterError: there is not enough shared memory.
    """
    if local:
        segment = f"local-{secrets.token_hex(8)}"
        _local[segment] = {k: t.detach().cpu() for k, t in tensors.items()}, config
        try:
            yield f"{path_of(name)}#{segment}"
        finally:
            del _local[segment]
        return
    number = next(_numbers)
    shared = _write(tensors, config, number)
    try:
        yield f"{path_of(name)}#{shared.name}@{number}"
    except BaseException:
        _delete(shared)  # somebody may still read it
        raise
    _spare.append(shared)
    while len(_spare) > 1:
        _delete(_spare.pop(0))


def _delete(shared: shared_memory.SharedMemory) -> None:
    _close(shared)
    shared.unlink()


@atexit.register
def _delete_spare() -> None:
    while _spare:
        shared = _spare.pop()
        if _is_mine(shared):
            _delete(shared)


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
            _delete(shared)
    _check_room(size)
    name = f"moe-lora-{os.getpid()}-{secrets.token_hex(8)}"
    return shared_memory.SharedMemory(name, create=True, size=size)


def _write(
    tensors: Mapping[str, torch.Tensor], config: dict[str, Any], number: int
) -> shared_memory.SharedMemory:
    """Copy an adapter into shared memory.

    It begins with ``number`` and the length of the header, 8 bytes each. The header is JSON: the
    config, and [dtype, [[name, shape], ...]] of each run of tensors. A run begins at a multiple of
    `ALIGNMENT`, and its tensors follow one another.
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
        _delete(shared)
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


@contextmanager
def opened(path: str) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The tensors and the config of an adapter that is offered. The tensors end with the block.

    Args:
        path: with its segment.

    Raises:
        AdapterError: it is not offered any more, or this process must not load from memory.
    """
    if not _allowed:
        raise AdapterError(OFF)
    segment = path.removeprefix(without_segment(path)).removeprefix("#")
    if segment in _local:
        yield _local[segment]
        return
    name, _, number = segment.partition("@")
    try:
        if not number.isdigit():
            raise FileNotFoundError(path)
        shared = _attach(name)
        if int.from_bytes(_buffer(shared)[:8], "little") != int(number):
            raise FileNotFoundError(path)  # the sender has used it for another push since
    except (ValueError, OSError):
        raise AdapterError(
            f"{without_segment(path).removeprefix(PREFIX)!r} was pushed from memory and is not "
            "held any more, or its sender runs on another machine. Push it again; more adapters "
            "are held with a higher --max-cpu-loras."
        ) from None
    yield _read(shared)


def _attach(segment: str) -> shared_memory.SharedMemory:
    """Map the segment, and keep it until another one comes."""
    if segment not in _attached:
        shared = _map(segment)
        while _attached:
            _close(_attached.popitem()[1])
        _attached[segment] = shared
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


def _read(shared: shared_memory.SharedMemory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Views of the tensors in shared memory, and the config; see `_write`."""
    import torch

    buffer = _buffer(shared)
    length = int.from_bytes(buffer[8:16], "little")
    config, table = json.loads(bytes(buffer[16 : 16 + length]))
    start, whole = _aligned(16 + length), torch.frombuffer(buffer, dtype=torch.uint8)
    tensors = {}
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


def load(worker_manager: Any, request: Any) -> Any:
    """Read a pushed adapter as vLLM's `_load_adapter` reads one from a folder.

    Args:
        worker_manager: vLLM's `WorkerLoRAManager`.
        request: the LoRARequest; its path has a segment.

    Returns:
        vLLM's `LoRAModel`, fitted to the model.

    Raises:
        AdapterError: it does not fit.
    """
    from ..fitting.fit import fit

    with opened(request.lora_path) as (tensors, config):
        lora = from_tensors(worker_manager, request.lora_int_id, tensors, config)
        fit(worker_manager._adapter_manager, lora)
        return lora


def from_tensors(
    worker_manager: Any, lora_id: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> Any:
    """Make vLLM's `LoRAModel` of tensors in memory; `fit` is still to be called."""
    from vllm.lora.peft_helper import PEFTHelper

    from ..fitting.read import read

    manager, limits = worker_manager._adapter_manager, worker_manager.lora_config
    helper = PEFTHelper.from_dict(config)
    try:
        helper.validate_legal(limits)
    except ValueError as error:
        limit = limits.max_lora_rank
        ranks = {k: t.shape[-2] for k, t in tensors.items() if "lora_A" in k and t.ndim > 1}
        worst = max(ranks, key=lambda key: ranks[key], default="")
        if "max_lora_rank" in str(error) and ranks and ranks[worst] > limit:
            raise AdapterError(rank_text(worst, ranks[worst], limit)) from error
        raise AdapterError(str(error)) from error
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    return read(
        worker_manager._lora_model_cls,
        None,
        lora_model_id=lora_id,
        tensors=tensors,
        peft_helper=helper,
        device="cpu",
        dtype=limits.lora_dtype,
        model_vocab_size=worker_manager.vocab_size,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )


def keep_old_mapper_name(model: Any) -> None:
    """Let the model's weights mapper answer to a name that it had up to vLLM 0.28.

    verl up to 0.9.1 asks for `get_unstacked_mapper`, which is `get_rename_mapper` since 0.29, and
    its push fails with an AttributeError otherwise.

    Args:
        model: vLLM's model.
    """
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    if hasattr(mapper, "get_rename_mapper") and not hasattr(mapper, "get_unstacked_mapper"):
        object.__setattr__(mapper, "get_unstacked_mapper", mapper.get_rename_mapper)
