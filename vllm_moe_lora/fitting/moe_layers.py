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
    if known is not None:
        return bool(known)
    return any(map(is_experts, manager.modules.values())) or bool(unwrapped(manager))


def unwrapped(manager: Any) -> dict[str, Any]:
    """The model's layers of routed experts that LoRA does not reach: name -> upstream's layer."""
    found: dict[str, Any] | None = getattr(manager, "moe_lora_unwrapped", None)
    if found is None:
        model = getattr(manager, "model", None)
        inside = {id(m.base_layer) for m in manager.modules.values() if is_experts(m)}
        layers = _layers(model) if model is not None else {}
        found = {name: m for name, m in layers.items() if id(m) not in inside}
        manager.moe_lora_unwrapped = found
    return found


def words_without_lora(model: Any) -> set[str]:
    """Last words of the names of layers of routed experts that were built without LoRA."""
    lean: set[str] = set()
    others: set[str] = set()
    for name, layer in _layers(model).items():
        config = getattr(layer, "moe_config", None)
        takes = getattr(config, "is_lora_enabled", True)
        (others if takes else lean).add(name.rpartition(".")[2])
    return lean - others


def _layers(model: Any) -> dict[str, Any]:
    """What `FusedMoEWithLoRA` wraps: a FusedMoE, since 0.24 the MoERunner around RoutedExperts."""
    kinds = {"FusedMoE", "MoERunner"}
    return {
        name: module
        for name, module in model.named_modules()
        if not kinds.isdisjoint(kind.__name__ for kind in type(module).__mro__)
    }


def dims_of(manager: Any, wrapper: Any) -> Dims:
    """Sizes of the model's experts, without the padding of a weight format or of ranks.

    Here and below, of a wrapper its ``base_layer`` and its stacks are read and nothing else: an
    out-of-tree platform's own wrapper need not have more.
    """
    layer, config = wrapper.base_layer, wrapper.base_layer.moe_config
    size = getattr(config, "intermediate_size_per_partition", None)  # since 0.20
    inner = (size or layer.intermediate_size_per_partition) * config.moe_parallel_config.tp_size
    hidden = config.hidden_dim
    if hasattr(config, "hidden_dim_unpadded"):
        hidden = config.hidden_dim_unpadded or hidden
        if config.intermediate_size_per_partition_unpadded:
            inner = config.intermediate_size_per_partition_unpadded
            inner *= config.moe_parallel_config.tp_size
    else:  # up to 0.19 nothing but the checkpoint's config knows
        own = getattr(manager.model.config, "text_config", manager.model.config)
        hidden = _without_padding(hidden, getattr(own, "hidden_size", 0))
        for name in ("moe_intermediate_size", "intermediate_size"):
            inner = _without_padding(inner, getattr(own, name, 0))
    return Dims(
        experts=config.num_experts,
        hidden=hidden,
        inner=inner,
        gated=bool(getattr(config, "is_act_and_mul", True)),
        # Upstream knows the one model of this kind by its name, too.
        interleaved=manager.model.config.architectures[0] == "GptOssForCausalLM",
    )


def slots_of(manager: Any, wrapper: Any) -> Slots:
    dims = dims_of(manager, wrapper)
    return Slots(
        local=local_experts(wrapper),
        fused=dims.gated and not _per_expert(wrapper) and len(wrapper.w13_lora_a_stacked) == 1,
        dims=dims,
        dtype=manager.lora_config.lora_dtype,
        limit=manager.lora_config.max_lora_rank,
        shared=bool(getattr(wrapper, "enable_moe_shared_loras", False)),
        multiple=_multiple(manager, wrapper),
    )


def _multiple(manager: Any, wrapper: Any) -> int:
    """Of what ranks have to be a multiple where devices share them (--fully-sharded-loras)."""
    size: int = wrapper.base_layer.moe_config.moe_parallel_config.tp_size
    if size == 1 or not manager.lora_config.fully_sharded_loras or _per_expert(wrapper):
        return 1
    # 0.12 and 0.13 put a device's piece of a lower rank where no lora_b is.
    early = not hasattr(manager, "_stack_moe_lora_weights")
    return int(manager.lora_config.max_lora_rank) if early else size


def local_experts(wrapper: Any) -> list[int]:
    """Global numbers of this rank's experts, in the order of its weights."""
    stacks = wrapper.w1_lora_b_stacked if _per_expert(wrapper) else wrapper.w13_lora_b_stacked[0]
    layer, count = wrapper.base_layer, stacks.shape[1]
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


def _without_padding(padded: int, whole: int) -> int:
    return whole if 0 < padded - whole < 256 and whole > 0 else padded
