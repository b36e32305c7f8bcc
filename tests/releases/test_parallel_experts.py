"""Routed experts on every rank of a world: what each release does alone, and with us.

One process is each rank in turn (`ranks.py`): the release's real layers, parallel configs,
managers, LoRA wrappers, experts and kernels' Python; the GPU's operators are loops, what ranks tell
one another is passed by hand. The ranks' answers are summed and compared with fp32 loops over the
whole layer with the adapter merged, and each rank's slots with its part of the adapter.
"""

from __future__ import annotations

import re

import pytest
import test_quantised_experts
import unpacked
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from parallel_cases import cases
from test_quantised_experts import ASSERTION, BASE_WRONG, FINE, IGNORED, WRONG

# fp32, and fp16 over up to 128 numbers; an adapter moves answers by more than 0.5.
LIMIT, LIMIT_HALF = 1e-5, 0.004
INDEX = "IndexError: list index out of range"
SEED = r"AttributeError: '\w+' object has no attribute 'w2_weight'"
RANKS = [
    ("<0.12", WRONG),  # experts without all of gate, up and down are passed over
    ("<0.32", ASSERTION),
    (">=0.32", "ValueError: The experts of .* have different LoRA ranks for the same .*"),
]
LAYOUT = [("<0.14", f"{WRONG}|{IGNORED}")]  # experts and ranks of fused factors confused
ALWAYS = ">=0.11"
PADDED = [(">=0.25", WRONG)]  # before, Marlin refuses such layers
# What each release does without us; the first range that holds, else fine.
ALONE = {
    "tp4-ragged": RANKS,
    "tp2-fused": LAYOUT,
    "tp2-interleaved": LAYOUT,
    "tp3-inner": [(ALWAYS, "AssertionError.*")],  # also without LoRA
    "fs2": LAYOUT,
    "fs4": LAYOUT,
    "fs2-ragged": RANKS,
    "fs2-fused": LAYOUT,
    "fs2-interleaved": LAYOUT,
    "fs4-rank": [(ALWAYS, ASSERTION)],
    "fs4-some": [(ALWAYS, ASSERTION)],
    "fs3-max-rank": [(ALWAYS, "AssertionError: 8 is not divisible by 3")],
    "ep3-uneven": [("<0.22", INDEX), (ALWAYS, WRONG)],
    "ep8-uneven": [("<0.22", INDEX), (ALWAYS, WRONG)],
    "ep3-uneven-ragged": [("<0.22", INDEX), *RANKS],
    "ep3-uneven-fused": [("<0.33", "RuntimeError: shape .* is invalid.*"), (ALWAYS, WRONG)],
    "ep3-uneven-interleaved": [("<0.33", "RuntimeError: shape .* is invalid.*"), (ALWAYS, WRONG)],
    "ep2-round-robin": [(ALWAYS, WRONG)],
    "ep3-round-robin": [("<0.22", INDEX), (ALWAYS, WRONG)],
    "ep2-moved": [(ALWAYS, WRONG)],
    "ep2-redundant": [(">=0.22", ASSERTION)],
    "ep2-redundant-moved": [(">=0.22", ASSERTION), (ALWAYS, WRONG)],
    "ep2-moved-fused": [(ALWAYS, "RuntimeError: shape .* is invalid.*|AssertionError.*")],
    "ep2-sharded": [(ALWAYS, "AssertionError: Fused MoE LoRA does not support .*")],
    "ep3-uneven-shared": [(ALWAYS, "ValueError: While loading .*, expected target modules .*")],
    "ep3-uneven-mixed": [(ALWAYS, WRONG)],
    "rounded-fused": [(ALWAYS, WRONG)],
    "rounded-tp2": [("<0.33", WRONG)],
    "rounded-tp2-fused": [("<0.33", WRONG)],
    "llama4": [(ALWAYS, WRONG)],
    "llama4-tp2": [(ALWAYS, WRONG)],
    "llama4-ep3-uneven": [("<0.22", INDEX), (ALWAYS, WRONG)],
    "marlin-padded": PADDED,
    "marlin-padded-tp2": PADDED,
    "marlin-padded-tp2-fused": [*LAYOUT, *PADDED],
    "marlin-padded-ep3-uneven": [("<0.22", INDEX), (ALWAYS, WRONG)],
    "marlin-llama4": [(ALWAYS, BASE_WRONG)],
}
MOVES = (
    r"NotImplementedError: model\.layers\.0\.mlp\.experts: --enable-eplb moves experts .*"
    r"Start without --enable-eplb, without --enable-lora, or with --lora-target-modules .*"
)
MOVED = ("ep2-moved", "ep2-redundant", "ep2-redundant-moved", "ep2-moved-fused")
# What is still refused with us; the first range that holds.
REFUSED = {
    "tp3-inner": [(ALWAYS, "AssertionError.*")],
    "fs3-max-rank": [(ALWAYS, "AssertionError: 8 is not divisible by 3")],
    **{name: [("<0.30", MOVES)] for name in MOVED},
    "ep2-sharded": [
        (ALWAYS, "AssertionError: Fused MoE LoRA does not support .* Disable one of them.")
    ],
}


def verdict(name, found):
    """One of the words, or the error's text."""
    if "error" in found:
        return found["error"]
    limit = LIMIT_HALF if name.startswith(("marlin", "wna16")) else LIMIT
    assert found["moved"] > 0.5
    if found["base_off"] > limit:
        assert found["base_off"] > 10 * limit
        return BASE_WRONG
    if found["off"] <= limit:
        # Where every number is right the slots are, too; the other way there are kernels between.
        assert found["slots"] <= LIMIT, found
        return FINE
    assert found["off"] > 10 * limit
    return IGNORED if abs(found["off"] - found["moved"]) < limit else WRONG


def _first(ranges, release):
    return next((what for where, what in ranges if release in SpecifierSet(where)), FINE)


def alone(name, release):
    own = _first(ALONE.get(name, ()), release)
    kind = {"marlin": "gptq", "wna16": "moe_wna16"}.get(name.partition("-")[0])
    refused = test_quantised_experts.expected(kind, release) if kind else FINE
    if kind and Version(release) < Version("0.12"):
        return SEED
    # That one comes before the first request, where layers without w13_weight fail.
    return own if refused == FINE or own == INDEX else refused


def results(release):
    found = unpacked.results(release, "parallel_experts.py")
    if Version(release) >= Version("0.12"):
        assert found["status"]["parallel-experts"] == found["status"]["gpu-experts"] == "on"
    return found["bare"], found["ours"]


@pytest.mark.parametrize(
    ("release", "name"), [(r, case.name) for r in unpacked.available() for case in cases(r)]
)
def test_every_rank(release, name):
    bare, ours = results(release)
    assert re.fullmatch(alone(name, release), verdict(name, bare[name]), re.DOTALL), bare[name]
    want = _first(REFUSED.get(name, ()), release)
    assert re.fullmatch(want, verdict(name, ours[name]), re.DOTALL), ours[name]
