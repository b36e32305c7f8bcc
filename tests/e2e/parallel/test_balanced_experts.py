"""EPLB on the CPU: two real processes between which vLLM moves experts, adapter == merged.

vLLM has EPLB on GPUs only; balanced.py says what stands in. Without our hook of
`_commit_eplb_maps` these tests fail once experts have moved.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from engine_cases import PROMPTS, compare_fp32
from processes import PROCESSES

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine
BEGIN = [0, 1, 2, 3, 4, 5, 0, 1]
SCRIPT = Path(__file__).with_name("balanced.py")


def changes(log):
    """Layer -> the experts by place, each time that vLLM changed them."""
    found = {}
    for text in re.findall(r"moved (\[.*\])$", log, re.MULTILINE):
        layer, places = json.loads(text)
        if found.setdefault(layer, [BEGIN])[-1] != places:
            found[layer].append(places)
    return found


@pytest.mark.parametrize("use_async", [True, pytest.param(False, marks=pytest.mark.long)])
def test_experts_move_and_have_copies(make_case, use_async):
    """Eight places for six experts. Adapters are loaded before experts move, and after."""
    case = make_case("qwen3_moe", num_experts=6)
    case.add("all", seed=1)
    case.add("odd", seed=2, rank=5, alpha=15)
    case.add("late", seed=3, rank=4)
    rounds, names = [], [None, "all", "odd"]
    for number in range(12):
        if number == 8:
            names.append("late")
        rounds.append([(p, name) for p in PROMPTS for name in names[-(1 + number % 4) :]])
    job = engine.Job(
        str(case.model),
        {name: str(path) for name, path in case.adapters.items()},
        rounds,
        options={
            "dtype": "float32",
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "enable_eplb": True,
            "eplb_config": {
                "window_size": 2,
                "step_interval": 2,
                "num_redundant_experts": 2,
                "use_async": use_async,
                "communicator": "torch_gloo",
            },
        },
    )
    answers, _, log = engine.run(job, PROCESSES, timeout=120, script=SCRIPT)
    assert [len(changes(log)[layer]) >= 4 for layer in range(2)] == [True, True], changes(log)
    for asked, batch in zip(rounds, answers, strict=True):
        for name in {name for _, name in asked}:
            got = [
                logprobs[-1]
                for (_, own), (_, logprobs) in zip(asked, batch, strict=True)
                if own == name
            ]
            compare_fp32(got, case, name)
