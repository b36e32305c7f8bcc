"""Runs tests/e2e/rl/routed.py: an engine that returns routes, and takes them."""

from __future__ import annotations

from pathlib import Path

from vllm_moe_lora.tiny import engine

LONG = [(7 * i + 3) % 500 for i in range(90)]
PROMPTS = [[1, 2, 3], [5, 9, 11, 300, 17, 44, 2, 8], LONG[:70]]
NAMES = (None, "a", "b")  # the base model, and the adapters of `case_of`
SCRIPT = Path(__file__).parent / "e2e" / "rl" / "routed.py"


def run(case, rounds, env=None, **options):
    """The answers of one engine: for each round, for each request a dict; and preemptions."""
    job = {
        "model": str(case.model),
        "adapters": {name: str(path) for name, path in case.adapters.items()},
        "options": options,
        "rounds": rounds,
    }
    return engine.saved_by(SCRIPT, job, env)[0]


def case_of(make_case, family="qwen2_moe", **overrides):
    """A checkpoint with two adapters on all of its modules."""
    case = make_case(family, **overrides)
    case.add("a", seed=1)
    case.add("b", seed=2)
    return case


def request(prompt, adapter=None, max_tokens=6, **more):
    return {"prompt": prompt, "adapter": adapter, "max_tokens": max_tokens, **more}
