"""verl 0.9.1 on the vLLM that it pins, 0.24.0: its pushes land in that release's own slots."""

from __future__ import annotations

import json
import sys

import forks
import layouts
import pytest
import torch
import unpacked
from test_adapters import _wrong

from vllm_moe_lora.tiny import models

pytestmark = pytest.mark.verl
PIN = "0.24.0"
FORMS = {
    "Megatron, per expert": lambda truth: layouts.per_expert(truth, prefix=""),
    "Megatron, packed": layouts.packed,
    "FSDP, PEFT 0.19": layouts.flat,
    "FSDP, PEFT 0.18": lambda truth: layouts.flat(truth, transposed=True),
}


@pytest.mark.parametrize("release", [one for one in unpacked.available() if one == PIN])
def test_pushes_land(release, tmp_path):
    model = models.build("qwen3_moe", tmp_path / "model", moe_intermediate_size=layouts.INNER)
    truths = {name: layouts.Truth(seed=seed) for seed, name in enumerate(FORMS, start=1)}
    adapters = {}
    for name, truth in truths.items():
        config = {"r": truth.rank, "lora_alpha": truth.alpha, "target_modules": "all-linear"}
        tensors = {key: one.contiguous() for key, one in FORMS[name](truth).items()}
        adapters[name] = tensors, config
    lost = {**tensors, "model.layers.0.mlp.experts.lost_proj.lora_A.weight": torch.ones(2, 2)}
    torch.save({**adapters, "lost": (lost, config)}, tmp_path / "pushed.pt")
    job = {"verl": str(unpacked.other("verl-0.9.1")), "model": str(model)}
    job |= {"adapters": str(tmp_path / "pushed.pt"), "out": str(tmp_path / "out.pt")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = unpacked.HERE / "scripts" / "verl_world.py"
    env = unpacked.environment(str(unpacked.tree(release))) | {"VLLM_MOE_LORA": "1"}
    done = forks.launch([sys.executable, str(script), str(tmp_path / "job.json")], env, 600)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = torch.load(tmp_path / "out.pt")
    assert answer["status"]["adapters"] == "on"
    wrong = {name: _wrong(answer[name], truth, "qwen3_moe") for name, truth in truths.items()}
    assert not any(wrong.values()), wrong
    assert "lost_proj" in answer["lost"]
