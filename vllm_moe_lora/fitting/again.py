"""Reads the next version of a pushed adapter without its names being parsed once more.

A trainer pushes tens of thousands of tensors at every step. Only their numbers change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch

from ..adapters.canonical import Experts

T = TypeVar("T")


class KeptTensors(dict[str, torch.Tensor]):
    """Tensors whose memory is written again for the adapter's next version.

    Names, shapes, dtypes, places in memory and adapter_config.json stay the same, or it is another
    `KeptTensors`.

    Attributes:
        found: what was made of them, by a key that has everything else that it depends on.
    """

    found: dict[Hashable, Any]

    def __init__(self) -> None:
        super().__init__()
        self.found = {}


def once(
    found: dict[Hashable, Any] | None,
    key: Hashable,
    make: Callable[[], T],
    may_keep: Callable[[T], bool] = lambda _: True,
) -> T:
    """What ``make`` returns, from ``found`` if it is there.

    Args:
        found: of `KeptTensors`; None if the tensors are not kept.
        key: of the result.
        make: called if there is none.
        may_keep: whether the result holds no numbers, only views of the kept tensors.
    """
    if found is None:
        return make()
    if key not in found:
        made = make()
        if not may_keep(made):
            return made
        found[key] = made
    result: T = found[key]
    return result


def are_views(layers: Iterable[Experts], tensors: KeptTensors) -> bool:
    """Whether the factors of all layers are views of ``tensors``, and none is a copy."""
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    return all(
        isinstance(stack, torch.Tensor) and stack.untyped_storage().data_ptr() in places
        for layer in layers
        for _, part in layer
        for stack in (part.a, part.b)
    )
