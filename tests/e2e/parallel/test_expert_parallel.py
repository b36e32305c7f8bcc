"""Expert parallelism 2 on the CPU: whole experts on each of two real processes, over gloo.

Bare vLLM 0.32 dies here, with and without LoRA: its CPU operators take the router's global expert
ids for local ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import compare_fp32, compare_low_precision
from processes import add_3d_layouts, run, without

pytestmark = pytest.mark.cpu_engine
more = pytest.mark.long
FP32 = {"dtype": "float32", "enable_expert_parallel": True}
UPSTREAM = Path(__file__).with_name("upstream_experts.py")


def check(case, names, compare=compare_fp32, **how):
    alone, mixed, outcomes, answers = run(case, names, **how)
    for name in names:
        if name is None and compare is not compare_fp32:
            continue  # compare_low_precision compares an adapter's effect
        compare(alone[name], case, name)
        compare(mixed[name], case, name)
    return outcomes, answers


def test_uneven_experts(make_case):
    """Seven experts, four and three; adapters on all modules, odd ranks, one rank's experts only.

    Base tokens have the bits of an engine without LoRA, whose tokens upstream's operator gets one
    by one. A damaged expert of one rank is refused by both.
    """
    case = make_case("qwen2_moe", num_experts=7)
    case.add("all", seed=1)
    case.add("odd", seed=2, rank=5, alpha=15)
    case.add("rank 1", lambda n: any(f"experts.{e}." in n for e in (4, 5, 6)), seed=3, size=0.5)
    case.adapters["damaged"] = without(
        case, "all", lambda n: "layers.1.mlp.experts.5.down_proj.lora_B" in n
    )
    names = [None, "all", "odd", "rank 1"]
    said = ["number of experts: 4/7"]
    outcomes, answers = check(case, names, load=["damaged", "all"], said=said, **FP32)
    assert "layers.1.mlp.experts.5.down_proj" in outcomes[0], "both ranks refuse, and say why"
    assert outcomes[1] == "ok", "and the next load succeeds"
    _, _, _, upstream = run(case, [None], script=UPSTREAM, **FP32)
    for have, again, want in zip(answers[0], answers[-1], upstream[0], strict=True):
        assert have[0] == again[0] == want[0]
        assert torch.equal(have[1], want[1])
        assert torch.equal(again[1], want[1])


def test_round_robin(make_case):
    """Nine experts in three groups: 0, 2, 4, 6, 8 on one rank and the others on the other one."""
    case = make_case("glm4_moe", n_routed_experts=9, n_group=3)
    case.add("all", seed=1)
    case.add("other", seed=2, rank=4, alpha=12)
    said = ["Expert placement strategy: round_robin", "0->0, 1->2, 2->4, 3->6, 4->8"]
    how = {**FP32, "expert_placement_strategy": "round_robin"}
    check(case, [None, "all", "other"], said=said, **how)


def test_layouts_of_3d_experts(make_case):
    """gpt-oss: fused and interleaved gate and up, with biases, in three layouts."""
    case = make_case("gpt_oss", intermediate_size=96)
    add_3d_layouts(case, 96)
    check(case, [None, *case.adapters], **FP32)


@pytest.mark.parametrize("form", ["gptq", pytest.param("compressed-tensors", marks=more)])
def test_int4(make_case, form):
    """No comparison of bits: an engine without LoRA has INT4 experts on CPUs with AMX only."""
    case = make_case("qwen2_moe", (form, 32, True), num_experts=7)
    case.add("all", seed=1)
    how = {"dtype": "bfloat16", "enable_expert_parallel": True}
    check(case, [None, "all"], compare_low_precision, **how)


@more
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_families(make_case, family):
    case = make_case(family)
    case.add("all", seed=1)
    case.add("other", seed=2, rank=4, alpha=12)
    check(case, [None, "all", "other"], **FP32)


@more
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(make_case, dtype):
    case = make_case("qwen2_moe")
    case.add("all")
    check(case, [None, "all"], compare_low_precision, dtype=dtype, enable_expert_parallel=True)
