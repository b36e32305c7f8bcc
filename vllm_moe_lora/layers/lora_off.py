"""A choice of upstream's, made as it would be without LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lora_off(config: Any) -> Iterator[None]:
    """While this lasts, the layer's `FusedMoEConfig` says that there is no LoRA."""
    asked, config.is_lora_enabled = config.is_lora_enabled, False
    try:
        yield
    finally:
        config.is_lora_enabled = asked
