"""kill -9 of one of two workers, or of the engine: every call ends with a sentence, none waits.

Bare vLLM 0.32 (a dense model, as it has no LoRA on a CPU for others): requests end with
EngineDeadError, but `add_lora` hangs. Here requests wait for a load, too, so they hung as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_cases import told
from processes import PROCESSES

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("killed.py")
ENV = {
    **PROCESSES,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # for the other worker, which waits for this one
}


@pytest.mark.parametrize(
    ("api", "rank", "busy"),
    [
        ("AsyncLLM", 1, True),
        ("LLM", 1, False),
        ("AsyncLLM", None, True),
        pytest.param("AsyncLLM", 0, False, marks=pytest.mark.long),
        pytest.param("LLM", 0, True, marks=pytest.mark.long),
    ],
)
def test_all_calls_end(make_case, api, rank, busy):
    case = make_case("qwen2_moe")
    for seed, name in enumerate("abc", start=1):
        case.add(name, seed=seed)
    job = {"model": str(case.model), "adapters": {n: str(p) for n, p in case.adapters.items()}}
    found = told(SCRIPT, json.dumps({**job, "api": api, "rank": rank, "busy": busy}), **ENV)
    assert len(found["calls"]) >= 2
    for name, text in found["calls"].items():
        assert text.startswith("EngineDeadError: EngineCore encountered an issue"), (name, found)
    if api == "AsyncLLM":
        assert len(found["calls"]) >= 6
        assert found["errored"]
        assert not found["workers left"]
