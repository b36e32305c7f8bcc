"""What a quantised MoE layer calls its packed weights, and the names that LoRA reads them by."""

from __future__ import annotations

from typing import Any

NAMES = ("{}_weight", "{}_weight_packed", "{}_qweight")


def alias(layer: Any, which: str) -> bool:
    """Let ``w13_weight`` (or w2) name the packed weight, if that is what ``layer`` has.

    Returns:
        Whether the layer has a weight by any of the names.
    """
    names = [name.format(which) for name in NAMES]
    found = next((name for name in names if getattr(layer, name, None) is not None), None)
    if found is not None and found != names[0]:
        setattr(layer, names[0], getattr(layer, found))
    return found is not None


def alias_weights(layer: Any) -> None:
    """`alias` for both weights.

    Raises:
        NotImplementedError: the layer has none of the known names.
    """
    for which in ("w13", "w2"):
        if not alias(layer, which):
            names = ", ".join(name.format(which) for name in NAMES)
            raise NotImplementedError(
                f"{type(layer).__name__} has none of {names}: MoE LoRA does not know "
                "this quantisation. Serve another checkpoint, or without --enable-lora."
            )
