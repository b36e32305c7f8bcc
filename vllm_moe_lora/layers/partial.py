"""Adapters that train some experts, some projections or several ranks: filled up for the stacks."""

from __future__ import annotations

from typing import Any


def fill(loras: list[Any], is_non_gated: bool = False) -> list[Any]:
    """Complete [e0.w1, e0.w2, e0.w3, e1.w1, ...] with zeros so that every expert has all three.

    A zero factor changes nothing, so an absent projection stays absent in its effect. Smaller
    ranks are padded with zero rows and columns to the largest of their projection. Each scale is
    folded into its lora_B first, so experts may differ in it.

    Args:
        loras: `LoRALayerWeights` or None, three an expert; at least one is present.
        is_non_gated: the model has no w3; its entries stay None.

    Returns:
        A list of the same length for upstream's `PackedLoRALayerWeights.pack_moe`.
    """
    for lora in loras:
        if lora is not None:
            # Up to 0.29 upstream scales by alpha / rank whatever the adapter says (rsLoRA).
            lora.optimize()
            lora.lora_alpha = lora.rank
    projections = [0, 1] if is_non_gated else [0, 1, 2]
    if all(_alike(loras[i::3]) for i in projections):
        return loras
    shapes = _shapes(loras)
    filled = list(loras)
    for index in projections:
        group = [lora for lora in loras[index::3] if lora is not None]
        rank = max((lora.lora_a.shape[0] for lora in group), default=1)
        template = group[0] if group else next(lora for lora in loras if lora is not None)
        for position in range(index, len(loras), 3):
            filled[position] = _padded(loras[position], template, rank, shapes[index])
    return filled


def _alike(group: list[Any]) -> bool:
    return None not in group and len({lora.lora_a.shape[0] for lora in group}) == 1


def _shapes(loras: list[Any]) -> list[tuple[int, int]]:
    """(out, in) of w1, w2, w3, from whichever is present: w2 leads back where w1 and w3 lead."""
    for index, lora in enumerate(loras):
        if lora is not None:
            out, inn = lora.lora_b.shape[0], lora.lora_a.shape[1]
            there, back = ((inn, out), (out, inn)) if index % 3 == 1 else ((out, inn), (inn, out))
            return [there, back, there]
    raise ValueError("no expert has LoRA")


def _padded(lora: Any, template: Any, rank: int, shape: tuple[int, int]) -> Any:
    a = template.lora_a.new_zeros(rank, shape[1])
    b = template.lora_b.new_zeros(shape[0], rank)
    name = template.module_name
    if lora is not None:
        own, name = lora.lora_a.shape[0], lora.module_name
        a[:own], b[:, :own] = lora.lora_a, lora.lora_b
    return type(template)(name, rank, rank, a, b, scaling=1)
