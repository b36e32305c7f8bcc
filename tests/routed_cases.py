"""Runs tests/e2e/rl/routed.py: an engine that returns routes, and takes them."""

from __future__ import annotations

from pathlib import Path

from vllm_moe_lora.tiny import engine

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


def request(prompt, adapter=None, max_tokens=6, **more):
    return {"prompt": prompt, "adapter": adapter, "max_tokens": max_tokens, **more}
