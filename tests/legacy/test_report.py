"""The first report: `FusedMoEWithLoRA` over INT4 layers of the real release, without and with us.

Only the choice of kernel is tested; test_int4_numbers.py computes with it.
"""

from __future__ import annotations

import pytest
import quantised
import torch

pytestmark = pytest.mark.legacy


@pytest.fixture(scope="module", autouse=True)
def groups():
    with quantised.parallel():
        yield


EXPECTED = {
    "gptq": "MarlinExperts",
    "awq": "MarlinExperts",
    "ct": "MarlinExperts",
    "ct-triton": "TritonExperts",
    "moe_wna16": "TritonExperts",
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_wrapping_a_quantised_layer(kind, ours, monkeypatch):
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

    layer = quantised.layer(kind, monkeypatch)
    for which in ("w13", "w2"):  # what only exists after loading on CUDA
        for name in ("g_idx_sort_indices", "g_idx"):
            if not hasattr(layer, f"{which}_{name}"):
                setattr(
                    layer, f"{which}_{name}", torch.empty(quantised.EXPERTS, 0, dtype=torch.int32)
                )
    if not ours:
        with pytest.raises(
            AttributeError, match="'SharedFusedMoE' object has no attribute 'w2_weight'"
        ):
            FusedMoEWithLoRA(layer)
        return
    quantised.on_a_gpu(monkeypatch)
    wrapper = FusedMoEWithLoRA(layer)
    assert wrapper.device == layer.w13_weight.device
    method = layer.quant_method
    assert type(method).__name__ == "FusedMoEModularMethod"
    experts = method.fused_experts.fused_experts
    assert type(experts).__name__ == EXPECTED[kind]
    config = experts.quant_config
    assert config.use_int4_w4a16
    assert not config.use_mxfp4_w4a16
    assert config.block_shape == [0, quantised.GROUP]
    scales = getattr(layer, "w13_scales", None)
    assert config.w1_scale is (layer.w13_weight_scale if scales is None else scales)
    assert (config.w1_zp is not None) == (kind == "awq")
    if kind == "awq":
        from vllm.scalar_type import scalar_types

        assert experts.quant_type_id == scalar_types.uint4.id
    packed = next(
        getattr(layer, name)
        for name in ("w13_qweight", "w13_weight_packed")
        if hasattr(layer, name)
    )
    assert layer.w13_weight is packed
    for name in ("activation", "moe_sum"):
        assert name in vars(experts), "upstream's decorators are on these experts"


def test_unknown_weights_are_refused_with_a_cure():
    from vllm_moe_lora.layers.quantised.weight_names import alias_weights

    layer = torch.nn.Module()
    layer.w13_qweight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"w2_weight_packed.*without --enable-lora"):
        alias_weights(layer)
