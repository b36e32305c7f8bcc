"""Will an adapter load on a model? From config.json and the headers of files alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .. import sizes
from ..errors import AdapterError, listed
from ..group import refuse_what_is_not_lora
from ..names import PREFIX
from ..spelling import Spellings
from .convert import Adapter, read

# vLLM's choices for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class Fit:
    """What an adapter asks of the engine.

    Attributes:
        rank: the highest of its tensors.
        layouts: of its routed experts.
        layers: number of layers whose experts it has.
        notes: what the reader had to assume.
    """

    rank: int
    layouts: list[str]
    layers: int
    notes: list[str] = field(default_factory=list)


def fits(adapter: Path, model: Path) -> Fit:
    """
    Args:
        adapter: its folder; tensors are mapped, and none is read.
        model: the folder of the checkpoint that is to be served; config.json and the names in
            its safetensors are read.

    Raises:
        AdapterError: the sentence that loading would end with.
    """
    found = read(adapter, model if _has_experts(model) else None)
    refuse_what_is_not_lora(found.found)
    _place(found, model)
    ranks = [t.shape[0] for key, t in found.found.dense.items() if ".lora_A" in key]
    ranks += [part.rank for one in found.experts for _, part in one]
    return Fit(
        max(ranks, default=0),
        sorted({one.layout for one in found.experts}),
        len(found.experts),
        found.notes,
    )


def smallest_rank(rank: int) -> int:
    """What --max-lora-rank must be at least.

    Raises:
        AdapterError: vLLM has no choice that large.
    """
    choice = next((allowed for allowed in RANKS if allowed >= rank), None)
    if choice is None:
        raise AdapterError(f"rank {rank} is above {RANKS[-1]}, the largest that vLLM serves")
    return choice


def _has_experts(model: Path) -> bool:
    try:
        sizes.from_model(model)
    except AdapterError:
        return False
    return True


def _place(adapter: Adapter, model: Path) -> None:
    """Every module of the adapter is a module of the checkpoint."""
    modules = {name.rpartition(".")[0] for names in sizes.shards(model).values() for name in names}
    # "experts.7.up_proj" of a checkpoint also stands for its layer's "experts".
    modules |= {name.partition(".experts")[0] + ".experts" for name in modules if "experts" in name}
    spellings = Spellings(modules)
    wanted = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in adapter.found.dense}
    wanted |= {one.prefix for one in adapter.experts}
    lost = [name for name in wanted if spellings.find(name) is None]
    if lost:
        raise AdapterError(f"{model} has no module {listed(lost)}")
