"""Adapters pushed from a trainer's memory, in every form that trainers push: adapter == merged."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
import torch
from engine_cases import PROMPTS, compare_fp32

from vllm_moe_lora.tiny import engine, oracle

pytestmark = pytest.mark.cpu_engine


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_pushed(make_case, family):
    inner = "intermediate_size" if family == "gpt_oss" else "moe_intermediate_size"
    case = make_case(family, **{inner: layouts.INNER})
    interleaved = family == "gpt_oss"
    truth = layouts.Truth(seed=1)
    forms = {
        "per-expert": layouts.per_expert(truth, prefix=""),
        "packed": layouts.packed(truth, interleaved=interleaved),
        "flat": layouts.flat(truth, interleaved=interleaved),
        "flat-transposed": layouts.flat(truth, transposed=True, interleaved=interleaved),
        "stacked": layouts.stacked(truth),
        "rows": layouts.rows(truth),
    }
    lost = {**forms["packed"], "model.layers.0.mlp.experts.lost_proj.lora_A": torch.ones(2, 2)}
    config = {"r": truth.rank, "lora_alpha": truth.alpha, "target_modules": "all-linear"}
    for name, tensors in {**forms, "lost": lost}.items():
        case.adapters[name] = case.folder / f"{name}.pt"
        torch.save(({k: t.contiguous() for k, t in tensors.items()}, config), case.adapters[name])
    merged = layouts.merge(case.plain, truth, case.folder / "merged")
    expected = oracle.log_probs(merged, PROMPTS)
    job = engine.Job(
        str(case.model),
        {name: str(path) for name, path in case.adapters.items()},
        [[(p, name) for p in PROMPTS] for name in forms],
        options={"dtype": "float32"},
        load=["lost"],
    )
    script = Path(__file__).with_name("pushed.py")
    answers, outcomes, _ = engine.run(job, script=script)
    for name, batch in zip(forms, answers, strict=False):
        case.oracles[name] = expected
        compare_fp32([lp[-1] for _, lp in batch], case, name)
    assert "lost_proj" in outcomes[0]
    assert "AdapterError" in outcomes[0]
