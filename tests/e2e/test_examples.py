"""The examples run as they are, on the tiny model that they make."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_moe_lora.tiny import engine

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.cpu_engine


def run(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, **engine.SETTINGS},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(re.findall(r"^(\S+): (\[.*\])$", done.stdout, re.MULTILINE)), done.stdout


def test_offline():
    answers, _ = run("offline.py")
    assert list(answers) == ["base", "a", "b"]
    assert len(set(answers.values())) == 3, "each adapter has answers of its own"


def test_serve_openai():
    answers, out = run("serve_openai.py")
    assert list(answers)[1:] == ["a", "b", "c", "served"]
    assert answers["c"] == answers["a"] != answers["b"], "c is a's folder"
    assert answers["served"] == "['a', 'b']", out
