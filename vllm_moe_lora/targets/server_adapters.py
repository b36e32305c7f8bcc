"""Reads the adapters that a server is started with, before its engine is built.

If none of them has LoRA on routed experts, and no other adapter can be loaded later, the routed
experts run without LoRA. The user then need not set --lora-target-modules.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..adapters import folder
from ..adapters.errors import AdapterError
from ..adapters.names import touches_experts
from ..log import get_logger
from .target_modules import NO_EXPERTS_KEY, SERVER_FLAG

logger = get_logger(__name__)


def record_no_experts(args: Any, engine_args: Any) -> None:
    """Record in ``engine_args`` that no adapter of this server targets routed experts.

    Nothing is recorded unless that is certain: the server has --lora-modules, all its adapters can
    be read here and none of them has LoRA on routed experts, and none can be added later.

    Args:
        args: the parsed arguments of ``vllm serve``.
        engine_args: vLLM's `EngineArgs` made from them. Its ``additional_config`` gets an entry
            `target_modules.NO_EXPERTS_KEY`, which reaches all processes of the engine.
    """
    lora_modules = getattr(args, "lora_modules", None)
    if not lora_modules or not engine_args.enable_lora:
        return
    if engine_args.__dict__.get("lora_target_modules") is not None:
        return  # the user's own setting decides
    if _can_get_more(args):
        return
    paths = [str(one.path) for one in lora_modules]
    mm = getattr(engine_args, "default_mm_loras", None) or {}
    if any(_may_have_experts(path) for path in (*paths, *mm.values())):
        return
    more = engine_args.additional_config or {}
    if isinstance(more, dict):
        engine_args.additional_config = {**more, NO_EXPERTS_KEY: True}
        logger.debug("No adapter of %s has LoRA on routed experts", SERVER_FLAG)


def _can_get_more(args: Any) -> bool:
    """Whether the engine may later get adapters that are not in ``args``."""
    from vllm import envs
    from vllm.lora.resolver import LoRAResolverRegistry

    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or LoRAResolverRegistry.get_supported_resolvers():
        return True
    if os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        return True  # the endpoint /collective_rpc can load adapters in the workers
    # Other nodes are started by commands of their own, which may have other adapters.
    counts = [getattr(args, name, None) for name in ("nnodes", "data_parallel_size")]
    return any(int(count or 0) > 1 for count in counts) or bool(getattr(args, "headless", False))


def _may_have_experts(path: str) -> bool:
    """Whether the adapter has LoRA on routed experts, or cannot be read here."""
    try:
        names = folder.tensors(Path(path).expanduser())
    except (AdapterError, OSError):
        return True
    return touches_experts(names)
