"""The first report: `FusedMoEWithLoRA` over INT4 layers of the real release, without and with us.

Only the choice of kernel is tested: the kernels themselves run on CUDA only.
"""

from __future__ import annotations

import os
import socket

import pytest
import release
import torch

pytestmark = release.ERA_A

EXPERTS, HIDDEN, INNER, GROUP = 8, 128, 128, 32
GPTQ = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
AWQ = {"bits": 4, "group_size": GROUP, "zero_point": True, "lm_head": False}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
    },
}


@pytest.fixture(scope="module", autouse=True)
def groups():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield


@pytest.fixture(params=[False, True], ids=["bare", "plugin"])
def ours(request):
    import vllm_moe_lora

    vllm_moe_lora.revert()
    if request.param:
        vllm_moe_lora.register()
    yield request.param
    vllm_moe_lora.revert()


def _method(kind):
    from vllm.model_executor.layers.quantization import (
        awq_marlin,
        gptq_marlin,
        moe_wna16,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors as ct,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors_moe as ct_moe,
    )

    if kind == "gptq":
        config = gptq_marlin.GPTQMarlinConfig.from_config({**GPTQ, "quant_method": "gptq"})
        return lambda layer: gptq_marlin.GPTQMarlinMoEMethod(config, layer.moe_config)
    if kind == "awq":
        config = awq_marlin.AWQMarlinConfig.from_config({**AWQ, "quant_method": "awq"})
        return lambda layer: awq_marlin.AWQMoEMethod(config, layer.moe_config)
    if kind == "moe_wna16":
        config = moe_wna16.MoeWNA16Config.from_config({**GPTQ, "quant_method": "gptq"})
        return lambda layer: moe_wna16.MoeWNA16Method(config, layer.moe_config)
    config = ct.CompressedTensorsConfig.from_config(CT)
    name = (
        "CompressedTensorsWNA16MarlinMoEMethod"
        if kind == "ct"
        else "CompressedTensorsWNA16MoEMethod"
    )
    return lambda layer: getattr(ct_moe, name)(config, layer.moe_config)


def _layer(kind, monkeypatch):
    from vllm.model_executor.layers.fused_moe import FusedMoE, SharedFusedMoE
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    quantization = "vllm.model_executor.layers.quantization"
    for name in (  # these ask which GPU this is
        "awq_marlin.verify_marlin_supported",
        "awq_marlin.marlin_make_workspace_new",
        "gptq_marlin.marlin_make_workspace_new",
    ):
        monkeypatch.setattr(f"{quantization}.{name}", lambda *args, **more: None)
    make = _method(kind)

    class Config(QuantizationConfig):
        """Gives the one method, on whatever machine this is."""

        def get_name(self):
            return kind

        def get_quant_method(self, layer, prefix):
            return make(layer)

    Config.__abstractmethods__ = frozenset()
    assert issubclass(SharedFusedMoE, FusedMoE)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return SharedFusedMoE(
            shared_experts=torch.nn.Identity(),
            num_experts=EXPERTS,
            top_k=2,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            params_dtype=torch.bfloat16,
            quant_config=Config(),
            prefix=f"model.layers.{len(_names)}.mlp.experts",
        )
    finally:
        torch.set_default_dtype(torch.float32)
        _names.append(kind)


_names: list[str] = []
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

    layer = _layer(kind, monkeypatch)
    for which in ("w13", "w2"):  # what only exists after loading on CUDA
        for name in ("g_idx_sort_indices", "g_idx"):
            if not hasattr(layer, f"{which}_{name}"):
                setattr(layer, f"{which}_{name}", torch.empty(EXPERTS, 0, dtype=torch.int32))
    if not ours:
        with pytest.raises(
            AttributeError, match="'SharedFusedMoE' object has no attribute 'w2_weight'"
        ):
            FusedMoEWithLoRA(layer)
        return
    # The kernels are not run here; the wrapper is to think that it is on a GPU.
    monkeypatch.setattr(
        "vllm_moe_lora.layers.era_a_cpu.install", lambda wrapper, layer: _on_a_gpu(wrapper, layer)
    )
    wrapper = FusedMoEWithLoRA(layer)
    assert wrapper.device == layer.w13_weight.device
    method = layer.quant_method
    assert type(method).__name__ == "FusedMoEModularMethod"
    experts = method.fused_experts.fused_experts
    assert type(experts).__name__ == EXPECTED[kind]
    config = experts.quant_config
    assert config.use_int4_w4a16
    assert not config.use_mxfp4_w4a16
    assert config.block_shape == [0, GROUP]
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


def _on_a_gpu(wrapper, layer):
    from vllm.lora.layers import fused_moe

    from vllm_moe_lora.layers import era_a

    original = fused_moe.FusedMoEWithLoRA._inject_lora_into_fused_moe
    del original  # replaced by us; upstream's own is what it closes over
    upstream = fused_moe.FusedMoEWithLoRA._inject_lora_into_fused_moe.__closure__[0].cell_contents
    with era_a.chosen(layer):
        upstream(wrapper)


def test_unknown_weights_are_refused_with_a_cure():
    from vllm_moe_lora.layers.weight_names import alias_weights

    layer = torch.nn.Module()
    layer.w13_qweight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"w2_weight_packed.*without --enable-lora"):
        alias_weights(layer)
