"""test_compiled.py again, by the Triton of vLLM releases with torch 2.11."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import unpacked

RELEASE = "3.6.0"


def test_compiled_by_triton_3_6():
    """ptxas and the compiler are that wheel's; the test there looks at the machine code alike."""
    folder = unpacked.FOLDER / f"triton-{RELEASE}"
    if not (folder / "triton").is_dir():
        pytest.skip(
            f"no Triton {RELEASE} in {folder}: "
            f"pip install --no-deps --target {folder} triton=={RELEASE}"
        )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    file = Path(__file__).with_name("test_compiled.py")
    asked = "import sys, triton; print(triton.__version__, file=sys.stderr)"
    for command in (["-c", asked], ["-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]):
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": path},
            cwd=unpacked.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        if "-c" in command:
            assert done.stderr.strip() == RELEASE, "another Triton was imported"
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout
