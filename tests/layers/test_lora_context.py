"""Experts for one call of `apply`: what is passed on, and that the experts themselves stay."""

from __future__ import annotations

import types

import torch

from vllm_moe_lora.layers.quantised import lora_context, unquantised_tokens

TOKENS, TOP_K = 3, 2


class Experts:
    """Notes its calls, as vLLM's experts are called by `apply`."""

    def __init__(self, context):
        self._lora_context, self.calls = context, []

    def apply_w13_lora(self, context, **given):
        self.calls.append(("w13", given))
        return "sorted", "experts", "padded", "mapping"

    def apply_w2_lora(self, context, **given):
        self.calls.append(("w2", given))

    def activation(self, kind, output, input, **options):
        self.calls.append(("activation", options))

    def moe_sum(self, input, output, *rest):
        self.calls.append(("sum", rest))


def _given():
    ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int32)
    return torch.ones(TOKENS, 8), "w1", "w2", torch.ones(TOKENS, TOP_K), ids, None


def test_without_a_context_they_are_themselves():
    experts = Experts(None)
    assert lora_context.consuming(experts, *_given()) is experts


def test_factors_are_added_at_the_two_places():
    experts, given = Experts("context"), _given()
    held = dict(vars(experts))
    once = lora_context.consuming(experts, *given)
    out = torch.zeros(TOKENS * TOP_K, 4)
    once.activation("silu", out, torch.zeros(TOKENS * TOP_K, 8), clamp_limit=7)
    once.moe_sum("products", "answer", "ids", "map")
    assert vars(experts) == held, "another batch may be on its way through them"
    (_, w13), activation, (_, w2), total = experts.calls
    assert w13["y"].shape == (TOKENS, TOP_K, 8)
    assert w13["x"] is given[0]
    assert activation == ("activation", {"clamp_limit": 7})
    assert w2["x"] is out
    assert (w2["sorted_token_ids_lora"], w2["expert_ids_lora"]) == ("sorted", "experts")
    assert w2["num_tokens_post_padded_lora"] == "padded"
    assert w2["token_lora_mapping"] == "mapping"
    assert total == ("sum", ("ids", "map"))


def _quantising(**more):
    config = types.SimpleNamespace(ocp_mx_scheme=None)
    known = {"_lora_context": "context", "quant_dtype": torch.float8_e4m3fn, "quant_config": config}
    return types.SimpleNamespace(**{**known, **more})


def test_which_experts_want_tokens_as_they_were():
    assert unquantised_tokens.wanted(_quantising())
    assert unquantised_tokens.wanted(_quantising(quant_dtype=torch.int8))
    assert not unquantised_tokens.wanted(_quantising(_lora_context=None))
    assert not unquantised_tokens.wanted(_quantising(quant_dtype=None))
    assert not unquantised_tokens.wanted(_quantising(quant_dtype="nvfp4"))
    assert not unquantised_tokens.wanted(_quantising(quantization_emulation=True))
    mixed = types.SimpleNamespace(ocp_mx_scheme="w_mxfp4_a_fp8")
    assert not unquantised_tokens.wanted(_quantising(quant_config=mixed))


def test_tokens_that_came_quantised_are_left():
    experts, tokens = _quantising(), torch.ones(2, 4)
    scale = torch.ones(1)
    assert unquantised_tokens.quantised(experts, tokens, scale) == (experts, tokens, scale)
