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


@contextmanager
def hidden(config: Any, moe_config: Any = None) -> Iterator[None]:
    """While this lasts the engine's `VllmConfig` has no LoRA; ``moe_config`` has none for good."""
    if moe_config is not None:
        moe_config.is_lora_enabled = False
    asked, config.lora_config = config.lora_config, None
    try:
        yield
    finally:
        config.lora_config = asked
