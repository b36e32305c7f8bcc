"""The classes of models/rows.py in the releases that are here: each is set and not changed."""

from __future__ import annotations

import pytest
import unpacked
from packaging.version import Version

# With which release each class came, and which is the first that declares it.
BETWEEN = {
    "AriaForConditionalGeneration": ("0.11.1", "1"),
    "KimiVLForConditionalGeneration": ("0.11.1", "1"),
    "Step3TextForCausalLM": ("0.11.1", "1"),
    "Step3VLForConditionalGeneration": ("0.11.1", "1"),
    "MiniMaxM2ForCausalLM": ("0.11.1", "0.15"),
    "Qwen3OmniMoeThinkerForConditionalGeneration": ("0.11.1", "0.29"),
    "MiMoV2FlashForCausalLM": ("0.14", "1"),
    "KimiK25ForConditionalGeneration": ("0.15", "1"),
    "Step3p5ForCausalLM": ("0.15.1", "1"),
    "BailingMoeV25ForCausalLM": ("0.17", "1"),
    "Cohere2MoeForCausalLM": ("0.21", "1"),
    "MiMoV2ForCausalLM": ("0.21", "1"),
    "MiMoV2OmniForCausalLM": ("0.21", "1"),
    "Step3p7ForConditionalGeneration": ("0.23", "1"),
    "BailingMoeV3ForCausalLM": ("0.28", "1"),
    "BailingMoeV3VLForConditionalGeneration": ("0.30", "1"),
}
# Classes that are refused with a reason; others need a GPU to be imported.
REFUSED = {
    "ArcticForCausalLM": ("0.11.1", "0.29"),
    "DbrxForCausalLM": ("0.11.1", "1"),
    "KimiLinearForCausalLM": ("0.11.1", "0.27"),
    "Moondream3ForCausalLM": ("0.21", "1"),
}


def those(table, release):
    """The names in ``table`` whose row is for a release."""
    here = Version(release)
    return {n for n, (first, end) in table.items() if Version(first) <= here < Version(end)}


@pytest.mark.long
@pytest.mark.parametrize("release", unpacked.available())
def test_rows(release):
    told = unpacked.results(release, "declared_classes.py")
    found = told["found"]
    print(release, found, told["failed"])
    for name in those(BETWEEN, release):
        assert found.get(name) == "declared", f"{name}: {told['failed']}"
    for name in those(REFUSED, release):
        assert found[name].startswith(f"{name} does not support LoRA: "), name
    assert found["GptOssForCausalLM"] == "upstream's"
    if Version(release) < Version("0.25"):  # without `repair.expert_mapping`
        assert "'get_expert_mapping' must be implemented" in told["granite"]
    if release == "0.33.0":  # before weights are read
        flint, beam, kimi, other = told["early"]
        assert "LoRA is not supported for FlintForCausalLM" in flint
        assert "The reason: its MoE layers have kernels of their own" in flint
        assert "The reason: its attention reads the weight of the merged q, k, v" in beam
        assert "The reason: its linear attention merges projections" in kimi  # not the row's name
        assert "LoRA is not supported for MiniMaxText01ForCausalLM" in other
        assert "The reason" not in other
