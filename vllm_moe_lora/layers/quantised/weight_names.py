"""The attribute names of a quantised MoE layer's packed weights.

vLLM's LoRA layer reads ``w13_weight`` and ``w2_weight``. Layers with INT4 or INT8 weights call them
``w13_qweight`` or ``w13_weight_packed``. `alias` adds the names that LoRA needs. Used with vLLM
0.11.1 to 0.27.
"""

from __future__ import annotations

from typing import Any

NAMES = ("{}_weight", "{}_weight_packed", "{}_qweight")


def alias(layer: Any, which: str) -> bool:
    """Make the packed weight available as ``w13_weight`` or ``w2_weight``.

    Args:
        layer: the module that has the weights; it may get one more attribute.
        which: "w13" or "w2".

    Returns:
        Whether the layer has that weight under one of the names in `NAMES`.
    """
    names = [name.format(which) for name in NAMES]
    found = next((name for name in names if getattr(layer, name, None) is not None), None)
    if found is not None and found != names[0]:
        setattr(layer, names[0], getattr(layer, found))
    return found is not None


def alias_weights(layer: Any) -> None:
    """Call `alias` for w13 and w2.

    Raises:
        NotImplementedError: the layer has a weight under none of the names.
    """
    for which in ("w13", "w2"):
        if not alias(layer, which):
            names = ", ".join(name.format(which) for name in NAMES)
            raise NotImplementedError(
                f"{type(layer).__name__} has none of {names}: MoE LoRA does not support "
                "this quantisation. Serve another checkpoint, or without --enable-lora."
            )
