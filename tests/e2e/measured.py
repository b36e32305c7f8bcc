"""A child that prints what an engine's LoRA slots and weights really take, and its experts."""

from __future__ import annotations

import json

import torch
from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
from vllm.lora.model_manager import LoRAModelManager

from vllm_moe_lora.kernels.slot_stack import SlotStack
from vllm_moe_lora.tiny import engine

_made = LoRAModelManager.__init__


def _measured(self, *args, **more):
    _made(self, *args, **more)
    total = experts = 0
    for module in self.modules.values():
        moe = isinstance(module, FusedMoEWithLoRA)
        names = [n for n in vars(module) if n.endswith("_stacked")]
        if moe:  # its lora_a_stacked are views of the others
            names = [n for n in names if n.startswith("w")]
        found = [value for n in names for value in getattr(module, n) if value is not None]
        # The experts' slots take memory only for what an adapter has: here what they may hold.
        found = [t for t in found if isinstance(t, torch.Tensor | SlotStack)]
        size = sum(t.shape.numel() * t.dtype.itemsize for t in found)
        total, experts = total + size, experts + size * moe
    classes = {
        type(module._moe_kernel.fused_experts).__name__
        for module in self.modules.values()
        if isinstance(module, FusedMoEWithLoRA)
    }
    print("MEASURED", json.dumps([total, experts, sorted(classes)]), flush=True)


LoRAModelManager.__init__ = _measured

if __name__ == "__main__":
    import sys

    engine.main(*sys.argv[1:])
