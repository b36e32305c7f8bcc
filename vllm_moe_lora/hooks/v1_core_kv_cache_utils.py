"""vllm/v1/core/kv_cache_utils.py: the keys under which cached prefixes are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _with_versions(original: Callable[..., Any]) -> Callable[..., Any]:
    def _gen_lora_extra_hash_keys(request: Any) -> list[Any]:
        found = list(original(request))
        if request.lora_request:
            from ..loading import versions

            found += versions.keys(request.lora_request.lora_int_id)
        return found

    return _gen_lora_extra_hash_keys


def _with_path_and_versions(original: Callable[..., Any]) -> Callable[..., Any]:
    with_versions = _with_versions(original)

    def _gen_lora_extra_hash_keys(request: Any) -> list[Any]:
        keys: list[Any] = with_versions(request)
        if request.lora_request:
            keys.append(("lora path", request.lora_request.lora_path))
        return keys

    return _gen_lora_extra_hash_keys


HOOKS = (
    Hook(
        feature="safe-loading",
        target="vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        make=_with_path_and_versions,
        releases=">=0.29,<0.31",
        why="the cached prefixes of an adapter are found by its name only, so if new weights are "
        "loaded under the same name, requests use prefixes that were computed with the old ones",
        upstream="https://github.com/vllm-project/vllm/blob/v0.31.0/vllm/v1/core/kv_cache_utils.py",
        until="0.31, which adds the path of the adapter to the keys",
    ),
    Hook(
        feature="safe-loading",
        target="vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        make=_with_versions,
        releases=">=0.31,<0.34",
        why="if a trainer replaces an adapter by a call to the workers, as verl does, requests use "
        "prefixes that were computed with the earlier one",
        upstream="https://github.com/vllm-project/vllm/issues/48297",
        until="upstream can load adapters from memory",
    ),
)
