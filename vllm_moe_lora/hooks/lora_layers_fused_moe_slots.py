"""vllm/lora/layers/fused_moe.py: reacts when the adapter in a slot changes.

`set_lora` writes an adapter into a slot of a LoRA layer, and `reset_lora` clears a slot. The CPU
experts (layers/cpu) and our Triton kernels (layers/gpu/moe_kernels.py) keep data of their own for
each slot. These hooks update it. And a slot takes the memory of its adapter's own rank: on a CPU,
and on a GPU where our kernels serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.lora.layers.fused_moe"


def _notify_experts(wrapper: Any, event: str, *args: Any) -> None:
    """Call the method ``event`` of the wrapped experts, if they have it (`CPULoRAExperts` does)."""
    import torch

    handler = getattr(wrapper._moe_kernel.fused_experts, event, None)
    if handler is not None:
        # vLLM may call this in inference mode. A tensor that is created there cannot be changed
        # outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            handler(*args)


def _create(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the stacks of lora_a or lora_b as `SlotStack`, for experts that read these."""

    @functools.wraps(original, assigned=("__name__",))
    def create_lora_weights(self: Any, *args: Any, **more: Any) -> None:
        from ..layers.cpu.experts import CPULoRAExperts
        from ..layers.cpu.slots import created

        # A layer from torch_experts.init_wrapper has no kernel, and reads a `SlotStack`, too.
        kernel = getattr(self, "_moe_kernel", None)
        if kernel is not None and not isinstance(kernel.fused_experts, CPULoRAExperts):
            return original(self, *args, **more)
        with created(self):
            return original(self, *args, **more)

    return create_lora_weights


def _create_pages(original: Callable[..., Any]) -> Callable[..., Any]:
    # Upstream creates lora_b after lora_a. Then the sizes of all are known.
    is_last = original.__name__ == "_create_lora_b_weights"

    @functools.wraps(original, assigned=("__name__",))
    def create_lora_weights(self: Any, *args: Any, **more: Any) -> None:
        from ..kernels.writable_slots import without_memory
        from ..layers.gpu import pages

        if not pages.planned():
            return original(self, *args, **more)
        with without_memory(self):
            original(self, *args, **more)
        return pages.allocate(self) if is_last else None

    return create_lora_weights


def _set_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        original(self, index, lora_a, lora_b)
        rank = max(a.shape[1] for a in lora_a if a is not None)
        _notify_experts(self, "slot_written", self, index, rank)

    return set_lora


def _reset_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def reset_lora(self: Any, index: int) -> None:
        original(self, index)
        _notify_experts(self, "slot_cleared", index)

    return reset_lora


def _set_lora_kernels(original: Callable[..., Any]) -> Callable[..., Any]:
    # In a patched tree the decorator of _set_lora is applied to this function, and finds its hook
    # by the function's name. So the name must be upstream's.
    @functools.wraps(original, assigned=("__name__",))
    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        from ..layers.gpu.moe_kernels import slot_written

        original(self, index, lora_a, lora_b)
        slot_written(self, index)

    return set_lora


def _reset_lora_kernels(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, assigned=("__name__",))
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
    "why": "the CPU experts with LoRA keep the factors in their packed weights, and upstream does "
    "not notify experts when a slot changes",
    "layers": True,
}

_KERNELS: dict[str, Any] = {
    **_COMMON,
    "feature": "moe-kernels",
    "releases": ">=0.28,<0.34",
    "platforms": ("cuda",),  # the device type of ROCm is "cuda", too
    "until": "upstream's kernels are as fast as ours",
    "why": "our kernels skip the unused part of max_lora_rank, so they must know the rank of the "
    "adapter in each slot",
}

_STACKS: dict[str, Any] = {
    "feature": "cpu-experts",
    "make": _create,
    "platforms": ("cpu",),
    "upstream": "",
    "until": "upstream allocates the factors of an adapter when it is loaded",
    "why": "factors are allocated for max_loras adapters of max_lora_rank, whether they are there "
    "or not, and each adapter is copied there although its tensors stay in memory",
    "layers": True,
}

_PAGES: dict[str, Any] = {
    **_KERNELS,
    "until": "upstream allocates the factors of an adapter when it is loaded",
    "why": "factors are allocated for max_loras adapters of max_lora_rank, whether they are there "
    "or not: 198 GiB for 32 adapters of rank 64 on Qwen3-30B-A3B. Our kernels read pages of the "
    "adapters' own ranks",
}

_CREATE = (
    "FusedMoEWithLoRA._create_lora_a_weights",
    "FusedMoEWithLoRA._create_lora_b_weights",
    "FusedMoE3DWithLoRA._create_lora_b_weights",
)

HOOKS = (
    *(
        Hook(target=f"{_FILE}:{name}", releases=releases, **_STACKS)
        for releases in (">=0.24,<0.28", ">=0.30,<0.34")  # between them CPU experts take no LoRA
        for name in _CREATE
    ),
    *(Hook(target=f"{_FILE}:{name}", make=_create_pages, **_PAGES) for name in _CREATE),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.set_lora", make=_set_lora, **_COMMON),
    Hook(target=f"{_FILE}:FusedMoE3DWithLoRA.set_lora", make=_set_lora, **_COMMON),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.reset_lora", make=_reset_lora, **_COMMON),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.set_lora", make=_set_lora_kernels, **_KERNELS),
    Hook(target=f"{_FILE}:FusedMoE3DWithLoRA.set_lora", make=_set_lora_kernels, **_KERNELS),
    Hook(target=f"{_FILE}:FusedMoEWithLoRA.reset_lora", make=_reset_lora_kernels, **_KERNELS),
)
