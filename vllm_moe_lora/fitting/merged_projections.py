"""Assembles LoRA on a merged projection from the parts of it that an adapter has.

In a gated delta net, as in Qwen3.5, vLLM merges projections into one module `in_proj_qkvz` with
four slices: q, k, v and z. vLLM knows two parts of it, `in_proj_qkv` and `in_proj_z`. It finds out
from row counts which slices a tensor covers, starting at the first slice. Because of that, an
adapter with `in_proj_z` alone fails at activation, and one with separate q, k and v, as Tinker
writes them, is refused.
"""

from __future__ import annotations

from typing import Any

from ..adapters.errors import AdapterError

# Last word of the merged module's name -> the part's name -> its slices, as in the weights mapper
# of vLLM's Qwen3.5.
SLICES: dict[str, dict[str, tuple[int, ...]]] = {
    "in_proj_qkvz": {
        "in_proj_qkv": (0, 1, 2),
        "in_proj_q": (0,),
        "in_proj_k": (1,),
        "in_proj_v": (2,),
        "in_proj_z": (3,),
    },
}


def parts_of(module: str, wrapper: Any) -> dict[str, tuple[int, ...]]:
    """Full names of a merged module's parts -> their slices; {} if it is any other module.

    Args:
        module: the module's name.
        wrapper: vLLM's LoRA layer around it.
    """
    parent, _, word = module.rpartition(".")
    table = SLICES.get(word, {})
    if getattr(wrapper, "n_slices", 0) <= max((i for s in table.values() for i in s), default=-1):
        return {}
    return {f"{parent}.{part}": slices for part, slices in table.items()}


def merge(manager: Any, lora: Any) -> None:
    """Replace an adapter's parts of such a module by one entry with a LoRA for each slice.

    Args:
        manager: vLLM's `LoRAModelManager`.
        lora: the `LoRAModel`; it is changed.

    Raises:
        AdapterError: a part has the wrong number of rows, or two parts cover the same slice.
    """
    for module, wrapper in manager.modules.items():
        found = {
            part: slices for part, slices in parts_of(module, wrapper).items() if part in lora.loras
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
                    f"{part} has {weights.lora_b.shape[0]} rows, but the model's module has "
                    f"{sum(sizes)}. The adapter is for another model."
                )
            for i, rows in zip(slices, weights.lora_b.split(sizes), strict=True):
                if b[i] is not None:
                    raise AdapterError(
                        f"{part}: the adapter has this part of {module} under another name too. "
                        "Keep one of them."
                    )
                a[i], b[i] = weights.lora_a, rows
        lora.loras[module] = _packed(module, a, b)


def _packed(module: str, a: list[Any], b: list[Any]) -> Any:
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    rank = max(one.shape[0] for one in a if one is not None)
    scaling = [None if one is None else 1 for one in b]
    return PackedLoRALayerWeights(module, rank, list(scaling), a, b, scaling=scaling)
