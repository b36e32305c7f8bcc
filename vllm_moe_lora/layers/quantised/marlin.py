"""Makes `MarlinExperts` for GPTQ and AWQ layers, in vLLM 0.11.1 to 0.12.

The quantisation methods of these releases have no experts class for LoRA. Later ones make it
themselves.
"""

from __future__ import annotations

from typing import Any

# Names of the quantisation methods in question.
METHODS = ("GPTQMarlinMoEMethod", "AWQMoEMethod", "AWQMarlinMoEMethod")


def make_quant_config(layer: Any, method: Any) -> Any:
    """Make the quantisation config, for which ``method.get_fused_moe_quant_config`` returns None.

    Args:
        layer: the module that has the scales and zero points.
        method: its quantisation method, one of `METHODS`.

    Returns:
        A `FusedMoEQuantConfig` for INT4 weights and 16-bit activations.

    Raises:
        NotImplementedError: the weights do not have 4 bits.
    """
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config

    config, zeros = method.quant_config, "AWQ" in type(method).__name__
    if not zeros and config.quant_type.size_bits != 4:
        raise NotImplementedError(
            "MoE LoRA on GPTQ-Marlin experts supports only 4-bit weights: serve a 4-bit "
            "checkpoint, or without --enable-lora."
        )
    return int4_w4a16_moe_quant_config(
        w1_scale=layer.w13_scales,
        w2_scale=layer.w2_scales,
        w1_zp=layer.w13_qzeros if zeros else None,
        w2_zp=layer.w2_qzeros if zeros else None,
        block_shape=[0, config.group_size],
    )


def make_experts(layer: Any, method: Any) -> Any:
    """Make `MarlinExperts` for ``layer``. ``method.moe_quant_config`` must be set."""
    from vllm.model_executor.layers.fused_moe.fused_marlin_moe import MarlinExperts

    config = method.moe_quant_config
    if config.w1_zp is not None:
        return MarlinExperts(config)
    return MarlinExperts(
        config,
        w13_g_idx=layer.w13_g_idx,
        w2_g_idx=layer.w2_g_idx,
        w13_g_idx_sort_indices=layer.w13_g_idx_sort_indices,
        w2_g_idx_sort_indices=layer.w2_g_idx_sort_indices,
        is_k_full=method.is_k_full,
    )
