"""How a layer's experts are built. With real layers: tests/releases/test_untargeted_experts.py."""

from __future__ import annotations

import types

import pytest

from vllm_moe_lora.layers import without_lora

config_module = pytest.importorskip("vllm.config", reason="asks vLLM; vLLM is not installed")
LAYER = "model.layers.0.mlp.experts"


class Layer:
    """``fails``: "with LoRA", "without LoRA", "always" or "never"."""

    def __init__(self, monkeypatch, fails="never", targets=None, lora=True):
        self.lora = types.SimpleNamespace(target_modules=targets) if lora else None
        self.config = types.SimpleNamespace(lora_config=self.lora, additional_config={})
        self.moe = types.SimpleNamespace(is_lora_enabled=lora)
        self.fails, self.seen = fails, []
        monkeypatch.setattr(config_module, "get_current_vllm_config", lambda: self.config)

    def build(self):
        with_lora = self.config.lora_config is not None
        assert with_lora == self.moe.is_lora_enabled
        self.seen.append(with_lora)
        if self.fails in ("always", "with LoRA" if with_lora else "without LoRA"):
            raise NotImplementedError("No backend supports the deployment configuration.")

    def make(self, layer=LAYER):
        without_lora.build_experts(layer, self.build, self.moe)


@pytest.mark.parametrize(
    ("targets", "lora", "layer", "seen"),
    [
        (None, True, LAYER, [True]),
        (["experts"], True, LAYER, [True]),
        (["q_proj"], True, LAYER, [False]),
        (["q_proj"], True, "", [True]),
        (None, False, LAYER, [False]),
    ],
)
def test_lora_is_off_where_no_adapter_may_target(monkeypatch, targets, lora, layer, seen):
    one = Layer(monkeypatch, targets=targets, lora=lora)
    one.make(layer)
    assert one.seen == seen
    assert one.config.lora_config is one.lora


def test_an_error_with_lora_only_names_the_flag(monkeypatch):
    one = Layer(monkeypatch, "with LoRA")
    with pytest.raises(NotImplementedError) as found:
        one.make()
    assert str(found.value).startswith(f"{LAYER}: No backend supports the deployment config")
    assert "--lora-target-modules" in str(found.value)
    Layer(monkeypatch, "with LoRA", targets=["q_proj"]).make()


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_an_error_without_lora_too_is_unchanged(monkeypatch, targets):
    one = Layer(monkeypatch, "always", targets=targets)
    with pytest.raises(NotImplementedError, match=r"^No backend") as found:
        one.make()
    assert "lora-target" not in str(found.value)
    assert one.config.lora_config is one.lora


def test_if_it_fails_without_lora_it_is_built_with_lora(monkeypatch):
    """Such as INT4 on a CPU without AMX."""
    one = Layer(monkeypatch, "without LoRA", targets=["q_proj"])
    one.make()
    assert one.seen == [False, True]
    assert one.moe.is_lora_enabled
