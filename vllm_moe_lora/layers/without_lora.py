"""Builds a layer's routed experts without LoRA if no adapter may target them.

With --enable-lora vLLM gives the experts of every layer a backend that supports LoRA, even if
--lora-target-modules leaves the experts out. Such a backend may be slower, or there may be none, so
that the start fails. `build_experts` runs the constructor of a layer's experts with LoRA turned off
in the config, so vLLM chooses the backend that it uses without LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..log import get_logger
from ..targets import target_modules

# What vLLM raises if no backend fits.
ERRORS = (AssertionError, NotImplementedError, ValueError)


@contextmanager
def lora_off(moe_config: Any) -> Iterator[None]:
    """Set ``is_lora_enabled`` of a layer's `FusedMoEConfig` to False inside the block.

    vLLM then chooses the backend that it would choose without LoRA.
    """
    before, moe_config.is_lora_enabled = moe_config.is_lora_enabled, False
    try:
        yield
    finally:
        moe_config.is_lora_enabled = before


@contextmanager
def _engine_without_lora(config: Any, moe_config: Any = None) -> Iterator[None]:
    """Hide LoRA from a layer that is built inside the block.

    Args:
        config: the engine's `VllmConfig`. Its ``lora_config`` is None inside the block.
        moe_config: the layer's `FusedMoEConfig`. Its ``is_lora_enabled`` is False inside the block,
            and stays False after it.
    """
    if moe_config is not None:
        moe_config.is_lora_enabled = False
        moe_config.moe_lora_left_out = True  # for hooks/fused_moe_unquantized_fused_moe_method.py
    before, config.lora_config = config.lora_config, None
    try:
        yield
    finally:
        config.lora_config = before


def build_experts(layer: str, build: Callable[[], None], moe_config: Any = None) -> None:
    """Call ``build``, with LoRA turned off if no adapter may target this layer's experts.

    Args:
        layer: the layer's name ("model.layers.0.mlp.experts"), "" if it has none.
        build: the constructor of the experts. It chooses their backend and creates their weights.
        moe_config: the layer's `FusedMoEConfig`, if it exists before ``build`` runs.

    Raises:
        NotImplementedError: vLLM has a backend for these experts without LoRA, but none with LoRA.
            The text names the layer, vLLM's reason and the flag that helps.
    """
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    if config.lora_config is None:
        return build()
    if target_modules.may_target(config, layer):
        return _build_with_lora(layer, build, config, moe_config)
    try:
        with _engine_without_lora(config, moe_config):
            build()
    except ERRORS as error:
        if moe_config is None:
            raise
        # vLLM has no backend for them without LoRA. One of our experts classes with LoRA may still
        # run them, such as INT4 on a CPU without AMX.
        moe_config.is_lora_enabled = True
        moe_config.moe_lora_left_out = False
        try:
            return build()
        except Exception:
            raise error from None
    return _log_once(target_modules.flagged(config.lora_config))


@functools.cache
def _log_once(flagged: bool) -> None:
    """Say once per process that experts run without LoRA, and why."""
    why = f"{target_modules.FLAG} leaves them out" if flagged else "no adapter targets them"
    get_logger(__name__).info("Routed experts run without LoRA: %s", why)


def _build_with_lora(layer: str, build: Callable[[], None], config: Any, moe_config: Any) -> None:
    """Call ``build``. If it only fails because of LoRA, raise an error that says so."""
    try:
        return build()
    except ERRORS as error:
        if moe_config is None:
            raise
        try:
            with _engine_without_lora(config, moe_config):
                build()
        except Exception:
            raise error from None  # it fails without LoRA, too
        reason = str(error).rstrip(". ") or "an assertion failed"
        raise NotImplementedError(
            f"{layer}: {reason}. Without LoRA vLLM runs these experts. "
            f"{target_modules.cure(moe_config)}"
        ) from error
