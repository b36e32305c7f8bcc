"""Tests that want a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def passes(file: Path, first: Path = ROOT, **env: str) -> None:
    """Demand that the tests of ``file`` pass, all of them.

    Args:
        first: what comes first on the path.
        env: on top of this process's.
    """
    path = os.pathsep.join([str(first), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "PYTHONPATH": path, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0
    counts = re.search(r"(\d+) passed", done.stdout)
    assert counts, "nothing ran"
    assert not re.search(r"\d+ skipped", done.stdout)
