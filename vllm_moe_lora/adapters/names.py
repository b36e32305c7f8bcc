"""What a tensor's name says: which module, which factor, which expert, which projection."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

PREFIX = "base_model.model."
EXPERTS = ".experts"

# Names of an expert's matrices, in checkpoints and adapters -> vLLM's: w1 gate, w3 up, w2 down.
PROJECTIONS = {
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "gate_up_proj": "w13",
    "w1": "w1",
    "w2": "w2",
    "w3": "w3",
    "w13": "w13",
    "linear": "w1",  # Grok
    "linear_v": "w3",
    "linear_1": "w2",
    # PEFT's nested ParamWrappers: the inner one is `experts.base_layer`, the outer `experts`.
    "base_layer": "inner",
    "": "outer",
}

# What a projection is called where we write it.
WORDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "w13": "gate_up_proj"}

# What `convert` writes.
LAYOUTS = ("per-expert", "peft-fused", "packed")

_SIDES = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}


class Name(NamedTuple):
    """One tensor of an adapter.

    Attributes:
        module: the module's name, without PEFT's prefix.
        side: "A", "B", "magnitude" (DoRA), "bias" (of lora_B) or "full" (no LoRA at all).
        adapter: PEFT's adapter name where the file still has it ("default"), else "".
        embedding: a factor of an embedding, whose A and B are the other way round.
    """

    module: str
    side: str
    adapter: str
    embedding: bool


class Place(NamedTuple):
    """Where in the routed experts of which layer.

    Attributes:
        prefix: the layer's experts, "model.layers.0.mlp.experts".
        expert: the expert's number, or None for a tensor that holds several.
        projection: a value of `PROJECTIONS`.
    """

    prefix: str
    expert: int | None
    projection: str


def parse(tensor: str) -> Name:
    """Split a tensor's name. Forms: ``[base_model.model.]M.lora_A[.default][.weight]`` and kin."""
    name = tensor.removeprefix(PREFIX)
    module, _, tail = name.rpartition(".lora_")
    side, adapter, embedding = _tail(tail) if module else _FULL
    return Name(name if side == "full" else module, side, adapter, embedding)


_FULL = ("full", "", False)


@lru_cache(maxsize=1024)  # a file has thousands of names, and a handful of tails
def _tail(tail: str) -> tuple[str, str, bool]:
    word, *rest = ("lora_" + tail).split(".")
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
    side = _SIDES.get(word, "full")
    if side == "full" or len(rest) > 1:
        return _FULL
    return "bias" if leaf == "bias" else side, rest[0] if rest else "", "embedding" in word


def place(module: str) -> Place | None:
    """The routed experts that a module belongs to, None for any other module."""
    prefix, found, rest = module.rpartition(EXPERTS)
    where = _expert(rest) if found else None
    return None if where is None else Place(prefix + EXPERTS, *where)


@lru_cache(maxsize=8192)  # every layer has the same
def _expert(rest: str) -> tuple[int | None, str] | None:
    if rest[:1] not in ("", "."):
        return None
    words = rest[1:].split(".")
    expert = int(words.pop(0)) if words[0].isdecimal() else None
    projection = PROJECTIONS.get(".".join(words))
    if projection is None or (expert is not None and projection in ("inner", "outer")):
        return None
    return expert, projection


def touches_experts(tensors: Iterable[str]) -> bool:
    """Whether any of these names is of routed experts."""
    return any(f"{EXPERTS}." in name for name in tensors)
