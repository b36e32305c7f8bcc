"""Merges an adapter into a full-precision checkpoint, for `convert --merge-into`.

Use it for what vLLM cannot serve as an adapter. A weight W becomes W + scale * lora_B @ lora_A.
With DoRA (https://arxiv.org/abs/2402.09353) each row of that is then scaled to the length that the
adapter learned. Whole weights (PEFT's modules_to_save) replace the model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from .. import sizes
from ..canonical import Experts, Part, pick
from ..errors import AdapterError, listed
from ..group import UNUSED
from ..names import PREFIX, PROJECTIONS, parse, place
from ..spelling import Spellings
from .convert import Adapter, Progress, replacing

# Values of "model_type" whose fused experts have shape [E, in, out]. All others have [E, out, in].
_IN_FIRST = ("gpt_oss", "llama4", "llama4_text")

# "w1" -> "gate_proj", "w1", ...: the words that checkpoints use for a projection.
_SPELLED: dict[str, list[str]] = {}
for _word, _projection in PROJECTIONS.items():
    _SPELLED.setdefault(_projection, []).append(_word)

# Weight of the model -> merged weight, with the same shape and dtype.
Change = Callable[[torch.Tensor], torch.Tensor]


class Plan:
    """Which weights of the model change, and how.

    The plan is made from names, before anything is written. So an adapter of which some tensor has
    no weight in the model is refused as a whole.

    Attributes:
        changes: name of a weight -> its changes, in the order in which they are made.

    Raises:
        AdapterError: a tensor of the adapter has no weight in the model, the model is quantised, or
            the adapter has something that cannot be merged. The message names the tensors.
    """

    def __init__(self, adapter: Adapter, model: Path) -> None:
        self.model = model
        text = sizes.text_config(model)
        if text.get("quantization_config"):
            raise AdapterError(
                f"{model} is quantised. Merge into the full-precision weights instead."
            )
        self._in_first = text.get("model_type") in _IN_FIRST
        self._interleaved = text.get("model_type") in sizes.INTERLEAVED
        self.shards = sizes.shards(model)
        names = {name for found in self.shards.values() for name in found}
        self._spellings = Spellings(names)
        self.changes: dict[str, list[Change]] = {}
        self._without_weight: list[str] = []
        have = {parse(key).module for key in adapter.found.dense}
        extra = {*adapter.found.magnitude, *adapter.found.bias}
        alone = [name for name in extra if place(name) is None and name not in have]
        if alone:
            raise AdapterError(
                f"{listed(alone)}: DoRA magnitude or bias without lora_A and lora_B. The file is "
                "damaged or was cut."
            )
        self._dense(adapter)
        odd = [name for name in adapter.found.bias if place(name)]
        if odd:
            raise AdapterError(
                f"biases on {listed(odd)} cannot be merged: the model's routed experts have none"
            )
        self._magnitudes = {
            (where.prefix, where.expert, where.projection): tensor
            for name, tensor in adapter.found.magnitude.items()
            if (where := place(name)) is not None
        }
        for experts in adapter.experts:
            self._experts(experts)
        if self._magnitudes:
            prefix, expert, projection = next(iter(self._magnitudes))
            raise AdapterError(
                f"{prefix}, expert {expert}, {projection}: its DoRA magnitude cannot be merged. "
                "The model stores experts as fused tensors, or lora_A and lora_B are missing."
            )
        if self._without_weight:
            raise AdapterError(
                f"{model} has no weight for {listed(self._without_weight)}. Nothing was written. "
                "Is the adapter for this model?"
            )

    def write(self, folder: Path, progress: Progress) -> None:
        """Write the merged model, one safetensors file at a time.

        Args:
            folder: where to write. An existing folder is replaced.
            progress: shows the progress of the loop over files.

        Raises:
            AdapterError: a factor does not have the shape of the model's weight.
        """
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
        """Plan ``change`` for the weight ``name``; ``source`` is the adapter's tensor."""
        own = self._spellings.find(name)
        if own is None:
            self._without_weight.append(source)
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
            self._change(f"{module}.weight", _add(a, b, scale, magnitude, key), key)
        for module, bias in found.bias.items():
            if place(module):
                continue
            rank = found.dense[f"{PREFIX}{module}.lora_A.weight"].shape[0]
            scale, _ = config.scale(module, rank)
            self._change(f"{module}.bias", _add_bias(bias, scale), f"{module}.lora_B.bias")
        for key, tensor in found.full.items():
            if not key.endswith(UNUSED):
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
                source = f"{part.label} (expert {expert})"
                change = _add(pick(part.a, i), pick(part.b, i), part.scale, magnitude, source)
                self._change(f"{base}.{own}.weight", change, source)
        return None

    def _fused(self, experts: Experts) -> None:
        """Plan changes for a model that has gate_up_proj and down_proj of all experts fused."""
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
                source = f"{part.label} (expert {expert})"
                add = _add(pick(part.a, i), pick(part.b, i), part.scale, None, source)
                target.copy_(add(target))
            return out

        return change


def _add(
    a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor | None, source: str
) -> Change:
    """Add LoRA to a weight [out, in], and with ``magnitude`` [out] apply DoRA.

    Args:
        source: the adapter's tensor, for the message.
    """

    def change(weight: torch.Tensor) -> torch.Tensor:
        delta = scale * (b.float() @ a.float())
        if delta.shape != weight.shape:
            raise AdapterError(
                f"{source}: lora_B @ lora_A is {tuple(delta.shape)}, but the model's weight is "
                f"{tuple(weight.shape)}. The adapter is for another model."
            )
        merged = weight.float() + delta
        if magnitude is not None:
            merged *= (magnitude.float().flatten() / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    return change


def _add_bias(bias: torch.Tensor, scale: float) -> Change:
    return lambda weight: (weight.float() + scale * bias.float()).to(weight.dtype)


def _replace(tensor: torch.Tensor) -> Change:
    return lambda weight: tensor.to(weight.dtype)
