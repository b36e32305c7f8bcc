"""A layer's experts are made: as without LoRA where no adapter may target them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..log import get_logger
from ..store import targets
from .lora_off import hidden

ERRORS = (AssertionError, NotImplementedError, ValueError)


def make(layer: str, build: Callable[[], None], moe_config: Any = None) -> None:
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
    if targets.may_target(config, layer):
        return _explained(layer, build, config, moe_config)
    try:
        with hidden(config, moe_config):
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
    return _say(targets.flagged(config.lora_config))


@functools.cache
def _say(flagged: bool) -> None:
    """Once a process."""
    why = f"{targets.FLAG} leaves them out" if flagged else "no adapter targets them"
    get_logger(__name__).info("Routed experts run without LoRA: %s", why)


def _explained(layer: str, build: Callable[[], None], config: Any, moe_config: Any) -> None:
    try:
        return build()
    except ERRORS as error:
        if moe_config is None:
            raise
        try:
            with hidden(config, moe_config):
                build()
        except Exception:
            raise error from None  # not LoRA's fault
        reason = str(error).rstrip(". ") or "an assertion failed"
        raise NotImplementedError(
            f"{layer}: {reason}. Without LoRA vLLM runs these experts. {targets.cure(moe_config)}"
        ) from error
