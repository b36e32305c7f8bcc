"""Finds the sizes of a model's routed experts without an engine, for the commands.

They come from the model's config.json (`from_model`), or from the shapes of an adapter's tensors if
the model's folder is not there (`from_adapter`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .canonical import Dims
from .config import Config
from .errors import AdapterError
from .group import Tensors
from .names import WORDS

# What families of models call these in config.json: number of experts, intermediate size of one.
_EXPERT_COUNT = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_EXPERT_SIZE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
# Values of "model_type".
INTERLEAVED = ("gpt_oss",)  # rows of fused gate_up alternate between gate and up
_KINDS = ("ernie4_5_moe_vl", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text")  # see modalities.py
_NOT_GATED = ("nemotron_h",)  # experts have no gate, only up and down


def from_model(folder: Path, kind: int = 0) -> Dims:
    """The sizes that a model's config.json gives.

    Args:
        folder: the model's folder.
        kind: which of `modalities.KINDS`, if a layer has experts of several kinds.

    Raises:
        AdapterError: config.json cannot be read, or does not describe routed experts.
    """
    text = text_config(folder)
    experts = next((text[key] for key in _EXPERT_COUNT if text.get(key)), None)
    inner = next((text[key] for key in _EXPERT_SIZE if text.get(key)), None)
    if experts is None or inner is None:
        raise AdapterError(f"{folder / 'config.json'} does not describe routed experts")
    model_type = str(text.get("model_type", ""))
    return Dims(
        int(experts[kind] if isinstance(experts, list) else experts),
        int(text["hidden_size"]),
        int(inner[kind] if isinstance(inner, list) else inner),
        gated=model_type not in _NOT_GATED,
        interleaved=model_type in INTERLEAVED,
    )


def has_kinds(folder: Path) -> bool:
    """Whether a layer has experts for text and others for images; see `modalities.py`."""
    return text_config(folder).get("model_type") in _KINDS


def text_config(folder: Path) -> dict[str, Any]:
    """The config of a model's language part.

    For a multimodal model that is "text_config" in config.json, else all of config.json.
    "quantization_config" is included wherever it is.

    Raises:
        AdapterError: config.json cannot be read.
    """
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, RecursionError, ValueError) as error:
        raise AdapterError(f"{folder / 'config.json'} cannot be read: {error}") from error
    whole = {key: config[key] for key in ("quantization_config",) if key in config}
    return {**(config.get("text_config") or config), **whole}


def shards(folder: Path) -> dict[str, list[str]]:
    """The names of a model's weights, for each of its safetensors files.

    Raises:
        AdapterError: the folder has no safetensors files.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder} has no safetensors files")
    found = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as data:
            found[file] = list(data.keys())
    return found


def from_adapter(layers: Mapping[str, Tensors], config: Config) -> Dims:
    """The sizes that the shapes of an adapter's tensors show.

    The number of experts is a lower bound if each tensor holds one expert.

    Args:
        layers: prefix of a layer's experts -> its tensors (`group.Grouped.experts`).
        config: for the ranks.

    Raises:
        AdapterError: the tensors do not show all sizes.
    """
    experts = hidden = inner = 0
    for prefix, tensors in layers.items():
        for (expert, projection), pair in tensors.items():
            for side, (_, tensor) in pair.items():
                if projection in ("inner", "outer"):
                    continue
                if expert is not None:
                    experts = max(experts, expert + 1)
                elif tensor.ndim == 3:
                    experts = max(experts, tensor.shape[0])
                elif side == "A":
                    experts = max(experts, tensor.shape[0] // _rank(config, prefix, projection))
                out_or_in = tensor.shape[-1] if side == "A" else tensor.shape[-2]
                if expert is None and tensor.ndim == 2 and side == "B":
                    continue  # the rows of all experts together: not the rows of one
                half = 2 if projection == "w13" and side == "B" else 1
                if (projection == "w2") == (side == "B"):
                    hidden = out_or_in
                else:
                    inner = out_or_in // half
        fused = _from_peft_fused(prefix, tensors, config)
        if fused is not None:
            return fused
    if not experts or not hidden or not inner:
        raise AdapterError(
            "this adapter's tensors do not show the sizes of the model's experts. Give the model's "
            "folder with --base."
        )
    return Dims(experts, hidden, inner)


def _from_peft_fused(prefix: str, tensors: Tensors, config: Config) -> Dims | None:
    """From PEFT's `experts.base_layer` (gate_up) and `experts` (down), if the layer has both.

    One of the two does not show enough.
    """
    pairs = [tensors.get((None, name), {}) for name in ("inner", "outer")]
    if any(len(pair) != 2 for pair in pairs):
        return None
    rows = [pair["B"][1].shape[0] for pair in pairs]
    columns = [pair["A"][1].shape[1] for pair in pairs]
    counts = {
        pair["A"][1].shape[0] / _rank(config, prefix, projection)
        for pair, projection in zip(pairs, ("w13", "w2"), strict=True)
    }
    if len(counts) != 1 or not min(counts).is_integer():
        return None  # the ranks do not agree with adapter_config.json
    for hidden, inner, wide in (
        (columns[0], columns[1], rows[0]),  # gate_up [2 I, H], down [H, I]
        (rows[0], rows[1], columns[0]),  # in and out swapped
    ):
        if wide == 2 * inner and hidden in (rows[1], columns[1]):
            return Dims(int(min(counts)), hidden, inner)
    return None


def _rank(config: Config, prefix: str, projection: str) -> int:
    """The rank that adapter_config.json gives a projection."""
    return config.scale(f"{prefix}.{WORDS[projection]}", 1)[1]
