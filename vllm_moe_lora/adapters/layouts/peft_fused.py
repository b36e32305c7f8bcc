"""Reads PEFT's fused experts, which PEFT writes for `target_parameters`.

The names do not contain a projection: `experts.base_layer` is gate_up_proj and `experts` is
down_proj. If the file has only one of them, it is called `experts` either way, and its shapes show
which it is.

    lora_A  [r E, in]   row    = expert * r + j    (expert-major)
    lora_B  [out, r E]  column = j * E + expert    (rank-major)

These orders were verified against PEFT's own merge_and_unload for peft 0.17.1 to 0.21.2. Some other
trainers write the same names and shapes in another order (`config.ORDERS`). On transformers 5, PEFT
up to 0.19.0 swaps in and out: lora_A is [r E, out] and lora_B is [in, r E].

The shapes show whether in and out are swapped. If they allow both, and for the order of rows and
columns, the entries of adapter_config.json decide. Without such an entry the tensors are read as
today's PEFT writes them, and the log says so where the shapes allow both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..canonical import Dims, Part
from ..config import ORDERS, Config
from ..errors import AdapterError
from ..group import Tensors
from ..names import WORDS


@dataclass(frozen=True)
class FusedOrder:
    """How the fused tensors of one adapter are to be read. It is the same in all its layers.

    Attributes:
        transposed: in and out are swapped.
        a_by_expert: the rows of lora_A are expert-major, else rank-major.
        b_by_expert: the columns of lora_B are expert-major, else rank-major.
        note: for the log: what was assumed. "" if nothing was.
    """

    transposed: bool
    a_by_expert: bool
    b_by_expert: bool
    note: str = ""

    @property
    def layout(self) -> str:
        """The layout's name for messages and tables, as in "flat peft transposed"."""
        orders = (self.a_by_expert, self.b_by_expert)
        name = next(name for name, order in ORDERS.items() if order == orders)
        return f"flat {name}{' transposed' if self.transposed else ''}"


def decide(layers: Mapping[str, Tensors], dims: Dims, config: Config) -> FusedOrder:
    """Find out in which order an adapter's fused tensors are.

    Args:
        layers: prefix of a layer's experts -> its tensors, for all layers with fused tensors.
        dims: sizes of the model's experts.
        config: the adapter's; may say which order it is.

    Raises:
        AdapterError: the shapes of a layer do not fit the model, layers differ in whether in and
            out are swapped, or the config contradicts the shapes.
    """
    configured = config.transposed()
    found: dict[bool, str] = {}  # in and out are swapped -> a layer whose shapes show it
    ambiguous = ""  # a layer whose shapes allow both
    for prefix, tensors in layers.items():
        fits = [t for t in (False, True) if _roles(tensors, dims, t) is not None]
        if not fits:
            raise AdapterError(_no_fit(prefix, tensors, dims))
        if len(fits) == 1:
            found.setdefault(fits[0], prefix)
        else:
            ambiguous = prefix
    if len(found) > 1:
        raise AdapterError(
            f"in and out are swapped in {found[True]} (as PEFT up to 0.19.0 writes them) but not "
            f"in {found[False]}. Save the whole adapter with one version of PEFT."
        )
    if found:
        transposed = next(iter(found))
        if configured is not None and configured != transposed:
            which, entry = ("are", "are not") if transposed else ("are not", "are")
            raise AdapterError(
                f"{found[transposed]}: the shapes show that in and out {which} swapped (as PEFT up "
                f"to 0.19.0 writes them), but the config says that they {entry}. Correct "
                '"moe_lora_layout" in adapter_config.json, or "paramwrapper_layout" in '
                "automodel_peft_config.json."
            )
        ambiguous = ""
    else:
        transposed = bool(configured)
    orders, note = config.orders(), ""
    if orders is None and transposed and config.written_by_megatron_bridge():
        orders = ORDERS["megatron-bridge"]
        note = (
            "fused experts are read as Megatron-Bridge's save_hf_adapter writes them (columns of "
            "lora_B expert by expert)"
        )
    elif ambiguous and configured is None:
        note = (
            f"{ambiguous}: the shapes fit the model whether in and out are swapped (as PEFT up to "
            "0.19.0 writes them) or not. They are read as PEFT writes them today"
        )
    by_expert = orders or ORDERS["peft"]
    if note:
        note += (
            '. If that is wrong, set "moe_lora_layout" in adapter_config.json to one of '
            f"{', '.join(ORDERS)}, followed by -standard or -transposed."
        )
    return FusedOrder(transposed, *by_expert, note)


def read(
    prefix: str, tensors: Tensors, dims: Dims, config: Config, order: FusedOrder
) -> dict[str, list[Part]]:
    """Read one layer's experts into the canonical form.

    Args:
        prefix: what the adapter calls the layer's experts.
        tensors: all tensors of this layer's experts.
        dims: sizes of the model's experts.
        config: for ranks and scales.
        order: from `decide`.

    Returns:
        "w13" (or "w1" if the experts have no gate) and "w2" -> parts, as in `canonical.Experts`.

    Raises:
        AdapterError: the shapes do not fit the model, or a rank is not what adapter_config.json
            says.
    """
    roles = _roles(tensors, dims, order.transposed)
    if roles is None:
        raise AdapterError(_no_fit(prefix, tensors, dims))
    parts = {}
    for projection, place in roles.items():
        (key, one), (_, two) = tensors[place]["A"], tensors[place]["B"]
        a = _split_rows(one, dims.experts, order.a_by_expert)
        b = _split_columns(two, dims.experts, order.b_by_expert)
        if order.transposed:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        rank = a.shape[1]
        parameter = f"{prefix}.{'up_proj' if projection == 'w1' else WORDS[projection]}"
        scale, expected = config.scale(parameter, rank)
        if rank != expected:
            # A tensor has rank * experts rows, so a wrong rank may also mean that the adapter was
            # trained with another number of experts.
            raise AdapterError(
                f"{key} has rank {rank} for each of {dims.experts} experts, but "
                f"adapter_config.json says {expected}. The adapter is for a model with another "
                f'number of experts, or the config lacks "rank_pattern": {{"{parameter}": {rank}}}.'
            )
        interleaved = dims.interleaved if config.interleaved() is None else config.interleaved()
        fused = projection == "w13" and bool(interleaved)
        parts[projection] = [Part(range(dims.experts), a, b, scale, key, fused)]
    return parts


def _roles(
    tensors: Tensors, dims: Dims, transposed: bool
) -> dict[str, tuple[int | None, str]] | None:
    """Which tensors of a layer are which projection, judged by their shapes.

    Returns:
        Projection -> key in ``tensors``; None if the shapes do not fit the model.
    """
    up = "w13" if dims.gated else "w1"
    names = [up, "w2"]
    places = sorted(tensors)  # "inner", which should be gate_up, then "outer"
    if any(
        key not in ((None, "inner"), (None, "outer")) or len(pair) != 2
        for key, pair in tensors.items()
    ):
        return None
    # PEFT's nesting can be the other way round, and a single tensor can be either projection.
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
    """Whether the shapes of lora_A and lora_B fit this projection of the model."""
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
        f"size {dims.hidden} and intermediate size {dims.inner}: lora_A must be "
        "[rank * experts, in] and lora_B [out, rank * experts]. The adapter is for another model, "
        "or was cut."
    )


def _split_rows(a: torch.Tensor, experts: int, by_expert: bool) -> torch.Tensor:
    """[r E, x] -> [E, r, x]"""
    if by_expert:
        return a.unflatten(0, (experts, -1))
    return a.unflatten(0, (-1, experts)).transpose(0, 1)


def _split_columns(b: torch.Tensor, experts: int, by_expert: bool) -> torch.Tensor:
    """[y, r E] -> [E, y, r]"""
    if by_expert:
        return b.unflatten(1, (experts, -1)).transpose(0, 1)
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1)
