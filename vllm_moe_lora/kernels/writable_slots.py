"""Lets vLLM's LoRA layer write slots that are no dense tensor, as if they were one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The stacks of vLLM's `FusedMoEWithLoRA` -> where a slot has the rank.
RANK_AXES = {"w13_lora_a_stacked": 1, "w13_lora_b_stacked": 2}
RANK_AXES |= {"w2_lora_a_stacked": 1, "w2_lora_b_stacked": 2}


@contextmanager
def without_memory(wrapper: Any) -> Iterator[None]:
    """Let vLLM's `FusedMoEWithLoRA` create stacks on torch's "meta" device, inside the block."""
    device, wrapper.device = wrapper.device, torch.device("meta")
    try:
        yield
    finally:
        wrapper.device = device


class WritableSlots(ABC):
    """One factor of a layer's experts, for all slots, which `set_lora` and `reset_lora` write."""

    def __getitem__(self, key: Any) -> Any:
        """Return a slot, or with slices, as vLLM's `set_lora` writes one, what has a `copy_`."""
        if isinstance(key, int):
            return self.slot(key)
        slot, *rest = key
        if any(isinstance(one, slice) for one in rest):
            return _Place(self, slot)
        return self.slot(slot)[tuple(rest)]

    def __setitem__(self, slot: int, value: int) -> None:
        """Empty a slot: vLLM's `reset_lora` sets it to 0.

        Raises:
            ValueError: ``value`` is something else.
        """
        if value != 0:
            raise ValueError(f"a slot takes a factor by copy_, not {value!r}")
        self.empty(slot)

    @abstractmethod
    def slot(self, slot: int) -> torch.Tensor:
        """Return the factor in a slot; zeros if it is empty."""

    @abstractmethod
    def write(self, slot: int, factor: torch.Tensor) -> None:
        """Put a factor into a slot, in place of what is there."""

    @abstractmethod
    def empty(self, slot: int) -> None:
        """Take the factor out of a slot."""


class _Place:
    """A slot of a `WritableSlots`, as vLLM's `set_lora` writes it."""

    def __init__(self, stack: WritableSlots, slot: int) -> None:
        self._stack, self._slot = stack, slot

    def copy_(self, factor: torch.Tensor, non_blocking: bool = False) -> None:
        """See `WritableSlots.write`."""
        self._stack.write(self._slot, factor)
