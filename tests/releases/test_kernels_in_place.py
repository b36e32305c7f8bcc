"""Our Triton kernels under each release's own layers, experts and `PunicaWrapperGPU`.

In Triton's interpreter, on CPU tensors: kernels_in_place.py, which these tests run once a release.
"""

from __future__ import annotations

import pytest
import unpacked
from kernel_cases import CASES, REFUSED, TAIL, TAILLESS
from packaging.specifiers import SpecifierSet

pytest.importorskip("triton")
RELEASES = [r for r in unpacked.available() if r in SpecifierSet(">=0.28,<0.34")]
# How far answers are from loops in fp32, by what the layer computes in.
LIMIT, LIMIT_FP16, LIMIT_BF16 = 1e-5, 0.004, 0.03
OTHER = {
    "bf16": LIMIT_BF16,
    "fp16, int64 ids": LIMIT_FP16,
    "Marlin": LIMIT_FP16,
    "INT4 in Triton": LIMIT_FP16,
}
EXPERTS = {"Marlin": "MarlinExperts", "INT4 in Triton": "TritonWNA16Experts"}


def result(release, name):
    found = unpacked.results(release, "kernels_in_place.py")
    assert found["status"]["moe-kernels"] == "on", found["status"]
    assert "error" not in found["cases"][name], found["cases"][name]
    return found["cases"][name]


def _right(found, name):
    """Demand the loops' numbers; returns their limit."""
    limit = OTHER.get(name.removeprefix("tail, "), LIMIT)
    assert found["off"] <= limit
    assert found["ranks"] is True
    return limit


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", CASES)
def test_ours_is_the_loops(release, name):
    found = result(release, name)
    assert found["experts"] == EXPERTS.get(name, "TritonExperts")
    limit = _right(found, name)
    if name == "no adapter in the batch":
        assert found["calls"] == [0, 0], "nothing is launched for base tokens alone"
        return
    assert found["calls"] == [2, 0], "two calls of ours, none of upstream's"
    assert found["moved"] > 20 * limit


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", REFUSED)
def test_upstream_runs_where_ours_cannot_or_is_not_wanted(release, name):
    found = result(release, name)
    assert (found["calls"], found["tails"]) == ([0, 2], 0)
    # Upstream's are counted, not run: what is left is the base's answer.
    assert abs(found["off"] - found["moved"]) < LIMIT


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", TAIL)
def test_lora_is_the_tail_of_the_base(release, name):
    found = result(release, name)
    limit = _right(found, name)
    assert found["calls"] == [0, 0]
    assert (found["tails"], found["base"]) == (2, 0), (
        "both products are ours, also where no token has an adapter"
    )
    if "no adapter" not in name:
        assert found["moved"] > 20 * limit


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", TAILLESS)
def test_where_there_is_no_tail_ours_comes_after(release, name):
    found = result(release, name)
    _right(found, name)
    assert (found["calls"], found["tails"]) == ([2, 0], 0)


@pytest.mark.parametrize("release", RELEASES)
def test_factors_are_in_pages_where_ours_serve(release):
    for name in [*CASES, *TAIL, *TAILLESS]:
        assert result(release, name)["pages"], name
    for name in REFUSED:
        assert not result(release, name)["pages"], name


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_factors_in_pages_give_the_same_bits(release):
    """vLLM's own `set_lora` and `reset_lora` write the pages; the answer is that of dense slots."""
    paged = unpacked.results(release, "kernels_in_place.py")["cases"]
    env = {"MOE_LORA_DENSE": "1", "TRITON_INTERPRET": "1"}
    dense = unpacked.asked(str(unpacked.tree(release)), "kernels_in_place.py", **env)
    assert isinstance(dense, dict), dense
    for name in [*CASES, *TAIL, *TAILLESS]:
        own, whole = dict(paged[name]), dict(dense["cases"][name])
        assert "error" not in own | whole, (name, own, whole)
        assert (own.pop("pages"), whole.pop("pages")) == (True, False), name
        assert own == whole, name
