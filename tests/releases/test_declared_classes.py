"""The classes of models/rows.py in the releases that are here: each is set and not changed."""

from __future__ import annotations

import pytest
import unpacked
from packaging.version import Version

# With which release each class came.
SINCE = {
    "AriaForConditionalGeneration": "0.11.1",
    "KimiVLForConditionalGeneration": "0.11.1",
    "MiMoV2FlashForCausalLM": "0.14",
    "KimiK25ForConditionalGeneration": "0.15",
    "Step3p5ForCausalLM": "0.15.1",
    "BailingMoeV25ForCausalLM": "0.20",
    "Cohere2MoeForCausalLM": "0.21",
    "MiMoV2ForCausalLM": "0.21",
    "Step3p7ForConditionalGeneration": "0.23",
    "BailingMoeV3ForCausalLM": "0.28",
}


@pytest.mark.long
@pytest.mark.parametrize("release", unpacked.available())
def test_rows(release):
    told = unpacked.results(release, "declared_classes.py")
    found = told["found"]
    print(release, found, told["failed"])
    for name, since in SINCE.items():
        if Version(release) >= Version(since):
            assert found.get(name) == "declared", f"{name}: {told['failed']}"
    assert found["GptOssForCausalLM"] == "upstream's"
    assert found["DbrxForCausalLM"].startswith("DbrxForCausalLM does not support LoRA: its exp")
    if Version(release) < Version("0.25"):  # without `repair.expert_mapping`
        assert "'get_expert_mapping' must be implemented" in told["granite"]
    if release == "0.33.0":  # before weights are read
        flint, beam = told["early"]
        assert "LoRA is not supported for FlintForCausalLM" in flint
        assert "The reason: its MoE layers have kernels of their own" in flint
        assert "LoRA is not supported for BeamForCausalLM" in beam
        assert "The reason" not in beam
