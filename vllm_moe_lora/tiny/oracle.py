"""The expected results, computed without vLLM and without the plugin's kernels.

`merge` adds an adapter to the weights of a checkpoint, and `log_probs` runs a checkpoint with
Hugging Face transformers in fp32.
"""

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
    """Return all tensors of a checkpoint's or adapter's folder, by name."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def merge(checkpoint: Path, adapter: Path, target: Path) -> Path:
    """Write ``checkpoint`` with ``adapter`` merged into its weights.

    The adapter has PEFT's format. Most modules, single experts among them, have a pair of matrices
    lora_A [rank, in] and lora_B [out, rank]. Fused experts (PEFT's `target_parameters`, named
    `experts.base_layer` and `experts`) have one pair for all experts: lora_A [experts * rank, in]
    with the rows of an expert together, and lora_B [out, rank * experts] with the columns of a
    rank together.

    Args:
        checkpoint: folder of the unquantised model.
        adapter: folder of the adapter.
        target: folder to write to; it is created.

    Returns:
        ``target``.

    Raises:
        KeyError: the adapter names a module that the checkpoint does not have.
    """
    from safetensors.torch import save_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, lora = load_tensors(checkpoint), load_tensors(adapter)
    # Fused experts are [experts, in, out] in these two, and [experts, out, in] in all others.
    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    in_first = model_type in ("gpt_oss", "aria")
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
    """Merge the pair of one fused weight into ``weights``; see `merge`."""
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
    """Return the log-probs of the next token after each token of each prompt.

    Args:
        checkpoint: folder of the model.
        prompts: token ids.

    Returns:
        For each prompt [tokens of the prompt, vocab] fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = json.loads((checkpoint / "config.json").read_text())
    # A class of multimodal models. Those of a text model alone have no config inside of theirs.
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = auto.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return [
            model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
            for ids in prompts
        ]
