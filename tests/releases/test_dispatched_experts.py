"""Routed experts that get the tokens of several batches, release by release: refused up to 0.29.

With data parallelism each rank is an engine with a scheduler and a LoRA manager of its own, while
the experts of all of them are one layer. One process is each rank in turn (`ranks.py`): the
release's real layers, parallel configs, managers, LoRA wrappers and modular kernels, and what a
rank without requests does about LoRA (`_dummy_run`); the GPU's operators are loops, and tokens are
taken from rank to rank by hand. Each rank's answers are compared with fp32 loops over the whole
layer with each token's own adapter.
"""

from __future__ import annotations

import re

import pytest
import unpacked
from dispatched_experts import cases
from packaging.specifiers import SpecifierSet
from test_quantised_experts import ASSERTION, FINE, WRONG

LIMIT = 1e-5
# What each release does without us.
OWN_SLOTS = [
    # Factors are cut for the ranks of one batch, experts for those of all.
    (
        "<0.21",
        r"RuntimeError: The size of tensor a \(16\) must match the size of tensor b \(32\).*",
    ),
    (">=0.21", WRONG),
]
ALONE = {
    "without": [],
    # As soon as LoRA is enabled: the experts' kernel is made for one batch, and no rank's answers
    # are added to another's.
    "base": [("<0.20", WRONG)],
    # All have the same adapters in the same slots, and all of them in their batches.
    "same": OWN_SLOTS[:1],
    # Who has no adapter in his batch adds none to others' tokens.
    "base-beside": OWN_SLOTS,
    # And says of his own tokens that they have those of the batch before.
    "base-after": OWN_SLOTS,
    # Nor are adapters added that are not in his batch.
    "one-each": OWN_SLOTS,
    "other-slots": OWN_SLOTS,
    # Who has no requests at all throws all adapters away.
    "idle": OWN_SLOTS,
    "tp2": [(">=0.21", ASSERTION)],  # sequence parallel, which this means
}
SEQUENCE_PARALLEL = (
    r"NotImplementedError: \S+: with --data-parallel-size 2 --tensor-parallel-size and .*"
)
REFUSED = (
    r"NotImplementedError: \S+: with --data-parallel-size 2 its experts compute .*"
    r"Start 2 servers without data parallelism, .* or without --enable-lora\. If no adapter .*"
)


def verdict(name, found):
    """One of the words, or the error's text."""
    if "error" in found:
        return found["error"]
    looked_at = 1 if name.endswith("-idle") else 2
    off, moved = max(found["off"][:looked_at]), max(found["moved"][:looked_at])
    assert moved > 0.3 or name.endswith(("-without", "-base"))
    if off <= LIMIT:
        return FINE
    assert off > 0.1
    return WRONG


@pytest.mark.parametrize(
    ("release", "name"), [(r, case.name) for r in unpacked.available() for case in cases(r)]
)
def test_tokens_of_several_batches(release, name):
    found = unpacked.results(release, "dispatched_experts.py")
    assert found["status"]["parallel-experts"] == "on"
    bare, ours = found["bare"][name], found["ours"][name]
    kind = name.partition("-")[2]
    want = next((w for where, w in ALONE[kind] if release in SpecifierSet(where)), FINE)
    assert re.fullmatch(want, verdict(name, bare), re.DOTALL), bare
    want = FINE if kind == "without" or release in SpecifierSet(">=0.30") else REFUSED
    if kind == "tp2" and want == FINE:
        want = SEQUENCE_PARALLEL
    assert re.fullmatch(want, verdict(name, ours), re.DOTALL), ours
