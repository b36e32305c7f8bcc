"""Runs tests/e2e/rl/routed.py: an engine that returns routes, and takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

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
    spec, result = case.folder / "job.json", case.folder / "result.pt"
    result.unlink(missing_ok=True)
    spec.write_text(json.dumps(job))
    done = engine.launch(
        [sys.executable, str(SCRIPT), str(spec), str(result)],
        env={**os.environ, **engine.SETTINGS, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode or not result.exists():
        raise engine.EngineError(done.stdout)
    return torch.load(result, weights_only=True)


def request(prompt, adapter=None, max_tokens=6, **more):
    return {"prompt": prompt, "adapter": adapter, "max_tokens": max_tokens, **more}
