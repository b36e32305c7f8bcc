"""Writes the canonical form as tensors of a layout, for the `convert` command.

adapter_config.json must give the rank and alpha of what is written; `patterns` makes these entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..canonical import Dims, Experts, Part, pick, same, stacked
from ..config import Config
from ..names import PREFIX, WORDS


@dataclass
class Written:
    """What was written so far.

    Attributes:
        tensors: by their names in the file.
        ranks: module of routed experts -> (rank, alpha) of its tensors.
        notes: what the user should know, as where values were rounded.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)


def write(experts: Experts, layout: str, dims: Dims, config: Config, out: Written) -> None:
    """Add the tensors of one layer to ``out``.

    Args:
        experts: the layer's experts in the canonical form.
        layout: one of `names.LAYOUTS`.
        dims: sizes of the model's experts.
        config: the source adapter's. Its rule for the scale (rsLoRA or not) is kept.
        out: what was written so far; it is changed.
    """
    if layout == "per-expert":
        return _per_expert(experts, config, out)
    projections = {"w13": _joined(experts, dims, out), "w2": _whole(experts, "w2", dims, out)}
    if not dims.gated:
        projections = {"w1": _whole(experts, "w1", dims, out), "w2": projections["w2"]}
    present = {name: part for name, part in projections.items() if part is not None}
    for name, part in present.items():
        word = WORDS[name] if dims.gated or name == "w2" else "up_proj"
        a, b = stacked(part.a), stacked(part.b)
        out.ranks[f"{experts.prefix}.{word}"] = (part.rank, _alpha(part, config))
        if layout == "packed":
            out.tensors[f"{PREFIX}{experts.prefix}.{word}.lora_A"] = a
            out.tensors[f"{PREFIX}{experts.prefix}.{word}.lora_B"] = b
            continue
        where = ".base_layer" if name != "w2" and len(present) == 2 else ""
        key = f"{PREFIX}{experts.prefix}{where}"
        out.tensors[f"{key}.lora_A.weight"] = a.flatten(0, 1)
        out.tensors[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1, 2)


def patterns(written: Written, config: Config) -> dict[str, Any]:
    """The entries "rank_pattern" and "alpha_pattern" for the modules in ``written``.

    A projection with the same rank and alpha in all experts gets one regex instead of many names.
    Values that equal the config's "r" and "lora_alpha" are left out, unless the source adapter has
    patterns of its own. One of these could then match by accident, so every module gets a pattern.
    """
    always = bool(config.rank_pattern or config.alpha_pattern)
    by_word: dict[str, set[tuple[int, float]]] = {}
    for module, pair in written.ranks.items():
        by_word.setdefault(module.rpartition(".")[2], set()).add(pair)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, (rank, alpha) in written.ranks.items():
        word = module.rpartition(".")[2]
        name = rf".*\.experts(\.\d+)?\.{word}" if len(by_word[word]) == 1 else module
        if always or rank != config.rank:
            ranks[name] = rank
        if always or not math.isclose(alpha, config.alpha, rel_tol=1e-12):
            alphas[name] = alpha
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _alpha(part: Part, config: Config) -> float:
    alpha = part.scale * (math.sqrt(part.rank) if config.rslora else part.rank)
    return round(alpha, 12)


def _per_expert(experts: Experts, config: Config, out: Written) -> None:
    mixtral = ".block_sparse_moe." in experts.prefix
    for name, part in experts.split():
        part = part.trimmed() if experts.parts.get("w13") and name != "w2" else part
        word = name if mixtral else WORDS[name]
        for i, expert in enumerate(part.experts):
            module = f"{experts.prefix}.{expert}.{word}"
            out.tensors[f"{PREFIX}{module}.lora_A.weight"] = pick(part.a, i)
            out.tensors[f"{PREFIX}{module}.lora_B.weight"] = pick(part.b, i)
            out.ranks[module] = (part.rank, _alpha(part, config))


def _joined(experts: Experts, dims: Dims, out: Written) -> Part | None:
    """Gate and up of all experts as one w13 part, with rows ordered as in the model's weight.

    None if the layer has LoRA on neither.
    """
    whole = experts.parts.get("w13")
    if whole and len(whole) == 1 and whole[0].interleaved == dims.interleaved:
        return _whole(experts, "w13", dims, out)
    halves = experts.split()
    gate, up = (_whole(halves, name, dims, out) for name in ("w1", "w3"))
    if gate is None and up is None:
        return None
    some = gate or up
    assert some is not None
    zero = torch.zeros_like(stacked(some.b))
    if gate is None or up is None:
        a, scale, rank_b = stacked(some.a), some.scale, [stacked(some.b), zero]
        pair = rank_b if up is None else rank_b[::-1]
    elif gate.scale == up.scale and same(gate.a, up.a):
        a, scale, pair = stacked(gate.a), gate.scale, [stacked(gate.b), stacked(up.b)]
    else:
        out.notes.add("gate and up have different lora_A: fused, their rank is the sum of both")
        a, scale = torch.cat([stacked(gate.a), stacked(up.a)], 1), gate.scale
        above, below = stacked(gate.b), _rescaled(stacked(up.b), up.scale / scale, out)
        pair = [
            torch.cat([above, above.new_zeros(*above.shape[:2], below.shape[2])], 2),
            torch.cat([below.new_zeros(*below.shape[:2], above.shape[2]), below], 2),
        ]
    b = torch.stack(pair, 2).flatten(1, 2) if dims.interleaved else torch.cat(pair, 1)
    return Part(range(dims.experts), a, b, scale, some.label, dims.interleaved)


def _whole(experts: Experts, name: str, dims: Dims, out: Written) -> Part | None:
    """A projection of every expert of the model as one part; None if it has no LoRA.

    Smaller ranks are padded with zeros, and experts without LoRA are zeros.
    """
    parts = experts.parts.get(name)
    if not parts:
        return None
    rank, scale = max(part.rank for part in parts), parts[0].scale
    one = parts[0]
    if len(parts) == 1 and list(one.experts) == list(range(dims.experts)):
        return Part(one.experts, _all(one.a, dims), _all(one.b, dims), scale, one.label)
    rows, columns = dims.shape(name)
    a = stacked(one.a).new_zeros(dims.experts, rank, columns)
    b = stacked(one.b).new_zeros(dims.experts, rows, rank)
    absent = dims.experts - len({number for part in parts for number in part.experts})
    if absent:
        out.notes.add("experts without LoRA are written as zeros")
    for part in parts:
        numbers = list(part.experts)
        a[numbers, : part.rank] = stacked(part.a)
        b[numbers, :, : part.rank] = _rescaled(stacked(part.b), part.scale / scale, out)
    return Part(range(dims.experts), a, b, scale, one.label)


def _all(stack: Any, dims: Dims) -> torch.Tensor:
    """A stack as one tensor with a row for every expert; a shared matrix is expanded."""
    whole = stacked(stack)
    return whole.expand(dims.experts, *whole.shape[1:])


def _rescaled(b: torch.Tensor, factor: float, out: Written) -> torch.Tensor:
    """Multiply lora_B by ``factor``, so that experts with different scales get the same one."""
    if factor == 1:
        return b
    if math.frexp(factor)[0] != 0.5:  # a power of two does not round
        out.notes.add("experts have different scales, which are folded into lora_B and round it")
    return b * factor
