"""PEFT's fused experts (target_parameters): `experts.base_layer` is gate_up_proj, `experts` down.

lora_A [r E, in]: row = expert * r + j. lora_B [out, r E]: column = j * E + expert. Verified against
merge_and_unload for peft 0.17.1 to 0.21.2 (facts/adapter-layouts.md, 1.3). PEFT up to 0.19.0 swaps
in and out on transformers 5 (1.4). Which it is, is read from shapes; where they cannot tell, from
markers in adapter_config.json, else PEFT's present order is taken and the log says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..canonical import Dims, Part
from ..config import ORDERS, Config
from ..errors import AdapterError
from ..group import Tensors


@dataclass(frozen=True)
class Reading:
    """How all flat tensors of one adapter are read.

    Attributes:
        transposed: in and out are swapped.
        a_by_expert, b_by_expert: rows of lora_A / columns of lora_B go expert by expert.
        note: what the log should say, "" where nothing was guessed.
    """

    transposed: bool
    a_by_expert: bool
    b_by_expert: bool
    note: str = ""

    @property
    def layout(self) -> str:
        orders = (self.a_by_expert, self.b_by_expert)
        name = next(name for name, order in ORDERS.items() if order == orders)
        return f"flat {name}{' transposed' if self.transposed else ''}"


def decide(layers: Mapping[str, Tensors], dims: Dims, config: Config) -> Reading:
    """One reading for the whole adapter.

    Raises:
        AdapterError: the shapes fit the model in no reading, or in different ones.
    """
    said = config.transposed()
    found: set[bool] = set()
    open_question = ""
    for prefix, tensors in layers.items():
        fits = [t for t in (False, True) if _roles(tensors, dims, t) is not None]
        if not fits:
            raise AdapterError(_no_fit(prefix, tensors, dims))
        if len(fits) == 1:
            found.add(fits[0])
        else:
            open_question = prefix
    if len(found) > 1:
        raise AdapterError("some layers have in and out swapped and some have not")
    if found:
        transposed = found.pop()
        if said is not None and said != transposed:
            which = "are" if transposed else "are not"
            raise AdapterError(
                f"adapter_config.json says otherwise, but the shapes show that in and out {which} "
                "swapped (PEFT up to 0.19.0). Correct the tag."
            )
        open_question = ""
    else:
        transposed = bool(said)
    orders, note = config.orders(), ""
    if orders is None and transposed and config.written_by_megatron_bridge():
        orders = ORDERS["megatron-bridge"]
        note = "read as Megatron-Bridge's save_hf_adapter writes it (columns expert by expert)"
    elif open_question and said is None:
        note = (
            f"{open_question}: the model's sizes do not show whether in and out are swapped (PEFT "
            "up to 0.19.0); read as PEFT writes today"
        )
    by_expert = orders or ORDERS["peft"]
    if note:
        note += (
            '. To override, put "moe_lora_layout" into adapter_config.json: one of '
            f"{', '.join(ORDERS)}, with -standard or -transposed behind it."
        )
    return Reading(transposed, *by_expert, note)


def read(
    prefix: str, tensors: Tensors, dims: Dims, config: Config, reading: Reading
) -> dict[str, list[Part]]:
    """Parts of one layer.

    Raises:
        AdapterError: a rank is not what adapter_config.json says.
    """
    roles = _roles(tensors, dims, reading.transposed)
    if roles is None:
        raise AdapterError(_no_fit(prefix, tensors, dims))
    parts = {}
    for projection, place in roles.items():
        (key, one), (_, two) = tensors[place]["A"], tensors[place]["B"]
        a = _rows(one, dims.experts, reading.a_by_expert)
        b = _columns(two, dims.experts, reading.b_by_expert)
        if reading.transposed:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        rank = a.shape[1]
        parameter = "down_proj" if projection == "w2" else "gate_up_proj"
        if projection == "w1":
            parameter = "up_proj"
        scale, expected = config.scale(f"{prefix}.{parameter}", rank)
        if rank != expected:
            # Rows are rank times experts: another rank may be another number of experts.
            raise AdapterError(
                f"{key} has rank {rank} for each of {dims.experts} experts, but "
                f"adapter_config.json says {expected}: the adapter is for a model with another "
                f'number of experts, or lacks "rank_pattern": {{"{prefix}.{parameter}": {rank}}}.'
            )
        interleaved = dims.interleaved if config.interleaved() is None else config.interleaved()
        fused = projection == "w13" and bool(interleaved)
        parts[projection] = [Part(range(dims.experts), a, b, scale, key, fused)]
    return parts


def _roles(
    tensors: Tensors, dims: Dims, transposed: bool
) -> dict[str, tuple[int | None, str]] | None:
    """Projection -> tensors of this layer, or None where the shapes do not fit."""
    up = "w13" if dims.gated else "w1"
    names = [up, "w2"]
    places = sorted(tensors)  # "inner" before "outer": gate_up is the inner one
    if any(
        key not in ((None, "inner"), (None, "outer")) or len(pair) != 2
        for key, pair in tensors.items()
    ):
        return None
    for order in (names, names[::-1]) if len(places) == 2 else ([up], ["w2"]):
        if all(
            _fits(tensors[place], dims, name, transposed)
            for name, place in zip(order, places, strict=True)
        ):
            return dict(zip(order, places, strict=True))
    return None


def _fits(
    pair: Mapping[str, tuple[str, torch.Tensor]], dims: Dims, projection: str, transposed: bool
) -> bool:
    a, b = pair["A"][1], pair["B"][1]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return False
    if a.shape[0] == 0 or a.shape[0] % dims.experts:
        return False
    rows, columns = dims.shape(projection)
    want = (columns, rows) if transposed else (rows, columns)
    return (b.shape[0], a.shape[1]) == want


def _no_fit(prefix: str, tensors: Tensors, dims: Dims) -> str:
    shapes = ", ".join(
        f"{key} {list(tensor.shape)}" for pair in tensors.values() for key, tensor in pair.values()
    )
    return (
        f"{prefix}: {shapes} fit no layout of fused experts for {dims.experts} experts, hidden "
        f"size {dims.hidden} and intermediate size {dims.inner}: lora_A is [rank * experts, in], "
        "lora_B [out, rank * experts]. The adapter is for another model, or was cut."
    )


def _rows(a: torch.Tensor, experts: int, by_expert: bool) -> torch.Tensor:
    """[r E, x] -> [E, r, x]"""
    if by_expert:
        return a.unflatten(0, (experts, -1))
    return a.unflatten(0, (-1, experts)).transpose(0, 1)


def _columns(b: torch.Tensor, experts: int, by_expert: bool) -> torch.Tensor:
    """[y, r E] -> [E, y, r]"""
    if by_expert:
        return b.unflatten(1, (experts, -1)).transpose(0, 1)
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1)
