"""What is right: Hugging Face transformers in fp32, the adapter merged into the weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_A = re.compile(r"^base_model\.model\.(?P<name>.+)\.lora_A\.weight$")


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint or adapter folder."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def merge(checkpoint: Path, adapter: Path, target: Path) -> Path:
    """Write ``checkpoint`` with ``adapter`` merged into its (full precision) weights.

    The adapter is in PEFT's format: 2-D pairs on modules of the checkpoint (experts one by one),
    or `target_parameters` pairs on fused experts (`experts.base_layer`, `experts`): A expert-major
    rows, B rank-major columns.

    Raises:
        KeyError: the adapter names a module that the checkpoint does not have.
    """
    from safetensors.torch import save_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, lora = load_tensors(checkpoint), load_tensors(adapter)
    # gpt-oss keeps its fused experts as [E, in, out], every other family as [E, out, in].
    in_first = json.loads((checkpoint / "config.json").read_text())["model_type"] == "gpt_oss"
    for key in lora:
        match = _A.match(key)
        if match is None:
            continue
        name = match["name"]
        a, b = lora[key].double(), lora[key.replace("lora_A", "lora_B")].double()
        if name.endswith((".experts", ".experts.base_layer")):
            _merge_fused(weights, name, a, b, config["lora_alpha"], in_first)
            continue
        scale = config["lora_alpha"] / a.shape[0]
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = (weight.double() + scale * (b @ a)).to(weight.dtype)
    target.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _merge_fused(
    weights: dict[str, torch.Tensor],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    alpha: float,
    in_first: bool,
) -> None:
    import torch

    which = "gate_up_proj" if name.endswith(".base_layer") else "down_proj"
    key = f"{name.removesuffix('.base_layer')}.{which}"
    weight = weights[key]
    experts, rank = weight.shape[0], a.shape[0] // weight.shape[0]
    scale = alpha / rank
    a3 = a.view(experts, rank, a.shape[1])
    b3 = b.view(b.shape[0], rank, experts).permute(2, 0, 1)
    delta = scale * torch.bmm(b3, a3)  # [experts, out, in]
    if in_first:
        delta = delta.transpose(1, 2)
    weights[key] = (weight.double() + delta).to(weight.dtype)


def log_probs(checkpoint: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Next-token log-probs after each position of each prompt: [len(prompt), vocab] fp32 each."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return [
            model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
            for ids in prompts
        ]
