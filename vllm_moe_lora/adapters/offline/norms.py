"""How far an adapter moves each routed expert: the norm of what it adds to the expert's weights."""

from __future__ import annotations

import torch

from ..canonical import Experts, Part


def delta_norms(experts: Experts) -> dict[int, float]:
    """Return expert -> the Frobenius norm of scale * lora_B @ lora_A, over all its projections.

    The product itself is never made: the square of its norm is the sum over (BᵀB) * (AAᵀ), which
    are [rank, rank].

    Args:
        experts: the routed experts of one layer. Experts without LoRA are not in the result.
    """
    squares: dict[int, float] = {}
    for _, part in experts:
        for expert, square in zip(part.experts, _squares(part), strict=True):
            squares[expert] = squares.get(expert, 0.0) + square
    return {expert: square**0.5 for expert, square in sorted(squares.items())}


def _squares(part: Part) -> list[float]:
    """Return the square of the norm for each expert of a part."""
    inner = [one.float() @ one.float().T for one in part.a]
    outer = [one.float().T @ one.float() for one in part.b]
    found = []
    for number in range(len(part.experts)):
        a = inner[number if len(inner) > 1 else 0]
        b = outer[number if len(outer) > 1 else 0]
        found.append(max(0.0, float((a * b.T).sum(dtype=torch.float64))) * part.scale**2)
    return found
