"""vllm/v1/engine/core.py: marks the KV cache of engines that run adapters on a MoE model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _get_kv_cache_configs(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_configs(vllm_config: Any, *args: Any, **more: Any) -> Any:
        configs = original(vllm_config, *args, **more)
        if vllm_config.lora_config is not None and vllm_config.model_config.is_moe:
            for config in configs:
                config.moe_lora_zeroing = True  # for hooks/v1_kv_cache_interface.py
        return configs

    return get_kv_cache_configs


def _collective_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, assigned=("__name__",))  # the core counts its parameters
    def collective_rpc(self: Any, *args: Any, **more: Any) -> Any:
        config = self.vllm_config
        if config.lora_config is None or not config.model_config.is_moe:
            return original(self, *args, **more)
        from ..loading import versions

        try:
            found = original(self, *args, **more)
        except Exception:
            with contextlib.suppress(Exception):
                versions.compare(self)
            raise
        versions.compare(self)
        return found

    return collective_rpc


HOOKS = (
    Hook(
        feature="safe-loading",
        target="vllm.v1.engine.core:EngineCore.collective_rpc",
        make=_collective_rpc,
        releases=">=0.29,<0.34",
        why="if a trainer replaces an adapter by a call to the workers, as verl does, requests use "
        "prefixes that were computed with the earlier one",
        upstream="https://github.com/vllm-project/vllm/issues/48297",
        until="upstream can load adapters from memory",
    ),
    Hook(
        feature="isolation",
        # In 0.33 it is defined in another module, but it is called by this name in all releases.
        target="vllm.v1.engine.core:get_kv_cache_configs",
        make=_get_kv_cache_configs,
        releases=">=0.29,<0.34",
        why="the hook of KVCacheConfig.needs_kv_cache_zeroing must know whether the engine runs "
        "adapters on a MoE model",
        upstream="",
        until="the hook of KVCacheConfig.needs_kv_cache_zeroing is deleted",
    ),
)
