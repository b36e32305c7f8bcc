"""Ranks of a data-parallel group without requests: they keep their adapters.

Such a rank runs a dummy batch of one token whenever another rank has a batch, because its experts
compute tokens of that one. Upstream loads dummy adapters for each of them, and then removes all
adapters of the rank, those of the other rank's tokens among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def idle(runner: Any) -> Iterator[None]:
    """Mark a model runner while it runs the dummy batch of a rank without requests."""
    runner.moe_lora_idle = True
    try:
        yield
    finally:
        runner.moe_lora_idle = False


def is_idle(runner: Any) -> bool:
    """Whether the runner is in the block of `idle`."""
    return bool(getattr(runner, "moe_lora_idle", False))
