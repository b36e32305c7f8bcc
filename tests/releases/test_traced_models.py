"""What torch.compile would trace on a GPU, in every release: no function of ours that has tensors.

A simulation: traced_models.py lets Dynamo trace a release's own model, and runs nothing.
"""

from __future__ import annotations

import pytest
import unpacked

from vllm_moe_lora.tiny import models

pytest.importorskip("triton")
RELEASES = unpacked.available()
MODELS = ["qwen2_moe", "qwen3_moe"]
LAYERS = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    return [str(models.build(name, folder / name)) for name in MODELS]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("release", RELEASES)
def test_the_moe_layer_is_opaque(made, release, model):
    """One graph; experts are vLLM's operator, dense LoRA is punica's; nothing of ours is inside."""
    found = unpacked.results(release, "traced_models.py", *made)
    assert found["status"]["shared-experts"] == "on", found["status"]
    found = found["models"][model]
    assert "error" not in found, found
    calls = {name.removeprefix("vllm."): n for name, n in found["operators"].items()}
    experts = sum(n for name, n in calls.items() if name.startswith("moe_forward"))
    assert experts == LAYERS
    embeddings = found["layers"].get("VocabParallelEmbeddingWithLoRA", 0)
    assert calls["lora_shrink"] >= 2 * LAYERS, "attention at least"
    assert calls["lora_expand"] == calls["lora_shrink"] + embeddings
    assert found["ours"] == []
