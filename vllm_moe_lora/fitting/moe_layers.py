"""Reads what we must know of a model's MoE layers from vLLM, in every release since 0.11.1.

A "wrapper" here is vLLM's LoRA layer around routed experts: FusedMoEWithLoRA or a variant of it.
Only its ``base_layer`` and its stacks (``w13_lora_a_stacked`` and so on) are read, because the LoRA
layer of an out-of-tree platform need not have more.
"""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.canonical import Dims
from ..targets.supports_lora import has_eplb
from .stage import Slots

# (lora_a, lora_b), each one tensor per projection.
Factors = tuple[list[torch.Tensor], list[torch.Tensor]]


def is_experts(module: Any) -> bool:
    """Whether a module is vLLM's LoRA layer around routed experts."""
    return hasattr(module, "w13_lora_a_stacked") or _per_expert(module)


def serves_moe(manager: Any) -> bool:
    """Whether the model has routed experts. Dense models run vLLM's code unchanged.

    Args:
        manager: vLLM's `LoRAModelManager`.
    """
    is_moe = getattr(manager, "_is_moe", None)  # since vLLM 0.22
    if is_moe is not None:
        return bool(is_moe)
    return any(map(is_experts, manager.modules.values())) or bool(unwrapped(manager))


def punica_wrappers(manager: Any) -> list[Any]:
    """The punica wrappers of vLLM's `LoRAModelManager`: one, or since 0.14 one for each tower."""
    several = getattr(manager, "punica_wrapper_mapping", None)
    return list(several.values()) if several is not None else [manager.punica_wrapper]


def in_group(manager: Any) -> bool:
    """Whether experts get tokens of other data-parallel ranks, with the slots of those."""
    experts = (m for m in manager.modules.values() if is_experts(m))
    config = getattr(next(experts, None), "moe_config", None)
    ranks = getattr(getattr(config, "moe_parallel_config", None), "dp_size", 1)
    return ranks > 1 and all(hasattr(p, "token_mapping_meta") for p in punica_wrappers(manager))


def unwrapped(manager: Any) -> dict[str, Any]:
    """The model's MoE layers that have no LoRA layer around them: name -> vLLM's layer.

    They were built without LoRA because no adapter may target them (`targets/target_modules.py`).
    The answer is kept in ``manager``.
    """
    found: dict[str, Any] | None = getattr(manager, "moe_lora_unwrapped", None)
    if found is None:
        model = getattr(manager, "model", None)
        inside = {id(m.base_layer) for m in manager.modules.values() if is_experts(m)}
        layers = layers_of(model) if model is not None else {}
        found = {name: m for name, m in layers.items() if id(m) not in inside}
        manager.moe_lora_unwrapped = found
    return found


def suffixes_without_lora(model: Any) -> set[str]:
    """Last words of MoE layers' names ("experts"), if all layers with that word are without LoRA.

    vLLM decides by such suffixes which modules it wraps in LoRA layers.
    """
    without: set[str] = set()
    others: set[str] = set()
    for name, layer in layers_of(model).items():
        config = getattr(layer, "moe_config", None)
        takes = getattr(config, "is_lora_enabled", True)
        (others if takes else without).add(name.rpartition(".")[2])
    return without - others


def layers_of(model: Any) -> dict[str, Any]:
    """The model's MoE layers by name: `FusedMoE`, or since vLLM 0.24 `MoERunner`."""
    kinds = {"FusedMoE", "MoERunner"}
    return {
        name: module
        for name, module in model.named_modules()
        if not kinds.isdisjoint(kind.__name__ for kind in type(module).__mro__)
    }


def dims_of(manager: Any, wrapper: Any) -> Dims:
    """Sizes of the model's experts over all devices, without any padding of the weights.

    Args:
        manager: vLLM's `LoRAModelManager`.
        wrapper: any of its LoRA layers around routed experts.
    """
    layer, config = wrapper.base_layer, wrapper.base_layer.moe_config
    size = getattr(config, "intermediate_size_per_partition", None)  # since vLLM 0.20
    inner = (size or layer.intermediate_size_per_partition) * config.moe_parallel_config.tp_size
    hidden = config.hidden_dim
    if hasattr(config, "hidden_dim_unpadded"):
        hidden = config.hidden_dim_unpadded or hidden
        if config.intermediate_size_per_partition_unpadded:
            inner = config.intermediate_size_per_partition_unpadded
            inner *= config.moe_parallel_config.tp_size
    else:  # up to vLLM 0.19 only the checkpoint's config has the sizes without padding
        own = getattr(manager.model.config, "text_config", manager.model.config)
        hidden = _without_padding(hidden, getattr(own, "hidden_size", 0))
        for name in ("moe_intermediate_size", "intermediate_size"):
            inner = _without_padding(inner, getattr(own, name, 0))
    return Dims(
        # Without the copies that EPLB adds.
        experts=config.num_logical_experts if has_eplb(wrapper) else config.num_experts,
        hidden=hidden,
        inner=inner,
        gated=bool(getattr(config, "is_act_and_mul", True)),
        # gpt-oss is the only such model, and vLLM itself recognises it by this name.
        interleaved=manager.model.config.architectures[0] == "GptOssForCausalLM",
    )


def slots_of(manager: Any, wrapper: Any) -> Slots:
    """The form of the tensors that ``wrapper`` copies into a slot."""
    dims = dims_of(manager, wrapper)
    return Slots(
        # The factors of all experts stay in CPU memory if their weights may come here (moved.py).
        local=range(dims.experts) if has_eplb(wrapper) else local_experts(wrapper),
        fused=dims.gated and not _per_expert(wrapper) and len(wrapper.w13_lora_a_stacked) == 1,
        dims=dims,
        dtype=manager.lora_config.lora_dtype,
        limit=manager.lora_config.max_lora_rank,
        shared=bool(getattr(wrapper, "enable_moe_shared_loras", False)),
        rank_multiple=_rank_multiple(manager, wrapper),
    )


def _rank_multiple(manager: Any, wrapper: Any) -> int:
    """What the rank must be a multiple of, because --fully-sharded-loras splits it over devices."""
    size: int = wrapper.base_layer.moe_config.moe_parallel_config.tp_size
    if size == 1 or not manager.lora_config.fully_sharded_loras or _per_expert(wrapper):
        return 1
    # If the rank is below max_lora_rank, vLLM 0.12 and 0.13 put a device's piece of lora_a where
    # there is no lora_b.
    early = not hasattr(manager, "_stack_moe_lora_weights")
    return int(manager.lora_config.max_lora_rank) if early else size


def local_experts(wrapper: Any) -> list[int]:
    """Numbers of the experts on this device, in the order of its weights."""
    stacks = wrapper.w1_lora_b_stacked if _per_expert(wrapper) else wrapper.w13_lora_b_stacked[0]
    layer, count = wrapper.base_layer, stacks.shape[1]
    owned = getattr(getattr(layer, "routed_experts", layer), "expert_map", None)
    if owned is None:
        return list(range(count))
    pairs = [(int(local), number) for number, local in enumerate(owned.tolist()) if local >= 0]
    return [number for _, number in sorted(pairs)][:count]


def for_set_lora(manager: Any, wrapper: Any, staged: Factors) -> Factors:
    """Bring the tensors of `stage.stage` into the form that this release's `set_lora` takes.

    vLLM 0.11 takes a list of matrices: gate, down and up of each expert in turn. 0.12 and 0.13 take
    lora_b of fused gate_up as [out, experts * rank] and reshape it (which is why they misread
    PEFT's files, [out, rank * experts]). Later releases take the tensors as they are.
    """
    a, b = staged
    if _per_expert(wrapper):
        order = [(i, part) for i in range(a[0].shape[0]) for part in (0, 1, 2)]
        return [a[part][i] for i, part in order], [b[part][i] for i, part in order]
    if len(a) == 2 and not hasattr(manager, "_stack_moe_lora_weights"):
        return a, [one.permute(1, 0, 2).reshape(one.shape[1], -1) for one in b]
    return staged


def _per_expert(module: Any) -> bool:
    """Whether this is the LoRA layer of vLLM 0.11, which stacks w1 and w3 separately."""
    return hasattr(module, "w1_lora_a_stacked")


def _without_padding(padded: int, whole: int) -> int:
    """``whole``, the size in the checkpoint's config, if ``padded`` can be that plus padding."""
    return whole if 0 < padded - whole < 256 and whole > 0 else padded
