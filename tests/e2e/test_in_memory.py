"""Adapters pushed from a trainer's memory, in every form that trainers push: adapter == merged."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
import torch
from engine_cases import PROMPTS, compare_fp32
from safetensors.torch import load_file

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


def test_pushed_without_experts(make_case):
    """On a MoE model they go by the same rules, though vLLM's own code reads them."""
    case = make_case("qwen3_moe")
    case.add("good", lambda name: "self_attn" in name, seed=1)
    tensors = load_file(case.adapters["good"] / "adapter_model.safetensors")
    config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    first = sorted(tensors)[0]
    magnitude = {first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(128)}
    wide = {k: torch.zeros(len(t), t.shape[1] + 3) for k, t in tensors.items()}
    pushed = {
        "good": (tensors, config),
        "int8": ({k: (10 * t).to(torch.int8) for k, t in tensors.items()}, config),
        "fp8": ({**tensors, first: tensors[first].to(torch.float8_e4m3fn)}, config),
        "another rank": (tensors, {**config, "r": 4}),
        "DoRA": ({**tensors, **magnitude}, config),
        "zeros, too wide": (wide, config),
        "empty": ({}, config),
    }
    case.want("good")
    for name, what in pushed.items():
        case.adapters[name] = case.folder / f"{name}.pt"
        torch.save(what, case.adapters[name])
    job = engine.Job(
        str(case.model),
        {name: str(path) for name, path in case.adapters.items()},
        [[(p, name) for name in ("good", None) for p in PROMPTS]],
        options={"dtype": "float32"},
        load=[name for name in pushed if name != "good"],
    )
    answers, outcomes, _ = engine.run(job, script=Path(__file__).with_name("pushed.py"))
    compare_fp32([lp[-1] for _, lp in answers[0][:3]], case, "good")
    said = ["must be float32", "must be float32", "rank", "magnitude", "", "no tensors"]
    for name, text, outcome in zip(job.load, said, outcomes, strict=True):
        # vLLM itself refuses DoRA here, with a sentence.
        assert ("ValueError: " if name == "DoRA" else "AdapterError: ") in outcome, (name, outcome)
        assert text in outcome, (name, outcome)
    for batch in answers[1:]:
        for (_, have), (_, want) in zip(batch, answers[0], strict=True):
            assert torch.equal(have, want)
