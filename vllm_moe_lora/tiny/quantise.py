"""Quantises a checkpoint to INT4.

It writes two checkpoints with the same weights: one packed, which vLLM loads, and one dequantised
to fp32, from which the expected results are computed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_moe_lora.tiny.oracle import load_tensors

if TYPE_CHECKING:
    import torch

_EXPERT = re.compile(r"\.experts\.\d+\.")
_LINEAR = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$|\.w[123]\.weight$")


def quantise(
    checkpoint: Path,
    packed: Path,
    dequantised: Path,
    form: str = "gptq",
    group_size: int = 64,
    symmetric: bool = True,
    experts_only: bool = False,
) -> None:
    """Round the weights of the linear layers to INT4 and write both checkpoints.

    Args:
        checkpoint: folder of the unquantised model, whose experts have a tensor each.
        packed: folder to write the packed weights to, in the format ``form``.
        dequantised: folder to write the same weights to, in fp32.
        form: the format: "gptq" (version 1, as AutoGPTQ writes it: stored zero points are one too
            small) or "compressed-tensors" (pack-quantized).
        group_size: how many input columns share a scale; -1 for one scale per row.
        symmetric: whether all zero points are 8. If not, each group has its own.
        experts_only: only routed experts, as in Kimi K2.5; with compressed-tensors only.
    """
    from safetensors.torch import save_file

    plain: dict[str, torch.Tensor] = {}
    out: dict[str, torch.Tensor] = {}
    for key, weight in load_tensors(checkpoint).items():
        if not _LINEAR.search(key) or (experts_only and not _EXPERT.search(key)):
            plain[key] = out[key] = weight
            continue
        q, scale, zero = _round(weight, group_size, symmetric)
        columns = weight.shape[1] if group_size == -1 else group_size
        wide = [t.repeat_interleave(columns, 1) for t in (scale.float(), zero.float())]
        plain[key] = (q.float() - wide[1]) * wide[0]
        name = key.removesuffix("weight")
        write = _gptq if form == "gptq" else _pack_quantized
        out.update({name + part: t for part, t in write(q, scale, zero, symmetric).items()})
    for folder, tensors in ((packed, out), (dequantised, plain)):
        folder.mkdir(parents=True, exist_ok=True)
        for file in checkpoint.glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder)
        save_file(
            {k: t.contiguous() for k, t in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = _config(form, group_size, symmetric)
    if experts_only:
        # As in the published config.json of Kimi K2.5.
        rest = ["self_attn", "shared_experts", r"mlp\.(gate|up|gate_up|down)_proj"]
        more = [f"re:.*{one}.*" for one in (*rest, "vision_tower", "mm_projector")]
        config["quantization_config"]["ignore"] += more
    (packed / "config.json").write_text(json.dumps(config, indent=1))


def _round(
    weight: torch.Tensor, group_size: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight [out, in].

    Returns:
        The INT4 numbers [out, in] int32 from 0 to 15, the scales [out, groups] fp32 (rounded to
        bf16), and the zero points [out, groups] int32.
    """
    import torch

    rows, columns = weight.shape
    groups = 1 if group_size == -1 else columns // group_size
    w = weight.float().view(rows, groups, -1)
    if symmetric:
        scale = w.abs().amax(-1) / 7.5
        scale = scale.clamp(min=1e-6).to(torch.bfloat16).float()
        zero = torch.full_like(scale, 8.0)
    else:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-6).to(torch.bfloat16).float()
        zero = (-low / scale).round().clamp(1, 15)
    q = (w / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return q.view(rows, columns).to(torch.int32), scale, zero.to(torch.int32)


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Pack eight 4-bit numbers of the last axis into one int32; the first has the lowest bits."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    words = (values.to(torch.int64).unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _gptq(
    q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, symmetric: bool
) -> dict[str, torch.Tensor]:
    """Return the tensors of one layer in GPTQ's format."""
    import torch

    columns = q.shape[1]
    return {
        "qweight": _pack(q).t(),  # [in / 8, out]
        "qzeros": _pack(zero.t() - 1),  # [groups, out / 8]
        "scales": scale.t().to(torch.float16),  # [groups, out]
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // scale.shape[1]),
    }


def _pack_quantized(
    q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, symmetric: bool
) -> dict[str, torch.Tensor]:
    """Return the tensors of one layer in the pack-quantized format of compressed-tensors."""
    import torch

    out = {
        "weight_packed": _pack(q),  # [out, in / 8]
        "weight_scale": scale.to(torch.bfloat16),  # [out, groups]
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if not symmetric:
        out["weight_zero_point"] = _pack(zero.t()).t()  # [out / 8, groups]
    return out


def _config(form: str, group_size: int, symmetric: bool) -> dict[str, Any]:
    """Return the entry "quantization_config" of config.json."""
    if form == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group_size,
            "desc_act": False,
            "sym": symmetric,
            "lm_head": False,
        }
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*gate$", "re:.*router.*"],
    }
