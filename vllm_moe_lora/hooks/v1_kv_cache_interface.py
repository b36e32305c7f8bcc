"""vllm/v1/kv_cache_interface.py: clears blocks of the KV cache before they are used again."""

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
        why="with large weights in an adapter, keys and values may overflow to NaN. The next "
        "request that gets such a block of the KV cache becomes NaN, too: attention multiplies "
        "unused entries of the block with 0, and 0 * NaN is NaN",
        upstream="",
        until="upstream clears a block before it is used again, or never reads its unused entries",
    ),
)
