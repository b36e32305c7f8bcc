"""vllm/plugins/lora_resolvers/filesystem_resolver.py: finds an adapter by a model's name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..log import get_logger
from ..patching import Hook


def _resolve_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def resolve_lora(self: Any, base_model_name: str, lora_name: str) -> Any:
        root = os.path.abspath(self.lora_cache_dir)
        # By name, not by what links lead to: an adapter in the folder may be a link.
        path = os.path.normpath(os.path.join(root, lora_name))
        if os.path.dirname(path) != root and not path.startswith(os.path.join(root, "")):
            get_logger(__name__).warning(
                "The model name %r leads out of VLLM_LORA_RESOLVER_CACHE_DIR and is refused.",
                lora_name,
            )
            return None
        return await original(self, base_model_name, lora_name)

    return resolve_lora


HOOKS = (
    Hook(
        feature="safe-loading",
        target="vllm.plugins.lora_resolvers.filesystem_resolver:FilesystemResolver.resolve_lora",
        make=_resolve_lora,
        releases=">=0.29,<0.34",
        why="a client can have the server read any folder, by a model name with .. or an absolute "
        "path",
        upstream="",
        until="upstream refuses names that lead out of VLLM_LORA_RESOLVER_CACHE_DIR",
    ),
)
