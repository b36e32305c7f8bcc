"""The classes of models/rows.py in the releases that are here: each is set and not changed."""

from __future__ import annotations

import pytest
import unpacked

# With which release each class came, of those that import here without a GPU's packages.
SINCE = {
    "KimiVLForConditionalGeneration": (0, 11),
    "KimiK25ForConditionalGeneration": (0, 15),
    "Step3p5ForCausalLM": (0, 16),
    "MiMoV2FlashForCausalLM": (0, 14),
    "Cohere2MoeForCausalLM": (0, 21),
}


@pytest.mark.parametrize("release", unpacked.available())
def test_rows(release):
    told = unpacked.results(release, "declared_classes.py")
    here = tuple(map(int, release.split(".")[:2]))
    found = told["found"]
    print(release, found, told["failed"])
    for name, since in SINCE.items():
        if here >= since:
            assert found.get(name) == "declared", f"{name}: {told['failed']}"
    assert found["DbrxForCausalLM"].startswith("DbrxForCausalLM does not support LoRA: its exp")


@pytest.mark.skipif("0.33.0" not in unpacked.available(), reason="want 0.33.0: ci/trees.py 0.33.0")
def test_the_check_before_weights_are_read():
    flint, beam = unpacked.results("0.33.0", "declared_classes.py")["early"]
    assert "LoRA is not supported for FlintForCausalLM" in flint
    assert "The reason: its MoE layers have kernels of their own" in flint
    assert "LoRA is not supported for BeamForCausalLM" in beam
    assert "The reason" not in beam
