"""Layers with routed experts for text and others for images (Ernie 4.5 VL).

transformers gives each kind a module of its own, and so do we. Published checkpoints have one list
for both: `mlp.experts.0` to `.63` are for text, `.64` to `.127` for images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .errors import AdapterError
from .group import Tensors

# What a layer has, in the order of the published list.
KINDS = ("text_moe.experts", "vision_moe.experts")


def has_kinds(names: Iterable[str]) -> bool:
    """Whether routed experts of a model, given by their names, are of two kinds."""
    return any(name.endswith(KINDS) for name in names)


def split(layers: Mapping[str, Tensors], count: int) -> dict[str, tuple[str, Tensors]]:
    """Give the experts of each kind a prefix and numbers of their own.

    Args:
        layers: prefix of a layer's experts -> its tensors (`group.Grouped.experts`).
        count: number of experts of a kind, which is the same for both.

    Returns:
        Prefix of the experts of a kind -> what the adapter calls them, and their tensors.

    Raises:
        AdapterError: an expert's number is beyond those of both kinds.
    """
    found: dict[str, tuple[str, Tensors]] = {}
    for prefix, tensors in layers.items():
        if prefix.endswith(KINDS) or any(number is None for number, _ in tensors):
            found[prefix] = prefix, tensors
            continue
        for (number, projection), sides in tensors.items():
            assert number is not None
            kind = number // count
            if kind >= len(KINDS):
                raise AdapterError(
                    f"{prefix}.{number} is not in the model, which has experts 0 to "
                    f"{len(KINDS) * count - 1}. The adapter is for another model."
                )
            own = prefix.removesuffix("experts") + KINDS[kind]
            _, part = found.setdefault(own, (prefix, {}))
            part[number - kind * count, projection] = sides
    return found
