"""The ways in give the same tokens; the off switch gives upstream; the real server serves."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time

import forks
import pytest
from engine_cases import PROMPTS, compare_fp32
from server import Server

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine


@pytest.fixture(autouse=True, scope="module")
def _fresh_processes():
    """How the plugin gets into a process is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "launch", subprocess.run)
        yield


@pytest.fixture(scope="module")
def case(make_case):
    case = make_case("qwen3_moe")
    case.add("all", seed=1)
    return case


def _job(case, **how):
    return engine.Job(
        str(case.model),
        {"all": str(case.adapters["all"])},
        [[(p, name) for p in PROMPTS for name in (None, "all")]],
        options={"dtype": "float32"},
        **how,
    )


def test_entry_point_and_import_agree(case):
    """The entry point in a spawned engine process, and an import in this one."""
    spawned = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    entry, _, log = engine.run(_job(case), spawned)
    assert "vllm-moe-lora on vLLM" in log
    imported, _, log = engine.run(_job(case, import_plugin=True), {"VLLM_PLUGINS": ""})
    assert log.count("vllm-moe-lora on vLLM") == 1, "said once, and late enough to be heard"
    compare_fp32([lp[-1] for _, lp in entry[0][1::2]], case, "all")
    for (tokens, logprobs), (tokens2, logprobs2) in zip(entry[0], imported[0], strict=True):
        assert tokens == tokens2
        # A spawned engine may start on the first request before the last has arrived, and dense
        # layers round differently for other batch sizes.
        assert (logprobs - logprobs2).abs().max() <= 1e-4


def test_off_switch_is_upstream(case, monkeypatch):
    """Bare vLLM's own error, as issue 2 reports it: the plugin is not even half there.

    tests/hooks/test_registry.py switches it off in a process that imports it first.
    """
    monkeypatch.setattr(engine, "launch", forks.launch)
    with pytest.raises(engine.EngineError, match=r"triton\.language"):
        engine.run(_job(case), {"VLLM_MOE_LORA": "0"})


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    """The API server in its own processes on loopback."""
    folder, adapters = tmp_path_factory.mktemp("server"), {"all": case.adapters["all"]}
    with Server(case.model, folder, adapters, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as server:
        yield server


def test_openai_server(case, server):
    """The answer of an adapter of --lora-modules is the oracle's."""
    _ask_and_compare(server, case, "all")


def test_loads_while_the_server_runs(case, server, tmp_path):
    """POST /v1/load_lora_adapter, staged beside the steps; new weights under an old name."""
    case.add("later", seed=9)
    moving = tmp_path / "moving"
    shutil.copytree(case.adapters["later"], moving)
    for name in ("later", "all"):
        assert server.load(f"{name} now", case.adapters[name])[0] == 200
        _ask_and_compare(server, case, name, asked=f"{name} now")
    assert server.load("moving", moving)[0] == 200
    _ask_and_compare(server, case, "later", asked="moving")
    shutil.rmtree(moving)
    shutil.copytree(case.adapters["all"], moving)
    # The prompts' blocks are cached with the old weights, under this name and path.
    assert server.load("moving", moving, load_inplace=True)[0] == 200
    _ask_and_compare(server, case, "all", asked="moving")
    # A version that is refused leaves the one it was to replace as it was.
    (moving / "adapter_model.safetensors").write_bytes(b"damaged")
    assert server.load("moving", moving, load_inplace=True)[0] == 400
    _ask_and_compare(server, case, "all", asked="moving")
    shutil.rmtree(moving)  # nothing is read again
    _ask_and_compare(server, case, "all", asked="moving")
    _ask_and_compare(server, case, "later", asked="later now")


def test_requests_in_flight_end_on_the_version_they_began_on(case, server, tmp_path):
    """load_inplace waits for them, requests that come later wait for it, nobody else waits."""
    case.add("later", seed=9)
    moving, prompt = tmp_path / "moving", PROMPTS[1]
    shutil.copytree(case.adapters["later"], moving)
    assert server.load("flying", moving)[0] == 200
    room = 250 - len(prompt)
    want = {name: list(server.tokens(name, prompt, room)) for name in ("flying", "all")}
    assert want["flying"] != want["all"]
    shutil.rmtree(moving)
    shutil.copytree(case.adapters["all"], moving)
    times, flight = {}, server.tokens("flying", prompt, room)
    got = [next(flight)]

    def timed(name, call):
        times[name] = (call(), time.monotonic())

    load = ("load", lambda: server.load("flying", moving, load_inplace=True))
    asks = [
        ("new", lambda: list(server.tokens("flying", prompt, room))),
        ("other", lambda: next(server.tokens(None, prompt, room))),
    ]
    threads = [threading.Thread(target=timed, args=what) for what in (load, *asks)]
    threads[0].start()
    time.sleep(0.1)
    for thread in threads[1:]:
        thread.start()
    got += flight
    ended = time.monotonic()
    for thread in threads:
        thread.join()
    assert got == want["flying"]
    assert times["load"][0][0] == 200
    assert times["new"][0] == want["all"]
    assert times["other"][1] < ended < times["load"][1] < times["new"][1]


def _ask_and_compare(server, case, name, asked=None):
    for want, prompt in zip(case.want(name), PROMPTS, strict=True):
        for token, logprob in server.log_probs(asked or name, prompt).items():
            assert abs(logprob - want[-1][token].item()) <= 1e-3
