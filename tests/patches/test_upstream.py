"""The patches for vLLM's maintainers in a real engine, without the plugin: merged weights.

Their own tests are in the patches; ci/upstream.sh runs them. What they repair on a GPU only is not
shown here.
"""

from __future__ import annotations

import json

import forks
import pytest
import trees
from engine_cases import PROMPTS, Case, compare_fp32
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine, models

pytestmark = pytest.mark.cpu_engine
ATTENTION = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"]


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(engine, "launch", forks.launch)


@pytest.fixture(scope="module")
def env():
    return {"PYTHONPATH": str(trees.upstream()), "VLLM_PLUGINS": "", "VLLM_MOE_LORA": "0"}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    model = models.build("qwen2_moe", folder / "model")
    case = Case(folder, model, model)
    case.add("all", seed=1)
    case.add("gate", lambda name: name.endswith("mlp.gate"), seed=2)
    case.add("shared gate", lambda name: name.endswith("shared_expert_gate"), seed=3)
    case.add("down of two experts", _down_of_two, seed=4)
    case.add("attention", lambda name: name.endswith(("q_proj", "v_proj")), seed=5)
    return case


def _down_of_two(name):
    return "experts.1.down_proj" in name or "experts.6.down_proj" in name


def test_every_kind_of_layer(case, env):
    """Gates, shared experts, some experts and projections; half an adapter is refused."""
    half = case.folder / "half"
    half.mkdir()
    tensors = load_file(case.adapters["all"] / "adapter_model.safetensors")
    (gone,) = [name for name in tensors if "0.self_attn.q_proj.lora_B" in name]
    del tensors[gone]
    save_file(tensors, half / "adapter_model.safetensors")
    config = json.loads((case.adapters["all"] / "adapter_config.json").read_text())
    (half / "adapter_config.json").write_text(json.dumps(config))

    names = [None, "all", "gate", "shared gate", "down of two experts"]
    paths = {name: str(case.adapters[name]) for name in names if name} | {"half": str(half)}
    rounds = [[(prompt, name) for prompt in PROMPTS] for name in names]
    job = engine.Job(str(case.model), paths, rounds, load=["half"], options={"dtype": "float32"})
    answers, outcomes, log = engine.run(job, env)
    assert "vllm-moe-lora" not in log
    for name, batch in zip(names, answers, strict=False):
        compare_fp32([logprobs[-1] for _, logprobs in batch], case, name)
    assert "'model.layers.0.self_attn.q_proj' is missing lora_B" in outcomes[0]


def test_attention_only(case, env):
    """Experts that no adapter may target keep the kernel that they have without LoRA."""
    job = engine.Job(
        str(case.model),
        {"attention": str(case.adapters["attention"])},
        [[(prompt, "attention") for prompt in PROMPTS]],
        options={"dtype": "float32", "lora_target_modules": ATTENTION},
    )
    answers, _, log = engine.run(job, env)
    assert "Using CPUUnquantizedExperts MoE backend" in log
    compare_fp32([logprobs[-1] for _, logprobs in answers[0]], case, "attention")


def test_what_the_cpu_cannot_is_said(tmp_path, env):
    model = models.build("gpt_oss", tmp_path / "model")
    job = engine.Job(str(model), {"none": str(tmp_path)}, [], options={"dtype": "float32"})
    with pytest.raises(engine.EngineError, match=r"on CPU since .* with --lora-target-modules"):
        engine.run(job, env)
