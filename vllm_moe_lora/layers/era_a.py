"""vLLM 0.11.1 and 0.11.2: what `FusedMoEWithLoRA` needs of a quantised MoE layer, and of a CPU.

There the wrapper always runs `TritonExperts` over ``w13_weight`` and ``w2_weight``. Layers of INT4
weights have other names, and some of them other kernels.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The experts that the wrapper being built is to run instead of `TritonExperts`.
_experts: contextvars.ContextVar[Any] = contextvars.ContextVar("moe_lora_experts", default=None)

NAMES = ("{}_weight", "{}_weight_packed", "{}_qweight")


def alias_weights(layer: torch.nn.Module) -> None:
    """Let ``w13_weight`` and ``w2_weight`` name the packed weights of a quantised layer.

    Raises:
        NotImplementedError: the layer has none of the known names.
    """
    for which in ("w13", "w2"):
        names = [name.format(which) for name in NAMES]
        found = next((name for name in names if getattr(layer, name, None) is not None), None)
        if found is None:
            raise NotImplementedError(
                f"{type(layer).__name__} has none of {', '.join(names)}: MoE LoRA does not know "
                "this quantisation. Serve another checkpoint, or without --enable-lora."
            )
        if found != names[0]:
            setattr(layer, names[0], getattr(layer, found))


def _int4(layer: Any, group_size: int, zeros: bool) -> Any:
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config

    return int4_w4a16_moe_quant_config(
        w1_scale=layer.w13_scales,
        w2_scale=layer.w2_scales,
        w1_zp=layer.w13_qzeros if zeros else None,
        w2_zp=layer.w2_qzeros if zeros else None,
        block_shape=[0, group_size],
    )


def _gptq_marlin(layer: Any, method: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.fused_marlin_moe import MarlinExperts

    if method.quant_config.quant_type.size_bits != 4:
        raise NotImplementedError(
            "GPTQ-Marlin experts take LoRA with 4-bit weights only: serve a 4-bit checkpoint, or "
            "without --enable-lora."
        )
    method.moe_quant_config = _int4(layer, method.quant_config.group_size, zeros=False)
    return MarlinExperts(
        method.moe_quant_config,
        w13_g_idx=layer.w13_g_idx,
        w2_g_idx=layer.w2_g_idx,
        w13_g_idx_sort_indices=layer.w13_g_idx_sort_indices,
        w2_g_idx_sort_indices=layer.w2_g_idx_sort_indices,
        is_k_full=method.is_k_full,
    )


def _awq_marlin(layer: Any, method: Any) -> Any:
    """`MarlinExperts` of these releases know no zero points; the kernel does."""
    from vllm.model_executor.layers.fused_moe import fused_marlin_moe as marlin

    method.moe_quant_config = _int4(layer, method.quant_config.group_size, zeros=True)

    class MarlinExpertsWithZeros(marlin.MarlinExperts):
        @property
        def quant_type_id(self) -> int:
            return int(method.quant_type.id)

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            activation: str,
            global_num_experts: int,
            expert_map: torch.Tensor | None,
            a1q_scale: torch.Tensor | None,
            a2_scale: torch.Tensor | None,
            workspace13: torch.Tensor,
            workspace2: torch.Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> torch.Tensor:
            # The workspaces are swapped as in upstream's `workspace_shapes`.
            return marlin.fused_marlin_moe(
                hidden_states=hidden_states,
                w1=w1,
                w2=w2,
                bias1=self.w1_bias,
                bias2=self.w2_bias,
                w1_scale=self.w1_scale,
                w2_scale=self.w2_scale,
                gating_output=None,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                quant_type_id=self.quant_type_id,
                apply_router_weight_on_input=apply_router_weight_on_input,
                global_num_experts=global_num_experts,
                activation=activation,
                activation_func=self.activation,
                moe_sum=self.moe_sum,
                expert_map=expert_map,
                w1_zeros=self.w1_zp,
                w2_zeros=self.w2_zp,
                output=output,
                intermediate_cache13=workspace2,
                intermediate_cache2=workspace13,
                is_k_full=self.is_k_full,
            )

    return MarlinExpertsWithZeros(method.moe_quant_config)


def _own_choice(layer: Any, method: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

    if method.num_bits != 4:
        raise NotImplementedError(
            "compressed-tensors' Marlin experts take LoRA with 4-bit weights only: serve a 4-bit "
            "checkpoint, or without --enable-lora."
        )
    layer.ensure_moe_quant_config_init()
    return method.select_gemm_impl(MoEPrepareAndFinalizeNoEP(), layer)


# Method -> what makes its experts; others run `TritonExperts`, which also take the INT4 and INT8
# weights of MoeWNA16Method and CompressedTensorsWNA16MoEMethod.
CHOICES: dict[str, Callable[[Any, Any], Any]] = {
    "GPTQMarlinMoEMethod": _gptq_marlin,
    "AWQMoEMethod": _awq_marlin,
    "CompressedTensorsWNA16MarlinMoEMethod": _own_choice,
}


def on_cpu(wrapper: Any) -> bool:
    """Whether era_a_cpu.py serves this `FusedMoEWithLoRA`."""
    return bool(wrapper.device.type == "cpu")


@contextmanager
def chosen(layer: Any) -> Iterator[None]:
    """While this lasts, `kernel` gives the one for ``layer``, whose weights have their aliases.

    Raises:
        NotImplementedError: the quantisation is not one that takes LoRA; the text has the cure.
    """
    choice = CHOICES.get(type(layer.quant_method).__name__)
    token = _experts.set(choice(layer, layer.quant_method) if choice else None)
    try:
        yield
    finally:
        _experts.reset(token)


def in_one_piece(layer: Any) -> None:
    """Have the wrapped layer's experts get a batch whole.

    The modular kernel hands them VLLM_FUSED_MOE_CHUNK_SIZE tokens at a time (32,768 by default),
    while upstream's wrapper adds the factors of all the batch's tokens to each piece.
    """
    layer.quant_method.fused_experts.fused_experts.supports_chunking = lambda: False


def kernel(shared_experts: Any) -> Any:
    """The modular kernel of the layer that `chosen` is for; None where upstream's own is right."""
    experts = _experts.get()
    if experts is None:
        return None
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

    return modular_kernel.FusedMoEModularKernel(
        MoEPrepareAndFinalizeNoEP(), experts, shared_experts
    )
