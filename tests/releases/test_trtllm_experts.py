"""TRT-LLM's experts with LoRA, vLLM's choice on Blackwell: what releases do alone, and with us.

Layers, managers, wrappers, the choice of a backend, weights' conversion and experts are each
release's own; FlashInfer's operators are loops, and so are Punica's kernels, or they are ours in
Triton's interpreter (trtllm_experts.py). Nothing of this was run on such a GPU.
"""

from __future__ import annotations

import re

import pytest
import unpacked
from packaging.specifiers import SpecifierSet
from test_quantised_experts import ASSERTION, BASE_WRONG, FINE, WRONG

pytest.importorskip("triton")
RELEASES = [r for r in unpacked.available() if r in SpecifierSet(">=0.26,<0.34")]
# Factors, deltas and activations are rounded to bf16; an adapter moves answers by half and more.
LIMIT = 0.015
ALWAYS = ">=0.26"
RANKS = "ValueError: The experts of .* have different LoRA ranks for the same .*"
UNEVEN = [("<0.33", "RuntimeError: shape .* is invalid.*"), (ALWAYS, BASE_WRONG)]
# What each release does without us; the first range that holds, else fine.
ALONE = {
    "two slices": [],
    "two slices, tp2": [],
    "two slices, ep2": [],
    "two slices, ep3 uneven": [(ALWAYS, BASE_WRONG)],
    "two slices, ep2 round robin": [(ALWAYS, BASE_WRONG)],
    "ranks of their own": [("<0.32", ASSERTION), (ALWAYS, RANKS)],
    "mixed format": [],
    "shared factors": [(ALWAYS, "ValueError: While loading .*, expected target modules .*")],
    "Llama-4": [(ALWAYS, BASE_WRONG)],
    "one slice": [(ALWAYS, WRONG)],
    "one slice, tp2": [(ALWAYS, WRONG)],
    "one slice, ep3 uneven": UNEVEN,
    "gpt-oss in bf16": [("<0.28", BASE_WRONG)],
    "MXFP4, two slices": [],
    "MXFP4, one slice": [],
    "MXFP4, one slice, ep3 uneven": UNEVEN,
    "MXFP4, gpt-oss": [],
    "MXFP4, gpt-oss, tp2": [],
    "MXFP4, gpt-oss, ep3 uneven": UNEVEN,
    "MXFP4, gpt-oss, mixed format": [],
    "MXFP4, gpt-oss, wider": [],
}
CASES = [(r, n) for r in RELEASES for n in ALONE if r in SpecifierSet(">=0.33") or n[0] != "M"]


def experts(name):
    """What is to compute a case."""
    if name == "gpt-oss in bf16":
        return "TritonExperts"
    return "TrtLlmMxfp4LoRAExperts" if name[0] == "M" else "TrtLlmBf16LoRAExperts"


def ranks(name):
    return int((re.findall(r"[te]p(\d)", name) or [1])[0])


def verdict(found):
    """One of the words, or the error's text."""
    if "error" in found:
        return found["error"]
    assert found["moved"] > 20 * LIMIT
    if found["base_off"] > LIMIT:
        assert found["base_off"] > 3 * LIMIT
        return BASE_WRONG
    if found["off"] <= LIMIT:
        return FINE
    assert found["off"] > 10 * LIMIT
    return WRONG


def results(release, who):
    found = unpacked.results(release, "trtllm_experts.py")
    assert found["status"]["parallel-experts"] == found["status"]["gpu-experts"] == "on"
    return found[who]


@pytest.mark.parametrize(("release", "name"), CASES)
def test_alone(release, name):
    want = (what for where, what in ALONE[name] if release in SpecifierSet(where))
    found = results(release, "bare")[name]
    assert re.fullmatch(next(want, FINE), verdict(found), re.DOTALL), found


# Before 0.28 our kernels do not stand in for Punica's.
WHO = [(*case, who) for case in CASES for who in ("ours", "kernels")]


@pytest.mark.parametrize(
    ("release", "name", "who"),
    [one for one in WHO if one[2] == "ours" or one[0] in SpecifierSet(">=0.28")],
)
def test_with_us(release, name, who):
    found = results(release, who)[name]
    assert verdict(found) == FINE, found
    assert found["experts"] == experts(name)
    # In the batch of base tokens there is nothing to add.
    assert found["deltas"] == (0 if found["experts"] == "TritonExperts" else ranks(name))
    assert found["calls"] == (2 * ranks(name) if who == "kernels" else 0), "calls of our kernels"


@pytest.mark.parametrize("release", RELEASES)
def test_gathered_tokens_have_adapters_of_their_own(release):
    """The experts are asked whether nobody has an adapter: in the batch; where others' came, too"""
    for who, want in (("bare", [True, True]), ("ours", [True, False])):
        assert results(release, who)["two slices"]["flags"] == want, who
