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
    parallel = wrapper.base_layer.moe_config.moe_parallel_config
    if not _supported():
        why = (
            f"its experts compute the tokens of all {ranks} ranks, but each rank has LoRA slots of "
        )
        why += "its own, so tokens would get another rank's adapter, or none"
        cure = f"{ranks} servers without data parallelism, one with --tensor-parallel-size"
    elif parallel.all2all_backend != BACKEND:
        why = f"--all2all-backend {parallel.all2all_backend} sends tokens to the experts of other "
        why += "ranks without their adapters"
        cure = f"with --all2all-backend {BACKEND}"
    elif parallel.is_sequence_parallel:
        why = "--tensor-parallel-size and --enable-expert-parallel give each rank a part of each "
        why += "batch, but vLLM sends the adapters of the batch's first tokens with it"
        cure = "without --enable-expert-parallel, with --tensor-parallel-size 1"
    elif parallel_config("data_parallel_external_lb") or parallel_config("data_parallel_hybrid_lb"):
        why = (
            "and a load balancer outside of vLLM each server gives out LoRA slots of its own, but "
        )
        why += "a slot must hold the same adapter on all ranks"
        cure = (
            "one server for all ranks, without --data-parallel-rank, --data-parallel-external-lb "
        )
        cure += "and --data-parallel-hybrid-lb"
    elif _quantises_first(wrapper):
        why = "vLLM quantises tokens before it sends them to other ranks, and LoRA would get the "
        why += "quantised ones"
        cure = "a version of the model without quantised activations, such as bf16 or INT4 weights"
    elif getattr(whole, "use_v2_model_runner", False):
        why = (
            "vLLM's model runner V2 writes dummy adapters into the slots of a rank without requests"
        )
        cure = "with VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
    elif parallel_config("enable_dbo"):
        why, cure = "--enable-dbo splits batches, but not their adapters", "without --enable-dbo"
    else:
        return ""
    return f"{flag} {why}. Start {cure}, or without --enable-lora."


def parallel_config(flag: str) -> bool:
    """A flag of the engine's `ParallelConfig` while it is built; False at other times."""
    return bool(getattr(getattr(_config(), "parallel_config", None), flag, False))


def _config() -> Any:
    """The engine's `VllmConfig` while it is built; None at other times."""
    from vllm import config

    current = getattr(config, "get_current_vllm_config_or_none", None)  # from 0.14 on
    return None if current is None else current()


def _supported() -> bool:
    """Whether our hooks keep the slots of all ranks equal: from vLLM 0.30 on, if they are on."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.platforms import current_platform
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    hooked = [LRUCacheWorkerLoRAManager.add_adapter]
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
