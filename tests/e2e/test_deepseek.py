"""DeepSeek-V2/V3 layout (MLA, grouped routing, shared experts) on the CPU engine."""

from __future__ import annotations

import pytest
from engine_cases import PROMPTS, ROTARY_IN_TORCH, compare_fp32

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_fp32(make_case, family):
    case = make_case(family)
    case.add("all", lambda name: "kv_b_proj" not in name)
    case.add("absorbed", lambda name: "kv_b_proj" in name)
    job = engine.Job(
        str(case.model),
        {name: str(path) for name, path in case.adapters.items()},
        [[(p, name) for p in PROMPTS for name in (None, "all")]],
        options={"dtype": "float32", **ROTARY_IN_TORCH},
        load=["absorbed"],
    )
    answers, outcomes, _ = engine.run(job)
    for i, name in enumerate((None, "all")):
        compare_fp32([lp[-1] for _, lp in answers[0][i::2]], case, name)
    # kv_b_proj is multiplied into the attention at load: refused by name, and the engine goes on.
    assert "self_attn.kv_b_proj" in outcomes[0]
    assert "Merge the adapter" in outcomes[0]
    for (_, before), (_, after) in zip(answers[0], answers[1], strict=True):
        assert (before == after).all()
