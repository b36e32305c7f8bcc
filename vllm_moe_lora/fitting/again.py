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
        found: what was made of them, see `once`.
    """

    found: dict[Hashable, Any]

    def __init__(self) -> None:
        super().__init__()
        self.found = {}


def once(
    tensors: dict[str, torch.Tensor],
    key: Hashable,
    make: Callable[[], T],
    may_keep: Callable[[T], bool] = lambda _: True,
) -> T:
    """What ``make`` returns; for `KeptTensors` only the first call with ``key`` calls it.

    Args:
        tensors: what it is made of.
        key: has everything else that the result depends on.
        make: makes it.
        may_keep: whether the result holds no numbers, only views of the tensors.
    """
    if not isinstance(tensors, KeptTensors):
        return make()
    if key not in tensors.found:
        made = make()
        if not may_keep(made):
            return made
        tensors.found[key] = made
    result: T = tensors.found[key]
    return result


def are_views(layers: Iterable[Experts], tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the factors of all layers are views of ``tensors``, and none is a copy."""
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    return all(
        isinstance(stack, torch.Tensor) and stack.untyped_storage().data_ptr() in places
        for layer in layers
        for _, part in layer
        for stack in (part.a, part.b)
    )
