"""Runs tests/kernels/interpreted on Triton's interpreter.

TRITON_INTERPRET=1 changes every kernel of the process that is made under it, so it gets one of
its own; a kernel that reads outside its tensors ends that process and not this one.
"""

from __future__ import annotations

from pathlib import Path

import inner
import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", sorted(file.stem for file in HERE.glob("test_*.py")))
def test_interpreted(name):
    inner.passes(HERE / f"{name}.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
