"""Tensors of one adapter -> ordinary modules, and the tensors of each layer's routed experts.

Strict accounting starts here: each tensor gets one place, and a tensor without one is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .errors import AdapterError, listed
from .names import PREFIX, Name, parse, place

LAYOUTS = (
    "experts.N.gate_proj (one expert each), experts.gate_proj / experts.gate_up_proj (3-D), "
    "experts.w1 (3-D), experts and experts.base_layer (PEFT target_parameters)"
)
_MERGE = (
    "vLLM cannot serve it as an adapter: merge it into the model "
    "(`vllm-moe-lora convert SRC DST --merge-into MODEL`) or train without it."
)

# (expert or None, projection) -> {"A": ..., "B": ...}
Tensors = dict[tuple[int | None, str], dict[str, tuple[str, torch.Tensor]]]


@dataclass
class Grouped:
    """An adapter's tensors by where they belong.

    Attributes:
        dense: tensors of all other modules, named as PEFT names them.
        experts: prefix of a layer's routed experts -> its tensors.
        full: what is no LoRA factor (modules_to_save, copies of embeddings), by name.
        magnitude: DoRA's vectors by module.
        bias: lora_B's biases by module.
    """

    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[str, Tensors] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)
    bias: dict[str, torch.Tensor] = field(default_factory=dict)


def group(tensors: Mapping[str, torch.Tensor]) -> Grouped:
    """Give each tensor its place.

    Raises:
        AdapterError: names the tensors that are doubled, or whose counterpart is missing.
    """
    out = Grouped()
    adapters: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = parse(key)
        if name.side != "full" and name.adapter not in adapters:
            adapters[name.adapter] = key
        if name.side == "full":
            out.full[key] = tensor
        elif name.side in ("magnitude", "bias"):
            (out.magnitude if name.side == "magnitude" else out.bias)[name.module] = tensor
        else:
            where = place(name.module)
            if where is None:
                _put_dense(out, key, name, tensor)
                continue
            sides = out.experts.setdefault(where.prefix, {}).setdefault(where[1:], {})
            if name.side in sides:
                raise AdapterError(f"{key} and {sides[name.side][0]} are the same factor twice")
            sides[name.side] = (key, tensor)
    if len(adapters) > 1:
        raise AdapterError(
            f"{' and '.join(sorted(adapters.values()))} belong to two adapters in one file. Save "
            "one adapter (PEFT's save_pretrained does)."
        )
    _refuse_lonely(out)
    return out


def refuse_what_is_not_lora(found: Grouped) -> None:
    """
    Raises:
        AdapterError: the adapter has DoRA, biases or whole modules; names them and the cure.
    """
    for what, tensors in (("DoRA magnitudes", found.magnitude), ("LoRA biases", found.bias)):
        if tensors:
            raise AdapterError(f"{what} on {listed(tensors)}. {_MERGE}")
    lost = [key for key in found.full if not key.endswith(EMBEDDING_COPIES)]
    if lost:
        near = any(".experts" in key for key in lost)
        raise AdapterError(
            f"{listed(lost)}: no LoRA factors (modules_to_save?). "
            + (f"Layouts of routed experts that are known: {LAYOUTS}." if near else _MERGE)
        )


# PEFT stores them beside LoRA on an embedding; they are the base model's own weights.
EMBEDDING_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def _put_dense(out: Grouped, key: str, name: Name, tensor: torch.Tensor) -> None:
    if ".experts" in name.module and ".shared_experts" not in name.module:
        out.full[key] = tensor  # routed experts under a name that is not known
        return
    leaf = f"lora_embedding_{name.side}" if name.embedding else f"lora_{name.side}.weight"
    plain = f"{PREFIX}{name.module}.{leaf}"
    if plain in out.dense:
        raise AdapterError(f"{key} and {plain} are the same factor twice")
    out.dense[plain] = tensor


def _refuse_lonely(out: Grouped) -> None:
    """Every A has its B and the reverse; factors of shared-outer experts may pair across names."""
    lonely = [name for name in out.dense if _counterpart(name) not in out.dense]
    for tensors in out.experts.values():
        for (expert, projection), sides in tensors.items():
            for side, (key, _) in sides.items():
                other = "B" if side == "A" else "A"
                if other in sides or _across(tensors, expert, projection, other):
                    continue
                lonely.append(key)
    if lonely:
        raise AdapterError(
            f"{listed(lonely)}: lora_A without lora_B or the reverse. The file is damaged or "
            "was cut."
        )


def _counterpart(name: str) -> str:
    head, _, leaf = name.rpartition(".lora_")
    swapped = leaf.replace("A", "B") if "A" in leaf else leaf.replace("B", "A")
    return f"{head}.lora_{swapped}"


def _across(tensors: Tensors, expert: int | None, projection: str, side: str) -> bool:
    if expert is not None:
        return side in tensors.get((None, projection), {})
    return any(
        number is not None and name == projection and side in sides
        for (number, name), sides in tensors.items()
    )
