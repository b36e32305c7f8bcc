"""Parses the names of an adapter's tensors: module, lora_A or lora_B, expert, projection."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

PREFIX = "base_model.model."
EXPERTS = ".experts"

# What checkpoints and adapters call an expert's matrices -> vLLM's names: w1 is gate, w3 is up,
# w2 is down, w13 is gate and up fused into one matrix.
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
    # PEFT's target_parameters nests two ParamWrappers in one module. Their tensors do not name the
    # projection: the inner wrapper is `experts.base_layer`, the outer one is `experts` itself.
    "base_layer": "inner",
    "": "outer",
}

# What we call a projection in files that we write.
WORDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "w13": "gate_up_proj"}

# The layouts that the `convert` command can write.
LAYOUTS = ("per-expert", "peft-fused", "packed")

_SIDES = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}


class Name(NamedTuple):
    """The parsed name of one tensor.

    Attributes:
        module: the module's name without PEFT's prefix. For side "full" it is the tensor's name.
        side: "A" (lora_A), "B" (lora_B), "magnitude" (DoRA's vector), "bias" (of lora_B), or
            "full" for a tensor that is none of these, as from PEFT's modules_to_save.
        adapter: PEFT's adapter name ("default") if the tensor's name still has it, else "".
        embedding: the tensor is lora_embedding_A or lora_embedding_B. These are the transposes of
            what lora_A and lora_B of a linear layer would be.
    """

    module: str
    side: str
    adapter: str
    embedding: bool


class Place(NamedTuple):
    """Which routed experts and which projection a module name means.

    Attributes:
        prefix: the layer's experts, as in "model.layers.0.mlp.experts".
        expert: the expert's number, or None if the tensor holds several experts.
        projection: one of the values of `PROJECTIONS`.
    """

    prefix: str
    expert: int | None
    projection: str


def parse(tensor: str) -> Name:
    """Parse a tensor's name.

    PEFT writes ``base_model.model.MODULE.lora_A.weight``. The prefix and ``.weight`` may be
    missing, and PEFT's adapter name may follow ``lora_A``: ``MODULE.lora_A.default.weight``. The
    name may begin with ``_orig_mod.`` or ``module.``, from torch.compile and from
    DistributedDataParallel.
    """
    name = _plain(tensor)
    module, _, tail = name.rpartition(".lora_")
    side, adapter, embedding = _tail(tail) if module else _FULL
    return Name(name if side == "full" else module, side, adapter, embedding)


# What torch.compile and DistributedDataParallel put before the names of a model that they wrap.
_WRAPPERS = ("_orig_mod.", "module.")


def _plain(tensor: str) -> str:
    """A tensor's name without PEFT's prefix and without those of `_WRAPPERS`."""
    name = tensor
    while name.startswith((PREFIX, *_WRAPPERS)):
        for prefix in (PREFIX, *_WRAPPERS):
            name = name.removeprefix(prefix)
    return name


_FULL = ("full", "", False)


@lru_cache(maxsize=1024)  # a file has thousands of names, but few different tails
def _tail(tail: str) -> tuple[str, str, bool]:
    word, *rest = ("lora_" + tail).split(".")
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
    side = _SIDES.get(word, "full")
    if side == "full" or len(rest) > 1:
        return _FULL
    return "bias" if leaf == "bias" else side, rest[0] if rest else "", "embedding" in word


def place(module: str) -> Place | None:
    """Parse a module's name as one of routed experts; None if it is any other module."""
    prefix, found, rest = module.rpartition(EXPERTS)
    where = _expert(rest) if found else None
    return None if where is None else Place(prefix + EXPERTS, *where)


@lru_cache(maxsize=8192)  # the names repeat in every layer
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
    """Whether any of these tensor names belongs to routed experts."""
    return any(f"{EXPERTS}." in name for name in tensors)
