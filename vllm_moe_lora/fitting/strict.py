"""Every tensor of an adapter has a place in the model, with the right shape, or loading stops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..adapters.errors import AdapterError, listed, rank_text
from ..adapters.spelling import Spellings
from ..targets import target_modules
from . import merged_projections
from .moe_layers import is_experts, unwrapped

# Name an adapter may use -> (out, in) of the module, None where it is not known here.
Places = dict[str, tuple[int, int] | None]


def check(manager: Any, lora: Any, where: Places) -> None:
    """Refuse an adapter of which a part would be ignored, cut or padded.

    Args:
        manager: vLLM's `LoRAModelManager` of a MoE model, its modules wrapped.
        lora: the loaded `LoRAModel`; its routed experts, if any, wait in ``lora.moe_lora``.
        where: `places` of the manager.

    Raises:
        AdapterError: naming the module. Nothing has changed then.
    """
    _refuse_unreachable(manager, lora)
    unknown = [name for name in lora.loras if name not in where]
    _refuse_left_out(manager, lora, unknown)
    if unknown and not may_be_elsewhere(manager):
        raise AdapterError(
            f"this model has no place for {listed(unknown)}. Nothing "
            "was loaded. Check that the adapter was trained on this model and that its module "
            "names are the checkpoint's."
        )
    limit = manager.lora_config.max_lora_rank
    for name, weights in lora.loras.items():
        for a, b in _pairs(weights):
            _check_pair(name, a, b, limit, where.get(name))


def _refuse_left_out(manager: Any, lora: Any, unknown: list[str]) -> None:
    """Modules that the engine was told, or has decided, to leave without LoRA."""
    config, packed = manager.lora_config, getattr(manager, "packed_modules_mapping", {})
    dense = {name for name in unknown if target_modules.leaves_out(config, name, packed)}
    words = {name.rpartition(".")[2] for name in dense}
    if target_modules.flagged(config):  # 0.19 does not know the parts of a packed module
        here = {name for name, _ in manager.model.named_modules()}
        for name in set(unknown) - dense:
            parent, _, own = name.rpartition(".")
            whole = {w for w, parts in packed.items() if own in parts and f"{parent}.{w}" in here}
            if whole:
                dense.add(name)
                words |= whole | {own}
    where = [listed(dense)] if dense else []
    pending, layers = getattr(lora, "moe_lora", None), Spellings(unwrapped(manager))
    lost = {p: layers.find(own) for p, own in (pending.mapped if pending else {}).items()}
    lost = {prefix: layer for prefix, layer in lost.items() if layer is not None}
    if pending is not None and lost:
        prefix, layer = min(lost.items())
        parts = pending.layers[prefix].values()
        first = min(name for sides in parts for name, _ in sides.values())
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        where.insert(0, f"{first} (routed experts of {layer}{more})")
        words |= {str(one).rpartition(".")[2] for one in lost.values()}
    if where:
        raise AdapterError(target_modules.text(config, f"it has LoRA on {', '.join(where)}", words))


def is_warm_up(lora: Any) -> bool:
    """vLLM's own adapters of zeros; they change nothing wherever they land."""
    return not any(
        a.any() or b.any() for weights in lora.loras.values() for a, b in _pairs(weights)
    )


def _refuse_unreachable(manager: Any, lora: Any) -> None:
    for name, holder in getattr(manager, "moe_lora_unreachable", {}).items():
        weights = lora.loras.get(name)
        if weights is not None:
            raise AdapterError(
                f"{name} cannot take LoRA in vLLM: {holder} reads its "
                "weight directly, so the adapter would be ignored there. Merge the adapter into "
                "the model, or train without this module."
            )


def _check_pair(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    limit: int,
    shape: tuple[int, int] | None,
) -> None:
    if a.ndim != 2 or b.ndim != 2:
        raise AdapterError(
            f"{name} has {a.ndim}-D lora_A and {b.ndim}-D lora_B; a matrix has two dimensions"
        )
    rank = a.shape[0]
    if rank != b.shape[1]:
        raise AdapterError(
            f"{name} has lora_A of rank {rank} but lora_B of rank "
            f"{b.shape[1]}. The file is damaged or was cut."
        )
    if rank > limit:
        raise AdapterError(rank_text(f"{name}.lora_A", rank, limit))
    if shape is not None and (b.shape[0], a.shape[1]) != shape:
        raise AdapterError(
            f"{name} is {b.shape[0]} x {a.shape[1]} (out x in), the "
            f"model's module is {shape[0]} x {shape[1]}. The adapter is for another model."
        )
    for side, values in (("lora_A", a), ("lora_B", b)):
        if not all(torch.isfinite(bound) for bound in torch.aminmax(values)):
            raise AdapterError(
                f"{name}.{side} has NaN or infinite numbers. The training "
                "run diverged or the file is damaged."
            )


def _pairs(weights: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    a, b = weights.lora_a, weights.lora_b
    if isinstance(a, list):
        yield from (pair for pair in zip(a, b, strict=True) if pair[0] is not None)
    else:
        yield a, b


def places(manager: Any) -> Places:
    """Every module of the model that takes LoRA, under the names that adapters use."""
    found: Places = {}
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name)
        if is_experts(module):
            found[name] = None  # its tensors have a reader of their own
            continue
        if parts is None:
            found[name] = _shape(module, 0)
            continue
        own = len(getattr(module, "lora_a_stacked", ()))
        for index, part in enumerate(parts):
            found[part] = _shape(module, index) if own == len(parts) else None
        found.update(dict.fromkeys(merged_projections.names(name, module)))
        found[name] = None
    return found


def _shape(module: Any, index: int) -> tuple[int, int] | None:
    """(out, in) of one slice, known exactly on one device; padded vocabularies are not."""
    a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
    base = getattr(module, "base_layer", None)
    if getattr(module, "tp_size", 1) != 1 or not hasattr(base, "input_size"):
        return None
    if not isinstance(a, tuple) or not isinstance(b, tuple):
        return None
    return b[index].shape[-2], a[index].shape[-1]


def may_be_elsewhere(manager: Any) -> bool:
    """Whether layers of the model live on other ranks, so that absence here says nothing."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().world_size > 1)
