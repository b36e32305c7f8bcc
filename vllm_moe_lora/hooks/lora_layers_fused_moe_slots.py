"""vllm/lora/layers/fused_moe.py: what is told when a slot changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.lora.layers.fused_moe"


def _tell(wrapper: Any, event: str, *args: Any) -> None:
    """Call ``event`` on the wrapped experts when they keep a form of their own of the slots."""
    import torch

    handler = getattr(wrapper._moe_kernel.fused_experts, event, None)
    if handler is not None:
        # Inside a step, a tensor made here could not be written to outside of steps later.
        with torch.inference_mode(False), torch.no_grad():
            handler(*args)


def _set_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        original(self, index, lora_a, lora_b)
        rank = max(a.shape[1] for a in lora_a if a is not None)
        _tell(self, "slot_written", self, index, rank)

    return set_lora


def _reset_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def reset_lora(self: Any, index: int) -> None:
        original(self, index)
        _tell(self, "slot_cleared", index)

    return reset_lora


def _set_lora_kernels(original: Callable[..., Any]) -> Callable[..., Any]:
    # In a patched tree _set_lora's seam stands above this one's, and asks for the name.
    @functools.wraps(original)
    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        from ..layers.gpu.moe_kernels import slot_written

        original(self, index, lora_a, lora_b)
        slot_written(self, index)

    return set_lora


def _reset_lora_kernels(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reset_lora(self: Any, index: int) -> None:
        from ..layers.gpu.moe_kernels import slot_cleared

        original(self, index)
        slot_cleared(self, index)

    return reset_lora


_COMMON: dict[str, Any] = {
    "feature": "cpu-experts",
    "releases": ">=0.30,<0.34",
    "platforms": ("cpu",),
    "upstream": "",
    "until": "upstream's CPU experts support LoRA",
    "why": "the CPU experts keep the factors inside their packed weights and must learn of "
    "every change of a slot; upstream has no such call, having no such experts",
    "layers": True,
}

_KERNELS: dict[str, Any] = {
    **_COMMON,
    "feature": "moe-kernels",
    "releases": ">=0.28,<0.34",
    "platforms": ("cuda",),  # ROCm calls itself that, too
    "until": "upstream's kernels are as fast as ours, see lora_punica_gpu.py",
    "why": "our kernels do no work past a factor's own rank, and must learn of every change of a "
    "slot",
}

HOOKS = (
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.set_lora", make=_set_lora, **_COMMON),
    Hook(target=f"{_FILE}:FusedMoE3DWithLoRA.set_lora", make=_set_lora, **_COMMON),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.reset_lora", make=_reset_lora, **_COMMON),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.set_lora", make=_set_lora_kernels, **_KERNELS),
    Hook(target=f"{_FILE}:FusedMoE3DWithLoRA.set_lora", make=_set_lora_kernels, **_KERNELS),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.reset_lora", make=_reset_lora_kernels, **_KERNELS),
)
