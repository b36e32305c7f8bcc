"""MoE LoRA layers of the platform, in two kinds, each for experts in two and in three dimensions.

Derived: as vllm-ascend's: a subclass of upstream's that skips upstream's `__init__` and has no
  `_moe_kernel`; rows of its own in `__init__`, the rest inherited.
Own: as little as vLLM's LoRA manager and its worker call, and nothing else of upstream's.

Both make their buffers themselves. Their ``__name__`` is upstream's, by which vLLM's
`create_dummy_lora` knows them.
"""

from __future__ import annotations

import torch
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA

from .runner import StandInRunner


class _Buffers:
    """[slots, experts, rank, in] and [slots, experts, out, rank] for each slice of w13, and w2."""

    slices = 2

    def create_lora_weights(self, max_loras, lora_config, model_config=None) -> None:
        config, rank = self.base_layer.moe_config, lora_config.max_lora_rank
        experts, hidden = config.num_local_experts, config.hidden_dim
        inner = config.intermediate_size_per_partition
        self.max_loras, self.fully_sharded = max_loras, False

        def make(*shape):
            return torch.zeros(max_loras, experts, *shape, dtype=lora_config.lora_dtype)

        rows = 2 * inner // self.slices
        self.adapter_enabled = torch.zeros(max_loras + 1, dtype=torch.int)
        self.w13_lora_a_stacked = tuple(make(rank, hidden) for _ in range(self.slices))
        self.w13_lora_b_stacked = tuple(make(rows, rank) for _ in range(self.slices))
        self.w2_lora_a_stacked = (make(rank, inner),)
        self.w2_lora_b_stacked = (make(hidden, rank),)
        if self.slices == 2:  # create_dummy_lora reads shapes here: w1, w2, w3 of each expert
            order = ("w13", 0), ("w2", 0), ("w13", 1)
            for side in "ab":
                stacks = [getattr(self, f"{w}_lora_{side}_stacked")[i] for w, i in order]
                flat = [
                    s[slot, e] for slot in range(max_loras) for e in range(experts) for s in stacks
                ]
                setattr(self, f"lora_{side}_stacked", flat)

    def set_mapping(self, punica_wrapper) -> None:
        BaseLayerWithLoRA.set_mapping(self, punica_wrapper)
        self.base_layer.set_lora_context(self)


class Derived(_Buffers, FusedMoEWithLoRA):
    def __init__(self, base_layer) -> None:
        BaseLayerWithLoRA.__init__(self)  # upstream's own asks for a modular kernel
        self.base_layer = base_layer
        self._shared_experts = base_layer._shared_experts  # vLLM's manager finds modules by it
        self.moe_config = base_layer.moe_config
        self.tp_size, self.tp_rank = 1, 0
        self._w13_slices = self.slices


class Derived3D(Derived, FusedMoE3DWithLoRA):
    slices = 1


class Own(_Buffers, BaseLayerWithLoRA):
    def __init__(self, base_layer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._shared_experts = base_layer._shared_experts

    def forward(self, *args, **more):
        return self.base_layer(*args, **more)

    def reset_lora(self, index) -> None:
        for side in "ab":
            for which in ("w13", "w2"):
                for stack in getattr(self, f"{which}_lora_{side}_stacked"):
                    stack[index] = 0
        self.adapter_enabled[index] = 0

    def set_lora(self, index, lora_a, lora_b) -> None:
        self.reset_lora(index)
        # vLLM's order: w1, w2, w3, or w13, w2.
        order = ("w13", 0), ("w2", 0), ("w13", 1)
        for side, tensors in (("a", lora_a), ("b", lora_b)):
            for (which, i), tensor in zip(order, tensors, strict=False):
                stack = getattr(self, f"{which}_lora_{side}_stacked")[i][index]
                stack[:, : tensor.shape[1], : tensor.shape[2]] = tensor
        self.adapter_enabled[index] = 1

    @classmethod
    def can_replace_layer(cls, source_layer, lora_config, packed_modules_list, model_config=None):
        return isinstance(source_layer, StandInRunner) and len(packed_modules_list) == cls.slices


class Own3D(Own):
    slices = 1

    w13_input_size = property(lambda self: self.w13_lora_a_stacked[0].shape[-1])
    w13_output_size = property(lambda self: self.w13_lora_b_stacked[0].shape[-2])
    w2_input_size = property(lambda self: self.w2_lora_a_stacked[0].shape[-1])
    w2_output_size = property(lambda self: self.w2_lora_b_stacked[0].shape[-2])


for _flat, _deep in ((Derived, Derived3D), (Own, Own3D)):
    _flat.__name__, _deep.__name__ = "FusedMoEWithLoRA", "FusedMoE3DWithLoRA"
