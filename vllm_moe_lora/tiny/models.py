"""Writes random small checkpoints of MoE model families.

They have the architecture and the tensor names of the real models, in small sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 512
LAYERS = 2
EXPERTS = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_GROUPS = {"n_group": 2, "topk_group": 1}
_MLA = {
    "kv_lora_rank": 512,  # vLLM's MLA on the CPU supports 512 + 64 (the next line) only
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}

# family -> (transformers class prefix, config on top of _COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2Moe",
        {**_MOE, "intermediate_size": 128, "shared_expert_intermediate_size": 128},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "intermediate_size": 128, "head_dim": 32}),
    # Not a MoE model: for comparisons with a dense one.
    "qwen3": ("Qwen3", {"intermediate_size": 128, "head_dim": 32}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 128},
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 128},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **_ROUTED,
            **_GROUPS,
            "intermediate_size": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "head_dim": 32,
            "partial_rotary_factor": 0.5,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **_ROUTED,
            **_MLA,
            "intermediate_size": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "head_dim": 64,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_ROUTED,
            **_GROUPS,
            **_MLA,
            "intermediate_size": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_MOE,
            "intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,  # vLLM's gated delta net on the CPU supports 128 only
            "linear_value_head_dim": 128,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            **_MOE,
            "shared_expert_intermediate_size": 128,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,  # vLLM's gated delta net on the CPU supports 128 only
            "linear_value_head_dim": 128,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    # vLLM reads the entries of the published config.json, transformers reads its own.
    "mimo_v2_flash": (
        "MiMoV2Flash",
        {
            **_ROUTED,
            "intermediate_size": 128,
            "head_dim": 32,
            "v_head_dim": 32,  # vLLM on the CPU has no attention with another size for v
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window_size": 16,
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "swa_rope_theta": 10_000.0,
            "rope_theta": 5_000_000.0,
            "partial_rotary_factor": 0.334,
            "layernorm_epsilon": 1e-5,
            "add_swa_attention_sink_bias": True,
        },
    ),
    "cohere2_moe": (
        "Cohere2Moe",
        {
            **_MOE,
            "intermediate_size": 128,
            "prefix_dense_intermediate_size": 192,
            "num_shared_experts": 1,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "logit_scale": 1.0,
            # Longer than the prompts: vLLM's window is one token longer than transformers'.
            "sliding_window": 64,
            "eos_token_id": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    # Its published names are those of transformers 4: see OWN_NAMES.
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "shared_intermediate_size": 96,
            "attention_multiplier": 0.2,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "intermediate_size": 128,
            "moe_intermediate_size": 128,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "exaone_moe": (
        "ExaoneMoe",
        {
            **_MOE,
            **_GROUPS,
            "intermediate_size": 128,
            "head_dim": 32,
            "first_k_dense_replace": 1,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "jamba": (
        "Jamba",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            # All layers have attention: vLLM on a CPU has no operator for Mamba-1.
            "attn_layer_period": 1,
            "attn_layer_offset": 0,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {"num_experts": EXPERTS, "moe_topk": 2, "intermediate_size": 128, "head_dim": 32},
    ),
    "dots1": (
        "Dots1",
        {
            **_ROUTED,
            **_GROUPS,
            "intermediate_size": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
    ),
    # The next two are text models of multimodal.WRAPPERS.
    "aria_text": (
        "AriaText",
        {
            "moe_num_experts": EXPERTS,
            "moe_topk": 2,
            "moe_num_shared_experts": 2,
            "intermediate_size": 128,
            "head_dim": 32,
        },
    ),
    "step3p7_text": (
        "Step3p7Text",
        {
            **_ROUTED,
            "intermediate_size": 128,
            "share_expert_dim": 128,
            "head_dim": 32,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "num_sliding_attention_heads": 8,
            "moe_router_scaling_factor": 2.0,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}

# Families whose modules transformers calls otherwise than their checkpoints do.
OWN_NAMES = ("aria", "granitemoe", "granitemoeshared", "step3p5", "step3p7")


def build(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random fp32 checkpoint.

    Args:
        family: a key of `FAMILIES` or of `multimodal.WRAPPERS`.
        folder: is created. config.json and model.safetensors are written to it.
        seed: of the random weights.
        overrides: entries of config.json, in place of the small ones; of a multimodal model those
            of its text model.

    Returns:
        ``folder``.
    """
    import torch
    import transformers

    from vllm_moe_lora.tiny import multimodal

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    if family in multimodal.WRAPPERS:
        wrapper = multimodal.WRAPPERS[family]
        model = multimodal.random_model(wrapper, text_config(wrapper.text, **overrides))
    else:
        config = text_config(family, **overrides)
        model = getattr(transformers, config.architectures[0])(config)
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers initialises these with 0 or 1. A test would not notice an error there.
            if name.endswith(("bias", "sinks", "e_score_correction_bias")):
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    model.save_pretrained(folder)
    if family in multimodal.WRAPPERS:
        multimodal.as_published(multimodal.WRAPPERS[family], folder)
    if family in multimodal.WRAPPERS or family in OWN_NAMES:
        multimodal.write_twin(model, folder / multimodal.TWIN)
    return folder


def text_config(family: str, **overrides: Any) -> Any:
    """Return the transformers config of a small model of `FAMILIES`; arguments as in `build`."""
    import transformers

    prefix, extra = FAMILIES[family]
    config_name = f"{prefix}TextConfig" if prefix == "Qwen3_5Moe" else f"{prefix}Config"
    config = getattr(transformers, config_name)(**{**_COMMON, **extra, **overrides})
    config.architectures = [f"{prefix}ForCausalLM"]
    return config


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint."""
    return dict(json.loads((folder / "config.json").read_text()))
