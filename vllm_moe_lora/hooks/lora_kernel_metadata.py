"""vllm/lora/ops/triton_ops/lora_kernel_metadata.py: which adapter slot each token has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _prepare_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_tensors(self: Any, token_lora_mapping: Any) -> None:
        original(self, token_lora_mapping)
        if getattr(self, "moe_lora_group", False):  # set by hooks/lora_model_manager.py
            from ..layers.gpu.data_parallel import clear_others

            clear_others(self, token_lora_mapping.numel())

    return prepare_tensors


HOOKS = (
    Hook(
        feature="data-parallel-gpu",
        target="vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta.prepare_tensors",
        make=_prepare_tensors,
        releases=">=0.30,<0.34",
        platforms=("cuda",),
        layers=True,
        why="with data parallelism, the tokens of a batch without adapters, and padding tokens, "
        "are sent to other ranks with the slots of an earlier batch",
        upstream="",
        until="upstream writes -1 for tokens without an adapter in each batch",
    ),
)
