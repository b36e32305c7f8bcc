"""Adapters pushed from memory: each version answers as its merged weights, a refused one changes
nothing, prefixes and requests keep to their version."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import PROMPTS, compare_fp32

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("pushing.py")
REFUSED = {
    "missing": "lora_A without lora_B",
    "foreign": "lost_proj",
    "nan": "NaN or infinite",
    "shape": "The adapter is for another model",
    "rank": "has rank 72, above max_lora_rank=16",
    "integers": "is torch.int32",
    "dora": "DoRA",
    "nothing": "it has no tensors",
}


def tell(story, case, **env):
    """The answer of one of the stories of pushing.py, which deletes the adapters' files."""
    adapters = {name: str(path) for name, path in case.adapters.items()}
    job = {"model": str(case.model), "prompts": PROMPTS, "adapters": adapters}
    found, log = engine.saved_by(SCRIPT, job, env, first=[story])
    assert "resource_tracker" not in log
    return found


@pytest.fixture
def case(make_case):
    case = make_case("qwen2_moe")
    for seed, name in enumerate("abc", start=1):
        case.add(name, seed=seed)
        case.want(name)  # before the files are gone
    return case


def test_versions(case):
    found = tell("steps", case)
    compare_fp32(list(found["base"]), case, None)
    # Pushed to the engine, then inside of the worker, then in place of requests that it aborted.
    for name, answers in zip([*"abc", *"ab", "a"], found["versions"], strict=True):
        compare_fp32(list(answers), case, name)
    # The first answer of each version uses no cached prefix, the second does.
    assert found["cached"] == [(0, 32)] * 5
    assert found["refused"].keys() == REFUSED.keys()
    for kind, text in found["refused"].items():
        assert text.startswith("AdapterError: LoRA adapter "), (kind, text)
        assert REFUSED[kind] in text, (kind, text)
    assert found["same"] == [True] * len(REFUSED)
    assert "unfinished requests of 'policy'" in found["in use"]
    assert (found["abort"], found["left"]) == ("", False)
    assert "'policy' was pushed from memory and is not held any more" in found["gone"]
    assert found["kept"]
    assert "moe_lora.rl.Worker'" in found["off"]
    assert found["opened"] == []


def test_while_others_are_served(case):
    """An `AsyncLLM` with its core in a process of its own, so through shared memory."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    found = tell("serve", case, **env)
    for version, name in ((found["one"], "a"), (found["two"], "b")):
        tokens, _ = version
        expected = case.forced(name, PROMPTS[2], tokens)
        assert expected.argmax(1).tolist() == tokens, name
    assert found["one"] != found["two"] != found["base"]
    assert found["running"] == found["two"], "a running request ends with its version"
    assert found["other"] == found["base"]
    assert found["later"] == found["one"]
    assert ["lora_A without lora_B" in text for text in found["at once"]] == [False, True, False]
    assert found["after"] == found["two"], "of two pushes at once the later stays"
    assert found["reloaded"] == found["two"]
    assert found["aborted"] == "abort"
    assert found["swapped"] == found["one"]
    assert len(found["segments"]) <= 1, "one is kept for the next push"
    assert found["down"] == "ok" or "shut down while 'policy' was pushed" in found["down"]
    assert found["opened"] == []
