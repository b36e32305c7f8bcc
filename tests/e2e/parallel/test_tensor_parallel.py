"""Tensor parallelism 2 on the CPU: two real worker processes over gloo, adapter == merged."""

from __future__ import annotations

import json
import shutil

import layouts
import pytest
import torch
from engine_cases import PROMPTS, compare_fp32, compare_low_precision
from processes import FORKED, run
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine, oracle

pytestmark = pytest.mark.cpu_engine
FILE = "adapter_model.safetensors"


def _damaged(case, name):
    """A copy of an adapter with an expert's lora_B missing on the second layer."""
    folder = case.folder / f"{name}-damaged"
    shutil.copytree(case.adapters[name], folder)
    tensors = load_file(folder / FILE)
    del tensors[next(k for k in tensors if "layers.1.mlp.experts.3.down_proj.lora_B" in k)]
    save_file(tensors, folder / FILE)
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["", "fully-sharded"])
def test_every_module(make_case, sharded):
    """Dense modules, shared experts, gates, routed experts, odd ranks; a refused adapter."""
    case = make_case("qwen2_moe")
    case.add("all", seed=1)
    case.add("odd", seed=2, rank=5, alpha=15)
    case.add("gates", lambda n: n.endswith(("gate", "expert_gate")), seed=3, size=0.5)
    case.adapters["damaged"] = _damaged(case, "all")
    names = [None, "all", "odd", "gates"]
    script = FORKED if sharded else engine.__file__  # as vLLM starts workers on a CPU
    options = {"dtype": "float32", "fully_sharded_loras": sharded}
    alone, mixed, outcomes, answers = run(case, names, ["damaged", "all"], script, **options)
    for name in names:
        compare_fp32(alone[name], case, name)
        compare_fp32(mixed[name], case, name)
    assert "layers.1.mlp.experts.3.down_proj" in outcomes[0], "all ranks refuse, and say why"
    assert outcomes[1] == "ok", "and the next load succeeds"
    for (tokens, have), (first, want) in zip(answers[-1], answers[0], strict=True):
        assert tokens == first
        assert torch.equal(have, want)


def test_layouts_of_3d_experts(make_case):
    """gpt-oss: fused and interleaved gate and up, in three layouts."""
    inner = 128  # vLLM's CPU experts want multiples of 32 on each rank
    case = make_case("gpt_oss", intermediate_size=inner)
    tied, untied = (layouts.Truth(seed=i, tied=i == 1, inner=inner) for i in (1, 2))
    for name, truth, tensors in (
        ("flat", tied, layouts.flat(tied, interleaved=True)),
        ("per-expert", untied, layouts.per_expert(untied)),
        ("packed", tied, layouts.packed(tied, interleaved=True)),
    ):
        case.adapters[name] = layouts.save(case.folder / name, tensors, truth)
        merged = layouts.merge(case.plain, truth, case.folder / f"{name}-truth")
        case.oracles[name] = oracle.log_probs(merged, PROMPTS)
    names = [None, "flat", "per-expert", "packed"]
    alone, mixed, _, _ = run(case, names, dtype="float32")
    for name in names:
        compare_fp32(alone[name], case, name)
        compare_fp32(mixed[name], case, name)


def test_int4(make_case):
    case = make_case("qwen2_moe", ("gptq", 32, True))
    case.add("all", seed=1)
    alone, mixed, _, _ = run(case, [None, "all"], dtype="bfloat16")
    compare_low_precision(alone["all"], case, "all")
    compare_low_precision(mixed["all"], case, "all")
    assert json.loads((case.model / "config.json").read_text())["quantization_config"]


def test_gated_delta_net(make_case):
    """in_proj_qkvz and in_proj_ba of Qwen3-Next are one part each, of which a rank has a piece."""
    case = make_case("qwen3_next")
    case.add("all", seed=1)
    alone, mixed, _, _ = run(case, [None, "all"], dtype="bfloat16")
    compare_low_precision(alone["all"], case, "all")
    compare_low_precision(mixed["all"], case, "all")
