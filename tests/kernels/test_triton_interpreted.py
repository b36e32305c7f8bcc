"""Runs tests/kernels/interpreted on Triton's interpreter.

TRITON_INTERPRET=1 changes every kernel of the process that is made under it, so it gets one of
its own; a kernel that reads outside its tensors ends that process and not this one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent / "interpreted"
ROOT = HERE.parents[2]


@pytest.mark.parametrize("name", sorted(file.stem for file in HERE.glob("test_*.py")))
def test_interpreted(name):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / f"{name}.py"), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
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
