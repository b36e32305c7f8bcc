"""An adapter merged into a full-precision checkpoint: what cannot be served can be merged.

W + scale * lora_B @ lora_A; with DoRA (https://arxiv.org/abs/2402.09353) each row is then scaled
to the length that the adapter learned. Whole modules (modules_to_save) replace the model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .. import sizes
from ..canonical import Experts, Part, pick
from ..errors import AdapterError, listed
from ..group import EMBEDDING_COPIES
from ..names import PREFIX, PROJECTIONS, place
from ..spelling import Spellings
from .convert import Adapter, replacing

# Families whose fused experts are [E, in, out]; all others are [E, out, in].
_IN_FIRST = ("gpt_oss", "llama4", "llama4_text")

# w1 -> "gate_proj", "w1", ...: what checkpoints call it.
_SPELLED: dict[str, list[str]] = {}
for _word, _projection in PROJECTIONS.items():
    _SPELLED.setdefault(_projection, []).append(_word)

Change = Callable[[torch.Tensor], torch.Tensor]


class Plan:
    """Which weights change, and how; made from names alone, so that nothing is half-merged.

    Attributes:
        changes: name of a weight -> what happens to it, in order.

    Raises (on making one):
        AdapterError: a tensor of the adapter has no weight to go to, or the model is quantised.
    """

    def __init__(self, adapter: Adapter, model: Path) -> None:
        self.model = model
        text = sizes.text_config(model)
        if text.get("quantization_config"):
            raise AdapterError(f"{model} is quantised; a merge needs the full-precision weights")
        self._in_first = text.get("model_type") in _IN_FIRST
        self._interleaved = text.get("model_type") in sizes.INTERLEAVED
        self.shards = sizes.shards(model)
        names = {name for found in self.shards.values() for name in found}
        self._spellings = Spellings(names)
        self.changes: dict[str, list[Change]] = {}
        self._lost: list[str] = []
        have = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in adapter.found.dense}
        extra = {*adapter.found.magnitude, *adapter.found.bias}
        lonely = [name for name in extra if place(name) is None and name not in have]
        if lonely:
            raise AdapterError(f"DoRA or a bias without lora_A and lora_B on {listed(lonely)}")
        self._dense(adapter)
        odd = [name for name in adapter.found.bias if place(name)]
        if odd:
            raise AdapterError(f"biases on {listed(odd)}: experts have none")
        self._magnitudes = {
            (where.prefix, where.expert, where.projection): tensor
            for name, tensor in adapter.found.magnitude.items()
            if (where := place(name)) is not None
        }
        for experts in adapter.experts:
            self._experts(experts)
        if self._magnitudes:
            raise AdapterError(f"DoRA on fused experts: {next(iter(self._magnitudes))}")
        if self._lost:
            raise AdapterError(f"{model} has no weight for {listed(self._lost)}")

    def write(self, folder: Path, progress: Callable[[Iterable[Any], str], Iterable[Any]]) -> None:
        """Write the merged model, shard by shard."""
        from safetensors.torch import load_file, save_file

        with replacing(folder) as draft:
            for file in self.model.iterdir():
                if file.is_file() and file.suffix != ".safetensors":
                    shutil.copy(file, draft)
            for shard in progress(self.shards, "shards"):
                weights = load_file(self.model / shard)
                for name in weights:
                    for change in self.changes.get(name, ()):
                        weights[name] = change(weights[name]).contiguous()
                save_file(weights, draft / shard, metadata={"format": "pt"})

    def _change(self, name: str, change: Change, source: str) -> None:
        own = self._spellings.find(name)
        if own is None:
            self._lost.append(source)
        else:
            self.changes.setdefault(own, []).append(change)

    def _dense(self, adapter: Adapter) -> None:
        found, config = adapter.found, adapter.config
        for key, b in found.dense.items():
            module, _, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
            if not leaf.startswith(("B", "embedding_B")):
                continue
            a = found.dense[key.removesuffix(leaf) + leaf.replace("B", "A", 1)]
            scale, _ = config.scale(module, a.shape[0])
            magnitude = found.magnitude.get(module)
            if leaf.startswith("embedding"):
                a, b = b.T, a.T
            self._change(f"{module}.weight", _add(a, b, scale, magnitude), key)
        for module, bias in found.bias.items():
            if place(module):
                continue
            rank = found.dense[f"{PREFIX}{module}.lora_A.weight"].shape[0]
            scale, _ = config.scale(module, rank)
            self._change(f"{module}.bias", _plus(bias, scale), f"{module}.lora_B.bias")
        for key, tensor in found.full.items():
            if not key.endswith(EMBEDDING_COPIES):
                name = key.removeprefix(PREFIX).replace(".modules_to_save.default.", ".")
                self._change(name.replace(".modules_to_save.", "."), _replace(tensor), key)

    def _experts(self, experts: Experts) -> None:
        if self._spellings.find(f"{experts.prefix}.down_proj") is not None:
            return self._fused(experts)
        for name, part in experts.split():
            for i, expert in enumerate(part.experts):
                base = f"{experts.prefix}.{expert}"
                own = next(
                    (w for w in _SPELLED[name] if self._spellings.find(f"{base}.{w}.weight")), None
                )
                magnitude = self._magnitudes.pop((experts.prefix, expert, name), None)
                change = _add(pick(part.a, i), pick(part.b, i), part.scale, magnitude)
                self._change(f"{base}.{own}.weight", change, f"{part.label} (expert {expert})")
        return None

    def _fused(self, experts: Experts) -> None:
        for name, part in experts.split():
            key = f"{experts.prefix}.{'down_proj' if name == 'w2' else 'gate_up_proj'}"
            self._change(key, self._add_to_stack(name, part), part.label)

    def _add_to_stack(self, name: str, part: Part) -> Change:
        def change(weight: torch.Tensor) -> torch.Tensor:
            out = weight.clone()
            for i, expert in enumerate(part.experts):
                target = out[expert].T if self._in_first else out[expert]
                if name != "w2":
                    rows = target.shape[0] // 2
                    first = 0 if name == "w1" else 1
                    target = (
                        target[first::2] if self._interleaved else target[first * rows :][:rows]
                    )
                add = _add(pick(part.a, i), pick(part.b, i), part.scale, None)
                target.copy_(add(target))
            return out

        return change


def _add(a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor | None) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        delta = scale * (b.float() @ a.float())
        if delta.shape != weight.shape:
            raise AdapterError(f"LoRA of {tuple(delta.shape)} on a weight of {tuple(weight.shape)}")
        merged = weight.float() + delta
        if magnitude is not None:
            merged *= (magnitude.float().flatten() / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    return change


def _plus(bias: torch.Tensor, scale: float) -> Change:
    return lambda weight: (weight.float() + scale * bias.float()).to(weight.dtype)


def _replace(tensor: torch.Tensor) -> Change:
    return lambda weight: tensor.to(weight.dtype)
