"""Writes random adapters in PEFT's format, for some or all modules of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_moe_lora.tiny.oracle import load_tensors

if TYPE_CHECKING:
    import torch

# The weights that an adapter can target: all matrices of attention, MLPs, experts and gates, and
# those of LLaVA's tower and connector.
_TARGET = re.compile(
    r"(\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123]|\.gate|\.wg|\.router|shared_expert_gate|"
    r"in_proj_\w+|put_linear|\.fc[12])|multi_modal_projector\.linear_[12])\.weight$"
)


def targets(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """Return the modules of ``checkpoint`` that an adapter can target -> (out, in) of the weight.

    The fused experts of a layer, two 3-D tensors, have PEFT's names: ``...experts.base_layer`` is
    gate_up_proj, and ``...experts`` is down_proj.
    """
    found: dict[str, tuple[int, int]] = {}
    for key, weight in load_tensors(checkpoint).items():
        if weight.ndim == 3 and key.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            prefix, which = key.rsplit(".", 1)
            name = f"{prefix}.base_layer" if which == "gate_up_proj" else prefix
            found[name] = (weight.shape[1], weight.shape[2])
        elif weight.ndim == 2 and _TARGET.search(key):
            found[key.removesuffix(".weight")] = (weight.shape[0], weight.shape[1])
    return found


def write(
    checkpoint: Path,
    folder: Path,
    keep: Callable[[str], bool] = lambda name: True,
    rank: int = 8,
    alpha: int = 16,
    size: float = 0.15,
    seed: int = 1,
    experts: int = 8,
    in_first: bool = False,
) -> Path:
    """Write an adapter for the modules of ``checkpoint`` that ``keep`` selects.

    Every tensor has random numbers of its own: factors differ between experts, layers and
    projections, and none is zero. So a test notices if one of them is ignored or misplaced.

    Args:
        checkpoint: folder of an unquantised checkpoint. (The names of modules in a quantised
            version are the same.)
        folder: to write to; it is created.
        keep: gets a module's name and returns whether it gets LoRA.
        rank, alpha: as in PEFT.
        size: standard deviation of the numbers in the factors.
        seed: of the random numbers.
        experts: number of experts in a fused weight.
        in_first: fused weights are [experts, in, out] (gpt-oss), not [experts, out, in].

    Returns:
        ``folder``.

    Raises:
        ValueError: ``keep`` selects no module.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in sorted(targets(checkpoint).items()):
        if not keep(name):
            continue
        r = rank
        if name.endswith((".experts", ".experts.base_layer")):
            r = rank * experts
            if in_first:
                rows, columns = columns, rows
        draw = [
            torch.randn(r, columns, generator=generator),
            torch.randn(rows, r, generator=generator),
        ]
        tensors[f"base_model.model.{name}.lora_A.weight"] = draw[0] * size
        tensors[f"base_model.model.{name}.lora_B.weight"] = draw[1] * size
    if not tensors:
        raise ValueError(f"`keep` selects no module of {checkpoint}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    suffixes = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(suffixes - {"base_layer"}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder
