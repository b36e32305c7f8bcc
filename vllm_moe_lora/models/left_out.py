"""The classes of the table that cannot serve adapters, each with the reason that its users read."""

from __future__ import annotations

from .row import Row

_ME = "vllm.model_executor.models."
_V = "vllm.models."
_WO_A = (
    "its attention reads the weights of wo_a and of the compressor directly, so LoRA there would "
    "be ignored."
)
_NO_MOE_LAYER = "its experts are plain tensors and not one of vLLM's MoE layers, which take LoRA."

LEFT_OUT: tuple[Row, ...] = (
    Row(
        targets=(
            f"{_V}deepseek_v41.nvidia.vl_model:DeepseekV41ForCausalLM",
            f"{_V}deepseek_v41.amd.vl_model:DeepseekV41ForCausalLM",
        ),
        releases=">=0.30,<0.34",
        known="source",
        refused=f"{_WO_A} vLLM's pull request 57245 changes that.",
        upstream="https://github.com/vllm-project/vllm/issues/57166",
    ),
    Row(
        targets=tuple(
            f"{_V}minimax_m3.{platform}.model:MiniMaxM3SparseFor{kind}"
            for kind in ("CausalLM", "ConditionalGeneration")
            for platform in ("nvidia", "amd")
        ),
        releases=">=0.24,<0.34",
        known="source",
        refused="in its sparse layers q_proj, k_proj and v_proj are one module with the indexer's "
        "projections, which no LoRA layer of vLLM can wrap, so LoRA there would be ignored.",
    ),
    Row(
        targets=(f"{_V}flint.model:FlintForCausalLM",),
        releases=">=0.33,<0.34",
        known="source",
        refused="its MoE layers have kernels of their own, which read the weights of the gate and "
        "of the experts directly, so LoRA there would be ignored.",
    ),
    Row(
        targets=(f"{_ME}dbrx:DbrxForCausalLM",),
        releases=">=0.11.1,<0.34",
        known="source",
        refused="its experts and its Wqkv are fused tensors whose LoRA was never checked in vLLM, "
        "and from 0.24 on vLLM loads its experts under names that the model does not have.",
    ),
    Row(
        targets=(f"{_V}deepseek_v4.nvidia.model:DeepseekV4ForCausalLM",),
        releases=">=0.22,<0.29",
        known="source",
        refused=f"{_WO_A} vLLM has LoRA for this model since 0.29.",
        until="0.28 is no longer supported",
    ),
    Row(
        targets=(f"{_V}deepseek_v4.xpu.model:DeepseekV4ForCausalLM",),
        releases=">=0.23,<0.30",
        known="source",
        refused=f"{_WO_A} vLLM has LoRA for this model on Intel's GPUs since 0.30.",
        until="0.29 is no longer supported",
    ),
    Row(  # the last of its name: 0.33 knows only the name when it refuses one
        targets=(
            f"{_ME}deepseek_v4:DeepseekV4ForCausalLM",  # up to 0.21
            f"{_V}deepseek_v4.amd.model:DeepseekV4ForCausalLM",
            f"{_V}deepseek_v4.cpu.model:DeepseekV4ForCausalLM",
        ),
        releases=">=0.20,<0.34",
        known="source",
        refused=f"{_WO_A} vLLM has LoRA for this model on NVIDIA's GPUs since 0.29.",
    ),
    Row(
        targets=(f"{_ME}kimi_linear:KimiLinearForCausalLM",),
        releases=">=0.11.1,<0.27",
        known="source",
        refused="each of its MoE layers has two names in vLLM, block_sparse_moe and mlp, and LoRA "
        "on experts with two names was never checked.",
    ),
    Row(
        targets=(
            f"{_V}kimi_k3.nvidia.model:KimiLinearForCausalLM",
            f"{_V}kimi_k3.amd.linear:KimiLinearForCausalLM",
            f"{_V}kimi_k3.nvidia.model:KimiK3ForConditionalGeneration",
            f"{_V}kimi_k3.amd.model:KimiK3ForConditionalGeneration",
        ),
        releases=">=0.27,<0.34",
        known="source",
        refused="its linear attention merges projections that are split over devices with others "
        "that are not, in an order that depends on the config, and LoRA there was never checked.",
    ),
    Row(
        targets=(f"{_V}beam.nvidia.model:BeamForCausalLM",),
        releases=">=0.33,<0.34",
        known="source",
        refused="its attention reads the weight of the merged q, k, v and gate directly, so LoRA "
        "there would be ignored.",
    ),
    Row(
        targets=(f"{_ME}moondream3:Moondream3ForCausalLM",),
        releases=">=0.21,<0.34",
        known="source",
        refused=_NO_MOE_LAYER,
    ),
    Row(
        targets=(f"{_ME}arctic:ArcticForCausalLM",),
        releases=">=0.11.1,<0.29",
        known="source",
        refused=_NO_MOE_LAYER,
    ),
)
