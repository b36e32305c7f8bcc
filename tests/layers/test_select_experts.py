"""Errors for layers without LoRA experts name layer and cure. With real layers: tests/releases."""

from __future__ import annotations

import types

import pytest

from vllm_moe_lora.layers.quantised import select_experts


class SomeMoEMethod:
    moe_quant_config = "set"
    moe = types.SimpleNamespace(is_lora_enabled=True)


def _layer(inside=False):
    layer = types.SimpleNamespace(quant_method=SomeMoEMethod(), layer_name="model.layers.3.experts")
    return types.SimpleNamespace(routed_experts=layer) if inside else layer


@pytest.mark.parametrize("inside", [False, True], ids=["layer", "runner"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), "an assertion on their class failed"),
        (NotImplementedError("LoRA is not supported for MXFP8 MoE."), "not supported for MXFP8"),
        (ValueError("SomeMoEMethod uses the new logic"), "uses the new logic"),
    ],
)
def test_errors_of_upstream_get_layer_and_cure(inside, error, said):
    with (
        pytest.raises(NotImplementedError, match=said) as found,
        select_experts.explained(_layer(inside)),
    ):
        raise error
    text = str(found.value)
    assert text.startswith("model.layers.3.experts: ")
    assert "SomeMoEMethod" in text
    assert text.endswith("or without --enable-lora.")
    assert found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("serve a 4-bit checkpoint, or without --enable-lora."),
        RuntimeError("out of memory"),
    ],
)
def test_errors_with_a_cure_and_other_errors_pass(error):
    with pytest.raises(type(error)) as found, select_experts.explained(_layer()):
        raise error
    assert found.value is error


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Monolithic kernels are not supported for Fused MoE LoRA."),
        RuntimeError("Old-style modular kernel not supported."),
    ],
)
def test_errors_with_a_reason_get_the_flag(error):
    layer = _layer()
    layer.moe_config = types.SimpleNamespace(moe_backend="flashinfer_trtllm")
    with pytest.raises(NotImplementedError) as found, select_experts.explained(layer):
        raise error
    text = str(found.value)
    assert text.startswith("model.layers.3.experts: ")
    assert str(error).rstrip(".") in text
    assert "--lora-target-modules" in text
    assert "--moe-backend flashinfer_trtllm" in text


def test_an_unknown_method_gets_upstreams_experts():
    method = SomeMoEMethod()
    assert select_experts.make_experts(method, _layer(), lambda: "upstream") == "upstream"


def test_without_lora_a_known_method_gets_upstreams_experts():
    method = type("MoeWNA16Method", (), {"moe": types.SimpleNamespace(is_lora_enabled=False)})()
    assert select_experts.make_experts(method, _layer(), lambda: "upstream") == "upstream"


def test_existing_names_are_kept():
    routed = _layer()
    routed.w13_weight, routed.w13_qweight, routed.w2_weight_packed = "own", "packed", "packed 2"
    select_experts.prepare(routed)
    assert (routed.w13_weight, routed.w2_weight) == ("own", "packed 2")
