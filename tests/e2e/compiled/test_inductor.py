"""Compiled to C++ by Inductor, as users run it; and what the cache keeps between starts."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from engine_cases import PROMPTS, compare_fp32
from test_compiled_engine import job, run

pytestmark = [
    pytest.mark.cpu_engine,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: Inductor needs it"),
]
LOADED, SAVED = "Directly load AOT compilation from path", "saved AOT compiled function to"
# A version of ours that did not know of that gate's second name; see child.py.
OLDER = {"OLDER_VERSION": "1"}


@pytest.fixture(scope="module")
def started(make_case, tmp_path_factory):
    """start(**env) -> answers without and with LoRA on a gate, and the log; one cache for all."""
    case = make_case("qwen2_moe", num_hidden_layers=1)
    case.add("gate", lambda n: n.endswith("shared_expert_gate"), size=0.4)
    rounds = [[(p, name) for p in PROMPTS] for name in (None, "gate")]
    root = tmp_path_factory.mktemp("cache")

    def start(**env):
        env = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CACHE_ROOT": str(root), **env}
        answers, _, log = run(job(case, rounds, dtype="float32"), env)
        return [[lp[-1] for _, lp in answer] for answer in answers], log

    return case, start


def test_starts_in_one_cache(started):
    """What an older version made is not taken; what this one made is loaded."""
    case, start = started
    answers, log = start(**OLDER)
    assert SAVED in log
    assert _without_gate(case, answers)
    for had in (SAVED, LOADED):
        answers, log = start()
        assert had in log, _said(log)
        assert "Compiling model again" not in log
        for got, name in zip(answers, (None, "gate"), strict=True):
            compare_fp32(got, case, name)


def _said(log):
    return [line for line in log.splitlines() if "decorators.py" in line or "compiled.py" in line]


def _without_gate(case, answers):
    compare_fp32(answers[0], case, None)
    return all(torch.equal(*pair) for pair in zip(*answers, strict=True))


@pytest.mark.long
@pytest.mark.skipif(os.environ.get("VLLM_MOE_LORA") == "0", reason="patches cannot be switched off")
def test_the_key_is_why(started):
    """With the key of upstream the older version's code is taken, and the gate's LoRA is lost."""
    case, start = started
    upstream = {"VLLM_MOE_LORA": "-compile-cache"}
    start(**upstream, **OLDER)
    answers, log = start(**upstream)
    assert LOADED in log, _said(log)
    assert _without_gate(case, answers)
