"""A slot of experts on a CPU has its adapter's own rank, and is the adapter's own tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS
from packaging.version import Version
from release import installed

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("slot_ranks.py")
RANKS = {"a": 2, "b": 8, "c": 3}


def _run(case, names, **env):
    rounds = [[(p, name) for p in PROMPTS for name in batch] for batch in names]
    paths = {name: str(case.adapters[name]) for name in RANKS}
    options = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 512, "dtype": "bfloat16"}
    job = engine.Job(str(case.model), paths, rounds, max_tokens=3, options=options)
    answers, _, log = engine.run(job, env, script=SCRIPT)
    return answers, _held(log)


def _held(log):
    """What slot_ranks.py printed after each batch."""
    return [json.loads(t.partition("HELD ")[2]) for t in log.splitlines() if "HELD [" in t]


def _loaded(log, of_rank):
    """Bytes of the adapters in memory after each load; one that is gone has no slot, no ranks."""
    held = _held(log)
    assert all(slots == adapters == ranks * of_rank / 2 for slots, adapters, ranks in held), held
    return [adapters for _, adapters, _ in held]


@pytest.mark.parametrize("quant", [None, ("gptq", 32, True)], ids=["bf16", "int4"])
def test_own_rank(make_case, quant):
    """Loads and evictions; the bits are those of dense stacks of max_lora_rank."""
    case = make_case("qwen2_moe", quant)
    for number, (name, rank) in enumerate(RANKS.items()):
        case.add(name, seed=number, rank=rank)
    names = [(None,), ("a", None), ("a", "b"), ("c",), ("c", "a"), ("b", None)]
    answers, held = _run(case, names)
    # Two of the three adapters are loaded at the end of each batch, and both have a slot.
    of_rank = held[1][0] / RANKS["a"]
    wanted = [0, 2, 2 + 8, None, 2 + 3, None]
    for (slots, adapters, ranks), want in zip(held, wanted, strict=True):
        assert slots == adapters == ranks * of_rank / 2
        assert want is None or slots == want * of_rank
    assert held[3][0] in (of_rank * 5, of_rank * 11)
    dense, held_dense = _run(case, names, MOE_LORA_TEST_DENSE="1")
    assert len(held_dense) == len(held)
    for own, other in zip(answers, dense, strict=True):
        for (tokens, logprobs), (tokens_dense, logprobs_dense) in zip(own, other, strict=True):
            assert tokens == tokens_dense
            assert torch.equal(logprobs, logprobs_dense)
    base, with_a = answers[0][0][1], answers[1][0][1]
    assert not torch.equal(base, with_a)


def test_memory_limit(make_case):
    """One that is larger than the limit is refused, by name and bytes; idle ones make room."""
    case = make_case("qwen2_moe")
    for number, (name, rank) in enumerate(RANKS.items()):
        case.add(name, seed=number, rank=rank)
    first = [(p, None) for p in PROMPTS]
    paths = {name: str(case.adapters[name]) for name in RANKS}
    job = engine.Job(str(case.model), paths, [first], load=["a", "c", "b", "a"])
    job.options = {"dtype": "bfloat16"}
    # 2 layers, 8 experts: see the sizes of tiny/models.py.
    (loaded_a,), held = _run(case, [("a",)])
    of_rank = held[0][0] / RANKS["a"]
    limit = int(of_rank * 5.5)
    answers, outcomes, log = engine.run(job, {"VLLM_MOE_LORA_MEMORY": str(limit)}, script=SCRIPT)
    assert [one.split(":")[0] for one in outcomes] == ["ok", "ok", "AdapterError", "ok"]
    assert "VLLM_MOE_LORA_MEMORY" in outcomes[2]
    assert f"{8 * of_rank / 2**20:,.1f} MiB" in outcomes[2]
    loaded = _loaded(log, of_rank)
    assert loaded == [0, 2 * of_rank, 5 * of_rank, 5 * of_rank, 5 * of_rank]
    for later in answers[1:]:
        for (tokens, logprobs), (own, ours) in zip(answers[0], later, strict=True):
            assert tokens == own
            assert torch.equal(logprobs, ours)
    most = int(of_rank * 8.5)  # a and c make room for b, which takes the slot of one of them
    _, outcomes, log = engine.run(
        engine.Job(**{**vars(job), "load": ["a", "c", "b", "a"]}),
        {"VLLM_MOE_LORA_MEMORY": str(most)},
        script=SCRIPT,
    )
    if Version(installed()) < Version("0.29"):  # the front end removes no adapter
        assert "are taken by 2 adapters in memory" in outcomes.pop(2)
        assert outcomes == ["ok"] * 3
        # What a request names is read inside a step, where nobody could be told of a refusal.
        beyond, held = _run(case, [("a",), ("b",)], VLLM_MOE_LORA_MEMORY="1K")
        assert [slots for slots, _, _ in held] == [2 * of_rank, 10 * of_rank]
        for (_, logprobs), (_, want) in zip(beyond[0], loaded_a, strict=True):
            assert torch.equal(logprobs, want)
        return
    assert outcomes == ["ok"] * 4
    assert _loaded(log, of_rank) == [0, 2 * of_rank, 5 * of_rank, 8 * of_rank, 2 * of_rank]
