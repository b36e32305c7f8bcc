"""Every tensor of an adapter has a place in the model, with the right shape, or loading stops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

SHOWN = 10


class AdapterMismatch(ValueError):
    """An adapter does not fit the model; the text names the modules, the limit and the cure."""


def check(manager: Any, lora: Any) -> None:
    """Refuse an adapter of which a part would be ignored, cut or padded.

    Args:
        manager: vLLM's `LoRAModelManager` of a MoE model, its modules wrapped.
        lora: the loaded `LoRAModel`, before its experts are packed.

    Raises:
        AdapterMismatch: naming module, layer and expert. Nothing has changed then.
    """
    if not any(b.any() for weights in lora.loras.values() for _, b in _pairs(weights)):
        return  # vLLM's own warm-up adapters; they change nothing wherever they land
    places = _places(manager)
    _refuse_unreachable(manager, lora)
    if manager.lora_config.target_modules is None and not _on_pipeline_stage(manager):
        unknown = sorted(name for name in lora.loras if name not in places)
        if unknown:
            more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            raise AdapterMismatch(
                f"LoRA adapter {lora.id}: this model has no place for {', '.join(unknown[:SHOWN])}"
                f"{more}. Nothing was loaded. Check that the adapter was trained on this model and "
                "that its module names are the checkpoint's."
            )
    limit = manager.lora_config.max_lora_rank
    for name, weights in lora.loras.items():
        for a, b in _pairs(weights):
            _check_pair(lora, name, a, b, limit, places.get(name))


def _refuse_unreachable(manager: Any, lora: Any) -> None:
    for name, holder in manager.moe_lora_unreachable.items():
        weights = lora.loras.get(name)
        if weights is not None:
            raise AdapterMismatch(
                f"LoRA adapter {lora.id}: {name} cannot take LoRA in vLLM: {holder} reads its "
                "weight directly, so the adapter would be ignored there. Merge the adapter into "
                "the model, or train without this module."
            )


def _check_pair(
    lora: Any,
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    limit: int,
    shape: tuple[int, int] | None,
) -> None:
    if a.ndim != 2 or b.ndim != 2:
        return  # stacked experts: their layer checks them
    rank = a.shape[0]
    if shape is None and name.endswith((".experts", ".experts.base_layer")):
        return
    if rank != b.shape[1]:
        raise AdapterMismatch(
            f"LoRA adapter {lora.id}: {name} has lora_A of rank {rank} but lora_B of rank "
            f"{b.shape[1]}. The file is damaged or was cut."
        )
    if rank > limit:
        raise AdapterMismatch(rank_text(f"{name}.lora_A.weight", rank, limit))
    if shape is not None and (b.shape[0], a.shape[1]) != shape:
        raise AdapterMismatch(
            f"LoRA adapter {lora.id}: {name} is {b.shape[0]} x {a.shape[1]} (out x in), the "
            f"model's module is {shape[0]} x {shape[1]}. The adapter is for another model."
        )


def rank_text(tensor: str, rank: int, limit: int) -> str:
    return (
        f"{tensor} has rank {rank}, above max_lora_rank={limit}. Start the engine with "
        f"--max-lora-rank {rank} or higher."
    )


def _pairs(weights: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    a, b = weights.lora_a, weights.lora_b
    if isinstance(a, list):
        yield from (pair for pair in zip(a, b, strict=True) if pair[0] is not None)
    else:
        yield a, b


def _places(manager: Any) -> dict[str, tuple[int, int] | None]:
    """Name an adapter may use -> (out, in) of the module, None where it is not known here."""
    places: dict[str, tuple[int, int] | None] = {}
    for name, module in manager.modules.items():
        if hasattr(module, "w13_lora_a_stacked"):
            places.update(_expert_places(name, module, manager.packed_modules.get(name, [])))
            continue
        parts = manager.packed_modules.get(name)
        if parts is None:
            places[name] = _shape(module, 0)
            continue
        own = len(getattr(module, "lora_a_stacked", ()))
        for index, part in enumerate(parts):
            places[part] = _shape(module, index) if own == len(parts) else None
        places[name] = None
    return places


def _shape(module: Any, index: int) -> tuple[int, int] | None:
    """(out, in) of one slice, known exactly on one device; padded vocabularies are not."""
    a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
    base = getattr(module, "base_layer", None)
    if getattr(module, "tp_size", 1) != 1 or not hasattr(base, "input_size"):
        return None
    if not isinstance(a, tuple) or not isinstance(b, tuple):
        return None
    return b[index].shape[-2], a[index].shape[-1]


def _expert_places(name: str, module: Any, parts: list[str]) -> dict[str, tuple[int, int] | None]:
    places: dict[str, tuple[int, int] | None] = {name: None, f"{name}.base_layer": None}
    config = module.moe_config
    hidden = config.hidden_dim_unpadded or config.hidden_dim
    inner = config.intermediate_size_per_partition_unpadded
    whole = module.tp_size == 1 and inner is not None
    for part in parts:
        # packed_modules lists (w1, w2, w3) for each expert; w2 is the one that leads back.
        down = part.endswith((".down_proj", ".w2"))
        shape = (hidden, inner) if down else (inner, hidden)
        places[part] = shape if whole else None
    return places


def _on_pipeline_stage(manager: Any) -> bool:
    """Whether layers of the model live on other ranks, so that absence here says nothing."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().world_size > 1)
