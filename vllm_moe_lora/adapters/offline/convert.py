"""An adapter's folder -> the same adapter in another layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import folder as files
from .. import sizes
from ..canonical import Dims, Experts
from ..config import Config
from ..errors import AdapterError, listed
from ..group import Grouped, group
from ..layouts.recognise import resolve
from ..layouts.write import Written, patterns, write
from ..names import place

# Statements about the layout of the source; they would be wrong in a file we write.
_STALE = ("moe_lora_layout", "lora_B_layout", "moe_lora_gate_up", "unsloth_fused_expert_lora")

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class Adapter:
    """A whole adapter, read and recognised.

    Attributes:
        config: of its adapter_config.json.
        found: all tensors by where they belong.
        experts: canonical, by layer.
        dims: of the model, None where the adapter has no routed experts.
        notes: what had to be guessed.
        sure: ``dims`` are the model's own, not read off the adapter.
    """

    config: Config
    found: Grouped
    experts: list[Experts]
    dims: Dims | None
    notes: list[str] = field(default_factory=list)
    sure: bool = True


def read(folder: Path, base: Path | None = None) -> Adapter:
    """Read an adapter's folder.

    Args:
        folder: with adapter_config.json and the tensors.
        base: the model's folder, for the sizes of its experts; without it they are taken from the
            config's base_model_name_or_path where that is a folder, else from the tensors.

    Raises:
        AdapterError: the adapter is damaged or its layout is not known.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    config = Config.from_folder(folder)
    found = group(files.tensors(folder))
    lost = [key for key in found.full if ".experts" in key and "shared_expert" not in key]
    if lost:
        raise AdapterError(f"{listed(lost)}: routed experts in no layout that is known")
    if not found.experts:
        return Adapter(config, found, [], None)
    if base is None:
        named = Path(str(config.raw.get("base_model_name_or_path") or ""))
        base = named if (named / "config.json").is_file() else None
    dims = sizes.from_model(base) if base else sizes.from_adapter(found.experts, config)
    experts, notes = resolve(found.experts, dims, config)
    return Adapter(config, found, experts, dims, notes, base is not None)


def convert(adapter: Adapter, layout: str, progress: Progress) -> tuple[Written, dict[str, Any]]:
    """The tensors and the adapter_config.json of ``adapter`` in another layout.

    Raises:
        AdapterError: it has DoRA or biases on routed experts, which no fused layout has.
    """
    odd = [name for name in (*adapter.found.magnitude, *adapter.found.bias) if place(name)]
    if odd:
        raise AdapterError(
            f"DoRA or biases on {listed(odd)} have no place in other layouts: merge the adapter "
            "into the model (--merge-into MODEL)"
        )
    out = Written(notes=set(adapter.notes))
    if not adapter.sure and layout != "per-expert" and adapter.dims is not None:
        out.notes.add(
            f"the model is taken to have {adapter.dims.experts} experts, as the adapter shows; "
            "--base MODEL makes sure"
        )
    for experts in progress(adapter.experts, "layers"):
        assert adapter.dims is not None
        write(experts, layout, adapter.dims, adapter.config, out)
    found = adapter.found
    out.tensors.update({**found.dense, **found.full})
    for module, tensor in found.magnitude.items():
        out.tensors[f"base_model.model.{module}.lora_magnitude_vector.weight"] = tensor
    for module, tensor in found.bias.items():
        out.tensors[f"base_model.model.{module}.lora_B.bias"] = tensor
    return out, _config(adapter, out, layout)


def _config(adapter: Adapter, out: Written, layout: str) -> dict[str, Any]:
    raw = {k: v for k, v in adapter.config.raw.items() if k not in _STALE}
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter.found.dense}
    raw["target_parameters"] = None
    own = {module.rpartition(".")[2] for module in out.ranks}
    if layout == "peft-fused":
        raw["target_parameters"] = sorted(f"experts.{word}" for word in own)
        own = set()
    raw["target_modules"] = sorted(modules | own)
    ours = patterns(out, adapter.config)
    for key in ("rank_pattern", "alpha_pattern"):
        # Of the source's patterns those on other modules stay; ours are more exact, and come first.
        kept = {k: v for k, v in (raw.get(key) or {}).items() if k not in ours[key]}
        raw[key] = {**ours[key], **kept}
    return raw


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write an adapter's folder."""
    from safetensors.torch import save_file

    with replacing(folder) as draft:
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()},
            draft / files.WEIGHTS,
            metadata={"format": "pt"},
        )
        (draft / "adapter_config.json").write_text(json.dumps(config, indent=2))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place and name of ``folder`` when all went well."""
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
