"""Says whether an adapter will load on a model, for the commands `plan` and `doctor`.

Only the model's config.json and the headers of the files are read. Sizes of dense modules and the
values of tensors are not checked.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from .. import sizes
from ..errors import AdapterError, listed
from ..group import refuse_what_is_not_lora
from ..modalities import KINDS
from ..names import parse
from ..spelling import Spellings
from .convert import Adapter, read

# The values that vLLM accepts for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class Fit:
    """What an adapter needs from an engine.

    Attributes:
        rank: the highest rank of its tensors.
        layouts: names of the layouts of its routed experts.
        layers: number of layers in which it has LoRA on routed experts.
        notes: what had to be assumed to read it.
    """

    rank: int
    layouts: list[str]
    layers: int
    notes: list[str] = field(default_factory=list)


def fits(adapter: Path, model: Path) -> Fit:
    """Check an adapter against a model.

    Args:
        adapter: the adapter's folder. Its tensors are memory-mapped; their values are not read.
        model: folder of the checkpoint that will be served. Its config.json is read, and the names
            of the weights in its safetensors files.

    Raises:
        AdapterError: the adapter would not load; says why.
    """
    found = read(adapter, model if _has_experts(model) else None)
    refuse_what_is_not_lora(found.found)
    _check_modules(found, model)
    ranks = [t.shape[0] for key, t in found.found.dense.items() if ".lora_A" in key]
    ranks += [part.rank for one in found.experts for _, part in one]
    return Fit(
        max(ranks, default=0),
        sorted({one.layout for one in found.experts}),
        len(found.experts),
        found.notes,
    )


def smallest_rank(rank: int) -> int:
    """The smallest value of --max-lora-rank that is enough for ``rank``.

    Raises:
        AdapterError: vLLM accepts no value that large.
    """
    choice = next((allowed for allowed in RANKS if allowed >= rank), None)
    if choice is None:
        raise AdapterError(
            f"rank {rank} is above {RANKS[-1]}, the largest --max-lora-rank that vLLM accepts. "
            "Merge the adapter into the model (`vllm-moe-lora convert SRC DST --merge-into MODEL`)."
        )
    return choice


def _has_experts(model: Path) -> bool:
    try:
        sizes.from_model(model)
    except AdapterError:
        return False
    return True


def _check_modules(adapter: Adapter, model: Path) -> None:
    """Check that every module of the adapter is a module of the checkpoint."""
    modules = {name.rpartition(".")[0] for names in sizes.shards(model).values() for name in names}
    # An adapter may name all experts of a layer where the checkpoint names "experts.7.up_proj".
    modules |= {name.partition(".experts")[0] + ".experts" for name in modules if "experts" in name}
    # Step-3.5's checkpoints name no experts: "layers.3.moe.down_proj" has them all.
    stacked = [name for name in modules if name.endswith(".moe.down_proj")]
    modules |= {f"{name.removesuffix('.down_proj')}.experts" for name in stacked}
    if sizes.has_kinds(model):  # published checkpoints name them as if there were one
        for kind, part in itertools.product(KINDS, ("experts", "gate")):
            own = f".{kind.removesuffix('experts')}{part}"
            modules |= {
                name.removesuffix(f".{part}") + own
                for name in modules
                if name.endswith(f".mlp.{part}")
            }
    spellings = Spellings(modules)
    wanted = {parse(key).module for key in adapter.found.dense}
    wanted |= {one.prefix for one in adapter.experts}
    lost = [name for name in wanted if spellings.find(name) is None]
    if lost:
        raise AdapterError(f"{model} has no module {listed(lost)}. Is the adapter for this model?")
