"""Grouped tensors + the model's sizes -> canonical experts, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from ..canonical import Dims, Experts
from ..config import Config
from ..errors import AdapterError
from ..group import Tensors
from . import by_projection, peft_fused


def resolve(
    layers: Mapping[str, Tensors], dims: Dims, config: Config
) -> tuple[list[Experts], list[str]]:
    """Recognise the layout of each layer's experts.

    Args:
        layers: prefix -> tensors of its experts (`group.Grouped.experts`).
        dims: of the model; all its MoE layers have the same.
        config: of the adapter.

    Returns:
        The experts by layer, and what the log should say of what had to be guessed.

    Raises:
        AdapterError: names the tensor that fits no layout, and says what would.
    """
    notes = []
    named = {prefix: by_projection.all_named(tensors) for prefix, tensors in layers.items()}
    flats = {prefix: tensors for prefix, tensors in layers.items() if not named[prefix]}
    reading = peft_fused.decide(flats, dims, config) if flats else None
    if reading is not None and reading.note:
        notes.append(reading.note)
    interleaved = config.interleaved()
    if interleaved is None:
        interleaved = dims.interleaved
        if interleaved and any((None, "w13") in tensors for tensors in layers.values()):
            notes.append(
                "experts.gate_up_proj: rows are read as alternating between gate and up, as the "
                "model's own; where they are gate first, then up, put "
                '"moe_lora_gate_up": "concatenated" into adapter_config.json'
            )
    out = []
    for prefix, tensors in layers.items():
        if named[prefix]:
            parts = by_projection.read(prefix, tensors, dims, config, interleaved)
            layout = _name(tensors)
        else:
            assert reading is not None
            parts, layout = peft_fused.read(prefix, tensors, dims, config, reading), reading.layout
        if not dims.gated and "w3" in parts and "w1" not in parts:
            parts["w1"] = parts.pop("w3")  # the one matrix that leads up is called up_proj
        if "w13" in parts and ("w1" in parts or "w3" in parts):
            part = parts["w13"][0]
            raise AdapterError(f"{part.label}: gate_up_proj beside gate_proj or up_proj")
        out.append(Experts(prefix, layout, parts))
    return out, notes


def _name(tensors: Tensors) -> str:
    numbered = [expert is not None for expert, _ in tensors]
    fused = any(projection == "w13" for _, projection in tensors)
    if all(numbered):
        return "per-expert gate_up" if fused else "per-expert"
    if any(numbered):
        return "shared-outer"
    dims = {tensor.ndim for pair in tensors.values() for _, tensor in pair.values()}
    if dims == {2}:
        return "rows"
    return "packed" if fused else "stacked"
