"""What vLLM's LoRA layer over routed experts says of itself, in every release since 0.11.1."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.canonical import Dims
from .stage import Slots

Factors = tuple[list[torch.Tensor], list[torch.Tensor]]


def is_experts(module: Any) -> bool:
    return hasattr(module, "w13_lora_a_stacked") or _per_expert(module)


def serves_moe(manager: Any) -> bool:
    """Whether the manager's model has routed experts; dense models keep upstream's code."""
    known = getattr(manager, "_is_moe", None)  # since 0.22
    return any(map(is_experts, manager.modules.values())) if known is None else bool(known)


def limits_targets(manager: Any) -> bool:
    """Whether the engine was told to leave modules without LoRA (lora_target_modules, 0.18)."""
    return getattr(manager.lora_config, "target_modules", None) is not None


def dims_of(manager: Any, wrapper: Any) -> Dims:
    """Sizes of the model's experts, without the padding of a weight format or of ranks."""
    layer, config = wrapper.base_layer, _config(wrapper)
    inner = _size(wrapper, "intermediate_size_per_partition") * wrapper.tp_size
    of_partition = getattr(config, "intermediate_size_per_partition_unpadded", None)
    hidden = getattr(config, "hidden_dim_unpadded", None)
    if of_partition is None and not hasattr(config, "intermediate_size_per_partition_unpadded"):
        own = manager.model.config  # up to 0.19 nothing but the checkpoint's config knows
        own = getattr(own, "text_config", own)
        hidden = _without_padding(config.hidden_dim, getattr(own, "hidden_size", 0))
        for name in ("moe_intermediate_size", "intermediate_size"):
            inner = _without_padding(inner, getattr(own, name, 0))
    return Dims(
        experts=getattr(wrapper, "global_num_experts", None) or layer.global_num_experts,
        hidden=hidden or config.hidden_dim,
        inner=of_partition * wrapper.tp_size if of_partition else inner,
        gated=bool(getattr(config, "is_act_and_mul", True)),
        # Upstream knows the one model of this kind by its name, too.
        interleaved=manager.model.config.architectures[0] == "GptOssForCausalLM",
    )


def slots_of(manager: Any, wrapper: Any) -> Slots:
    dims = dims_of(manager, wrapper)
    return Slots(
        local=local_experts(wrapper),
        fused=getattr(wrapper, "_w13_slices", 2) == 1 and dims.gated,
        dims=dims,
        dtype=manager.lora_config.lora_dtype,
        limit=manager.lora_config.max_lora_rank,
        shared=bool(getattr(wrapper, "enable_moe_shared_loras", False)),
    )


def local_experts(wrapper: Any) -> list[int]:
    """Global numbers of this rank's experts, in the order of its weights."""
    layer, count = wrapper.base_layer, _size(wrapper, "local_num_experts")
    owned = getattr(getattr(layer, "routed_experts", layer), "expert_map", None)
    if owned is None:
        return list(range(count))
    pairs = [(int(local), number) for number, local in enumerate(owned.tolist()) if local >= 0]
    return [number for _, number in sorted(pairs)][:count]


def as_taken(manager: Any, wrapper: Any, staged: Factors) -> Factors:
    """`stage`'s tensors as this release's `set_lora` wants them.

    0.11: a list of matrices, gate, down and up of each expert in turn. 0.12 and 0.13: lora_b of
    fused factors as [out, experts * rank], which its reshape takes apart again (and which is why
    it misreads PEFT's files, [out, rank * experts]). Later: as they are.
    """
    a, b = staged
    if _per_expert(wrapper):
        turns = [(i, part) for i in range(a[0].shape[0]) for part in (0, 1, 2)]
        return [a[part][i] for i, part in turns], [b[part][i] for i, part in turns]
    if len(a) == 2 and not hasattr(manager, "_stack_moe_lora_weights"):
        return a, [one.permute(1, 0, 2).reshape(one.shape[1], -1) for one in b]
    return staged


def _per_expert(module: Any) -> bool:
    return hasattr(module, "w1_lora_a_stacked")


def _config(wrapper: Any) -> Any:
    return getattr(wrapper, "moe_config", None) or wrapper.base_layer.moe_config


def _size(wrapper: Any, name: str) -> int:
    """The wrapper's own since 0.24, its layer's before."""
    found = getattr(wrapper, name, None)
    return int(getattr(wrapper.base_layer, name) if found is None else found)


def _without_padding(padded: int, whole: int) -> int:
    return whole if 0 < padded - whole < 256 and whole > 0 else padded
