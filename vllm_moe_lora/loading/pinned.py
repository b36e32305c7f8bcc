"""Lets a batch have the places of pinned adapters where it needs them.

vLLM's scheduler takes up to max_loras adapters into a batch. It does not know that pinned adapters
have slots, and places in CPU memory, too. A batch that needs more than are left would stop the
engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def places_for(manager: Any, batch: set[int]) -> Iterator[None]:
    """Give a batch its places inside the block, in which its adapters are loaded and activated.

    A pinned adapter that loses its place is kept by loading/background.py if it leaves memory, and
    pinned again when a batch has it.

    Args:
        manager: vLLM's `LRUCacheLoRAModelManager`.
        batch: ids of the batch's adapters, at most as many as there are slots.
    """
    slots, memory = manager._active_adapters, manager._registered_adapters
    lost: set[int] = manager.__dict__.setdefault("moe_lora_lost_pins", set())
    for cache in (slots, memory):
        pinned = [number for number in cache.order if number in cache.pinned_items]
        short = len(batch.union(pinned)) - int(cache.capacity)
        for number in [number for number in pinned if number not in batch][: max(short, 0)]:
            cache._unpin(number)
            lost.add(number)
    yield
    for number in batch & lost:
        slots.pin(number)
        memory.pin(number)
        lost.remove(number)


def forget(manager: Any, number: int) -> None:
    """An adapter was removed by the caller: it is not pinned any more."""
    manager.__dict__.get("moe_lora_lost_pins", set()).discard(number)
