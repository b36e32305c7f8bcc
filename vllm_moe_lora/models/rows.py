"""The table: MoE classes of vLLM that declare no LoRA, or declare it with incomplete data."""

from __future__ import annotations

from .left_out import LEFT_OUT
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
_INDEXER = {"wk_weights_proj": ("wk", "weights_proj")}
_STEP3_QKV = dict.fromkeys(
    (f"self_attn.{word}_proj" for word in "qkv"),
    "in vLLM it is a part of one replicated module, of which LoRA layers take no parts",
)
_GLM_INDEXER = {"indexer.weights_proj": "vLLM multiplies with a copy of its weight in fp32"}
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
        releases=">=0.17,<0.34",
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
    Row(
        targets=(f"{_ME}qwen3_omni_moe_thinker:Qwen3OmniMoeThinkerForConditionalGeneration",),
        releases=">=0.11.1,<0.29",
        known="source",
        packed={**_QKV, **_GATE_UP},
        language_model="language_model",
        connector="visual.merger",
        tower=("visual.", "audio_tower."),
        until="0.28 is no longer supported: upstream declares it since 0.29",
    ),
    Row(
        targets=(f"{_ME}minimax_m2:MiniMaxM2ForCausalLM",),
        releases=">=0.11.1,<0.15",
        known="source",
        packed=_QKV,
        until="0.14 is no longer supported: upstream declares it since 0.15",
    ),
    Row(
        targets=(f"{_ME}mimo_v2_omni:MiMoV2OmniForCausalLM",),
        releases=">=0.21,<0.34",
        known="source",
        packed={**_QKV, **_GATE_UP},
        language_model="language_model",
        tower=("visual.", "audio_encoder."),
        cast_inputs=("mlp.gate",),
    ),
    Row(  # Ling-3 VL
        targets=(f"{_ME}bailing_moe_v3_vl:BailingMoeV3VLForConditionalGeneration",),
        releases=">=0.30,<0.34",
        known="source",
        packed=_QKV_A,
        language_model="language_model",
        connector="linear_proj",
        tower="visual.",
        ignored={f"{word}_conv1d": _READ_DIRECTLY for word in "qkv"},
    ),
    Row(
        targets=(f"{_V}dots3_note.nvidia.multimodal:Dots3NoteForCausalLM",),
        releases=">=0.28,<0.34",
        known="source",
        packed={**_GATE_UP, **_QKV_A, **_INDEXER},
        language_model="language_model",
        tower=("visual", "audio_tower"),
    ),
    Row(
        targets=(f"{_ME}step3_text:Step3TextForCausalLM",),
        releases=">=0.11.1,<0.34",
        known="source",
        packed=_GATE_UP,
        ignored=_STEP3_QKV,
    ),
    Row(
        targets=(f"{_ME}step3_vl:Step3VLForConditionalGeneration",),
        releases=">=0.11.1,<0.34",
        known="source",
        packed=_GATE_UP,
        language_model="language_model",
        connector="vit_large_projector",
        tower=("vision_model", "vit_downsampler"),
        ignored=_STEP3_QKV,
    ),
    Row(  # GLM-5.3-Flash without its wrapper
        targets=(
            f"{_V}glm5next.common.model:Glm5NextForCausalLM",
            f"{_V}glm5next.nvidia.model:Glm5NextForCausalLM",  # 0.30
        ),
        releases=">=0.30,<0.34",
        known="source",
        packed={**_GATE_UP, **_QKV_A, **_INDEXER, "in_proj_qkvbfg_a": _GLM_KDA},
        not_sharded=_GLM_KDA,
        ignored=_GLM_INDEXER,
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
        packed=_INDEXER,
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
        packed={**_QKV_A, **_INDEXER, "in_proj_qkvbfg_a": _GLM_KDA},
        not_sharded=_GLM_KDA,
        ignored=_GLM_INDEXER,
        upstream="https://github.com/vllm-project/vllm/pull/56327",
        until="upstream's packed_modules_mapping has these modules",
    ),
    Row(
        targets=(f"{_ME}ernie45_vl:Ernie4_5_VLMoeForConditionalGeneration",),
        releases=">=0.11.1,<0.34",
        known="engine",
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
    *(
        Row(
            targets=(f"{_V}deepseek_v4.{platform}.model:DeepseekV4ForCausalLM",),
            releases=releases,
            known="source",
            extends=True,
            ignored=dict.fromkeys(
                ("wo_a", *(f"compressor.{name}" for name in ("wkv", "wgate", "fused_wkv_wgate"))),
                _READ_DIRECTLY,
            ),
            upstream="https://github.com/vllm-project/vllm/pull/57245",
            until="upstream's attention calls these modules",
        )
        for platform, releases in (("nvidia", ">=0.29,<0.34"), ("xpu", ">=0.30,<0.34"))
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
    *LEFT_OUT,
)
