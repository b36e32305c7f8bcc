"""Keeps the loaded adapters of a MoE model when its base weights are loaded again.

An adapter is a difference to the base weights, so it also applies to new ones: that is what a
trainer expects which syncs base weights and adapters. vLLM removes all adapters after
`reload_weights`, and those that came from memory would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def fill_slots_again(manager: Any) -> None:
    """Write the factors of all active adapters into their slots again.

    The memory of the slots, and what experts keep of it, may have been lost with the base weights.

    Args:
        manager: vLLM's `LoRAModelManager`.
    """
    active = manager._active_adapters
    pinned = set(getattr(active, "pinned_items", ()))
    for lora_id in list(getattr(active, "order", active)):  # least recently used first
        manager.deactivate_adapter(lora_id)
        manager.activate_adapter(lora_id)
        if lora_id in pinned:
            manager._pin_lora_in_gpu_cache(lora_id)
    # Adapters may have changed their slots, which vLLM reads only if the batch has changed.
    manager._last_mapping = None


def checkpoint_name(name: str) -> str:
    """The checkpoint's name of a weight: PEFT's has "base_layer" in it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def suspend_experts(model: Any) -> None:
    """Bring CPU experts' weights into upstream's form, see `layers/cpu/experts.py`."""
    for experts in experts_of(model):
        if hasattr(experts, "suspend"):
            experts.suspend()


def experts_of(model: Any) -> Iterator[Any]:
    """The experts objects (vLLM's `FusedMoEExperts`) of all MoE layers of a model."""
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "_parameters") and len(module._parameters):
            yield kernel.fused_experts


def process_again(method: Any, layer: Any) -> None:
    """Process the weights of a MoE layer that a LoRA layer has wrapped, after they were loaded.

    Some methods (INT4) make a new kernel then. It takes the place of the old one, with its
    adapters.

    Args:
        method: vLLM's `FusedMoEModularMethod`.
        layer: the module whose quant_method it is.
    """
    if not list(layer.parameters(recurse=False)):
        return  # vLLM's LoRA layer around the experts has the same quant_method
    inner = method.old_quant_method
    old = inner.moe_kernel
    inner.process_weights_after_loading(layer)
    new = inner.moe_kernel
    if new is old:
        return
    for before, now in (
        (method.moe_kernel.fused_experts, new.fused_experts),
        (method.moe_kernel.prepare_finalize, new.prepare_finalize),
    ):
        context = getattr(before, "_lora_context", None)
        if context is not None:
            now.set_lora_context(context)
        if hasattr(before, "take_slots"):
            now.take_slots(before)
    method.moe_kernel.impl = new.impl
    inner.moe_kernel = method.moe_kernel
    method.moe_quant_config = inner.moe_quant_config
