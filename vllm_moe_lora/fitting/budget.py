"""Limits the memory that adapters' factors for routed experts take.

Where slots have an adapter's own rank (CPU), an adapter takes memory when it is loaded, and no
sooner. VLLM_MOE_LORA_MEMORY says how much all loaded adapters may take together. Where factors are
in pages (GPU), it says how much those may take that are in slots.
"""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import envs
from ..adapters.errors import AdapterError
from ..kernels.paged_stack import pages_for
from ..kernels.slot_stack import SlotStack, nbytes

Factors = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # lora_a, lora_b of one layer
FULL = "allows are taken"  # in the message of an adapter for which others have to make room
_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}
_VALUE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def limit(value: str, total: int) -> int:
    """Return the bytes that a value of VLLM_MOE_LORA_MEMORY means.

    Args:
        value: a share of the memory, as 0.25, or a size, as 8GiB or 500M (powers of 1024).
        total: the memory of the device, bytes.

    Raises:
        ValueError: it is neither.
    """
    found = _VALUE.fullmatch(value.strip())
    if found is None:
        raise ValueError(
            f"VLLM_MOE_LORA_MEMORY={value!r}: use a share of the memory, as 0.25, or a size, "
            "as 8GiB"
        )
    number, unit = float(found[1]), found[2].lower()
    if not unit:
        return int(number * total) if number <= 1 else int(number)
    return int(number * 2.0 ** _UNITS[unit])


class Budget:
    """The adapters of one worker that take memory for routed experts.

    Args:
        limit: bytes that they may take together.
        value: of the variable, for messages.
    """

    _others = "in memory"  # which adapters take memory from a new one

    def __init__(self, limit: int, value: str) -> None:
        self.limit, self.value = limit, value
        self.refuses = True
        self._adapters: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # adapters are staged in a thread

    def with_layer(self, size: int, factors: Factors) -> int:
        """Return the size of an adapter whose layers so far have ``size``, with one layer more.

        Args:
            size: bytes.
            factors: the lora_a and lora_b of the layer, staged.
        """
        return size + size_of(factors)

    def expected(self, size: int, count: int, layers: int) -> int:
        """Return the size of an adapter of ``layers`` layers, of which ``count`` have ``size``."""
        return size * layers // count

    def taken(self, lora_id: int | None = None) -> tuple[int, int]:
        """Return the bytes that are taken for an adapter, and how many others take them.

        Args:
            lora_id: of the adapter, which may have an earlier version.
        """
        sizes = [size for _, size in self._in_memory()]
        return sum(sizes), len(sizes)

    def _in_memory(self) -> list[tuple[Any, int]]:
        with self._lock:
            return list(self._adapters.items())

    def check(self, size: int, lora_id: int | None = None) -> None:
        """Refuse an adapter that does not fit beside those that are in memory.

        Args:
            size: its bytes.
            lora_id: its id.

        Raises:
            AdapterError: the text says whether others could make room (`FULL`).
        """
        if not self.refuses or size + self.taken(lora_id)[0] <= self.limit:
            return
        gc.collect()  # what was removed may still be there
        taken, count = self.taken(lora_id)
        if size + taken <= self.limit:
            return
        need = f"its factors for routed experts take about {mib(size)} MiB"
        of = f"the {mib(self.limit)} MiB that VLLM_MOE_LORA_MEMORY={self.value}"
        if size > self.limit:
            raise AdapterError(f"{need}, more than {of} allows. Raise it.")
        raise AdapterError(
            f"{need}, but {mib(taken)} of {of} {FULL} by {count} adapters {self._others}. Raise "
            "it, or remove an adapter."
        )

    def add(self, lora: Any, size: int) -> None:
        """Count an adapter, as long as it exists.

        Args:
            lora: vLLM's `LoRAModel`.
            size: its bytes.
        """
        with self._lock:
            self._adapters[lora] = size


class PageBudget(Budget):
    """Admits only adapters that fit into the pages of a GPU, whichever of them run together.

    An adapter takes pages while it is in a slot. Which adapters these are, is up to vLLM's
    scheduler, which knows of slots only. So the largest ones have to fit together.

    Args:
        blocks: how many times 8 ranks there are pages for, in each layer.
        block_bytes: bytes of the pages for 8 ranks, in all layers.
        slots: --max-loras.
        value: of the variable, for messages.
    """

    _others = "that may run with it"

    def __init__(self, blocks: int, block_bytes: int, slots: int, value: str) -> None:
        super().__init__(blocks * block_bytes, value)
        self._block_bytes, self._slots = block_bytes, slots

    def with_layer(self, size: int, factors: Factors) -> int:
        """See `Budget`. All layers have as many pages as the one with the highest rank needs."""
        rank = max(one.shape[1] for one in factors[0])
        return max(size, pages_for(rank) * self._block_bytes)

    def expected(self, size: int, count: int, layers: int) -> int:
        """See `Budget`."""
        return size

    def taken(self, lora_id: int | None = None) -> tuple[int, int]:
        """See `Budget`. These are the others that may be in slots with the adapter."""
        sizes = sorted(size for lora, size in self._in_memory() if lora.id != lora_id)
        others = sizes[::-1][: self._slots - 1]
        return sum(others), len(others)


def mib(size: int) -> str:
    """Return a number of bytes in MiB, for messages."""
    return f"{size / 2**20:,.1f}"


def budget_of(manager: Any) -> Budget | None:
    """Return the budget of a worker; None where dense slots are allocated in advance.

    That of pages is made with them (layers/gpu/pages.py).

    Args:
        manager: vLLM's `LoRAModelManager`.
    """
    if not hasattr(manager, "moe_lora_budget"):
        stacks = (getattr(m, "w2_lora_a_stacked", (None,)) for m in manager.modules.values())
        manager.moe_lora_budget = None
        if any(isinstance(one[0], SlotStack) for one in stacks):
            from vllm.platforms import current_platform

            value = str(envs.get("VLLM_MOE_LORA_MEMORY"))
            total = current_platform.get_device_total_memory()
            manager.moe_lora_budget = Budget(limit(value, total), value)
    found: Budget | None = manager.moe_lora_budget
    return found


@contextmanager
def unlimited(manager: Any) -> Iterator[None]:
    """Refuse nothing inside the block: nobody could be told, and the engine would stop."""
    budget = budget_of(manager)
    if budget is None:
        yield
        return
    budget.refuses = False
    try:
        yield
    finally:
        budget.refuses = True


def size_of(factors: Factors) -> int:
    """Return the bytes of the lora_a and lora_b of one layer."""
    distinct = {id(one): one for side in factors for one in side}
    return sum(map(nbytes, distinct.values()))
