"""Every layout of routed experts that trainers write, on 2-D and 3-D models: adapter == merged.

One LoRA a model in all its layouts, so one merged checkpoint in Hugging Face fp32 judges them all.
"""

from __future__ import annotations

import layouts
import pytest
import torch
from conftest import PROMPTS, compare_fp32

from vllm_moe_lora.tiny import engine, oracle

pytestmark = pytest.mark.cpu_engine

MODELS = {
    # family -> (2-D or 3-D wrapper, overrides, experts in the adapter, rows of gate_up alternate)
    "qwen3_moe": ({"moe_intermediate_size": layouts.INNER}, layouts.EXP, False),
    "mixtral": (
        {"intermediate_size": layouts.INNER},
        "model.layers.{i}.block_sparse_moe.experts",
        False,
    ),
    "gpt_oss": ({"intermediate_size": layouts.INNER}, layouts.EXP, True),
    # A multimodal class, its experts 3-D; gated delta nets would run in bf16 only.
    "qwen3_5_moe": (
        {"moe_intermediate_size": layouts.INNER, "layer_types": ["full_attention"] * 2},
        "model.language_model.layers.{i}.mlp.experts",
        False,
    ),
}
DOUBLED = {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}}
# Megatron-Bridge's save_hf_adapter has full names and no version of PEFT: its fingerprint.
BRIDGE = {"target_parameters": [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]}


def _adapters(form, interleaved):
    """name -> (truth, tensors, config)"""
    tied = layouts.Truth(seed=1)
    untied = layouts.Truth(seed=2, tied=False)
    outer = layouts.Truth(seed=3, one_a=True)
    how = {"form": form, "interleaved": interleaved}
    short = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    rows = {"interleaved": interleaved, "form": form}
    return {
        "per-expert": (untied, layouts.per_expert(untied, form), {}),
        "per-expert-w123": (untied, layouts.per_expert(untied, form, names=short), {}),
        "no-prefix": (untied, layouts.per_expert(untied, form, prefix=""), {}),
        "default-name": (untied, layouts.per_expert(untied, form, leaf="default.weight"), {}),
        "text-names": (
            untied,
            layouts.per_expert(untied, form.replace("model.language_model.", "model.")),
            {},
        ),
        "multimodal-names": (
            untied,
            layouts.per_expert(untied, layouts.EXP.replace("model.", "model.language_model.")),
            {},
        ),
        "transformers-5-names": (untied, layouts.per_expert(untied, layouts.EXP), {}),
        "per-expert-gate-up": (tied, layouts.per_expert(tied, form, fused=True), {}),
        "flat": (tied, layouts.flat(tied, **how), {}),
        "flat-transposed": (tied, layouts.flat(tied, transposed=True, **how), {}),
        "flat-doubled": (untied, layouts.flat_doubled(untied, **rows), DOUBLED),
        "unsloth-old": (
            tied,
            layouts.flat(tied, b_grouped=True, **how),
            {"moe_lora_layout": "grouped-by-expert"},
        ),
        "unsloth-new": (
            tied,
            layouts.flat(tied, b_grouped=True, **how),
            {"lora_B_layout": "grouped_by_expert"},
        ),
        "megatron-bridge": (
            tied,
            layouts.flat(tied, transposed=True, b_grouped=True, **how),
            BRIDGE,
        ),
        "art-converted": (
            tied,
            layouts.flat(tied, a_grouped=False, b_grouped=True, **how),
            {"moe_lora_layout": "art-converted"},
        ),
        "packed": (tied, layouts.packed(tied, **rows), {}),
        "packed-concatenated": (
            tied,
            layouts.packed(tied, form),
            {"moe_lora_gate_up": "concatenated"},
        ),
        "tinker": (untied, layouts.stacked(untied, form), {}),
        "tinker-shared": (outer, layouts.stacked(outer, form, shared=True), {}),
        "art-rows": (untied, layouts.rows(untied, form), {}),
        "shared-outer": (outer, layouts.shared_outer(outer, form), {}),
        "rslora": (
            untied,
            layouts.per_expert(untied, form),
            {"use_rslora": True, "lora_alpha": 4.0},  # 4 / sqrt(4) == 8 / 4
        ),
        "patterns": (untied, _uneven(layouts.per_expert(untied, form)), UNEVEN),
    }


# Expert 0 has rank 6 (two ranks of nothing), experts 1 to 7 rank 4: one alpha / rank for all.
UNEVEN = {"rank_pattern": {r"experts\.0\..*": 6}, "alpha_pattern": {r"experts\.0\..*": 12.0}}


def _uneven(tensors):
    for key, t in tensors.items():
        if ".experts.0." in key:
            wide = [2, t.shape[1]] if "lora_A" in key else [t.shape[0], 2]
            tensors[key] = torch.cat([t, torch.zeros(wide)], 0 if "lora_A" in key else 1)
    return tensors


def _one_sided(form, interleaved):
    def gate_up(layer, projection, expert):
        return projection != "down_proj"

    def down(layer, projection, expert):
        return projection == "down_proj"

    def some(layer, projection, expert):
        return layer == 0 or expert % 2 == 0

    how = {"form": form, "interleaved": interleaved}
    out = {}
    for name, keep in (("gate-up-only", gate_up), ("down-only", down)):
        # One of two targets: PEFT's one wrapper is called `experts`, whichever it is.
        tensors = layouts.flat(layouts.Truth(seed=4), **how)
        where = ".experts.base_layer." if name == "gate-up-only" else ".experts.lora"
        tensors = {k.replace(".base_layer", ""): t for k, t in tensors.items() if where in k}
        out[name] = (layouts.Truth(seed=4).without(keep), tensors, {})
    tensors = layouts.per_expert(layouts.Truth(seed=5, tied=False), form)
    kept = {k: t for k, t in tensors.items() if "layers.0." in k or int(k.split(".")[-4]) % 2 == 0}
    out["some"] = (layouts.Truth(seed=5, tied=False).without(some), kept, {})
    return out


@pytest.mark.parametrize("family", sorted(MODELS))
def test_layouts(make_case, family, no_torchvision):
    overrides, form, interleaved = MODELS[family]
    case = make_case(family, **overrides)
    every = {**_adapters(form, interleaved), **_one_sided(form, interleaved)}
    merged = {}
    for name, (truth, tensors, config) in every.items():
        case.adapters[name] = layouts.save(case.folder / name, tensors, truth, **config)
        if id(truth) not in merged:
            target = layouts.merge(case.plain, truth, case.folder / f"merged-{len(merged)}")
            merged[id(truth)] = oracle.log_probs(target, PROMPTS)
        case.oracles[name] = merged[id(truth)]
    wrong = "flat-permuted"  # columns expert by expert, and nothing that says so
    truth = every["flat"][0]
    tensors = layouts.flat(truth, form=form, b_grouped=True, interleaved=interleaved)
    case.adapters[wrong] = layouts.save(case.folder / wrong, tensors, truth)
    case.oracles[wrong] = case.oracles["flat"]
    rounds = [[(p, name) for p in PROMPTS] for name in case.adapters]
    paths = {name: str(path) for name, path in case.adapters.items()}
    options = {"dtype": "float32"}
    if family == "qwen3_5_moe":
        options["language_model_only"] = True
    job = engine.Job(str(case.model), paths, rounds, options=options)
    answers, _, _ = engine.run(job, no_torchvision if family == "qwen3_5_moe" else None)
    got = dict(zip(case.adapters, ([lp[-1] for _, lp in batch] for batch in answers), strict=True))
    failed = []
    for name in every:
        try:
            compare_fp32(got[name], case, name)
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, failed
    with pytest.raises(AssertionError, match="differs by"):
        compare_fp32(got[wrong], case, wrong)
