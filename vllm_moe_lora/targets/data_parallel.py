"""Says with which settings of data parallelism LoRA on routed experts would be wrong.

With data parallelism the experts of a rank compute tokens of all ranks. LoRA is right only where
every rank has the same adapter in a slot (`loading/slots.py`), keeps it without requests of its own
(`layers/data_parallel.py`), and upstream sends the slots with the tokens.
"""

from __future__ import annotations

from typing import Any

from ..patching import MARK

BACKEND = "allgather_reducescatter"  # upstream's only dispatch that sends slots with the tokens


def size(wrapper: Any) -> int:
    """How many data-parallel ranks send tokens to the experts of a `FusedMoEWithLoRA`.

    This happens with expert parallelism and without it: vLLM spreads either the experts or each
    expert's weights over all ranks.
    """
    return int(getattr(wrapper.base_layer.moe_config.moe_parallel_config, "dp_size", 1))


def refusal(name: str, wrapper: Any) -> str:
    """Why LoRA on a MoE layer would be wrong with this engine's data parallelism; "" if it is not.

    Args:
        name: the layer's name.
        wrapper: its `FusedMoEWithLoRA`.
    """
    ranks = size(wrapper)
    if ranks == 1:
        return ""
    flag, whole = f"{name}: with --data-parallel-size {ranks}", _config()
    config = getattr(whole, "parallel_config", None)
    parallel = wrapper.base_layer.moe_config.moe_parallel_config
    if not _supported():
        return (
            f"{flag} its experts compute the tokens of all {ranks} ranks, but each rank has LoRA "
            "slots of its own, so tokens would get another rank's adapter, or none. Start "
            f"{ranks} servers without data parallelism, one with --tensor-parallel-size, or "
            "without --enable-lora."
        )
    if parallel.all2all_backend != BACKEND:
        return (
            f"{flag} --all2all-backend {parallel.all2all_backend} sends tokens to the experts of "
            f"other ranks without their adapters. Start with --all2all-backend {BACKEND}."
        )
    if parallel.is_sequence_parallel:
        return (
            f"{flag}, --tensor-parallel-size and --enable-expert-parallel, vLLM gives each rank a "
            "part of each batch, but sends the adapters of the batch's first tokens with it. Start "
            "without --enable-expert-parallel, or with --tensor-parallel-size 1."
        )
    if getattr(config, "data_parallel_external_lb", False) or getattr(
        config, "data_parallel_hybrid_lb", False
    ):
        return (
            f"{flag} and a load balancer outside of vLLM, each server gives out LoRA slots of its "
            "own, but a slot must hold the same adapter on all ranks. Start one server for all "
            "ranks, without --data-parallel-rank, --data-parallel-external-lb and "
            "--data-parallel-hybrid-lb."
        )
    if _quantises_first(wrapper):
        return (
            f"{flag} vLLM quantises tokens before it sends them to other ranks, and LoRA would get "
            "the quantised ones. Serve a version of the model without quantised activations, such "
            "as bf16 or INT4 weights, or start without data parallelism."
        )
    if getattr(whole, "use_v2_model_runner", False):
        return (
            f"{flag} vLLM's model runner V2 writes dummy adapters into the slots of a rank without "
            "requests. Start with VLLM_USE_V2_MODEL_RUNNER=0 in the environment."
        )
    if getattr(config, "enable_dbo", False):
        return f"{flag} --enable-dbo splits batches, but not their adapters. Start without it."
    return ""


def _config() -> Any:
    """The engine's `VllmConfig` while it is built; None at other times."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def _supported() -> bool:
    """Whether our hooks keep the slots of all ranks equal: from vLLM 0.30 on, if they are on."""
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.platforms import current_platform
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    hooked = [WorkerLoRAManager.add_adapter]
    hooked.append(getattr(LoRAModelRunnerMixin, "maybe_setup_dummy_loras", None))  # type: ignore[arg-type]
    if current_platform.device_type != "cpu":
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        hooked.append(PunicaWrapperGPU.moe_lora_align_block_size)
    return all(hasattr(function, MARK) for function in hooked)


def _quantises_first(wrapper: Any) -> bool:
    """Whether upstream quantises tokens before it sends them, so that LoRA gets quantised ones."""
    routed = getattr(wrapper.base_layer, "routed_experts", None)
    kernel = getattr(getattr(routed, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is None or experts.expects_unquantized_inputs:
        return False
    return experts.quant_config.quant_dtype is not None
