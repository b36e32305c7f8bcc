"""Assigns each tensor of an adapter a place: a dense module, or the routed experts of one layer.

This is the first step of strict accounting: every tensor gets exactly one place. A tensor without a
place, or two tensors for the same place, are errors. Nothing is dropped.
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

# The tensors of one layer's routed experts as they are in the file:
# (expert's number, or None for all experts; projection) -> {"A" or "B": (tensor's name, tensor)}
Tensors = dict[tuple[int | None, str], dict[str, tuple[str, torch.Tensor]]]


@dataclass
class Grouped:
    """An adapter's tensors, sorted by where they belong.

    Attributes:
        dense: lora_A and lora_B of all modules that are not routed experts, by PEFT's full names.
        experts: prefix of a layer's routed experts ("model.layers.0.mlp.experts") -> its tensors.
        full: tensors that are not LoRA factors, by name: whole weights (PEFT's modules_to_save),
            copies of embeddings, tensors of routed experts in an unknown layout.
        magnitude: DoRA's magnitude vectors, by module.
        bias: biases of lora_B, by module.
    """

    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[str, Tensors] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)
    bias: dict[str, torch.Tensor] = field(default_factory=dict)


def group(tensors: Mapping[str, torch.Tensor]) -> Grouped:
    """Assign each tensor its place.

    Args:
        tensors: all tensors of the adapter, by their names in the file.

    Raises:
        AdapterError: a factor is there twice, lora_A is there without lora_B or the reverse, or the
            file holds two adapters. The message names the tensors.
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
                raise AdapterError(_twice(key, sides[name.side][0]))
            sides[name.side] = (key, tensor)
    if len(adapters) > 1:
        raise AdapterError(
            f"{' and '.join(sorted(adapters.values()))} belong to two adapters in one file. Save "
            "one adapter per file, as PEFT's save_pretrained does."
        )
    _refuse_unpaired(out)
    return out


def refuse_what_is_not_lora(found: Grouped) -> None:
    """Refuse an adapter with tensors that vLLM cannot serve.

    What no product uses (`UNUSED`) is accepted and ignored.

    Raises:
        AdapterError: the adapter has DoRA magnitudes, biases or whole weights. The message names
            them and says how to merge them.
    """
    for what, tensors in (("DoRA magnitudes", found.magnitude), ("LoRA biases", found.bias)):
        if tensors:
            raise AdapterError(f"{what} on {listed(tensors)}. {_MERGE}")
    lost = [key for key in found.full if not key.endswith(UNUSED)]
    if lost:
        near = any(".experts" in key for key in lost)
        raise AdapterError(
            f"{listed(lost)}: not LoRA factors (modules_to_save?). "
            + (f"The layouts of routed experts that can be read: {LAYOUTS}." if near else _MERGE)
        )


# PEFT stores these beside the factors: with LoRA on an embedding the base model's weights,
# unchanged; with VeLoRA the vector that compresses activations for the backward pass.
UNUSED = (
    ".embed_tokens.base_layer.weight",
    ".lm_head.base_layer.weight",
    ".lora_velora_embed",
)


def _put_dense(out: Grouped, key: str, name: Name, tensor: torch.Tensor) -> None:
    if ".experts" in name.module and ".shared_experts" not in name.module:
        out.full[key] = tensor  # routed experts in an unknown layout: refused later, by name
        return
    leaf = f"lora_embedding_{name.side}" if name.embedding else f"lora_{name.side}.weight"
    plain = f"{PREFIX}{name.module}.{leaf}"
    if plain in out.dense:
        raise AdapterError(_twice(key, plain))
    out.dense[plain] = tensor


def _twice(key: str, other: str) -> str:
    return f"{key} and {other} are the same factor twice. The file must have it once."


def _refuse_unpaired(out: Grouped) -> None:
    """Check that every lora_A has its lora_B and the reverse."""
    unpaired = [name for name in out.dense if _counterpart(name) not in out.dense]
    for tensors in out.experts.values():
        for (expert, projection), sides in tensors.items():
            for side, (key, _) in sides.items():
                other = "B" if side == "A" else "A"
                if other in sides or _has_shared_side(tensors, expert, projection, other):
                    continue
                unpaired.append(key)
    if unpaired:
        raise AdapterError(
            f"{listed(unpaired)}: lora_A without lora_B or the reverse. The file is damaged or "
            "was cut."
        )


def _counterpart(name: str) -> str:
    head, _, leaf = name.rpartition(".lora_")
    swapped = leaf.replace("A", "B") if "A" in leaf else leaf.replace("B", "A")
    return f"{head}.lora_{swapped}"


def _has_shared_side(tensors: Tensors, expert: int | None, projection: str, side: str) -> bool:
    """Whether the other factor exists under the other kind of name.

    In Megatron-Bridge's experts_shared_outer_loras one side is a tensor that all experts share
    (``expert`` is None) and the other side is one tensor per expert.
    """
    if expert is not None:
        return side in tensors.get((None, projection), {})
    return any(
        number is not None and name == projection and side in sides
        for (number, name), sides in tensors.items()
    )
