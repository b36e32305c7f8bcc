"""A real engine on the patched tree, without the plugin: the same bits as pristine vLLM with it."""

from __future__ import annotations

from pathlib import Path

import forks
import pytest
import torch
import trees

from vllm_moe_lora.tiny import adapters, engine, models, quantise

pytestmark = [
    pytest.mark.cpu_engine,
]
PROMPTS = [[1, 2, 3], [5, 9, 11, 300, 17, 44, 2, 8], list(range(20, 60))]


@pytest.mark.parametrize("form", [None, "gptq"], ids=["fp32", "gptq-int4"])
def test_the_same_bits(tmp_path, monkeypatch, form):
    monkeypatch.setattr(engine, "launch", forks.launch)
    model = plain = models.build("qwen2_moe", tmp_path / "full")
    if form:
        model, plain = tmp_path / "int4", tmp_path / "plain"
        quantise.quantise(tmp_path / "full", model, plain, form=form, group_size=64)
    adapter = adapters.write(plain, tmp_path / "adapter")
    job = engine.Job(
        model=str(model),
        adapters={"one": str(adapter)},
        rounds=[[(p, name) for p in PROMPTS for name in (None, "one")]],
        max_tokens=4,
        options={"dtype": "bfloat16" if form else "float32"},
        load=["one"],
    )
    plugin, outcomes, _ = engine.run(job, {"VLLM_MOE_LORA": "1"})  # 1: on, or it fails
    assert outcomes == ["ok"]
    tree = trees.patched()
    patched, outcomes, log = engine.run(
        job,
        {
            "PYTHONPATH": str(tree),
            "VLLM_PLUGINS": "",
            "MOE_LORA_ENGINE": engine.__file__,
        },
        script=Path(__file__).with_name("patched_engine.py"),
    )
    assert outcomes == ["ok"]
    assert f"PATCHED {tree / 'vllm' / '__init__.py'} False" in log
    assert len(plugin) == len(patched) == 2
    for have, want in zip(patched, plugin, strict=True):
        for (tokens, logprobs), (wanted, exact) in zip(have, want, strict=True):
            assert tokens == wanted
            assert torch.equal(logprobs, exact)
    for (_, base), (_, adapted) in zip(patched[0][::2], patched[0][1::2], strict=True):
        assert (base - adapted)[0].abs().max() > 0.02, "the adapter does something"
