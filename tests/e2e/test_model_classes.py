"""Classes that vLLM gives no LoRA, or incomplete LoRA: adapter == merged, alone and mixed.

Without their rows (VLLM_MOE_LORA=-model-classes) the engine ends with "does not support LoRA yet".
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from engine_cases import ROTARY_IN_TORCH, compare_low_precision, run_and_compare
from safetensors.torch import load_file, save_file

from vllm_moe_lora import cli, probe
from vllm_moe_lora.adapters.offline import check

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
        key = rename(key, renames)
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


def rename(name, renames):
    """The name after all (pattern, replacement) of ``renames``."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(adapter, folder, *renames):
    """The adapter with other names."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file({rename(k, renames): t for k, t in load_file(file).items()}, file)
    return folder


def recognised(case, name):
    """What the commands `plan` and `inspect` say of an adapter: all its layers are known."""
    assert check.fits(case.adapters[name], case.model).layers == 1
    assert cli.main(["inspect", str(case.adapters[name]), "--base", str(case.model)]) == 0


def without_absorbed(name):
    return "kv_b_proj" not in name  # multiplied into the attention; see test_deepseek.py


TOWER = "vision_tower.encoder.blocks.0.wo"
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
        case.adapters["other"], case.folder / "text", (r"language_model\.model\.", "model.")
    )
    case.oracles["text"] = case.want("other")
    case.adapters["tower"] = renamed(
        case.adapters["all"],
        case.folder / "tower",
        (r"language_model\.model\.layers\.0\.self_attn\.o_proj", TOWER),
    )
    for adapter in ("all", "peft", "text"):
        recognised(case, adapter)
    names = [None, "all", "other", "peft", "text"]
    (outcome,), log = run_and_compare(case, names, load=["tower"], env=no_torchvision, **KIMI)
    assert "LoRA on KimiK25ForConditionalGeneration: vLLM's class does not declare it" in log
    assert f"it has LoRA on {TOWER}, but vLLM has no LoRA on" in outcome


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


def of_text(name):
    return "vision" not in name


STEP_CONFIG = """
from transformers import PretrainedConfig
from vllm.transformers_utils.configs import Step3p5Config


class Step3p7Config(PretrainedConfig):
    model_type = "step3p7"

    def __init__(self, text_config=None, vision_config=None, projector_bias=False, **more):
        self.text_config = Step3p5Config(**(text_config or {}))
        self.vision_config = PretrainedConfig(
            width=64, layers=1, heads=2, image_size=56, patch_size=14, mlp_ratio=2.0,
            output_dim=None, hidden_act="quick_gelu", use_abs_posemb=True, use_cls_token=False,
            use_rope2d=True, use_ln_pre=True, use_ln_post=False, ls_init_value=0.1,
        )
        self.projector_bias = projector_bias
        super().__init__(**more)
"""


def write_config(model, name, code):
    """Give a checkpoint a config class of its own, as published ones have."""
    module = name.partition(".")[0]
    (model / f"{module}.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": name}}))


@pytest.mark.parametrize("family", ["step3p5", pytest.param("step3p7", marks=pytest.mark.long)])
def test_step(make_case, no_torchvision, family):
    """transformers' names differ from the published ones, and experts are fused in both."""
    case = make_case(family)
    case.add("all", of_text)
    case.add("other", of_text, seed=2, rank=4, alpha=12)
    recognised(case, "all")
    more = {}
    if family == "step3p7":
        # transformers has a config of this name, of which vLLM 0.32 cannot read the heads.
        write_config(case.model, "configuration_step.Step3p7Config", STEP_CONFIG)
        more = {**TEXT_ONLY, "trust_remote_code": True}
    run_and_compare(case, [None, "all", "other"], env=no_torchvision, **more)


def test_aria(make_case, no_torchvision):
    case = make_case("aria")
    case.add("all", lambda name: of_text(name) and "router" not in name, in_first=True)
    case.add("router", lambda name: name.endswith("router"))
    (outcome,), _ = run_and_compare(
        case, [None, "all"], load=["router"], env=no_torchvision, **TEXT_ONLY
    )
    assert "mlp.router cannot take LoRA in vLLM: " in outcome


@pytest.mark.parametrize("family", ["mimo_v2_flash", "cohere2_moe"])
def test_text_classes(make_case, family):
    case = make_case(family)
    for name, how in ADAPTERS.items():
        case.add(name, **how)
    case.adapters["hostile"] = renamed(
        case.adapters["other"], case.folder / "hostile", ("layers.0.mlp.down", "layers.7.mlp.down")
    )
    recognised(case, "all")
    (outcome,), _ = run_and_compare(case, [None, *ADAPTERS], load=["hostile"])
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
        case.adapters["rest"], case.folder / "qkv", (r"self_attn\.o_proj", "self_attn.qkv_proj")
    )
    (outcome,), _ = run_and_compare(case, [None, "rest"], load=["qkv"])
    assert "self_attn.qkv_proj cannot take LoRA in vLLM: the published weight has" in outcome


def test_mimo_v2_bf16(make_case):
    """Its gates have fp32 weights and are called with fp32."""
    case = make_case("mimo_v2_flash")
    case.add("all")
    got = case.ask("all", dtype="bfloat16")
    compare_low_precision(got["all"], case, "all")


@pytest.mark.long
def test_plan_names_the_row(make_case):
    model = make_case("cohere2_moe").model
    assert probe.ask(probe.Question(str(model))).model_class == "Cohere2MoeForCausalLM (engine)"


# What Ling-2.5 calls the modules of DeepSeek-V3.
LING = (
    (r"model\.embed_tokens", "model.word_embeddings"),
    (r"self_attn\.o_proj", "attention.dense"),
    (r"self_attn\.", "attention."),
    (r"gate\.e_score_correction_bias", "gate.expert_bias"),
)
LING_CONFIG = """
from transformers import PretrainedConfig


class LingConfig(PretrainedConfig):
    model_type = "bailing_hybrid"
"""


@pytest.mark.long
@pytest.mark.parametrize("version", ["2_5", "3"])
def test_ling(make_case, version):
    """With full attention in all layers it computes what DeepSeek-V3 computes: the oracle.

    Its linear attention is a Triton kernel, and transformers does not have the class.
    """
    case = make_case("deepseek_v3")
    case.add("plain", without_absorbed)
    case.model = ling = case.folder / "ling"
    ling.mkdir()
    names = ((k, t) for k, t in load_file(case.plain / "model.safetensors").items())
    save_file({rename(k, LING): t for k, t in names}, ling / "model.safetensors")
    config = json.loads((case.plain / "config.json").read_text())
    config |= {
        "architectures": [f"BailingMoeV{version}ForCausalLM"],
        "model_type": "bailing_hybrid",
        "layer_group_size": 1,
        "num_experts": config["n_routed_experts"],
        "num_shared_experts": config["n_shared_experts"],
        "moe_router_enable_expert_bias": True,
        "score_function": "sigmoid",
        "use_bias": False,
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"],
        "short_conv_kernel_size": 4,
        # Of linear attention, which has no layer here. With any state of it vLLM wants blocks of
        # 128 tokens, which MLA on a CPU does not have.
        "head_dim": 0,
    }
    (ling / "config.json").write_text(json.dumps(config))
    write_config(ling, "configuration_ling.LingConfig", LING_CONFIG)
    case.adapters["ling"] = renamed(case.adapters["plain"], case.folder / "a", *LING)
    case.oracles["ling"] = case.want("plain")
    recognised(case, "ling")
    # vLLM's checks of a class that may have linear attention contradict MLA's on a CPU with it.
    options = {"trust_remote_code": True, "enable_prefix_caching": False, **ROTARY_IN_TORCH}
    run_and_compare(case, [None, "ling", "plain"], **options)
