"""Chooses which kernels compute LoRA on a layer's experts: upstream's or ours, by batch size.

VLLM_MOE_LORA_KERNELS names them, or `auto` takes the winners of a record of `vllm-moe-lora tune`.
The choice is made once per layer shape, before a CUDA graph is captured. All ranks of a tensor
parallel group use rank 0's record, because the machines may have different ones.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ... import envs, records
from ...log import get_logger

logger = get_logger(__name__)


def conditions(arch: str) -> records.Conditions:
    """Return what a record made in this process depends on.

    Args:
        arch: of the current device, from `checks.arch_of`; "cpu" in Triton's interpreter.
    """
    import triton
    import vllm

    device = "Triton's interpreter" if arch == "cpu" else torch.cuda.get_device_name()
    driver = "" if arch == "cpu" else _driver()
    return records.Conditions(
        device, arch, driver, triton.__version__, vllm.__version__, records.kernels_hash()
    )


def _driver() -> str:
    """Return the major version of the GPU's driver; of HIP on AMD."""
    if torch.version.hip:
        return str(torch.version.hip).partition(".")[0]
    from vllm.utils.import_utils import import_pynvml

    nvml = import_pynvml()
    nvml.nvmlInit()
    try:
        return str(nvml.nvmlSystemGetDriverVersion()).partition(".")[0]
    finally:
        nvml.nvmlShutdown()


def shape_of(layer: Any) -> records.LayerShape:
    """Return the shape of a layer, as records name it.

    Args:
        layer: vLLM's `FusedMoEWithLoRA`.
    """
    w13_a, w13_b = layer.w13_lora_a_stacked, layer.w13_lora_b_stacked
    slots, _, rank, hidden = w13_a[0].shape
    inner = layer.w2_lora_a_stacked[0].shape[3]
    return records.LayerShape(
        experts=layer.local_num_experts,
        top_k=layer.moe_config.experts_per_token,
        hidden=hidden,
        inner=inner,
        slices=len(w13_a),
        fused=sum(one.shape[2] for one in w13_b) // inner,
        slots=slots,
        rank=rank,
        dtype=str(w13_a[0].dtype).removeprefix("torch."),
        absent=layer.moe_config.num_experts - layer.local_num_experts,
        shared=w13_a[0].shape[1] < layer.local_num_experts,
        path=records.path_of(layer),
    )


def record_for(layer: Any, arch: str) -> records.Record | None:
    """Return the record that chooses the kernels of ``layer``; None for upstream's.

    With VLLM_MOE_LORA_KERNELS=auto only. Says once why there is none.

    Args:
        layer: vLLM's `FusedMoEWithLoRA`.
        arch: of the current device.
    """
    return _record(shape_of(layer), arch, str(envs.get("VLLM_MOE_LORA_TUNED")))


@functools.cache
def _record(shape: records.LayerShape, arch: str, folder: str) -> records.Record | None:
    """See `record_for`. ``folder`` is only a part of the cache's key."""
    here = conditions(arch)
    found, why = _agreed(*records.find(here, shape))
    if found is None:
        logger.info(
            "MoE LoRA: vLLM's own kernels compute LoRA on experts: %s. `vllm-moe-lora tune MODEL` "
            "measures which kernels are faster on this GPU",
            why,
        )
        return None
    if different := records.differs(found, here):  # rank 0 has another GPU than this rank
        logger.warning("MoE LoRA: rank 0's record is used here, too, though %s", different)
    logger.info(
        "MoE LoRA: a record of this GPU chooses the kernels for LoRA on experts: %s",
        ", ".join(f"{one.winner} up to {one.tokens} tokens" for one in found.choices),
    )
    return found


def _agreed(found: records.Record | None, why: str) -> tuple[records.Record | None, str]:
    """Return what rank 0 of the tensor parallel group has found; all ranks must call this."""
    if not torch.distributed.is_initialized():
        return found, why
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return found, why
    agreed: tuple[records.Record | None, str] = group.broadcast_object((found, why), src=0)
    return agreed
