"""test_compiled.py again, by the Triton of vLLM releases with torch 2.11."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import inner
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
    said = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == RELEASE, "another Triton was imported"
    # Another compiler is asked what it can get wrong on any part: spills, narrow loads.
    file, part = Path(__file__).with_name("test_compiled.py"), os.environ.get("MOE_LORA_ARCHES")
    inner.passes(file, folder, MOE_LORA_ARCHES=part or "sm_90")
