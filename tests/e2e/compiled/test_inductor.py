"""Compiled to C++ by Inductor, as users run it; and what the cache keeps between starts."""

from __future__ import annotations

import shutil

import pytest
from engine_cases import PROMPTS, compare_fp32
from test_compiled import job, run

pytestmark = [
    pytest.mark.cpu_engine,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: Inductor needs it"),
]
LOADED, SAVED = "Directly load AOT compilation from path", "saved AOT compiled function to"
OTHER_WIRES = "-shared-experts"  # without this feature the shared expert's gate has no LoRA


@pytest.fixture(scope="module")
def started(make_case, tmp_path_factory):
    """start(**env) -> answers without and with LoRA on gates, and the log; one cache for all."""
    case = make_case("qwen2_moe")
    case.add("gates", lambda n: n.endswith("gate"), size=0.4)
    rounds = [[(p, name) for p in PROMPTS] for name in (None, "gates")]
    root = tmp_path_factory.mktemp("cache")

    def start(**env):
        env = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CACHE_ROOT": str(root), **env}
        answers, log = run(job(case, rounds, dtype="float32"), env)
        return [[lp[-1] for _, lp in answer] for answer in answers], log

    return case, start


def test_starts_in_one_cache(started):
    """Made with other settings, made again; then loaded, by a second start with the same."""
    case, start = started
    _, log = start(VLLM_MOE_LORA=OTHER_WIRES)
    assert SAVED in log
    assert LOADED not in log
    for had in (SAVED, LOADED):
        answers, log = start()
        assert had in log, _said(log)
        assert "Compiling model again" not in log
        for got, name in zip(answers, (None, "gates"), strict=True):
            compare_fp32(got, case, name)


def _said(log):
    return [line for line in log.splitlines() if "decorators.py" in line or "compiled.py" in line]


def test_the_key_is_why(started):
    """What goes wrong if the key does not tell settings apart."""
    case, start = started
    same_key = "-compile-cache"
    start(VLLM_MOE_LORA=f"{OTHER_WIRES},{same_key}")
    answers, log = start(VLLM_MOE_LORA=same_key)
    assert LOADED in log, _said(log)
    with pytest.raises(AssertionError, match="differs by"):
        compare_fp32(answers[1], case, "gates")
