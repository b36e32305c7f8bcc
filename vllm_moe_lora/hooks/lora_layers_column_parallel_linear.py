"""vllm/lora/layers/column_parallel_linear.py: a rank's rows of lora_B on merged projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _slice_lora_b(original: Callable[..., Any]) -> Callable[..., Any]:
    def slice_lora_b(self: Any, lora_b: Any) -> Any:
        sizes = getattr(self.base_layer, "output_sizes", None)
        # Upstream is right for two parts of one size, as gate and up are.
        if not self.is_merged_col_linear or not sizes or (len(sizes) == 2 and len({*sizes}) == 1):
            return original(self, lora_b)
        import torch

        ranks, start, rows = sum(sizes) // self.output_size, 0, []
        for size in sizes:
            share = size // ranks
            rows.append(lora_b.narrow(0, start + self.tp_rank * share, share))
            start += size
        return torch.cat(rows)

    return slice_lora_b


HOOKS = (
    Hook(
        feature="parallel-experts",
        target="vllm.lora.layers.column_parallel_linear:ColumnParallelLinearWithLoRA.slice_lora_b",
        make=_slice_lora_b,
        releases=">=0.11.1,<0.34",
        layers=True,
        why="under tensor parallelism a module that is merged in the checkpoint is cut as gate_up "
        "is, in two halves. in_proj_qkvz and in_proj_ba of Qwen3-Next are one part, so a rank gets "
        "other rows than its weight has, and LoRA there is wrong without a message",
        upstream="",
        until="upstream cuts lora_B by the module's output_sizes",
    ),
)
