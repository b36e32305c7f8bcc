"""`vllm serve` with two API servers, or one for each rank, on the CPU: names and ids agree, or the
start is refused with the reason."""

from __future__ import annotations

import concurrent.futures
import re
import socket
from pathlib import Path

import pytest
from engine_cases import FP32_LIMIT, PROMPTS
from processes import PROCESSES
from server import Server

pytestmark = [pytest.mark.cpu_engine, pytest.mark.long]
START = [str(Path(__file__).with_name("serve.py"))]
ENV = {**PROCESSES, "TORCHDYNAMO_DISABLE": "1"}
TWO = ["--data-parallel-size", "2", "--max-loras", "2"]


@pytest.fixture
def case(make_case):
    case = make_case("qwen2_moe")
    for seed, name in enumerate("abc", start=1):
        case.add(name, seed=seed, rank=3 + seed, alpha=12)
    return case


def serve(case, folder, names, *options):
    folder.mkdir(exist_ok=True)
    adapters = {name: case.adapters[name] for name in names}
    return Server(case.model, folder, adapters, options, START, **ENV)


@pytest.mark.parametrize("engine", [TWO, ["--api-server-count", "2"]], ids=["dp 2", "one engine"])
def test_two_servers_agree(case, tmp_path, engine):
    """Data parallelism 2 starts two API servers; each connection goes to either of them."""
    asked = [(name, prompt) for name in (None, "a", "b") for prompt in range(len(PROMPTS))]
    both = {(one, *of) for one in "01" for of in (("a", "1"), ("b", "2"))}
    with serve(case, tmp_path, "ab", *engine, "--enable-log-requests") as server:
        answers = []
        # Which server gets a connection is up to them: until each has had both adapters.
        while held(server) != both and len(answers) < 40 * len(asked):
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                found = pool.map(lambda one: server.log_probs(one[0], PROMPTS[one[1]]), asked)
                answers.extend(zip(asked, found, strict=True))
        assert held(server) == both
        assert server.post("/v1/load_lora_adapter", {})[0] == 404  # vLLM has no such route then
    for (name, prompt), answer in answers:
        want = case.want(name)[prompt][-1]
        for token, logprob in answer.items():
            assert abs(logprob - want[token]) <= FP32_LIMIT, (name, prompt)
        if name:
            assert (want - case.want(None)[prompt][-1]).abs().max() >= 20 * FP32_LIMIT


def held(server):
    """Number of the server, name and id of each adapter in the requests that came."""
    found = r"\(ApiServer_(\d).*lora_name='(\w)', lora_int_id=(\d)"
    return set(re.findall(found, server.log))


def test_more_adapters_than_slots_are_refused(case, tmp_path):
    what = "adapter 3: several API servers share .* Raise --max-loras .* --api-server-count 1"
    with pytest.raises(AssertionError, match=what), serve(case, tmp_path, "abc", *TWO):
        pass


def test_a_server_for_each_rank_is_refused(case, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = [*TWO, "--data-parallel-external-lb", "--data-parallel-address", "127.0.0.1"]
    options += ["--data-parallel-rpc-port", port, "--data-parallel-rank"]
    ranks = [serve(case, tmp_path / rank, "a", *options, rank) for rank in "01"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for error in pool.map(refusal, ranks):
            assert "a load balancer outside of vLLM each server gives out LoRA slots" in error


def refusal(server):
    with pytest.raises(AssertionError) as raised, server:
        pass
    return str(raised.value) + server.log
