"""What a quantised MoE layer calls its packed weights, and the names that LoRA reads them by."""

from __future__ import annotations

from typing import Any

NAMES = ("{}_weight", "{}_weight_packed", "{}_qweight")


def alias_weights(layer: Any) -> None:
    """Let ``w13_weight`` and ``w2_weight`` name the packed weights of a quantised layer.

    Raises:
        NotImplementedError: the layer has none of the known names.
    """
    for which in ("w13", "w2"):
        names = [name.format(which) for name in NAMES]
        found = next((name for name in names if getattr(layer, name, None) is not None), None)
        if found is None:
            raise NotImplementedError(
                f"{type(layer).__name__} has none of {', '.join(names)}: MoE LoRA does not know "
                "this quantisation. Serve another checkpoint, or without --enable-lora."
            )
        if found != names[0]:
            setattr(layer, names[0], getattr(layer, found))
