"""Seeded requests on a CPU, whose prompt is computed in several steps.

vLLM samples for them in each of these steps, drops the token, and sets the generator back by the
offset that it has on a GPU. A CPU's generator has no offset, and the engine would stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

# The state of a request's generator before the step's sampling; none before its first.
_before: WeakKeyDictionary[torch.Generator, torch.Tensor] = WeakKeyDictionary()


class _WithOffset:
    """A CPU's generator, which goes back to the state before this step's sampling."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        state = _before.get(self._generator)
        if state is None:
            self._generator.manual_seed(self._generator.initial_seed())
        else:
            self._generator.set_state(state)


@contextmanager
def offsets(batch: Any) -> Iterator[None]:
    """Inside the block, the generators of vLLM's `InputBatch` can be set back by one sampling."""
    generators = batch.generators
    batch.generators = {row: _WithOffset(one) for row, one in generators.items()}
    try:
        yield
    finally:
        batch.generators = generators
        for one in generators.values():
            _before[one] = one.get_state()
