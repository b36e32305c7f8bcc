"""Pay for what you use: experts that no adapter may target run as in an engine without LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS, compare_fp32, compare_low_precision
from server import Server

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("experts_in_use.py")
BASE = [(prompt, None) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def case(make_case):
    case = make_case("qwen2_moe")
    case.add("queries", lambda name: name.endswith("q_proj"), seed=1)
    case.add("all", seed=2)
    return case


class Engine:
    """What one engine answered and said; ``answers`` of each batch: [(tokens, log-probs)]."""

    def __init__(self, case, adapters, rounds, load=(), **options):
        paths = {name: str(case.adapters[name]) for name in adapters}
        job = engine.Job(
            str(case.model), paths, rounds, max_tokens=4, load=list(load), by_request=True
        )
        job.options = options
        env = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        self.answers, self.outcomes, self.log = engine.run(job, env, script=SCRIPT)
        lines = self.log.splitlines()
        (said,) = [line.partition("EXPERTS ")[2] for line in lines if "EXPERTS [" in line]
        self.classes, self.wrapped, self.stacks = json.loads(said)
        self.calls = [int(line.split()[-1]) for line in lines if line.startswith("CALLS ")]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engines(case, request):
    """Without LoRA; with experts left out by the flag; with LoRA on all modules."""
    dtype = request.param
    mixed = [(p, name) for p in PROMPTS for name in (None, "queries")]
    targets = ["q_proj"]
    return {
        "dtype": dtype,
        "plain": Engine(case, [], [BASE], dtype=dtype),
        "left out": Engine(
            case,
            ["queries", "all"],
            [BASE, mixed],
            ["all"],
            dtype=dtype,
            lora_target_modules=targets,
        ),
        "whole": Engine(case, ["all"], [BASE], ["all"], dtype=dtype),
    }


def test_experts_left_out_are_those_of_an_engine_without_lora(engines):
    plain, left_out, whole = engines["plain"], engines["left out"], engines["whole"]
    assert (left_out.classes, left_out.wrapped, left_out.stacks) == (plain.classes, 0, 0)
    assert whole.wrapped == 2
    assert whole.stacks > 0
    assert whole.classes == [f"{plain.classes[0]}WithLoRA"]


def test_base_requests_keep_their_bits(engines):
    """Before any adapter, and with one of all modules in a slot."""
    want = engines["plain"].answers[0]
    for name in ("left out", "whole"):
        for batch in (engines[name].answers[0], engines[name].answers[-1]):
            for (tokens, logprobs), (own, ours) in zip(want, batch, strict=True):
                assert (tokens, True) == (own, torch.equal(logprobs, ours)), name


def test_a_batch_without_adapters_enters_nothing(engines):
    """Batches: base, base beside "all", base while "all" is in a slot."""
    whole = engines["whole"]
    assert whole.outcomes == ["ok"]
    before, beside, after = whole.calls
    assert (before, after) == (0, 0)
    assert beside > 0


def test_what_the_flag_leaves_is_served_and_the_rest_refused(engines, case):
    left_out = engines["left out"]
    if engines["dtype"] == "float32":
        compare_fp32([lp[0] for _, lp in left_out.answers[1][1::2]], case, "queries")
    (outcome,) = left_out.outcomes
    assert re.search(
        r"it has LoRA on \S+experts\.0\.\S+lora_A\S+ \(routed experts of "
        r"model\.layers\.0\.mlp\.experts and 1 more\), .*mlp\.gate.*, which "
        r"--lora-target-modules q_proj leaves out: .* --lora-target-modules .* experts .*q_proj",
        outcome,
    )


def test_int4_is_served_where_nothing_runs_it_without_lora(make_case):
    """Upstream wants AMX for INT4; ours, which wants less, is for LoRA."""
    case = make_case("qwen2_moe", ("gptq", 32, True))
    case.add("attention", lambda name: ".self_attn." in name, seed=1)
    batch = [(prompt, "attention") for prompt in PROMPTS]
    flag = ["q_proj", "k_proj", "v_proj", "o_proj"]
    found = Engine(case, ["attention"], [batch], dtype="bfloat16", lora_target_modules=flag)
    amx = torch.cpu._is_amx_tile_supported()
    assert found.classes == ["CPUExpertsInt4" if amx else "CPUExpertsInt4WithLoRA"]
    assert (found.wrapped, found.stacks) == (0, 0)
    compare_low_precision([lp[0] for _, lp in found.answers[0]], case, "attention")


def test_a_server_whose_adapters_leave_experts_alone(case, tmp_path):
    """It can be given no other adapter, so no flag is needed; its engine is another process."""
    with Server(case.model, tmp_path, {"queries": case.adapters["queries"]}) as server:
        for name in ("queries", None):
            for want, prompt in zip(case.want(name), PROMPTS, strict=True):
                for token, logprob in server.log_probs(name, prompt).items():
                    assert abs(logprob - want[-1][token].item()) <= 1e-3
    log = (tmp_path / "server.log").read_text().splitlines()
    (line,) = [text for text in log if "Routed experts run without LoRA" in text]
    assert line.startswith(("(EngineCore", "(Worker"))
    assert "no adapter targets them" in line
