"""Reads the layouts whose tensor names contain the projection (gate_proj, w1, gate_up_proj, ...).

E is the number of experts, r the rank, I the intermediate size of an expert:

    experts.7.gate_proj.lora_A        [r, in]      PEFT on models with one module per expert
    experts.7.gate_up_proj.lora_B     [2 I, r]     ms-swift, ART while it trains
    experts.gate_up_proj.lora_A       [E, r, in]   Megatron-Bridge's export of packed experts
    experts.w1.lora_A                 [E or 1, ..] Tinker, and the side of Megatron-Bridge's
                                                   experts_shared_outer_loras that is shared
    experts.gate_proj.lora_A          [E r, in]    ART: rows of all experts, expert after expert
                                                   (lora_B is [E out, r])

Taken from the source of each trainer: peft 0.21.2, ms-swift 4.6, ART 0.5.23, Megatron-Bridge 0.6.2,
Tinker cookbook 0.6.1. docs/compatibility.md lists more trainers that write them.
"""

from __future__ import annotations

import torch

from ...log import warning_once
from ..canonical import Dims, Part, Stack, first, gather
from ..config import Config
from ..errors import AdapterError, listed
from ..group import Tensors

# lora_A or lora_B of one projection: expert's number, or None for a tensor of all experts ->
# (tensor's name, tensor).
_Side = dict[int | None, tuple[str, torch.Tensor]]


def read(
    prefix: str, tensors: Tensors, dims: Dims, config: Config, interleaved: bool
) -> dict[str, list[Part]]:
    """Read one layer's experts into the canonical form.

    Args:
        prefix: what the adapter calls the layer's experts.
        tensors: all tensors of this layer's experts; each names its projection.
        dims: sizes of the model's experts.
        config: for ranks and scales.
        interleaved: rows of a 3-D gate_up_proj alternate between gate and up.

    Returns:
        "w1", "w2", "w3" or "w13" -> parts, as in `canonical.Experts`.

    Raises:
        AdapterError: a tensor has the wrong shape or rank, or an expert is there twice or does not
            exist in the model. The message names the tensor.
    """
    sides: dict[str, dict[str, _Side]] = {}
    for (expert, projection), pair in tensors.items():
        for side, named in pair.items():
            sides.setdefault(projection, {"A": {}, "B": {}})[side][expert] = named
    return {
        name: _projection(prefix, name, both["A"], both["B"], dims, config, interleaved)
        for name, both in sides.items()
    }


def _projection(
    prefix: str, name: str, a: _Side, b: _Side, dims: Dims, config: Config, interleaved: bool
) -> list[Part]:
    for side in (a, b):
        if None in side and len(side) > 1:
            other = next(key for number, (key, _) in side.items() if number is not None)
            raise AdapterError(f"{side[None][0]} and {other} hold the same factor twice.")
        for number, (key, tensor) in side.items():
            if number is not None and number >= dims.experts:
                raise AdapterError(
                    f"{key} is for expert {number}, but the model has experts 0 to "
                    f"{dims.experts - 1}. The adapter is for another model."
                )
            if number is not None and tensor.ndim != 2:
                raise AdapterError(
                    f"{key} has shape {_shape(tensor)}, but a LoRA matrix of one expert must have "
                    "two dimensions."
                )
    numbered = [number for side in (a, b) for number in side if number is not None]
    if not numbered:
        return [_all_experts(prefix, name, a[None], b[None], dims, config, interleaved)]
    experts = sorted(set(numbered))
    if None in a or None in b:
        return [_one_side_shared(prefix, name, a, b, experts, dims, config)]
    # A part needs one rank, scale and dtype, so sort the experts by these.
    buckets: dict[tuple[int, float, torch.dtype, torch.dtype], list[int]] = {}
    shape = dims.shape(name)
    for expert in experts:
        (key, one), (other, two) = a[expert], b[expert]
        _check(key, one, other, two, shape)
        scale = _scale(config, key, f"{prefix}.{expert}.{_word(key)}", one.shape[0])
        buckets.setdefault((one.shape[0], scale, one.dtype, two.dtype), []).append(expert)
    parts = []
    for (_, scale, *_), members in buckets.items():
        stack_a, order = gather([a[expert][1] for expert in members])
        stack_b, order_b = gather([b[expert][1] for expert in members])
        if order != order_b:
            stack_a = tuple(a[expert][1] for expert in members)
            stack_b = tuple(b[expert][1] for expert in members)
            order = list(range(len(members)))
        label = a[members[0]][0]
        parts.append(Part([members[i] for i in order], stack_a, stack_b, scale, label))
    return parts


def _all_experts(
    prefix: str,
    name: str,
    a: tuple[str, torch.Tensor],
    b: tuple[str, torch.Tensor],
    dims: Dims,
    config: Config,
    interleaved: bool,
) -> Part:
    """Read a projection whose lora_A and lora_B each hold all experts, or are shared by all."""
    (key, one), (other, two) = a, b
    shape = dims.shape(name)
    if one.ndim == two.ndim == 2:
        one, two = _rows(key, one, other, two, dims, shape)
    for label, tensor in ((key, one), (other, two)):
        if tensor.ndim != 3 or tensor.shape[0] not in (1, dims.experts):
            raise AdapterError(
                f"{label} has shape {_shape(tensor)}, but its first dimension must be "
                f"{dims.experts}, the number of experts, or 1 if all experts share it."
            )
    _check(key, one[0], other, two[0], shape)
    scale = _scale(config, key, f"{prefix}.{_word(key)}", one.shape[1])
    fused = name == "w13" and interleaved
    return Part(range(dims.experts), one, two, scale, key, fused)


def _one_side_shared(
    prefix: str,
    name: str,
    a: _Side,
    b: _Side,
    experts: list[int],
    dims: Dims,
    config: Config,
) -> Part:
    """Read Megatron-Bridge's experts_shared_outer_loras.

    All experts share one side ([1, ...]). The other side has one tensor per expert.
    """
    stacks: list[Stack] = []
    for side in (a, b):
        if None in side:
            key, tensor = side[None]
            if tensor.ndim == 2:
                tensor = tensor[None]
            if tensor.ndim != 3 or tensor.shape[0] not in (1, dims.experts):
                raise AdapterError(
                    f"{key} has shape {_shape(tensor)}, but a factor that all experts share must "
                    "have shape [1, rows, columns]."
                )
            stacks.append(tensor if tensor.shape[0] == 1 else tensor[experts])
            continue
        missing = [number for number in experts if number not in side]
        if missing:
            raise AdapterError(
                f"{prefix}: experts {missing[:10]} have only one of lora_A and lora_B for {name}. "
                "The file is damaged or was cut."
            )
        shapes = {tuple(side[number][1].shape) for number in experts}
        if len(shapes) > 1:
            key = side[experts[0]][0]
            raise AdapterError(
                f"{key}: the experts have different ranks here, but they share one matrix on the "
                "other side, so their ranks must be the same."
            )
        stacks.append(tuple(side[number][1] for number in experts))
    key = next(iter(a.values()))[0]
    _check(key, first(stacks[0]), next(iter(b.values()))[0], first(stacks[1]), dims.shape(name))
    scale = _scale(config, key, f"{prefix}.{_word(key)}", first(stacks[0]).shape[0])
    return Part(experts, stacks[0], stacks[1], scale, key)


def _rows(
    key: str,
    one: torch.Tensor,
    other: str,
    two: torch.Tensor,
    dims: Dims,
    shape: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give two 2-D factors a first dimension of experts.

    They hold either one LoRA that all experts share, or the rows of all experts (ART).
    """
    if two.shape[0] == shape[0]:
        return one[None], two[None]
    if two.shape[0] != dims.experts * shape[0] or one.shape[0] % dims.experts:
        raise AdapterError(
            f"{key} {_shape(one)} and {other} {_shape(two)} hold neither the rows of "
            f"{dims.experts} experts of {shape[0]} x {shape[1]} (out x in) nor one LoRA that all "
            "experts share. The adapter is for another model, or was cut."
        )
    return one.unflatten(0, (dims.experts, -1)), two.unflatten(0, (dims.experts, -1))


def _check(key: str, a: torch.Tensor, other: str, b: torch.Tensor, shape: tuple[int, int]) -> None:
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{key} has rank {a.shape[0]}, but {other} has rank {b.shape[1]}. The file is damaged "
            "or was cut."
        )
    if a.shape[0] == 0:
        raise AdapterError(f"{key} has rank 0. The file is damaged or was cut.")
    if (b.shape[0], a.shape[1]) != shape:
        raise AdapterError(
            f"{key} and {other} make a matrix of {b.shape[0]} x {a.shape[1]} (out x in), but the "
            f"model's experts are {shape[0]} x {shape[1]}. The adapter is for another model."
        )


def _scale(config: Config, key: str, module: str, rank: int) -> float:
    scale, expected = config.scale(module, rank)
    if rank > expected:
        raise AdapterError(
            f"{key} has rank {rank}, but adapter_config.json says {expected}, so its scale is not "
            f'known. Add the rank there: "rank_pattern": {{"{module}": {rank}}}.'
        )
    if rank < expected:
        warning_once(
            f"LoRA factors have rank {rank} where adapter_config.json says {expected}. They are "
            "scaled by their own rank, as Megatron-Bridge's normalize_moe_lora does. To confirm "
            'the rank, add it to "rank_pattern" in adapter_config.json.'
        )
    return scale


def _word(key: str) -> str:
    """The projection's word in a tensor's name, as in "gate_proj"."""
    return key.rpartition(".lora_")[0].rpartition(".")[2]


def _shape(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)}"


def all_named(tensors: Tensors) -> bool:
    """Whether every tensor of a layer names its projection, so that `read` can read the layer.

    If not, they are PEFT's fused experts, which `peft_fused` reads.

    Raises:
        AdapterError: the layer has both kinds.
    """
    fused = [
        named[0]
        for (_, projection), pair in tensors.items()
        if projection in ("inner", "outer")
        for named in pair.values()
    ]
    total = sum(len(pair) for pair in tensors.values())
    if fused and len(fused) != total:
        raise AdapterError(
            f"{listed(fused)}: PEFT's fused experts, but other tensors of this layer name their "
            "projection. Two layouts in one layer cannot be read. Save the adapter in one layout."
        )
    return not fused
