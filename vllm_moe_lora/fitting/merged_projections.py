"""Adapters on parts of a merged projection that vLLM keeps in more slices than it has names.

A gated delta net's `in_proj_qkvz` has four slices (q, k, v, z) and two names: `in_proj_qkv` and
`in_proj_z`. Upstream works out from row counts which slices a tensor covers, beginning at the
first, so that `in_proj_z` alone is an error at activation; q, k and v apart (Tinker) have no place.
"""

from __future__ import annotations

from typing import Any

from ..adapters.errors import AdapterError

# Last word of a merged module -> names of its parts -> slices, as Qwen3.5's weights mapper in vLLM.
SLICES: dict[str, dict[str, tuple[int, ...]]] = {
    "in_proj_qkvz": {
        "in_proj_qkv": (0, 1, 2),
        "in_proj_q": (0,),
        "in_proj_k": (1,),
        "in_proj_v": (2,),
        "in_proj_z": (3,),
    },
}


def names(module: str, wrapper: Any) -> dict[str, tuple[int, ...]]:
    """Full names of a merged module's parts -> their slices; {} for any other module."""
    parent, _, word = module.rpartition(".")
    table = SLICES.get(word, {})
    if getattr(wrapper, "n_slices", 0) <= max((i for s in table.values() for i in s), default=-1):
        return {}
    return {f"{parent}.{part}": slices for part, slices in table.items()}


def merge(manager: Any, lora: Any) -> None:
    """Replace an adapter's parts of such modules by one entry with a factor for each slice.

    Raises:
        AdapterError: a part has the wrong number of rows, or a slice is there twice.
    """
    for module, wrapper in manager.modules.items():
        found = {
            part: slices for part, slices in names(module, wrapper).items() if part in lora.loras
        }
        if not found:
            continue
        a: list[Any] = [None] * wrapper.n_slices
        b: list[Any] = [None] * wrapper.n_slices
        for part, slices in found.items():
            weights = lora.loras.pop(part).optimize()
            sizes = [wrapper.output_sizes[i] for i in slices]
            if weights.lora_b.shape[0] != sum(sizes):
                raise AdapterError(
                    f"{part} has {weights.lora_b.shape[0]} rows, the "
                    f"model's module has {sum(sizes)}. The adapter is for another model."
                )
            for i, rows in zip(slices, weights.lora_b.split(sizes), strict=True):
                if b[i] is not None:
                    raise AdapterError(f"{part} is there under two names")
                a[i], b[i] = weights.lora_a, rows
        lora.loras[module] = _packed(module, a, b)


def _packed(module: str, a: list[Any], b: list[Any]) -> Any:
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    rank = max(one.shape[0] for one in a if one is not None)
    scaling = [None if one is None else 1 for one in b]
    return PackedLoRALayerWeights(module, rank, list(scaling), a, b, scaling=scaling)
