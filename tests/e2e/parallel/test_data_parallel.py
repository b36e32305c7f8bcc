"""Data parallelism 2 on the CPU: two real processes, vLLM's own dispatch, adapter == merged.

Each rank has requests of its own, and experts that compute tokens of both. Bare vLLM cannot be
compared: it has no LoRA on a CPU's experts, and a data-parallel engine dies at the first MoE layer
without gloo.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from engine_cases import FP32_LIMIT, PROMPTS, TOP
from processes import PROCESSES, without

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("data_parallel.py")
LONG, SHORT = PROMPTS[1], PROMPTS[0]
NAMES = [None, "a", "b"]
ROUNDS = [
    # Base only; different adapters at the same time; one rank idle, either; base beside adapters.
    [(0, LONG, None), (1, SHORT, None)],
    [(0, LONG, "a"), (1, SHORT, "b")],
    [(0, SHORT, "b")],
    [(1, LONG, "a")],
    [(0, LONG, None), (1, PROMPTS[2], "a")],
    [(i % 2, prompt, name) for i, prompt in enumerate(PROMPTS) for name in NAMES],
]


def tell(case, stories, tmp_path, options, cores="0|1", script=SCRIPT, **more):
    """What each story of data_parallel.py returns, by its name. ``cores``: of each process."""
    job = {
        "model": str(case.model),
        "adapters": {name: str(path) for name, path in case.adapters.items()},
        "stories": stories,
        "prompts": [LONG, SHORT],
        "rounds": ROUNDS,
        **more,
        "options": {"dtype": "float32", **options},
    }
    spec, result = tmp_path / "job.json", tmp_path / "result.pt"
    spec.write_text(json.dumps(job))
    done = forks.launch(
        [sys.executable, str(script), str(spec), str(result)],
        env={**os.environ, **engine.SETTINGS, **PROCESSES, "VLLM_CPU_OMP_THREADS_BIND": cores},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert result.exists(), f"{engine.last_error(done.stdout)}\n{done.stdout[-3000:]}"
    return torch.load(result, weights_only=True)


def compare(case, name, prompt, answer):
    """Every generated token's distribution against the merged weights, given those before."""
    tokens, have = answer
    want, base = (case.forced(n, prompt, tokens) for n in (name, None))
    for i in range(len(tokens)):
        top = want[i].topk(TOP).indices
        difference = (have[i] - want[i])[top].abs().max().item()
        assert difference <= FP32_LIMIT, f"{name}, token {i}: differs by {difference:.2e}"
    if name is not None:
        effect = (base - want).abs().max().item()
        assert effect >= 20 * FP32_LIMIT, f"{name} does {effect:.2e} only"


def check_rounds(case, found, rounds=ROUNDS):
    for batch, answers in zip(rounds, found, strict=True):
        for (_, prompt, name), answer in zip(batch, answers, strict=True):
            compare(case, name, prompt, answer)


@pytest.fixture
def case(make_case):
    """Adapters on all modules; more of them than the two slots."""
    case = make_case("qwen2_moe", num_experts=7)
    for seed, name in enumerate("abcd", start=1):
        case.add(name, seed=seed, rank=3 + seed, alpha=12)
    return case


def test_experts_split_over_both_ranks(case, tmp_path):
    """Without expert parallelism each expert's weights are; a rank's death ends both."""
    found = tell(case, ["rounds", "loads", "died"], tmp_path, {})
    check_rounds(case, found["rounds"])
    loads = found["loads"]
    assert loads.pop("still running"), "the adapters came and went beside a's request"
    prompts = {"a": [LONG, SHORT, SHORT]}
    for name, answers in loads.items():
        for prompt, answer in zip(prompts.get(name, [SHORT] * 9), answers, strict=False):
            compare(case, name, prompt, answer)
    for text in found["died"]["texts"]:
        assert text.startswith("EngineDeadError"), text
    assert found["died"]["seconds"] < 30


def test_whole_experts_on_each_rank(case, tmp_path):
    """Expert parallelism: four experts on one rank, three on the other one."""
    case.adapters["old"] = shutil.copytree(case.adapters["a"], case.folder / "old")
    missing = "layers.1.mlp.experts.5.down_proj.lora_B"
    case.adapters["damaged"] = without(case, "a", lambda key: missing in key)
    options, new = {"enable_expert_parallel": True}, str(case.adapters["b"])
    stories = ["rounds", "refused", "loads", "replaced"]
    found = tell(case, stories, tmp_path, options, new=new)
    check_rounds(case, found["rounds"])
    for text in found["refused"]["texts"]:
        assert "layers.1.mlp.experts.5.down_proj" in text, "refused for both, with the reason"
    for prompt, answer in zip([LONG, SHORT, LONG], found["refused"]["a"], strict=True):
        compare(case, "a", prompt, answer)
    loads = found["loads"]
    assert loads.pop("still running")
    for name, answers in loads.items():
        for prompt, answer in zip([LONG] if name == "a" else [SHORT], answers, strict=False):
            compare(case, name, prompt, answer)
        compare(case, name, SHORT, answers[-1])
    replaced = found["replaced"]
    assert replaced["waited"]
    assert replaced["waited for removal"]
    compare(case, "a", LONG, replaced["old"][0])
    for prompt, answer in zip([SHORT, LONG, SHORT, SHORT, LONG], replaced["new"], strict=True):
        compare(case, "b", prompt, answer)


@pytest.mark.long
def test_two_ranks_of_two_processes(make_case, tmp_path):
    """With tensor parallelism: a quarter of each expert in each of four processes."""
    case = make_case("qwen2_moe", moe_intermediate_size=128, shared_expert_intermediate_size=128)
    for seed, name in enumerate("ab", start=1):
        case.add(name, seed=seed, rank=3 + seed, alpha=12)
    found = tell(case, ["rounds"], tmp_path, {"tensor_parallel_size": 2}, cores="0|1|0|1")
    check_rounds(case, found["rounds"])


@pytest.mark.long
def test_experts_that_move(make_case, tmp_path):
    """EPLB, every two steps, also in those that a rank without requests makes for the other one."""
    case = make_case("qwen3_moe", num_experts=6)
    for seed, name in enumerate("ab", start=1):
        case.add(name, seed=seed, rank=3 + seed, alpha=12)
    eplb = {"window_size": 2, "step_interval": 2, "num_redundant_experts": 2}
    options = {"eplb_config": {**eplb, "communicator": "torch_gloo"}, "enable_eplb": True}
    options["enable_expert_parallel"] = True
    script = SCRIPT.with_name("balanced_data_parallel.py")
    rounds = ROUNDS * 2
    found = tell(case, ["rounds"], tmp_path, options, script=script, rounds=rounds)
    check_rounds(case, found["rounds"], rounds)
