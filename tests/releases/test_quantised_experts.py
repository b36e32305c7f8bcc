"""Quantised layers of every release under `FusedMoEWithLoRA`: what vLLM does alone, and with us.

The layers, methods, experts and kernels are each release's own; only the GPU's operators are
replaced, by loops (`int4.py`, `fp8.py`, `mxfp8.py`). With us every answer is a loop's in fp32.
"""

from __future__ import annotations

import re

import pytest
import unpacked
from packaging.specifiers import SpecifierSet
from packaging.version import Version

RELEASES = [r for r in unpacked.available() if Version(r) >= Version("0.12")]
FINE, IGNORED, BASE_WRONG, WRONG = "fine", "ignored", "base wrong", "wrong"
ASSERTION = r"AssertionError: "
UNTAUGHT = r"NotImplementedError: \w+ must select appropriate gemm implementation.*"
UNTAUGHT_LATER = r"ValueError: \w+ uses the new modular kernel initialization logic.*"
NAMES = r"AttributeError: '(FusedMoE|RoutedExperts)' object has no attribute 'w13_weight'"
_MOE_WNA16 = [
    ("<0.17", UNTAUGHT),
    (">=0.17,<0.27", UNTAUGHT_LATER),
    (">=0.27", IGNORED),
]
# What each release does without us, on a GPU; the first range that holds.
ALONE = {
    "gptq": [("<0.13", UNTAUGHT), ("<0.16", FINE), ("<0.20", ASSERTION), ("<0.25", NAMES)],
    "awq": [
        ("<0.13", UNTAUGHT),
        ("<0.16", BASE_WRONG),
        ("<0.20", ASSERTION),
        ("<0.22", BASE_WRONG),
    ],
    "ct": [("<0.16", FINE), ("<0.20", ASSERTION)],
    "ct-triton": [("<0.14", UNTAUGHT), ("<0.20", FINE), (">=0.20", IGNORED)],
    "moe_wna16": _MOE_WNA16,
    "moe_wna16-awq": _MOE_WNA16,
    "moe_wna16-8": [(">=0.27,<0.29", ASSERTION), *_MOE_WNA16],
}
# With or without LoRA: there vLLM takes no 8 bits with groups.
STILL = {"moe_wna16-8": SpecifierSet(">=0.27,<0.29")}
# fp16 against fp32 over 64 numbers, tokens in FP8 against fp32: an adapter moves answers by more.
LIMIT, LIMIT_FP8 = 0.004, 0.1


def verdict(found, limit=LIMIT):
    """One of the words above, or the error's text."""
    if "error" in found:
        return found["error"]
    assert found["moved"] > (20 if limit == LIMIT else 4) * limit
    if found["base_off"] > limit:
        assert found["base_off"] > 10 * limit
        return BASE_WRONG
    if found["off"] <= limit:
        return FINE
    return IGNORED if abs(found["off"] - found["moved"]) < limit else WRONG


def expected(kind, release):
    for releases, what in ALONE[kind]:
        if release in SpecifierSet(releases):
            return what
    return FINE


def results(release):
    found = unpacked.results(release, "quantised_experts.py")
    assert found["status"]["quantised-experts"] == "on"
    return found["bare"], found["ours"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", ALONE)
def test_int4(release, kind):
    bare, ours = results(release)
    want = expected(kind, release)
    assert re.fullmatch(want, verdict(bare[kind])), bare[kind]
    still = kind in STILL and release in STILL[kind]
    assert verdict(ours[kind]) == (ASSERTION if still else FINE), ours[kind]


@pytest.mark.parametrize("release", [r for r in RELEASES if r in SpecifierSet(">=0.20,<0.25")])
def test_fp8(release):
    bare, ours = results(release)
    want = FINE if Version(release) >= Version("0.24") else WRONG
    assert verdict(bare["fp8"], LIMIT_FP8) == want, bare["fp8"]
    assert verdict(ours["fp8"], LIMIT_FP8) == FINE, ours["fp8"]


@pytest.mark.parametrize("release", [r for r in RELEASES if r in SpecifierSet(">=0.24")])
def test_native_mxfp8(release):
    bare, ours = results(release)
    assert verdict(bare["mxfp8"], LIMIT_FP8) == IGNORED, bare["mxfp8"]
    assert verdict(ours["mxfp8"], LIMIT_FP8) == FINE, ours["mxfp8"]
    assert ours["mxfp8"]["experts"] == "Mxfp8NativeTritonExperts"


@pytest.mark.parametrize(
    ("release", "kind"),
    [
        *((r, "moe_wna16-other") for r in RELEASES if Version(r) < Version("0.27")),
        *((r, "moe_wna16-strange") for r in RELEASES if Version(r) < Version("0.20")),
    ],
)
def test_what_takes_no_lora_is_refused_with_where_and_cure(release, kind):
    bare, ours = results(release)
    assert not re.search("--enable-lora", verdict(bare[kind]))
    if kind == "moe_wna16-strange":
        assert verdict(bare[kind]) == ASSERTION
    assert re.fullmatch(
        r"NotImplementedError: model\.layers\.\d+\.mlp\.experts: this vLLM release has no experts "
        r"for OtherMoEMethod that support LoRA \(.+\)\. .* without --enable-lora\.",
        verdict(ours[kind]),
    )
