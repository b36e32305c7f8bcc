"""Builds a layer's routed experts without LoRA if no adapter may target them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..log import get_logger
from ..targets import target_modules

ERRORS = (AssertionError, NotImplementedError, ValueError)


@contextmanager
def lora_off(moe_config: Any) -> Iterator[None]:
    """Set ``is_lora_enabled`` of a layer's `FusedMoEConfig` to False inside the block.

    vLLM then chooses the backend that it would choose without LoRA.
    """
    asked, moe_config.is_lora_enabled = moe_config.is_lora_enabled, False
    try:
        yield
    finally:
        moe_config.is_lora_enabled = asked


@contextmanager
def _engine_without_lora(config: Any, moe_config: Any = None) -> Iterator[None]:
    """Hide LoRA from a layer that is built inside the block.

    Args:
        config: the engine's `VllmConfig`; its ``lora_config`` comes back after the block.
        moe_config: the layer's `FusedMoEConfig`; its ``is_lora_enabled`` stays False.
    """
    if moe_config is not None:
        moe_config.is_lora_enabled = False
    asked, config.lora_config = config.lora_config, None
    try:
        yield
    finally:
        config.lora_config = asked


def build_experts(layer: str, build: Callable[[], None], moe_config: Any = None) -> None:
    """Call ``build``, which chooses the backend of the experts and makes their weights.

    Args:
        layer: the layer's name, "" where it has none.
        moe_config: the layer's `FusedMoEConfig` if that exists already.

    Raises:
        NotImplementedError: vLLM runs these experts without LoRA and not with it; names the layer,
            upstream's reason and the flag that helps.
    """
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    if config.lora_config is None:
        return build()
    if target_modules.may_target(config, layer):
        return _explained(layer, build, config, moe_config)
    try:
        with _engine_without_lora(config, moe_config):
            build()
    except ERRORS as error:
        if moe_config is None:
            raise
        # Without LoRA vLLM has nothing for them here, and with it perhaps we have.
        moe_config.is_lora_enabled = True
        try:
            return build()
        except Exception:
            raise error from None
    return _say(target_modules.flagged(config.lora_config))


@functools.cache
def _say(flagged: bool) -> None:
    """Once a process."""
    why = f"{target_modules.FLAG} leaves them out" if flagged else "no adapter targets them"
    get_logger(__name__).info("Routed experts run without LoRA: %s", why)


def _explained(layer: str, build: Callable[[], None], config: Any, moe_config: Any) -> None:
    try:
        return build()
    except ERRORS as error:
        if moe_config is None:
            raise
        try:
            with _engine_without_lora(config, moe_config):
                build()
        except Exception:
            raise error from None  # not LoRA's fault
        reason = str(error).rstrip(". ") or "an assertion failed"
        raise NotImplementedError(
            f"{layer}: {reason}. Without LoRA vLLM runs these experts. "
            f"{target_modules.cure(moe_config)}"
        ) from error
