"""Classes that vLLM gives no LoRA, or incomplete LoRA: adapter == merged, alone and mixed.

Without their rows (VLLM_MOE_LORA=-model-classes) the engine ends with "does not support LoRA yet".
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from engine_cases import PROMPTS, ROTARY_IN_TORCH, compare_fp32, compare_low_precision
from safetensors.torch import load_file, save_file

from vllm_moe_lora.adapters.offline import check
from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine

TEXT_ONLY = {"language_model_only": True}


def as_transformers(adapter, folder, renames):
    """The adapter as PEFT writes it for transformers' class: its names, and 3-D experts.

    gate and up share a lora_A there: both of ours stacked, each zero in the other's rows of lora_B.
    All other factors get as many zeros, because PEFT gives all modules one rank.
    """
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file, found, experts = folder / "adapter_model.safetensors", {}, {}
    for key, tensor in load_file(file).items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        place = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight", key)
        if place:
            prefix, expert, projection, side = place.groups()
            experts.setdefault(prefix, {})[int(expert), projection, side] = tensor
        else:
            found[key] = padded(tensor, "lora_A" in key)
    for prefix, parts in experts.items():
        numbers = range(1 + max(expert for expert, _, _ in parts))

        def get(projection, side, parts=parts, numbers=numbers):
            return [parts[e, projection, side] for e in numbers]

        gate, up = get("gate_proj", "A"), get("up_proj", "A")
        a13 = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        b13 = [
            torch.block_diag(*pair)
            for pair in zip(get("gate_proj", "B"), get("up_proj", "B"), strict=True)
        ]
        a2 = [padded(one, True) for one in get("down_proj", "A")]
        b2 = [padded(one, False) for one in get("down_proj", "B")]
        found[f"{prefix}.base_layer.lora_A.weight"] = torch.cat(a13)
        found[f"{prefix}.base_layer.lora_B.weight"] = torch.stack(b13, -1).flatten(1)
        found[f"{prefix}.lora_A.weight"] = torch.cat(a2)
        found[f"{prefix}.lora_B.weight"] = torch.stack(b2, -1).flatten(1)
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, file)
    return folder


def padded(tensor, is_a):
    """A factor of twice the rank, which does the same."""
    return torch.cat([tensor, torch.zeros_like(tensor)], 0 if is_a else 1)


def renamed(adapter, folder, pattern, replacement):
    """The adapter with other names."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file({re.sub(pattern, replacement, k): t for k, t in load_file(file).items()}, file)
    return folder


def run(case, names, *, load=(), env=None, **options):
    """Run an engine. Compare each name alone and all in one batch.

    Returns:
        The outcomes of loading ``load``, of which none changes an answer, and what was printed.
    """
    rounds = [[(p, name) for p in PROMPTS] for name in names]
    rounds.append([(p, name) for p in PROMPTS for name in names])
    job = engine.Job(
        str(case.model),
        {n: str(p) for n, p in case.adapters.items()},
        rounds,
        options={"dtype": "float32", **options},
        load=list(load),
    )
    answers, outcomes, log = engine.run(job, env)
    for i, name in enumerate(names):
        compare_fp32([lp[-1] for _, lp in answers[i]], case, name)
        compare_fp32([lp[-1] for _, lp in answers[len(names)][i :: len(names)]], case, name)
    for i in range(len(load)):  # whatever was refused changed nothing
        for (_, before), (_, after) in zip(answers[0], answers[len(names) + 1 + i], strict=True):
            assert (before == after).all()
    return outcomes, log


def without_absorbed(name):
    return "kv_b_proj" not in name  # multiplied into the attention; see test_deepseek.py


KIMI = {**TEXT_ONLY, **ROTARY_IN_TORCH}


def test_kimi_k25(make_case, no_torchvision):
    case = make_case("kimi_k25")
    case.add("all", without_absorbed)
    case.add("other", without_absorbed, seed=2, rank=4, alpha=12)
    case.adapters["peft"] = as_transformers(
        case.adapters["all"],
        case.folder / "peft",
        [(r"language_model\.model\.", "model.language_model.")],
    )
    case.oracles["peft"] = case.want("all")
    # Trained on the text model alone, as a DeepSeek-V3.
    case.adapters["text"] = renamed(
        case.adapters["other"], case.folder / "text", r"language_model\.model\.", "model."
    )
    case.oracles["text"] = case.want("other")
    case.adapters["tower"] = renamed(
        case.adapters["all"],
        case.folder / "tower",
        r"language_model\.model\.layers\.0\.self_attn\.o_proj",
        "vision_tower.encoder.blocks.0.wo",
    )
    for adapter in ("all", "peft", "text"):
        assert check.fits(case.adapters[adapter], case.model).layers == 1  # what `plan` says
    names = [None, "all", "other", "peft", "text"]
    (outcome,), log = run(case, names, load=["tower"], env=no_torchvision, **KIMI)
    assert "LoRA on KimiK25ForConditionalGeneration: vLLM's class does not declare it" in log
    assert "it has LoRA on vision_tower.encoder.blocks.0.wo, but vLLM has no LoRA on" in outcome


def test_kimi_k25_int4(make_case, no_torchvision):
    """As it is published: routed experts in INT4, compressed-tensors, groups of 32."""
    case = make_case("kimi_k25", ("compressed-tensors", 32, True), experts_only=True)
    case.add("all", without_absorbed)
    got = case.ask("all", env=no_torchvision, dtype="bfloat16", **KIMI)
    compare_low_precision(got["all"], case, "all")
    config = json.loads((case.model / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 32


def beyond_attention(name):
    return "self_attn.q_proj" not in name and "k_proj" not in name and "v_proj" not in name


def test_names_of_step3p5(make_case):
    """transformers' names differ from the published ones.

    No engine: vLLM 0.32 on a CPU has no routing by sigmoid without groups (cpu_router.py).
    """
    case = make_case("step3p5")
    case.add("all", lambda name: "vision" not in name)
    assert check.fits(case.adapters["all"], case.model).layers == 1


@pytest.mark.parametrize("family", ["mimo_v2_flash", "cohere2_moe"])
def test_text_classes(make_case, family):
    case = make_case(family)
    for name, how in ADAPTERS.items():
        case.add(name, **how)
    case.adapters["hostile"] = renamed(
        case.adapters["other"], case.folder / "hostile", "layers.0.mlp.down", "layers.7.mlp.down"
    )
    assert check.fits(case.adapters["all"], case.model).layers == 1  # what `plan` says
    (outcome,), _ = run(case, [None, *ADAPTERS], load=["hostile"])
    assert "layers.7.mlp.down_proj" in outcome


ADAPTERS = {"all": {"seed": 1}, "other": {"seed": 2, "rank": 4, "alpha": 12}}


def test_mimo_v2(make_case):
    """As MiMo-V2-Flash, but the checkpoint has q, k and v in one tensor."""
    case = make_case("mimo_v2_flash")
    case.model = fused = case.folder / "fused"
    weights = load_file(case.plain / "model.safetensors")
    for key in [key for key in weights if ".q_proj." in key]:
        parts = [weights.pop(key.replace("q_proj", f"{word}_proj")) for word in "qkv"]
        weights[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    fused.mkdir()
    save_file(weights, fused / "model.safetensors")
    config = json.loads((case.plain / "config.json").read_text())
    config["architectures"] = ["MiMoV2ForCausalLM"]
    (fused / "config.json").write_text(json.dumps(config))
    case.add("rest", beyond_attention)
    case.adapters["qkv"] = renamed(
        case.adapters["rest"], case.folder / "qkv", r"self_attn\.o_proj", "self_attn.qkv_proj"
    )
    (outcome,), _ = run(case, [None, "rest"], load=["qkv"])
    assert "self_attn.qkv_proj cannot take LoRA in vLLM: the published weight has" in outcome


def test_mimo_v2_bf16(make_case):
    """Its gates have fp32 weights and are called with fp32."""
    case = make_case("mimo_v2_flash")
    case.add("all")
    got = case.ask("all", dtype="bfloat16")
    compare_low_precision(got["all"], case, "all")
