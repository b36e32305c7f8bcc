"""The adapters a server is started with, read before its engine is built."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..adapters import folder
from ..adapters.errors import AdapterError
from ..adapters.names import touches_experts
from ..log import get_logger
from .target_modules import DECLARED, KEY

logger = get_logger(__name__)


def note(args: Any, engine_args: Any) -> None:
    """Write into ``engine_args`` that no adapter of this server targets routed experts.

    It stays as it is unless that is certain: adapters are declared, all can be read here, and
    none can be added while the server runs.

    Args:
        args: of ``vllm serve``, parsed.
        engine_args: made of them; its ``additional_config`` is given a new entry.
    """
    declared = getattr(args, "lora_modules", None)
    if not declared or not _closed(args, engine_args):
        return
    mm = getattr(engine_args, "default_mm_loras", None) or {}
    if any(_may_have_experts(path) for path in (*_paths(declared), *mm.values())):
        return
    more = engine_args.additional_config or {}
    if isinstance(more, dict):
        engine_args.additional_config = {**more, KEY: True}
        logger.debug("No adapter of %s has routed experts", DECLARED)


def _closed(args: Any, engine_args: Any) -> bool:
    """Whether this process knows every adapter that its engines will ever be given."""
    from vllm import envs
    from vllm.lora.resolver import LoRAResolverRegistry

    if not engine_args.enable_lora or engine_args.__dict__.get("lora_target_modules") is not None:
        return False
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or LoRAResolverRegistry.get_supported_resolvers():
        return False
    if os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        return False  # /collective_rpc reaches the workers
    # Other nodes are started by commands of their own, which need not declare the same.
    several = ("headless", "nnodes", "data_parallel_size")
    return all(int(getattr(args, name, None) or 0) <= 1 for name in several[1:]) and not getattr(
        args, several[0], False
    )


def _paths(declared: Iterable[Any]) -> Iterator[str]:
    for one in declared:
        yield str(one.path)


def _may_have_experts(path: str) -> bool:
    """Whether the adapter has routed experts, or cannot be read here."""
    try:
        names = folder.tensors(Path(path).expanduser())
    except (AdapterError, OSError):
        return True
    return touches_experts(names)
