"""LoRA factors in pages under each release's own managers, layers and experts.

In Triton's interpreter, on CPU tensors: paged_experts.py. The managers load adapters from disk with
room for two of 8 ranks, where dense slots would take four times as much. Answers are compared with
fp32 loops with the adapter merged.
"""

from __future__ import annotations

import re

import pytest
import unpacked
from packaging.specifiers import SpecifierSet

pytest.importorskip("triton")
RELEASES = [r for r in unpacked.available() if r in SpecifierSet(">=0.28,<0.34")]
LIMIT, LIMIT_BF16 = 1e-5, 0.01  # by the factors' dtype; an adapter moves answers by more than 0.5
RANKS = {
    "tp2": 2,
    "ragged": 1,
    "fused, tp2": 2,
    "interleaved": 1,
    "ep3 uneven, ragged": 3,
    "shared factors": 1,
    "moved": 2,
    "router weights on input": 1,
    "sharded in the rank": 2,
    "factors in bf16": 1,
}
DENSE = ("sharded in the rank", "factors in bf16")  # upstream's kernels serve these


def results(release):
    found = unpacked.results(release, "paged_experts.py")
    assert found["status"]["moe-kernels"] == "on", found["status"]
    return found


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", RANKS)
def test_answers(release, name):
    if name == "moved" and release in SpecifierSet("<0.30"):
        assert "--enable-eplb moves experts" in results(release)["cases"][name]["error"]
        return
    found = results(release)["cases"][name]
    assert "error" not in found, found
    limit = LIMIT_BF16 if name == "factors in bf16" else LIMIT
    assert max(found["off"], found["base_off"], found["slots"]) <= limit
    assert found["moved"] > 0.5
    assert found["pages"] == [None if name in DENSE else 2] * RANKS[name]
    if name not in DENSE:
        assert (found["calls"], found["dense"]) == (2 * RANKS[name], 0)


# What is done -> the error, and for how many ranks there are pages left. There are 24.
WITH_OTHERS = (
    r"LoRA adapter {}: its factors for routed experts take about \S+ MiB, but \S+ of the \S+ MiB "
    r"that VLLM_MOE_LORA_MEMORY=\d+ allows are taken by 1 adapters that may run with it\. Raise "
    r"it, or remove an adapter\."
)
LIFE = [
    ("load 1 of 8", "", 16),
    ("load 2 of 16", "", 0),
    ("load 3 of 24", WITH_OTHERS.format(3), 0),
    ("load 4 of 32", r"LoRA adapter 4: .* more than the \S+ MiB that \S+ allows\. Raise it\.", 0),
    ("load 2 of 16", "", 0),
    ("activate 2", "", 0),
    ("remove 1", "", 8),
    ("remove 2", "", 24),
    ("load 3 of 24", "", 0),
    ("load 5 of 8", WITH_OTHERS.format(5), 0),
    ("remove all", "", 24),
    ("load 6 of 16", "", 8),
    ("load 7 of 8", "", 0),
    ("remove 6", "", 16),
    ("load 9 of 16", "", 0),
    ("remove 9", "", 16),
    ("remove 7", "", 24),
    # In the middle of a step, where nobody can be told. 0.33 leaves the pages that were written;
    # the next adapter gets the same slot.
    ("load 8 of 32", r"MoE LoRA: a slot needs .* are free\. Raise VLLM_MOE_LORA_MEMORY\.", (8, 24)),
]


@pytest.mark.parametrize("release", RELEASES)
def test_adapters_come_and_go(release):
    life = results(release)["life"]
    assert "error" not in life, life
    for said, (what, want, free) in zip(life["said"], LIFE, strict=True):
        assert said[0] == what
        assert re.fullmatch(want, said[1]), said
        assert said[2] in (free if isinstance(free, tuple) else (free,)), said
    assert max(life["off"]) <= LIMIT


STARTS = (
    r"ValueError: VLLM_MOE_LORA_MEMORY='much': use .*",
    r"ValueError: VLLM_MOE_LORA_MEMORY=1KiB allows 0\.0 MiB for LoRA on routed experts, but 8 "
    r"ranks of one adapter take 0\.0 MiB\. Raise it, or set VLLM_MOE_LORA_KERNELS=upstream\.",
    r"OutOfMemoryError: CUDA is full\. LoRA on routed experts takes pages of 0\.1 MiB here: "
    r"VLLM_MOE_LORA_MEMORY=100KiB\. Lower it\.",
)


@pytest.mark.parametrize("release", RELEASES)
def test_engines_that_do_not_start(release):
    for want, said in zip(STARTS, results(release)["starts"], strict=True):
        assert re.fullmatch(want, said), said


@pytest.mark.parametrize("release", RELEASES)
def test_a_record_decides(release):
    """Upstream's kernels cannot read pages, so there are none where these win for some batches."""
    found = results(release)["measured"]
    assert [one["pages"] for one in found] == [[2], [None]]
    for one in found:
        assert one["off"] <= LIMIT
        assert one["calls"] == 2, "9 tokens: ours"
