"""vllm/v1/core/kv_cache_utils.py"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _gen_lora_extra_hash_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    if "lora_path" in inspect.getsource(original):
        return original  # 0.31 and later

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
        releases=">=0.29,<0.34",
        why="cached prefixes of an adapter are found by its name alone, so new weights under an "
        "old name are answered from the old ones' cache",
        upstream="https://github.com/vllm-project/vllm/blob/v0.31.0/vllm/v1/core/kv_cache_utils.py",
        until="0.31, which adds the path",
    ),
)
