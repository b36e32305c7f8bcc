"""One LoRA of routed experts in every layout that trainers write, and its merged oracle.

Written from the trainers' own conventions (facts/adapter-layouts.md, section 2), not with the
package's writers: these files are what the package's readers are tested against.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HIDDEN, INNER, EXPERTS, LAYERS = 128, 96, 8, 2


class Truth:
    """Factors of every expert: self[layer][projection][expert] -> (a, b), fp32, all different.

    tied: gate and up share lora_A, as every fused layout needs.
    one_a: one lora_A for gate and up, and one lora_B for down, of all experts (shared-outer).
    """

    def __init__(
        self, rank=4, alpha=8.0, seed=1, tied=True, one_a=False, inner=INNER, size=0.2
    ) -> None:
        self.rank, self.alpha, self.inner = rank, alpha, inner
        self.scale = alpha / rank
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g) * size

        self.layers = []
        for _ in range(LAYERS):
            outer_a, outer_b = draw(rank, HIDDEN), draw(HIDDEN, rank)
            layer = {"gate_proj": [], "up_proj": [], "down_proj": []}
            for _ in range(EXPERTS):
                a = outer_a if one_a else draw(rank, HIDDEN)
                layer["gate_proj"].append((a, draw(inner, rank)))
                layer["up_proj"].append((a if tied else draw(rank, HIDDEN), draw(inner, rank)))
                down = outer_b if one_a else draw(HIDDEN, rank)
                layer["down_proj"].append((draw(rank, inner), down))
            self.layers.append(layer)

    def delta(self, layer, projection, expert):
        a, b = self.layers[layer][projection][expert]
        return self.scale * (b.double() @ a.double())

    def without(self, keep):
        """Zeroed wherever keep(layer, projection, expert) is false: for the oracle."""
        for number, layer in enumerate(self.layers):
            for projection, pairs in layer.items():
                for e, (a, b) in enumerate(pairs):
                    if not keep(number, projection, e):
                        pairs[e] = (a, torch.zeros_like(b))
        return self


def merge(checkpoint: Path, truth: Truth, target: Path) -> Path:
    """The checkpoint with the truth added to its weights, expert by expert."""
    weights = load_file(checkpoint / "model.safetensors")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for i in range(LAYERS):
        for projection, short in names.items():
            for e in range(EXPERTS):
                _add(weights, i, projection, short, e, truth)
    target.mkdir(parents=True)
    shutil.copy(checkpoint / "config.json", target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _add(weights, layer, projection, short, e, truth):
    delta = truth.delta(layer, projection, e)
    for word in (projection, short):
        keys = [k for k in weights if k.endswith(f"layers.{layer}.mlp.experts.{e}.{word}.weight")]
        keys += [
            k
            for k in weights
            if k.endswith(f"layers.{layer}.block_sparse_moe.experts.{e}.{word}.weight")
        ]
        if keys:
            weights[keys[0]] = (weights[keys[0]].double() + delta).float()
            return
    fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
    key = next(k for k in weights if k.endswith(f"layers.{layer}.mlp.experts.{fused}"))
    one = weights[key][e].double()
    if one.shape[0] == HIDDEN and fused == "gate_up_proj":  # gpt-oss: [E, in, out], interleaved
        one[:, (0 if projection == "gate_proj" else 1) :: 2] += delta.T
    elif fused == "gate_up_proj":
        start = 0 if projection == "gate_proj" else truth.inner
        one[start : start + truth.inner] += delta
    else:  # of gpt-oss is [E, inner, hidden]
        one += delta.T if any("sinks" in k for k in weights) else delta
    weights[key][e] = one.float()


def save(folder: Path, tensors: dict, truth: Truth, **config) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {k: t.contiguous().clone() for k, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    base = {
        "peft_type": "LORA",
        "r": truth.rank,
        "lora_alpha": truth.alpha,
        "target_modules": ["experts"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**base, **config}))
    return folder


P = "base_model.model."
EXP = "model.layers.{i}.mlp.experts"


def _rows(truth, form, interleaved):
    """Each layer: prefix, then fused gate_up a [E, r, H] and b [E, 2I, r], then down's a and b."""
    for i, layer in enumerate(truth.layers):
        gate_b = torch.stack([b for _, b in layer["gate_proj"]])
        up_b = torch.stack([b for _, b in layer["up_proj"]])
        both = torch.cat([gate_b, up_b], 1)
        if interleaved:
            both = torch.stack([gate_b, up_b], 2).flatten(1, 2)
        yield (
            form.format(i=i),
            torch.stack([a for a, _ in layer["gate_proj"]]),
            both,
            torch.stack([a for a, _ in layer["down_proj"]]),
            torch.stack([b for _, b in layer["down_proj"]]),
        )


def per_expert(truth, form=EXP, prefix=P, leaf="weight", names=None, fused=False):
    names = names or {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
    out = {}
    for i, layer in enumerate(truth.layers):
        for e in range(EXPERTS):
            base = f"{prefix}{form.format(i=i)}.{e}."
            if fused:  # ms-swift, ART's training form: rows gate, then up
                out[f"{base}gate_up_proj.lora_A.{leaf}"] = layer["gate_proj"][e][0]
                out[f"{base}gate_up_proj.lora_B.{leaf}"] = torch.cat(
                    [layer["gate_proj"][e][1], layer["up_proj"][e][1]]
                )
            for projection, word in names.items():
                if fused and projection != "down_proj":
                    continue
                a, b = layer[projection][e]
                out[f"{base}{word}.lora_A.{leaf}"] = a
                out[f"{base}{word}.lora_B.{leaf}"] = b
    return out


def flat(truth, form=EXP, transposed=False, a_grouped=True, b_grouped=False, interleaved=False):
    """PEFT's target_parameters: A rows expert-major, B columns rank-major; else a variant."""
    out = {}
    for prefix, ga, gb, da, db in _rows(truth, form, interleaved):
        for where, a, b in ((".base_layer", ga, gb), ("", da, db)):
            if transposed:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            rows = a.flatten(0, 1) if a_grouped else a.transpose(0, 1).flatten(0, 1)
            columns = b.permute(1, 0, 2) if b_grouped else b.permute(1, 2, 0)
            out[f"{P}{prefix}{where}.lora_A.weight"] = rows
            out[f"{P}{prefix}{where}.lora_B.weight"] = columns.flatten(1, 2)
    return out


def flat_doubled(truth, form=EXP, interleaved=False):
    """PEFT's rewriting of gate_proj, up_proj: A stacked, B block-diagonal, rank 2 r."""
    out = flat(truth, form, interleaved=interleaved)
    for i, layer in enumerate(truth.layers):
        pairs = list(zip(layer["gate_proj"], layer["up_proj"], strict=True))
        ga = torch.stack([torch.cat([gate, up]) for (gate, _), (up, _) in pairs])
        blocks = []
        for (_, gate), (_, up) in pairs:
            zero = torch.zeros_like(gate)
            halves = [torch.cat([gate, zero], 1), torch.cat([zero, up], 1)]
            blocks.append(
                torch.stack(halves, 1).flatten(0, 1) if interleaved else torch.cat(halves)
            )
        name = f"{P}{form.format(i=i)}.base_layer"
        out[f"{name}.lora_A.weight"] = ga.flatten(0, 1)
        out[f"{name}.lora_B.weight"] = torch.stack(blocks).permute(1, 2, 0).flatten(1, 2)
    return out


def packed(truth, form=EXP, interleaved=False, prefix=""):
    """Megatron-Bridge's export of packed experts: 3-D, no `.weight`, no PEFT prefix."""
    out = {}
    for name, ga, gb, da, db in _rows(truth, form, interleaved):
        out[f"{prefix}{name}.gate_up_proj.lora_A"], out[f"{prefix}{name}.gate_up_proj.lora_B"] = (
            ga,
            gb,
        )
        out[f"{prefix}{name}.down_proj.lora_A"], out[f"{prefix}{name}.down_proj.lora_B"] = da, db
    return out


def stacked(truth, form=EXP, names=("w1", "w3", "w2"), shared=False, leaf=".weight"):
    """Tinker's raw stacks; shared: lora_A of w1, w3 and lora_B of w2 once for all experts."""
    out = {}
    for i, layer in enumerate(truth.layers):
        for word, projection in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
            a = torch.stack([a for a, _ in layer[projection]])
            b = torch.stack([b for _, b in layer[projection]])
            if shared:
                a, b = (a, b[:1]) if projection == "down_proj" else (a[:1], b)
            out[f"{P}{form.format(i=i)}.{word}.lora_A{leaf}"] = a
            out[f"{P}{form.format(i=i)}.{word}.lora_B{leaf}"] = b
    return out


def rows(truth, form=EXP):
    """ART's training form: rows of all experts under one 2-D name."""
    return {
        key: t.flatten(0, 1)
        for key, t in stacked(truth, form, ("gate_proj", "up_proj", "down_proj")).items()
    }


def shared_outer(truth, form=EXP):
    """Megatron-Bridge: the shared side [1, ...] without an expert, the other side by expert."""
    out = {}
    for i, layer in enumerate(truth.layers):
        base = form.format(i=i)
        for projection in ("gate_proj", "up_proj"):
            out[f"{base}.{projection}.lora_A"] = layer[projection][0][0][None]
            for e, (_, b) in enumerate(layer[projection]):
                out[f"{base}.{e}.{projection}.lora_B.weight"] = b
        out[f"{base}.down_proj.lora_B"] = layer["down_proj"][0][1][None]
        for e, (a, _) in enumerate(layer["down_proj"]):
            out[f"{base}.{e}.down_proj.lora_A.weight"] = a
    return out


DOUBLED = {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}}
# Megatron-Bridge's save_hf_adapter has full names and no version of PEFT: its fingerprint.
BRIDGE = {"target_parameters": [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]}


def every(form=EXP, interleaved=False):
    """name -> (truth, tensors, config)"""
    tied = Truth(seed=1)
    untied = Truth(seed=2, tied=False)
    outer = Truth(seed=3, one_a=True)
    nothing = Truth(seed=6).without(lambda layer, projection, expert: False)
    how = {"form": form, "interleaved": interleaved}
    short = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return {
        "per-expert": (untied, per_expert(untied, form), {}),
        "per-expert-w123": (untied, per_expert(untied, form, names=short), {}),
        "no-prefix": (untied, per_expert(untied, form, prefix=""), {}),
        "default-name": (untied, per_expert(untied, form, leaf="default.weight"), {}),
        "text-names": (
            untied,
            per_expert(untied, form.replace("model.language_model.", "model.")),
            {},
        ),
        "multimodal-names": (
            untied,
            per_expert(untied, EXP.replace("model.", "model.language_model.")),
            {},
        ),
        "transformers-5-names": (untied, per_expert(untied, EXP), {}),
        "per-expert-gate-up": (tied, per_expert(tied, form, fused=True), {}),
        "flat": (tied, flat(tied, **how), {}),
        "flat-transposed": (tied, flat(tied, transposed=True, **how), {}),
        "flat-doubled": (untied, flat_doubled(untied, **how), DOUBLED),
        "unsloth-old": (
            tied,
            flat(tied, b_grouped=True, **how),
            {"moe_lora_layout": "grouped-by-expert"},
        ),
        "unsloth-new": (
            tied,
            flat(tied, b_grouped=True, **how),
            {"lora_B_layout": "grouped_by_expert"},
        ),
        "megatron-bridge": (
            tied,
            flat(tied, transposed=True, b_grouped=True, **how),
            BRIDGE,
        ),
        "art-converted": (
            tied,
            flat(tied, a_grouped=False, b_grouped=True, **how),
            {"moe_lora_layout": "art-converted"},
        ),
        "packed": (tied, packed(tied, **how), {}),
        "packed-concatenated": (
            tied,
            packed(tied, form),
            {"moe_lora_gate_up": "concatenated"},
        ),
        "tinker": (untied, stacked(untied, form), {}),
        "tinker-shared": (outer, stacked(outer, form, shared=True), {}),
        "art-rows": (untied, rows(untied, form), {}),
        "shared-outer": (outer, shared_outer(outer, form), {}),
        "identity": (nothing, per_expert(nothing, form), {}),
        "rslora": (
            untied,
            per_expert(untied, form),
            {"use_rslora": True, "lora_alpha": 4.0},  # 4 / sqrt(4) == 8 / 4
        ),
        "patterns": (untied, _uneven(per_expert(untied, form)), UNEVEN),
    }


# Expert 0 has rank 6 (two ranks of nothing), experts 1 to 7 rank 4: one alpha / rank for all.
UNEVEN = {"rank_pattern": {r"experts\.0\..*": 6}, "alpha_pattern": {r"experts\.0\..*": 12.0}}


def _uneven(tensors):
    for key, t in tensors.items():
        if ".experts.0." in key:
            wide = [2, t.shape[1]] if "lora_A" in key else [t.shape[0], 2]
            tensors[key] = torch.cat([t, torch.zeros(wide)], 0 if "lora_A" in key else 1)
    return tensors
