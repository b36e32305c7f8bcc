"""LoRA layers that models/repair.py changes, in the releases that are here (simulated GPU)."""

from __future__ import annotations

import pytest
import unpacked
from packaging.version import Version

# vLLM's merged q, k and v have a size of v of their own since 0.14.
RELEASES = [r for r in unpacked.available() if Version(r) >= Version("0.14")]


@pytest.mark.parametrize("release", RELEASES)
def test_heads_of_v_and_fp32_gates(release):
    assert unpacked.results(release, "repaired_layers.py")["done"] == ["v_heads", "fp32_gate"]
