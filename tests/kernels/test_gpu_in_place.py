"""Our kernels under vLLM's own layers and experts on a real GPU; ci/gpu.sh runs this.

The cases of tests/releases/test_kernels_in_place.py with nothing replaced: where upstream's kernels
run, their numbers count, too. Never run so far.
"""

from __future__ import annotations

import os

import gpu
import pytest
import unpacked
from kernel_cases import CASES, REFUSED, TAIL, TAILLESS

pytestmark = gpu.MARKS
# Upstream's product of fp32 weights is in tf32; bf16 rounds between the products.
LIMIT, LIMIT_BF16 = 0.01, 0.03


@pytest.mark.parametrize("name", [*CASES, *REFUSED, *TAIL, *TAILLESS])
def test_the_layer_is_the_loops(name):
    # A tree on the path comes before the vLLM that is installed.
    tree = os.environ.get("PYTHONPATH", "")
    setting = {"MOE_LORA_DEVICE": "cuda", "MOE_LORA_SIZE": "256"}
    answers = unpacked.asked(tree, "kernels_in_place.py", **setting)
    assert isinstance(answers, dict), answers
    if answers["status"].get("moe-kernels") != "on":
        pytest.skip(f"vLLM {answers['release']} has no place for our kernels: 0.28 to 0.33 do")
    one = answers["cases"][name]
    assert "error" not in one, one
    assert one["off"] <= (LIMIT_BF16 if name.endswith("bf16") else LIMIT), one
    if "no adapter" not in name:
        assert one["moved"] > 0.2
    ours = [0, 0] if name in TAIL or "no adapter" in name else [2, 0]
    assert one["calls"] == ([0, 2] if name in REFUSED else ours)
    assert one["tails"] == (2 if name in TAIL else 0)
