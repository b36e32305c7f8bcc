"""No adapter hurts the server: every kind is refused with a sentence, and nothing else changes."""

from __future__ import annotations

import shutil
import urllib.request

import pytest
from conftest import PROMPTS
from hostile import kinds
from server import Server

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine


@pytest.fixture(scope="module")
def case(make_case):
    case = make_case("qwen2_moe")
    case.add("good", seed=1, rank=6)  # no size of the model: a transposed factor is seen
    return case


def _made(case, number, change):
    folder = case.folder / f"bad-{number}"
    shutil.copytree(case.adapters["good"], folder)
    change(folder)
    return folder


def test_there_are_two_hundred_kinds():
    names = [name for name, _ in kinds()]
    assert len(set(names)) == len(names) >= 200


def test_server(case, tmp_path):
    """Each kind is loaded at a running server: 400 or 404, a sentence, and the same bits after."""
    good = {"good": str(case.adapters["good"])}
    with Server(case.model, tmp_path, good, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as server:
        want = {name: server.log_probs(name, PROMPTS[1]) for name in (None, "good")}
        failed = []
        for number, (kind, change) in enumerate(kinds()):
            folder = _made(case, number, change)
            status, text = server.load(f"bad-{number}", folder)
            if status not in (400, 404) or len(text) < 20:
                failed.append(f"{kind}: {status} {text[:300]}")
            if (folder / "executed").exists():
                failed.append(f"{kind}: executed")
            for name, before in want.items():
                if server.log_probs(name, PROMPTS[1]) != before:
                    failed.append(f"{kind}: {name} changed")
            shutil.rmtree(folder)
        urllib.request.urlopen(f"{server.url}/health", timeout=10)
        assert server.load("late", case.adapters["good"])[0] == 200
        assert server.log_probs("late", PROMPTS[1]) == want["good"]
    assert not failed, f"{len(failed)}:\n" + "\n".join(failed)


@pytest.mark.parametrize("processes", ["0", "1"], ids=["in process", "engine core apart"])
def test_offline_requests(case, processes):
    """`LLM.generate` with a bad adapter raises, and the next call answers as before."""
    chosen = ["expert up, lora_A: missing", "expert down, lora_B: NaN", "file: cut in half"]
    chosen += ["attention, lora_A: a column too few", "config: DoRA", "folder: no config"]
    every = dict(kinds())
    paths = {"good": str(case.adapters["good"])}
    for number, kind in enumerate(chosen):
        paths[f"bad {number}"] = str(_made(case, f"{processes}-{number}", every[kind]))
    job = engine.Job(
        str(case.model),
        paths,
        [[(p, "good") for p in PROMPTS] + [(p, None) for p in PROMPTS]],
        options={"dtype": "float32"},
        load=[name for name in paths if name != "good"],
        by_request=True,
    )
    answers, outcomes, _ = engine.run(
        job, {"VLLM_ENABLE_V1_MULTIPROCESSING": processes}, timeout=300
    )
    for kind, outcome in zip(chosen, outcomes, strict=True):
        assert outcome != "ok", kind
        assert len(outcome) > 40, (kind, outcome)
    for batch in answers[1:]:
        for (tokens, have), (first_tokens, first) in zip(batch, answers[0], strict=True):
            assert tokens == first_tokens
            assert (have - first).abs().max() <= 1e-5
