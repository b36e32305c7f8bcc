"""Every layout of routed experts that trainers write, on 2-D and 3-D models: adapter == merged.

One LoRA a model in all its layouts, so one merged checkpoint in Hugging Face fp32 judges them all.
"""

from __future__ import annotations

import layouts
import pytest
import torch
from engine_cases import PROMPTS, Case, compare_fp32, compare_low_precision

from vllm_moe_lora.tiny import engine, models, oracle

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
}


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
def test_layouts(make_case, family):
    overrides, form, interleaved = MODELS[family]
    case = make_case(family, **overrides)
    got = _run(case, form, interleaved, oracle.log_probs, options={"dtype": "float32"})
    wrong, identity = got.pop(PERMUTED), got.pop("identity")
    _compare(got, case, compare_fp32)
    for have, want in zip(identity, case.want(None), strict=True):  # ART's: lora_B is zero
        assert (have - want[-1]).abs().max() <= 1e-4
    with pytest.raises(AssertionError, match="differs by"):
        compare_fp32(wrong, case, PERMUTED)


def test_layouts_of_a_multimodal_class(tmp_path, no_torchvision):
    """Qwen3.5's own class: 3-D experts, rows concatenated, its language model under a prefix."""
    model = _multimodal(tmp_path / "model")
    case = Case(tmp_path, model, model)
    case.oracles[None] = _multimodal_log_probs(model, PROMPTS)
    got = _run(
        case,
        "model.language_model.layers.{i}.mlp.experts",
        False,
        _multimodal_log_probs,
        options={"dtype": "bfloat16", "language_model_only": True},
        env=no_torchvision,
    )
    wrong, _ = got.pop(PERMUTED), got.pop("identity")
    _compare(got, case, compare_low_precision)
    with pytest.raises(AssertionError):
        compare_low_precision(wrong, case, PERMUTED)


def test_upstreams_own_flags(make_case):
    """--enable-mixed-moe-lora-format: 3-D models with the 2-D wrapper, so rank 4 stays rank 4."""
    case = make_case("gpt_oss", intermediate_size=layouts.INNER)
    tied, untied = layouts.Truth(seed=1), layouts.Truth(seed=2, tied=False)
    for name, truth, tensors in (
        ("flat", tied, layouts.flat(tied, interleaved=True)),
        ("apart", untied, layouts.per_expert(untied)),
    ):
        case.adapters[name] = layouts.save(case.folder / name, tensors, truth)
        merged = layouts.merge(case.plain, truth, case.folder / f"merged-{name}")
        case.oracles[name] = oracle.log_probs(merged, PROMPTS)
    options = {"dtype": "float32", "max_lora_rank": 8, "enable_mixed_moe_lora_format": True}
    for name, have in case.ask("flat", "apart", **options).items():
        compare_fp32(have, case, name)


def test_factors_shared_by_all_experts_in_shared_slots(make_case):
    """--enable-moe-shared-loras stores the shared side once; per-expert factors are refused."""
    case = make_case("qwen3_moe", moe_intermediate_size=layouts.INNER)
    outer = layouts.Truth(seed=3, one_a=True)
    merged = layouts.merge(case.plain, outer, case.folder / "merged")
    for name, tensors in (
        ("stacks", layouts.stacked(outer, shared=True)),
        ("outer", layouts.shared_outer(outer)),
        ("copies", layouts.per_expert(outer)),
    ):
        case.adapters[name] = layouts.save(case.folder / name, tensors, outer)
        case.oracles[name] = oracle.log_probs(merged, PROMPTS)
    got = case.ask("stacks", "outer", "copies", dtype="float32", enable_moe_shared_loras=True)
    for name, have in got.items():
        compare_fp32(have, case, name)


PERMUTED = "flat-permuted"  # columns expert by expert, and nothing that says so


def _run(case, form, interleaved, log_probs, options, env=None):
    """Every layout through one engine; each LoRA is merged once, by its own oracle."""
    every = {**layouts.every(form, interleaved), **_one_sided(form, interleaved)}
    truth = every["flat"][0]
    columns = layouts.flat(truth, form=form, b_grouped=True, interleaved=interleaved)
    every[PERMUTED] = (truth, columns, {})
    merged = {}
    for name, (truth, tensors, config) in every.items():
        case.adapters[name] = layouts.save(case.folder / name, tensors, truth, **config)
        if id(truth) not in merged:
            target = layouts.merge(case.plain, truth, case.folder / f"merged-{len(merged)}")
            merged[id(truth)] = log_probs(target, PROMPTS)
        case.oracles[name] = merged[id(truth)]
    rounds = [[(p, name) for p in PROMPTS] for name in case.adapters]
    paths = {name: str(path) for name, path in case.adapters.items()}
    answers, _, _ = engine.run(engine.Job(str(case.model), paths, rounds, options=options), env)
    return dict(zip(case.adapters, ([lp[-1] for _, lp in batch] for batch in answers), strict=True))


def _compare(got, case, compare):
    failed = []
    for name, have in got.items():
        try:
            compare(have, case, name)
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, failed


def _multimodal(folder):
    import transformers

    text = {**models._COMMON, **models.FAMILIES["qwen3_5_moe"][1]}
    text["moe_intermediate_size"] = layouts.INNER
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
    vision |= {"out_hidden_size": 128, "deepstack_visual_indexes": []}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen3_5MoeConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **{name: 500 + i for i, name in enumerate(ids)},
    )
    config.architectures = ["Qwen3_5MoeForConditionalGeneration"]
    torch.manual_seed(0)
    transformers.Qwen3_5MoeForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


def _multimodal_log_probs(folder, prompts):
    import transformers

    model = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts]
    return [logits.float().log_softmax(-1) for logits in found]
