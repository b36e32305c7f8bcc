"""Tensor parallelism 2 on the CPU: two real worker processes over gloo, adapter == merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS, compare_fp32, compare_low_precision, told
from processes import FILE, FORKED, PROCESSES, add_3d_layouts, run, without
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine


def _damaged(case, name):
    """A copy of an adapter with an expert's lora_B missing on the second layer."""
    return without(case, name, lambda key: "layers.1.mlp.experts.3.down_proj.lora_B" in key)


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
    add_3d_layouts(case, inner)
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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_families(make_case, family):
    """All modules and lm_head, and the router gate alone; batches of one and of all of them."""
    case = make_case(family)
    case.add("all", seed=1)
    case.add("gate", lambda name: name.endswith(".gate"), seed=2, rank=3, size=0.5)
    names = [None, "all", "gate"]
    if family == "qwen3_moe":
        case.add("head", lambda name: name.endswith("q_proj"), seed=3, rank=4)
        _add_lm_head(case.adapters["head"])
        names.append("head")
    alone, mixed, _, _ = run(case, names, dtype="float32")
    for name in names:
        compare_fp32(alone[name], case, name)
        compare_fp32(mixed[name], case, name)


def _add_lm_head(folder):
    tensors, g = load_file(folder / FILE), torch.Generator().manual_seed(7)
    name = "base_model.model.lm_head.lora_{}.weight"
    tensors[name.format("A")] = 0.1 * torch.randn(4, 128, generator=g)
    tensors[name.format("B")] = 0.1 * torch.randn(512, 4, generator=g)
    save_file(tensors, folder / FILE)


def test_traffic(make_case):
    """Adapters are loaded, refused and removed while others answer; calls get their own replies."""
    case = make_case("qwen2_moe")
    for seed, name in enumerate("abc", start=1):
        case.add(name, seed=seed)
    case.adapters["damaged"] = _damaged(case, "a")
    job = {"model": str(case.model), "adapters": {n: str(p) for n, p in case.adapters.items()}}
    script = Path(__file__).with_name("traffic.py")
    env = {**PROCESSES, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = told(script, json.dumps(job), **env)
    for name, tokens in zip([None, "a", "b", "c"], found["alone"], strict=True):
        want = case.forced(name, PROMPTS[1], tokens)
        chosen = want.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (want.max(1).values - chosen).max() <= 1e-3, name
    for at in range(0, 20, 5):
        assert found["traffic"][at : at + 4] == found["alone"], at
        assert "layers.1.mlp.experts.3.down_proj" in found["traffic"][at + 4]
