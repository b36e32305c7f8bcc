"""Copies of experts for one call of `apply`: their calls, and that the originals do not change."""

from __future__ import annotations

import types

import torch

from vllm_moe_lora.layers.quantised import lora_context, unquantised_tokens

TOKENS, TOP_K = 3, 2


class Experts:
    """Records the calls that `apply` of vLLM's experts makes."""

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


def test_without_a_context_there_is_no_copy():
    experts = Experts(None)
    assert lora_context.adding_lora(experts, *_given()) is experts


def test_lora_is_added_before_activation_and_sum():
    experts, given = Experts("context"), _given()
    before = dict(vars(experts))
    copy = lora_context.adding_lora(experts, *given)
    out = torch.zeros(TOKENS * TOP_K, 4)
    copy.activation("silu", out, torch.zeros(TOKENS * TOP_K, 8), clamp_limit=7)
    copy.moe_sum("products", "answer", "ids", "map")
    assert vars(experts) == before, "another batch may run through them at the same time"
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


def test_which_experts_need_unquantised_tokens():
    assert unquantised_tokens.needed(_quantising())
    assert unquantised_tokens.needed(_quantising(quant_dtype=torch.int8))
    assert not unquantised_tokens.needed(_quantising(_lora_context=None))
    assert not unquantised_tokens.needed(_quantising(quant_dtype=None))
    assert not unquantised_tokens.needed(_quantising(quant_dtype="nvfp4"))
    assert not unquantised_tokens.needed(_quantising(quantization_emulation=True))
    mixed = types.SimpleNamespace(ocp_mx_scheme="w_mxfp4_a_fp8")
    assert not unquantised_tokens.needed(_quantising(quant_config=mixed))


def test_quantised_tokens_are_kept():
    experts, tokens = _quantising(), torch.ones(2, 4)
    scale = torch.ones(1)
    assert unquantised_tokens.quantise(experts, tokens, scale) == (experts, tokens, scale)
