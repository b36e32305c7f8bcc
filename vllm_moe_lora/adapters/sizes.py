"""Sizes of a model's experts without the engine: from its config.json, or from an adapter alone."""

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

_COUNT = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_INNER = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
INTERLEAVED = ("gpt_oss",)
_NO_GATE = ("nemotron_h",)


def from_model(folder: Path) -> Dims:
    """
    Raises:
        AdapterError: no config.json, or no experts in it.
    """
    text = text_config(folder)
    experts = next((text[key] for key in _COUNT if text.get(key)), None)
    inner = next((text[key] for key in _INNER if text.get(key)), None)
    if experts is None or inner is None:
        raise AdapterError(f"{folder / 'config.json'} names no routed experts")
    kind = str(text.get("model_type", ""))
    return Dims(
        int(experts),
        int(text["hidden_size"]),
        int(inner),
        gated=kind not in _NO_GATE,
        interleaved=kind in INTERLEAVED,
    )


def text_config(folder: Path) -> dict[str, Any]:
    """A model's config.json, of a multimodal one the language model's; quantisation of either.

    Raises:
        AdapterError: it cannot be read.
    """
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, RecursionError, ValueError) as error:
        raise AdapterError(f"{folder / 'config.json'} cannot be read: {error}") from error
    whole = {key: config[key] for key in ("quantization_config",) if key in config}
    return {**(config.get("text_config") or config), **whole}


def shards(folder: Path) -> dict[str, list[str]]:
    """A model's files -> the names of their weights.

    Raises:
        AdapterError: it has no safetensors.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder} has no safetensors")
    found = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as data:
            found[file] = list(data.keys())
    return found


def from_adapter(layers: Mapping[str, Tensors], config: Config) -> Dims:
    """
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
                    continue  # rows of all experts
                half = 2 if projection == "w13" and side == "B" else 1
                if (projection == "w2") == (side == "B"):
                    hidden = out_or_in
                else:
                    inner = out_or_in // half
        flat = _flat(prefix, tensors, config)
        if flat is not None:
            return flat
    if not experts or not hidden or not inner:
        raise AdapterError(
            "the sizes of the model's experts do not show in this adapter: name the model's folder "
            "(--base)"
        )
    return Dims(experts, hidden, inner)


def _flat(prefix: str, tensors: Tensors, config: Config) -> Dims | None:
    """From `experts.base_layer` and `experts` together; one of them alone does not tell enough."""
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
        return None  # the ranks are not what adapter_config.json says
    for hidden, inner, wide in (
        (columns[0], columns[1], rows[0]),  # gate_up [2 I, H], down [H, I]
        (rows[0], rows[1], columns[0]),  # in and out swapped
    ):
        if wide == 2 * inner and hidden in (rows[1], columns[1]):
            return Dims(int(min(counts)), hidden, inner)
    return None


def _rank(config: Config, prefix: str, projection: str) -> int:
    """What adapter_config.json says of one projection's rank."""
    return config.scale(f"{prefix}.{WORDS[projection]}", 1)[1]
