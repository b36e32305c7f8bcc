"""MoE families with LoRA of vLLM's own: adapter == merged, alone and mixed with the base model."""

from __future__ import annotations

import pytest
from engine_cases import run_and_compare

pytestmark = pytest.mark.cpu_engine

more = pytest.mark.long


def attention_and_experts(name):
    return "self_attn" in name or ".experts." in name


@pytest.mark.parametrize(
    ("family", "keep"),
    [
        # Its names and its experts' layout are transformers', not those of the checkpoint.
        pytest.param("granitemoe", None),
        pytest.param("granitemoeshared", None, marks=more),
        # Its router has a bias, which vLLM's CPU backend leaves out without the package.
        pytest.param("ernie4_5_moe", None),
        pytest.param("exaone_moe", None, marks=more),
        pytest.param("jamba", None, marks=more),
        # vLLM runs these two by transformers' code. In the second it moves gates and shared experts
        # into the MoE layer, where no name of a checkpoint leads.
        pytest.param("hunyuan_v1_moe", None, marks=more),
        pytest.param("dots1", attention_and_experts, marks=more),
    ],
)
def test_family(make_case, family, keep):
    case = make_case(family)
    keep = keep or (lambda name: True)
    case.add("all", keep)
    case.add("other", keep, seed=2, rank=4, alpha=12)
    names, load = [None, "all", "other"], []
    if keep is attention_and_experts:
        case.add("gate", lambda name: name.endswith("mlp.gate"))
        load = ["gate"]
    outcomes, _ = run_and_compare(case, names, load=load)
    for outcome in outcomes:
        assert (
            "no module of this model that takes LoRA is called model.layers.1.mlp.gate" in outcome
        )
