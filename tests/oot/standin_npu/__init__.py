"""A stand-in for vllm-ascend: a platform from outside of vLLM's tree, which computes on the CPU.

Like vllm-ascend (its lora/fused_moe.py, lora/utils.py and platform.py were read, nothing is copied)
it brings a MoE runner, a punica wrapper, and MoE LoRA layers that this wrapper puts before
upstream's. It knows nothing of vllm_moe_lora.
"""


def platform() -> str:
    """The entry point in the group vllm.platform_plugins."""
    return "standin_npu.platform.StandInPlatform"
