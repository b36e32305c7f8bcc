"""vllm-ascend 0.23.0.post1's real Python on the vLLM it is made for: layouts, shared experts.

Contract-tested, not run on an NPU: stand_ins/npu replaces torch_npu, and its operators by loops.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import forks
import layouts
import pytest
import torch
import unpacked
from test_adapters import INNER, _demand_dense, _wrong

from vllm_moe_lora.tiny import adapters, models, oracle

pytestmark = pytest.mark.ascend
TREE = unpacked.other("vllm_ascend-0.23.0.post1")  # with vLLM 0.23.0 beside it
# What each token of the batch asks for. Both adapters target everything, gates included.
ROWS = ["one", "", "two", "two", "", "one", "two"]
LIMIT = 1e-4  # fp32


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Jobs by model, and the truth of each adapter of routed experts."""
    folder = tmp_path_factory.mktemp("ascend")
    jobs, truths = {}, {}
    for family, overrides in {
        "qwen3_moe": INNER,
        "gpt_oss": {"intermediate_size": layouts.INNER},
    }.items():
        model = models.build(family, folder / family, **overrides)
        forms = layouts.every(interleaved=family == "gpt_oss")
        truths[family] = {name: truth for name, (truth, _, _) in forms.items()}
        paths = {
            name: str(layouts.save(folder / f"{family}-{name}", tensors, truth, **config))
            for name, (truth, tensors, config) in forms.items()
        }
        jobs[family] = {"model": str(model), "adapters": paths}
    model = models.build("qwen2_moe", folder / "qwen2_moe")
    paths = {
        name: str(adapters.write(model, folder / name, seed=seed))
        for seed, name in enumerate(("one", "two"), start=1)
    }
    inputs = torch.randn(len(ROWS), 128, generator=torch.Generator().manual_seed(3))
    jobs["qwen2_moe"] = {"model": str(model), "adapters": paths, "inputs": inputs, "rows": ROWS}
    return jobs, truths


@pytest.fixture(scope="module")
def answer(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer")
    torch.save({"models": cases[0], "out": str(folder / "out.pt")}, folder / "job.pt")
    env = unpacked.environment(str(TREE)) | {"VLLM_MOE_LORA": "1", "VLLM_PLUGINS": "ascend"}
    env["PYTHONPATH"] += os.pathsep + str(unpacked.HERE / "stand_ins" / "npu")
    script = unpacked.HERE / "scripts" / "ascend.py"
    done = forks.launch([sys.executable, str(script), str(folder / "job.pt")], env, 600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out.pt")


def test_what_applies(answer):
    """The hooks for the package are on; what is vLLM's layers stays out of it."""
    status = answer["status"]
    assert status["ascend-shared-experts"] == status["adapters"] == status["shared-experts"] == "on"
    off = {why for why in status.values() if why != "on"}
    assert all("platform plugin" in why or "not needed" in why for why in off), off
    for family in ("qwen2_moe", "qwen3_moe", "gpt_oss"):
        assert answer[family]["kinds"] == ["vllm_ascend.lora.fused_moe, AscendFusedMoE"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_layout_lands(family, cases, answer):
    """In the slots of its own layers, for experts in two and in three dimensions."""
    got = answer[family]["adapters"]
    wrong = {name: _wrong(got[name], one, family) for name, one in cases[1][family].items()}
    assert not any(wrong.values()), {name: why for name, why in wrong.items() if why}


def test_shared_experts_and_gates_land(cases, answer):
    got = answer["qwen2_moe"]
    for name, path in cases[0]["qwen2_moe"]["adapters"].items():
        tensors = oracle.load_tensors(Path(path))
        _demand_dense({"raw": got["raw"], "adapters": {"all": got["adapters"][name]}}, tensors)


def test_experts_beside_shared_experts_compute(cases, answer, tmp_path):
    """Each token's MoE block, as a prompt and as single tokens, is Hugging Face's, merged."""
    job = cases[0]["qwen2_moe"]
    expected = {"": _blocks(Path(job["model"]), job["inputs"])}
    for name, path in job["adapters"].items():
        merged = oracle.merge(Path(job["model"]), Path(path), tmp_path / name)
        expected[name] = _blocks(merged, job["inputs"])
    want = torch.stack([expected[name][:, i] for i, name in enumerate(ROWS)], dim=1)
    for have in answer["qwen2_moe"]["outputs"]:
        assert (have - want).abs().max() <= LIMIT
    for i, name in enumerate(ROWS):
        if name:  # LoRA is what makes the difference
            assert (expected[name][:, i] - expected[""][:, i]).abs().max() > 100 * LIMIT


def _blocks(checkpoint, inputs):
    """[layers, tokens, hidden]: what each layer's MoE block makes of ``inputs``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        found = [layer.mlp(inputs[None]) for layer in model.model.layers]
    return torch.stack([(one[0] if isinstance(one, tuple) else one)[0] for one in found])


def test_bare_vllm_ascend_refuses_shared_experts(answer):
    """So the tests above see the hooks; a model without shared experts it takes."""
    assert "does not wrap the shared_experts path" in answer["bare"]["qwen2_moe"]
    assert answer["bare"]["qwen3_moe"] == answer["bare"]["gpt_oss"] == ""


@pytest.mark.parametrize(
    ("attribute", "word"),
    [
        ("quant_method", "leaves LoRA out"),
        ("multistream_overlap_shared_expert", "on a stream of their own"),
        ("use_ep", "expert parallelism"),
        ("multistream_overlap_gate", "multistream_overlap_gate"),
    ],
)
def test_what_stays_refused(attribute, word, answer):
    assert word in answer["refused"][attribute]
