"""The table: MoE classes of vLLM that declare no LoRA, or declare it with incomplete data."""

from __future__ import annotations

from .row import Row

_ME = "vllm.model_executor.models."
_V = "vllm.models."
_READ_DIRECTLY = (
    "vLLM's attention reads its weight directly, so the adapter would be ignored there. Merge the "
    "adapter into the model, or train without this module"
)
_MULTIPLIED = (
    "vLLM multiplies its weight by the config's output_multiplier after loading, and an adapter "
    "would not be multiplied. Merge the adapter into the model, or train without this module"
)
_QKV = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
_QKV_A = {"fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}
# In GLM-5.3-Flash's linear attention. b and f_a are replicated on the devices.
_GLM_KDA = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")

ROWS: tuple[Row, ...] = (
    # -- engine --
    Row(
        targets=(f"{_ME}kimi_k25:KimiK25ForConditionalGeneration",),
        releases=">=0.15,<0.34",
        known="engine",
        packed={**_GATE_UP, **_QKV_A},
        language_model="language_model",
        connector="mm_projector",
        tower="vision_tower",
        upstream="https://github.com/vllm-project/vllm/issues/43840",
    ),
    Row(
        targets=(f"{_ME}step3p5:Step3p5ForCausalLM",),
        releases=">=0.15.1,<0.34",
        known="engine",
        packed={**_QKV, **_GATE_UP},
        config="model.config",
    ),
    Row(
        targets=(
            f"{_ME}mimo_v2:MiMoV2FlashForCausalLM",
            f"{_ME}mimo_v2_flash:MiMoV2FlashForCausalLM",  # up to 0.20
        ),
        releases=">=0.14,<0.34",
        known="engine",
        packed={**_QKV, **_GATE_UP},
        cast_inputs=("mlp.gate",),
    ),
    Row(
        targets=(f"{_ME}mimo_v2:MiMoV2ForCausalLM",),
        releases=">=0.21,<0.34",
        known="engine",
        cast_inputs=("mlp.gate",),
        ignored={
            "self_attn.qkv_proj": "the published weight has the rows of q, k and v in chunks of "
            "heads, and vLLM does not sort those of an adapter as it sorts the weight's"
        },
    ),
    Row(
        targets=(f"{_ME}cohere2_moe:Cohere2MoeForCausalLM",),
        releases=">=0.21,<0.34",
        known="engine",
    ),
    Row(
        targets=(f"{_ME}step3p7:Step3p7ForConditionalGeneration",),
        releases=">=0.23,<0.34",
        known="engine",
        language_model="language_model",
        connector="vit_large_projector",
        tower="vision_model",
    ),
    Row(
        targets=(f"{_ME}aria:AriaForConditionalGeneration",),
        releases=">=0.11.1,<0.34",
        known="engine",
        packed={**_QKV, **_GATE_UP},
        language_model="language_model",
        connector="multi_modal_projector",
        tower="vision_tower",
        ignored={"mlp.router": "in vLLM its weight is no module that takes LoRA"},
    ),
    Row(  # Ling-2.5 and Ring-2.5
        targets=(f"{_ME}bailing_moe_linear:BailingMoeV25ForCausalLM",),
        releases=">=0.20,<0.34",
        known="engine",
        packed={**_GATE_UP, **_QKV_A, "query_key_value": ("query_key_value",)},
    ),
    Row(  # Ling-3
        targets=(f"{_ME}bailing_moe_v3:BailingMoeV3ForCausalLM",),
        releases=">=0.28,<0.34",
        known="engine",
        packed=_QKV_A,
        ignored={f"{word}_conv1d": _READ_DIRECTLY for word in "qkv"},
    ),
    # -- source --
    Row(
        targets=(f"{_ME}kimi_vl:KimiVLForConditionalGeneration",),
        releases=">=0.11.1,<0.34",
        known="source",
        packed={**_QKV, **_GATE_UP, **_QKV_A},
        language_model="language_model",
        connector="multi_modal_projector",
        tower="vision_tower",
    ),
    # -- upstream declares LoRA, but not all of it --
    Row(
        targets=(
            f"{_ME}longcat_flash:LongcatFlashForCausalLM",
            f"{_ME}longcat_flash_ngram:LongcatFlashNgramForCausalLM",
        ),
        releases=">=0.11.1,<0.34",
        known="source",
        extends=True,
        packed=_QKV_A,
        until="upstream's packed_modules_mapping has fused_qkv_a_proj",
    ),
    Row(
        targets=(f"{_ME}granitemoeshared:GraniteMoeSharedForCausalLM",),
        releases=">=0.11.1,<0.34",
        known="engine",
        extends=True,
        packed={"input_linear": ("input_linear",)},  # gate and up of shared experts, fused
        until="upstream's packed_modules_mapping has input_linear",
    ),
    Row(  # DeepSeek-V3.2 and GLM-5.x
        targets=(
            f"{_V}deepseek_v32.nvidia.model:DeepseekV32ForCausalLM",
            f"{_V}deepseek_v32.amd.model:DeepseekV32ForCausalLM",
            f"{_ME}deepseek_v2:GlmMoeDsaForCausalLM",
            f"{_ME}deepseek_v2:DeepseekV3ForCausalLM",
        ),
        releases=">=0.20,<0.34",
        known="source",
        extends=True,
        packed={"wk_weights_proj": ("wk", "weights_proj")},  # of the indexer
        until="upstream's packed_modules_mapping has wk_weights_proj",
    ),
    Row(  # GLM-5.3-Flash
        targets=(
            f"{_V}glm5next.common.model:Glm5NextForConditionalGeneration",
            f"{_V}glm5next.nvidia.model:Glm5NextForConditionalGeneration",  # 0.30
        ),
        releases=">=0.30,<0.34",
        known="source",
        extends=True,
        packed={
            **_QKV_A,
            "wk_weights_proj": ("wk", "weights_proj"),
            "in_proj_qkvbfg_a": _GLM_KDA,
        },
        not_sharded=_GLM_KDA,
        ignored={"indexer.weights_proj": "vLLM multiplies with a copy of its weight in fp32"},
        upstream="https://github.com/vllm-project/vllm/pull/56327",
        until="upstream's packed_modules_mapping has these modules",
    ),
    Row(
        targets=(f"{_ME}ernie45_vl:Ernie4_5_VLMoeForConditionalGeneration",),
        releases=">=0.11.1,<0.34",
        known="source",
        extends=True,
        # Without these upstream gives the vision tower the text's token map.
        language_model="language_model",
        connector="resampler_model",
        tower="vision_model",
        cast_inputs=("text_moe.gate", "vision_moe.gate"),
        whole_batches="Ernie4_5_VLMoeMoE",
        renamed={
            f"{kind}_{part}": f"{kind}_moe.{own}"
            for kind in ("text", "vision")
            for part, own in (("experts", "experts"), ("experts_gate", "gate"))
        },
        until="upstream's class has get_mm_mapping, its gates take the model's dtype, and its "
        "experts are called so",
    ),
    Row(
        targets=(
            f"{_V}deepseek_v4.nvidia.model:DeepseekV4ForCausalLM",
            f"{_V}deepseek_v4.xpu.model:DeepseekV4ForCausalLM",
        ),
        releases=">=0.32,<0.34",
        known="source",
        extends=True,
        ignored={
            "wo_a": _READ_DIRECTLY,
            "compressor.wkv": _READ_DIRECTLY,
            "compressor.wgate": _READ_DIRECTLY,
            "compressor.fused_wkv_wgate": _READ_DIRECTLY,
        },
        upstream="https://github.com/vllm-project/vllm/pull/57245",
        until="upstream's attention calls these modules",
    ),
    Row(
        targets=(f"{_ME}gpt_oss:GptOssForCausalLM",),
        releases=">=0.11.1,<0.34",
        known="source",
        extends=True,
        ignored_on={
            "rocm": {
                "mlp.router": "on AMD's GPUs vLLM multiplies with its weight directly, so the "
                "adapter would be ignored there. Merge the adapter into the model, or train "
                "without this module"
            }
        },
        until="upstream's MLPBlock calls its router on ROCm",
    ),
    Row(
        targets=(f"{_V}muse_spark.nvidia.multimodal:MuseSparkForConditionalGeneration",),
        releases=">=0.33,<0.34",
        known="source",
        extends=True,
        ignored_if={"output_multiplier": {"router": _MULTIPLIED}},
        until="upstream multiplies the router's output",
    ),
    Row(  # On some of AMD's GPUs a kernel also reads a copy of the router's weight.
        targets=(f"{_V}muse_spark.amd.multimodal:MuseSparkForConditionalGeneration",),
        releases=">=0.33,<0.34",
        known="source",
        extends=True,
        ignored={"router": _MULTIPLIED},
        until="upstream multiplies the router's output, and calls the router on all GPUs",
    ),
    Row(
        targets=tuple(
            f"{_V}qwen4_exp.nvidia.model:Qwen4ExpFor{kind}"
            for kind in ("CausalLM", "ConditionalGeneration")
        ),
        releases=">=0.31,<0.34",
        known="source",
        extends=True,
        ignored=dict.fromkeys(
            ("input_mix_weight_down", "block_inject_weight"),
            "on some GPUs a kernel of vLLM's reads its weight directly, and the adapter would be "
            "ignored there",
        ),
        until="upstream's hyperconnections call this module for all batches",
    ),
    Row(
        targets=(f"{_ME}alice_ai:AliceAIForCausalLM",),
        releases=">=0.33,<0.34",
        known="source",
        extends=True,
        ignored={"res_proj": _READ_DIRECTLY},
        until="upstream's residual attention calls this module",
    ),
    Row(
        targets=(f"{_V}hy_v4.nvidia.model:HYV4ForCausalLM", f"{_V}hy_v4.amd.model:HYV4ForCausalLM"),
        releases=">=0.29,<0.34",
        known="source",
        extends=True,
        ignored={
            "hc_fn": _READ_DIRECTLY,
            "self_attn.linear_gate": "on some GPUs a kernel of vLLM's reads its weight directly, "
            "and the adapter would be ignored there",
        },
        until="upstream calls these modules",
    ),
    # -- left out --
    Row(
        targets=(
            f"{_V}deepseek_v41.nvidia.vl_model:DeepseekV41ForCausalLM",
            f"{_V}deepseek_v41.amd.vl_model:DeepseekV41ForCausalLM",
        ),
        releases=">=0.32,<0.34",
        known="source",
        refused="its attention reads the weights of wo_a and of the compressor directly, so LoRA "
        "there would be ignored. vLLM's pull request 57245 changes that.",
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
)
