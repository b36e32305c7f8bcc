"""What `plan` says of an engine before it exists is what the engine then is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_cases import PROMPTS

from vllm_moe_lora import probe
from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine


@pytest.mark.parametrize(
    ("quant", "flag"),
    [(None, None), (("gptq", 32, True), None), (None, ("q_proj",))],
    ids=["bf16", "int4", "left out"],
)
def test_backend_and_bytes(make_case, quant, flag):
    case = make_case("qwen2_moe", quant)
    case.add("a", lambda name: flag is None or name.endswith(flag), seed=1)
    options = {"dtype": "bfloat16", "max_loras": 3, "max_lora_rank": 16}
    if flag:
        options["lora_target_modules"] = list(flag)
    job = engine.Job(
        str(case.model), {"a": str(case.adapters["a"])}, [[(PROMPTS[0], "a")]], options=options
    )
    _, _, log = engine.run(job, script=Path(__file__).with_name("measured.py"))
    (line,) = [text for text in log.splitlines() if "MEASURED" in text]
    total, experts, classes = json.loads(line.partition("MEASURED ")[2])
    said = probe.ask(
        probe.Question(
            str(case.model),
            max_loras=3,
            max_lora_rank=16,
            dtype="bfloat16",
            lora_target_modules=flag,
        )
    )
    assert not said.error
    assert said.takes_lora
    assert bool(said.wrapped) == (flag is None)
    if said.wrapped:
        assert [name.rpartition(", ")[2] for name in said.backends] == classes
    else:
        assert all("WithLoRA" not in name for name in said.backends)
    assert (said.slot * 3, said.slot_experts * 3) == (total, experts)
    assert said.own_rank == (flag is None)
    assert bool(said.widened) == (flag is None and quant is None)
