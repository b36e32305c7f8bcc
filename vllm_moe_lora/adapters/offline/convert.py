"""Reads a whole adapter's folder (`read`) and writes the adapter in another layout.

`read` is also the first step of the other commands: `inspect`, `plan` and merging.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import folder as files
from .. import modalities, sizes
from ..canonical import Dims, Experts
from ..config import Config
from ..errors import AdapterError, listed
from ..group import LAYOUTS, Grouped, Tensors, group
from ..layouts.recognise import resolve
from ..layouts.write import Written, patterns, write
from ..names import place

# Entries of adapter_config.json on the layout of the source. They would be wrong in what we write.
_LAYOUT_ENTRIES = (
    "moe_lora_layout",
    "lora_B_layout",
    "moe_lora_gate_up",
    "unsloth_fused_expert_lora",
)

# Wraps the items of a loop to show its progress: (items, what they are) -> the items.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class Adapter:
    """A whole adapter.

    Attributes:
        config: its adapter_config.json.
        found: all its tensors, sorted by where they belong.
        experts: its routed experts in the canonical form, one entry per layer.
        dims: sizes of the model's experts; None if the adapter has no LoRA on routed experts.
        notes: what had to be assumed to read it.
        dims_are_the_models: ``dims`` come from the model's config.json. If false they were inferred
            from the adapter's tensors.
    """

    config: Config
    found: Grouped
    experts: list[Experts]
    dims: Dims | None
    notes: list[str] = field(default_factory=list)
    dims_are_the_models: bool = True


def read(folder: Path, base: Path | None = None) -> Adapter:
    """Read an adapter's folder.

    Args:
        folder: the folder with adapter_config.json and the weights.
        base: the model's folder, for the sizes of its experts. Without it they come from the
            config's base_model_name_or_path if that is a local folder, else from the tensors.

    Raises:
        AdapterError: the adapter is damaged or has an unknown layout.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    config = Config.from_folder(folder)
    found = group(files.tensors(folder))
    lost = [key for key in found.full if ".experts" in key and "shared_expert" not in key]
    if lost:
        raise AdapterError(
            f"{listed(lost)}: these routed experts are in an unknown layout. The layouts that can "
            f"be read: {LAYOUTS}."
        )
    if not found.experts:
        return Adapter(config, found, [], None)
    if base is None:
        named = Path(str(config.raw.get("base_model_name_or_path") or ""))
        base = named if (named / "config.json").is_file() else None
    if base is not None and sizes.has_kinds(base):
        return _of_kinds(config, found, base)
    dims = sizes.from_model(base) if base else sizes.from_adapter(found.experts, config)
    experts, notes = resolve(found.experts, dims, config)
    return Adapter(config, found, experts, dims, notes, base is not None)


def _of_kinds(config: Config, found: Grouped, base: Path) -> Adapter:
    """Read an adapter for a model with experts for text and experts for images."""
    text, images = sizes.from_model(base), sizes.from_model(base, kind=1)
    layers: dict[Dims, dict[str, Tensors]] = {text: {}, images: {}}
    for prefix, (_, tensors) in modalities.split(found.experts, text.experts).items():
        layers[images if prefix.endswith(modalities.KINDS[1]) else text][prefix] = tensors
    read = [resolve(some, dims, config) for dims, some in layers.items() if some]
    experts = [one for some, _ in read for one in some]
    return Adapter(config, found, experts, text, [note for _, notes in read for note in notes])


def convert(adapter: Adapter, layout: str, progress: Progress) -> tuple[Written, dict[str, Any]]:
    """Convert an adapter to another layout of routed experts. Other modules stay as they are.

    Args:
        layout: one of `names.LAYOUTS`.
        progress: shows the progress of the loop over layers.

    Returns:
        The tensors, and the contents of adapter_config.json.

    Raises:
        AdapterError: the adapter has DoRA magnitudes or biases on routed experts. The fused layouts
            have no tensors for them.
    """
    odd = [name for name in (*adapter.found.magnitude, *adapter.found.bias) if place(name)]
    if odd:
        raise AdapterError(
            f"DoRA magnitudes or biases on {listed(odd)} cannot be converted: the fused layouts "
            "have no tensors for them. Merge the adapter into the model (--merge-into MODEL)."
        )
    out = Written(notes=set(adapter.notes))
    if not adapter.dims_are_the_models and layout != "per-expert" and adapter.dims is not None:
        out.notes.add(
            f"the model is assumed to have {adapter.dims.experts} experts, as the adapter shows. "
            "Give --base MODEL to be sure."
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
    """The contents of adapter_config.json for what was written."""
    raw = {k: v for k, v in adapter.config.raw.items() if k not in _LAYOUT_ENTRIES}
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter.found.dense}
    raw["target_parameters"] = None
    own = {module.rpartition(".")[2] for module in out.ranks}
    if layout == "peft-fused":
        raw["target_parameters"] = sorted(f"experts.{word}" for word in own)
        own = set()
    raw["target_modules"] = sorted(modules | own)
    ours = patterns(out, adapter.config)
    for key in ("rank_pattern", "alpha_pattern"):
        # The source's patterns stay, for other modules. Ours come first, because PEFT uses the
        # first pattern that matches.
        kept = {k: v for k, v in (raw.get(key) or {}).items() if k not in ours[key]}
        raw[key] = {**ours[key], **kept}
    return raw


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write an adapter's folder. An existing folder is replaced.

    Args:
        config: the contents of adapter_config.json.
    """
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
    """Yield an empty folder that becomes ``folder`` at the end of the block.

    An existing ``folder`` is replaced then. If the block raises, it stays as it was.
    """
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield draft
        for file in draft.iterdir():  # safetensors writes files that nobody else may read
            file.chmod(0o666 & ~umask)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
