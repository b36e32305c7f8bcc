"""Adapters that come from a trainer's memory, and how they get into vLLM's processes.

vLLM names an adapter by a path. The path of a pushed adapter is `PREFIX` and its name. To load a
version of it, "#", the name of a segment, "@" and a number are appended. A segment has the
adapter's tensors: it is shared memory, which every process of the machine can map, or an entry of
this process. Nothing is written to a file.

Both sides keep one segment for the next push, because to get memory from the system takes several
times as long as to copy into it. The number says which push the content is of.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..adapters.errors import AdapterError, rank_text
from . import segment

if TYPE_CHECKING:
    import torch

    from ..fitting.memory import UsedAgain

PREFIX = "vllm-moe-lora-memory:/"
WORKER = f"{__name__.removesuffix('.loading.memory')}.rl.Worker"
OFF = (
    "this engine takes no adapters from memory. Start it with "
    f"worker_extension_cls={WORKER!r} (--worker-extension-cls {WORKER})."
)

_local: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
_numbers = itertools.count(1)
_staging: UsedAgain | None = None  # of the worker
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
        own = f"local-{secrets.token_hex(8)}"
        _local[own] = {k: t.detach().cpu() for k, t in tensors.items()}, config
        try:
            yield f"{path_of(name)}#{own}"
        finally:
            del _local[own]
        return
    from ..fitting.memory import PausedGC

    number = next(_numbers)
    with PausedGC():
        shared = segment.write(tensors, config, number)
    try:
        yield f"{path_of(name)}#{shared.name}@{number}"
    except BaseException:
        segment.delete(shared)  # somebody may still read it
        raise
    segment.keep(shared)


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
    where = path.removeprefix(without_segment(path)).removeprefix("#")
    if where in _local:
        yield _local[where]
        return
    name, _, number = where.partition("@")
    try:
        if not number.isdigit():
            raise FileNotFoundError(path)
        attached = segment.attach(name)
        if attached.number() != int(number):
            raise FileNotFoundError(path)  # the sender has used it for another push since
    except (ValueError, OSError):
        raise AdapterError(
            f"{without_segment(path).removeprefix(PREFIX)!r} was pushed from memory and is not "
            "held any more, or its sender runs on another machine. Push it again; more adapters "
            "are held with a higher --max-cpu-loras."
        ) from None
    yield attached.read()


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
    from ..fitting.memory import PausedGC, UsedAgain

    global _staging
    _staging = _staging or UsedAgain()
    with PausedGC(), _staging.adapter(), opened(request.lora_path) as (tensors, config):
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
