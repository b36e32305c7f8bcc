"""LoRA on lm_head where vLLM computes logits of prompt tokens (prompt_logprobs).

vLLM computes them for one request at a time. But the punica wrapper has, for lm_head, the adapter
of each request that samples a token. So the rows of one prompt get the adapters of other requests,
or there are more rows than adapters and the engine stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..fitting.moe_layers import punica_wrappers
from ..kernels.cpu_dense import row_segments


@contextmanager
def rows_of_prompts(runner: Any, hidden_states: torch.Tensor) -> Iterator[None]:
    """Inside the block, `compute_logits` of the model applies each row's own adapter.

    Args:
        runner: vLLM's `GPUModelRunner`, on any platform.
        hidden_states: [tokens, hidden] of the batch. What `compute_logits` is given in the block
            are views of its rows.
    """
    model, wrappers = runner.model, _wrappers(runner)
    plain = model.compute_logits

    def compute_logits(rows: torch.Tensor, *args: Any, **more: Any) -> Any:
        first = (rows.data_ptr() - hidden_states.data_ptr()) // (
            hidden_states.stride(0) * hidden_states.element_size()
        )
        for wrapper in wrappers:
            _set_slots(wrapper, wrapper.token_lora_indices[first : first + len(rows)])
        return plain(rows, *args, **more)

    model.compute_logits = compute_logits
    try:
        yield
    finally:
        del model.compute_logits
        for wrapper in wrappers:
            _set_slots(wrapper, wrapper.sampler_indices)


def _wrappers(runner: Any) -> list[Any]:
    """The punica wrappers of a MoE model with LoRA; none of any other model."""
    manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    found = [] if manager is None else punica_wrappers(manager)
    return [wrapper for wrapper in found if getattr(wrapper, "moe_lora", False)]


def _set_slots(wrapper: Any, slots: torch.Tensor) -> None:
    """Tell a punica wrapper the slot of each row that lm_head computes next.

    Args:
        slots: [rows] int, -1 for a row without an adapter.
    """
    if hasattr(wrapper, "sampler_segments"):  # the CPU's, see hooks/lora_punica_cpu.py
        wrapper.sampler_segments = row_segments(slots)
    elif hasattr(wrapper, "prompt_mapping_meta"):
        wrapper.prompt_mapping_meta.prepare_tensors(slots)
