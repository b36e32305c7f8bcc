"""DeepSeek-V2/V3 layout (MLA, grouped routing, shared experts) on the CPU engine.

vLLM 0.32's CPU attention for this layout differs from Hugging Face already without LoRA (checked on
V2 and V3, with MLA and with VLLM_MLA_DISABLE=1; a one-token prompt agrees), so the oracle here is
the merged checkpoint in vLLM itself, without LoRA and without the plugin.
"""

from __future__ import annotations

import pytest
from engine_cases import FP32_LIMIT, PROMPTS, TOP

from vllm_moe_lora.tiny import engine, oracle

pytestmark = pytest.mark.cpu_engine


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_adapter_is_the_merged_checkpoint(make_case, family):
    case = make_case(family)
    case.add("all", lambda name: "kv_b_proj" not in name)
    case.add("absorbed", lambda name: "kv_b_proj" in name)
    merged = oracle.merge(case.plain, case.adapters["all"], case.folder / "all-merged")
    options = {"dtype": "float32"}
    job = engine.Job(
        str(case.model),
        {name: str(path) for name, path in case.adapters.items()},
        [[(p, "all") for p in PROMPTS]],
        options=options,
        load=["absorbed"],
    )
    answers, outcomes, _ = engine.run(job)
    rounds = [[(p, None) for p in PROMPTS]]
    want, _, _ = engine.run(
        engine.Job(str(merged), {}, rounds, options=options), {"VLLM_MOE_LORA": "0"}
    )
    base, _, _ = engine.run(
        engine.Job(str(case.model), {}, rounds, options=options), {"VLLM_MOE_LORA": "0"}
    )
    for (_, got), (_, right), (_, plain) in zip(answers[0], want[0], base[0], strict=True):
        top = right[-1].topk(TOP).indices
        assert (got[-1] - right[-1])[top].abs().max() <= FP32_LIMIT
        assert (plain[-1] - right[-1])[top].abs().max() >= 20 * FP32_LIMIT
    # kv_b_proj is multiplied into the attention at load: refused by name, and the engine goes on.
    assert "self_attn.kv_b_proj" in outcomes[0]
    assert "Merge the adapter" in outcomes[0]
    for (_, before), (_, after) in zip(answers[0], answers[1], strict=True):
        assert (before == after).all()
