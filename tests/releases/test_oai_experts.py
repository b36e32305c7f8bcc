"""gpt-oss' MXFP4 experts in Triton with LoRA: what vLLM does alone, and with us.

The layers, methods, wrappers, experts and kernels are each release's own; the package
`triton_kernels` and the GPU's operators are loops (`oai.py`). With us every answer is that of fp32
loops over the whole layer with the adapter; from 0.28 on also with our Triton kernels, interpreted.
"""

from __future__ import annotations

import re

import pytest
import unpacked
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from test_quantised_experts import ASSERTION, BASE_WRONG, FINE, WRONG

# bf16 between the products; an adapter moves answers by more than 0.8.
LIMIT = 0.02
# The package's generation that comes with a release, and the others that it takes.
PACKAGES = [("<0.17", ("3.5.1",)), ("<0.22", ("3.6",)), ("<0.31", ("3.5.1",))]
LATER = ("3.5.1", "3.8")
# What each release does without us; the first range that holds, else fine.
BY_EXPERT = [("<0.14", WRONG), ("<0.15", FINE), ("<0.17", ASSERTION)]
ALONE = {
    ("fused", "3.5.1"): BY_EXPERT,
    ("fused", "3.8"): [(">=0.31", WRONG)],
    ("slices", "3.5.1"): [("<0.32", WRONG)],  # as if gate and up lay one behind the other
    ("slices", "3.8"): [(">=0.31", WRONG)],
    # Rows of another rank's experts are not written, and summed.
    ("ranks", "3.5.1"): [("<0.25", BASE_WRONG)],
    ("ranks", "3.6"): [("<0.25", BASE_WRONG)],
    ("ranks", "3.8"): [(">=0.31", WRONG)],
}
SINCE = {"fused": "0.12", "slices": "0.22", "ranks": "0.21"}


def packages(release):
    return next((names for where, names in PACKAGES if release in SpecifierSet(where)), LATER)


CASES = [
    (release, package, case)
    for release in unpacked.available()
    for package in packages(release)
    for case, since in SINCE.items()
    if Version(release) >= Version(since)
]


def verdict(found):
    """One of the words, or the error's text."""
    if "error" in found:
        return found["error"]
    assert found["moved"] > 0.8
    if found["base_off"] > LIMIT:
        assert found["base_off"] > 0.5
        return BASE_WRONG
    if found["off"] <= LIMIT:
        return FINE
    assert found["off"] > 0.5
    return WRONG


@pytest.mark.parametrize(("release", "package", "case"), CASES)
def test_the_answer_is_that_of_loops(release, package, case):
    found = unpacked.results(release, "oai_experts.py", package)
    for feature in ("gpu-experts", "parallel-experts", "quantised-experts"):
        assert found["status"][feature] == "on"
    ranges = ALONE.get((case, package), ())
    alone = next((what for where, what in ranges if release in SpecifierSet(where)), FINE)
    assert re.fullmatch(alone, verdict(found["bare"][case])), found["bare"][case]
    assert verdict(found["ours"][case]) == FINE, found["ours"][case]
    assert found["ours"][case]["calls"] == 0
    if "kernels" in found:
        assert verdict(found["kernels"][case]) == FINE, found["kernels"][case]
        assert found["kernels"][case]["calls"] == 2
    else:
        assert Version(release) < Version("0.28")
