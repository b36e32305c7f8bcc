"""Layouts that name the projection: one expert each, 3-D stacks, rows of all experts, shared sides.

    experts.7.gate_proj.lora_A        [r, in]      PEFT on per-expert models, most exporters
    experts.7.gate_up_proj.lora_B     [2 I, r]     ms-swift, ART's training form
    experts.gate_up_proj.lora_A       [E, r, in]   Megatron-Bridge's packed export
    experts.w1.lora_A                 [E or 1, ..] Tinker; Megatron-Bridge's shared-outer side
    experts.gate_proj.lora_A          [E r, in]    ART's rows (B: [E out, r], rows expert by expert)

Sources: facts/adapter-layouts.md, section 2, which names trainer and version of each.
"""

from __future__ import annotations

import torch

from ...log import warning_once
from ..canonical import Dims, Part, Stack, first, gather
from ..config import Config
from ..errors import AdapterError, listed
from ..group import Tensors

# One side of one projection: expert (None: a stack) -> tensor's name and tensor.
_Side = dict[int | None, tuple[str, torch.Tensor]]


def read(
    prefix: str, tensors: Tensors, dims: Dims, config: Config, interleaved: bool
) -> dict[str, list[Part]]:
    """Parts by projection.

    Args:
        prefix: the layer's experts, as the adapter calls them.
        tensors: of this layer, none of them flat.
        dims: of the model.
        config: for ranks and scales.
        interleaved: 3-D gate_up has alternating rows, as the model's own fused weight has.

    Raises:
        AdapterError: names the tensor that does not fit.
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
            raise AdapterError(f"{side[None][0]} and {other} hold the same factor twice")
        for number, (key, tensor) in side.items():
            if number is not None and number >= dims.experts:
                raise AdapterError(f"{key}: the model has experts 0 to {dims.experts - 1}")
            if number is not None and tensor.ndim != 2:
                raise AdapterError(
                    f"{key} is {_shape(tensor)}; a matrix of one expert has two dimensions"
                )
    numbered = [number for side in (a, b) for number in side if number is not None]
    if not numbered:
        return [_of_stacks(prefix, name, a[None], b[None], dims, config, interleaved)]
    experts = sorted(set(numbered))
    if None in a or None in b:
        return [_one_side_shared(prefix, name, a, b, experts, dims, config)]
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


def _of_stacks(
    prefix: str,
    name: str,
    a: tuple[str, torch.Tensor],
    b: tuple[str, torch.Tensor],
    dims: Dims,
    config: Config,
    interleaved: bool,
) -> Part:
    (key, one), (other, two) = a, b
    shape = dims.shape(name)
    if one.ndim == two.ndim == 2:
        one, two = _rows(key, one, other, two, dims, shape)
    for label, tensor in ((key, one), (other, two)):
        if tensor.ndim != 3 or tensor.shape[0] not in (1, dims.experts):
            raise AdapterError(
                f"{label} is {_shape(tensor)}; its first dimension is to be {dims.experts} "
                "experts, or 1 where all share it"
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
    """Megatron-Bridge's experts_shared_outer_loras: one side [1, ...], the other by expert."""
    stacks: list[Stack] = []
    for side in (a, b):
        if None in side:
            key, tensor = side[None]
            if tensor.ndim == 2:
                tensor = tensor[None]
            if tensor.ndim != 3 or tensor.shape[0] not in (1, dims.experts):
                raise AdapterError(f"{key} is {_shape(tensor)}; a shared factor is [1, ., .]")
            stacks.append(tensor if tensor.shape[0] == 1 else tensor[experts])
            continue
        missing = [number for number in experts if number not in side]
        if missing:
            raise AdapterError(f"{prefix}: {name} of experts {missing[:10]} has one side only")
        ranks = {tuple(side[number][1].shape) for number in experts}
        if len(ranks) > 1:
            key = side[experts[0]][0]
            raise AdapterError(f"{key}: ranks differ, but the other side is shared by all experts")
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
    """ART's rows of all experts, or one LoRA that all experts share."""
    if two.shape[0] == shape[0]:
        return one[None], two[None]
    if two.shape[0] != dims.experts * shape[0] or one.shape[0] % dims.experts:
        raise AdapterError(
            f"{key} {_shape(one)} and {other} {_shape(two)} fit neither rows of {dims.experts} "
            f"experts of {shape[0]} x {shape[1]} (out x in) nor one factor for all of them"
        )
    return one.unflatten(0, (dims.experts, -1)), two.unflatten(0, (dims.experts, -1))


def _check(key: str, a: torch.Tensor, other: str, b: torch.Tensor, shape: tuple[int, int]) -> None:
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{key} has rank {a.shape[0]}, but {other} has rank {b.shape[1]}. The file is damaged "
            "or was cut."
        )
    if a.shape[0] == 0:
        raise AdapterError(f"{key} has rank 0")
    if (b.shape[0], a.shape[1]) != shape:
        raise AdapterError(
            f"{key} and {other} make {b.shape[0]} x {a.shape[1]} (out x in), the model's experts "
            f"are {shape[0]} x {shape[1]}. The adapter is for another model."
        )


def _scale(config: Config, key: str, module: str, rank: int) -> float:
    scale, expected = config.scale(module, rank)
    if rank > expected:
        raise AdapterError(
            f"{key} has rank {rank}, but adapter_config.json says {expected}, so its scale is not "
            f'known. Add it to "rank_pattern": {{"{module}": {rank}}}.'
        )
    if rank < expected:
        warning_once(
            f"LoRA factors of rank {rank} where adapter_config.json says {expected}: scaled by "
            f'their own rank (Megatron-Bridge normalises so); "rank_pattern" would say otherwise'
        )
    return scale


def _word(key: str) -> str:
    return key.rpartition(".lora_")[0].rpartition(".")[2]


def _shape(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)}"


def all_named(tensors: Tensors) -> bool:
    """Whether this reader knows every tensor of a layer.

    Raises:
        AdapterError: flat and named tensors are mixed.
    """
    flat = [
        named[0]
        for (_, projection), pair in tensors.items()
        if projection in ("inner", "outer")
        for named in pair.values()
    ]
    total = sum(len(pair) for pair in tensors.values())
    if flat and len(flat) != total:
        raise AdapterError(
            f"{listed(flat)}: PEFT's fused experts beside tensors that name a projection. "
            "Two layouts in one layer cannot be told apart."
        )
    return not flat
