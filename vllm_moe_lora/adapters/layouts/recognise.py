"""Recognises the layout of each layer's routed experts and reads it into the canonical form.

The layout is recognised from tensor names and shapes, given the sizes of the model's experts. It
need not be configured.
"""

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
    """Recognise and read all layers.

    Args:
        layers: prefix of a layer's experts -> its tensors (`group.Grouped.experts`).
        dims: sizes of the model's experts, which are the same in all its MoE layers.
        config: the adapter's.

    Returns:
        The experts of each layer in the canonical form, and notes for the log on what had to be
        assumed.

    Raises:
        AdapterError: a tensor fits no layout. The message names it and says what would fit.
    """
    notes = []
    named = {prefix: by_projection.all_named(tensors) for prefix, tensors in layers.items()}
    fused = {prefix: tensors for prefix, tensors in layers.items() if not named[prefix]}
    order = peft_fused.decide(fused, dims, config) if fused else None
    if order is not None and order.note:
        notes.append(order.note)
    interleaved = config.interleaved()
    if interleaved is None:
        interleaved = dims.interleaved
        if interleaved and any((None, "w13") in tensors for tensors in layers.values()):
            notes.append(
                "the rows of experts.gate_up_proj are read as alternating between gate and up, as "
                "in the model's own weight. If the rows of gate come first, then those of up, set "
                '"moe_lora_gate_up": "concatenated" in adapter_config.json.'
            )
    out = []
    for prefix, tensors in layers.items():
        if named[prefix]:
            parts = by_projection.read(prefix, tensors, dims, config, interleaved)
            layout = _name(tensors)
        else:
            assert order is not None
            parts, layout = peft_fused.read(prefix, tensors, dims, config, order), order.layout
        if not dims.gated and "w3" in parts and "w1" not in parts:
            parts["w1"] = parts.pop("w3")  # without a gate, vLLM calls up_proj w1
        if "w13" in parts and ("w1" in parts or "w3" in parts):
            part = parts["w13"][0]
            raise AdapterError(
                f"{part.label}: the layer has gate_up_proj and also gate_proj or up_proj, so a "
                "projection is there twice. Save the adapter in one layout."
            )
        out.append(Experts(prefix, layout, parts))
    return out, notes


def _name(tensors: Tensors) -> str:
    """A short name for the layout of a layer that `by_projection` reads."""
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
