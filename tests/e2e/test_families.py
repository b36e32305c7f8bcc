"""Every MoE family that vLLM's CPU backend starts: adapter == merged, alone and mixed."""

from __future__ import annotations

import shutil

import pytest
from engine_cases import compare_fp32, compare_low_precision, run_and_compare
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.cpu_engine


def _everything(name: str) -> bool:
    # The short convolution of a gated delta net is no matrix; kv_b_proj has a test of its own.
    return "conv" not in name and "kv_b_proj" not in name


@pytest.mark.parametrize(
    "family", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "gpt_oss"]
)
def test_fp32(make_case, family):
    case = make_case(family)
    in_first = family == "gpt_oss"
    case.add("all", _everything, seed=1, in_first=in_first)
    case.add("other", _everything, seed=2, rank=4, alpha=12, in_first=in_first)
    run_and_compare(case, [None, "all", "other"])


def test_padded_intermediate(make_case):
    """80 is no multiple of the operator's 32: gate and up are padded apart, each to 96 rows."""
    case = make_case("qwen3_moe", moe_intermediate_size=80)
    case.add("all", rank=5)
    got = case.ask("all", dtype="float32")
    compare_fp32(got["all"], case, "all")


def test_qwen3_next_bf16(make_case):
    """Its gated delta nets run in bf16 only on vLLM's CPU backend."""
    case = make_case("qwen3_next")
    case.add("all", _everything)
    got = case.ask("all", dtype="bfloat16")
    compare_low_precision(got["all"], case, "all")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(make_case, dtype):
    case = make_case("qwen2_moe")
    case.add("all")
    got = case.ask("all", dtype=dtype)
    compare_low_precision(got["all"], case, "all")


@pytest.mark.parametrize(
    "quant",
    [
        ("gptq", 32, True),
        ("gptq", 64, True),
        ("gptq", 128, True),
        ("gptq", -1, True),
        ("compressed-tensors", 32, True),
        ("compressed-tensors", 64, True),
        ("compressed-tensors", 128, True),
    ],
    ids=lambda q: f"{q[0]}-g{q[1]}",
)
def test_int4(make_case, quant):
    case = make_case("qwen2_moe", quant)
    case.add("all")
    got = case.ask("all", dtype="bfloat16")
    compare_low_precision(got["all"], case, "all")


def test_qwen3_5_moe_bf16(make_case, no_torchvision):
    """Fused 3-D experts in PEFT's flat layout, gated delta nets, both gates, shared experts."""
    case = make_case("qwen3_5_moe")
    case.add("all", _everything)
    got = case.ask("all", dtype="bfloat16", language_model_only=True, env=no_torchvision)
    compare_low_precision(got["all"], case, "all")


def test_gated_delta_net_projections_apart(make_case, no_torchvision):
    """vLLM merges in_proj_qkv with in_proj_z, and in_proj_b with in_proj_a: each on its own."""
    case = make_case("qwen3_5_moe")
    names = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
    for seed, word in enumerate(names):
        case.add(word, lambda n, w=word: n.endswith(w), seed=seed, size=0.5)
    case.adapters["apart"] = _apart(case.adapters["in_proj_qkv"], case.folder / "apart")
    case.oracles["apart"] = case.want("in_proj_qkv")
    names.append("apart")
    got = case.ask(*names, dtype="bfloat16", language_model_only=True, env=no_torchvision)
    for name in names:
        compare_low_precision(got[name], case, name)


def _apart(adapter, folder):
    """Tinker's form: q, k and v as three modules."""
    shutil.copytree(adapter, folder)
    file, out = folder / "adapter_model.safetensors", {}
    for key, tensor in load_file(file).items():
        rows = [256, 256, 512]  # 2 key heads, 4 value heads of 128
        parts = tensor.split(rows) if "lora_B" in key else [tensor.clone() for _ in rows]
        for word, part in zip("qkv", parts, strict=True):
            out[key.replace("in_proj_qkv", f"in_proj_{word}")] = part.contiguous()
    save_file(out, file)
    return folder
