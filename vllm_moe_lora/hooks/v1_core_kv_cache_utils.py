"""vllm/v1/core/kv_cache_utils.py: the keys under which cached prefixes are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _gen_lora_extra_hash_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    def _gen_lora_extra_hash_keys(request: Any) -> list[Any]:
        keys = list(original(request))
        if request.lora_request:
            keys.append(("lora path", request.lora_request.lora_path))
        return keys

    return _gen_lora_extra_hash_keys


HOOKS = (
    Hook(
        feature="safe-loading",
        target="vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        make=_gen_lora_extra_hash_keys,
        releases=">=0.29,<0.31",
        why="the cached prefixes of an adapter are found by its name only, so if new weights are "
        "loaded under the same name, requests use prefixes that were computed with the old ones",
        upstream="https://github.com/vllm-project/vllm/blob/v0.31.0/vllm/v1/core/kv_cache_utils.py",
        until="0.31, which adds the path of the adapter to the keys",
    ),
)
