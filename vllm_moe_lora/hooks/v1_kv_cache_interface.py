"""vllm/v1/kv_cache_interface.py"""

from __future__ import annotations

from typing import Any

from ..patching import Hook


def _needs_kv_cache_zeroing(original: Any) -> Any:
    def needs_kv_cache_zeroing(self: Any) -> bool:
        return getattr(self, "moe_lora_zeroing", False) or bool(original.fget(self))

    return property(needs_kv_cache_zeroing, doc=original.__doc__)


HOOKS = (
    Hook(
        feature="isolation",
        target="vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing",
        make=_needs_kv_cache_zeroing,
        releases=">=0.29,<0.34",
        why="an adapter with large weights may overflow to NaN; a block of the KV cache that held "
        "its keys makes the next request that gets it NaN too, because 0 * NaN is NaN",
        upstream="",
        until="upstream clears recycled blocks, or reads no values behind a request's end",
    ),
)
