"""Experts that vLLM moves between devices as the load asks (EPLB), without their factors."""

from __future__ import annotations

from typing import Any


def refuse(wrapper: Any) -> None:
    """
    Args:
        wrapper: a `FusedMoEWithLoRA` that is being made.

    Raises:
        NotImplementedError: its experts may move.
    """
    layer = wrapper.base_layer
    if not getattr(layer.moe_config.moe_parallel_config, "enable_eplb", False):
        return
    routed = getattr(layer, "routed_experts", layer)
    raise NotImplementedError(
        f"{getattr(routed, 'layer_name', '') or type(layer).__name__}: --enable-eplb moves "
        "experts between devices while the engine runs, and --enable-lora's factors stay where "
        "they are, so that adapters would be applied to the wrong experts. Start without "
        "--enable-eplb, without --enable-lora, or with --lora-target-modules that leave out the "
        "routed experts."
    )
