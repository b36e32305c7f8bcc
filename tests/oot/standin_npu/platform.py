"""The platform: everything of the CPU's, but it is none of those that vLLM knows."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum


class StandInPlatform(CpuPlatform):
    # is_cpu() is False by this. Its tensors are on the CPU, so device_type has to stay "cpu":
    # harder than vllm-ascend's "npu", because hooks made for vLLM's own CPU platform see it, too.
    _enum = PlatformEnum.OOT

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        vllm_config.parallel_config.worker_cls = "standin_npu.worker.StandInWorker"
        super().check_and_update_config(vllm_config)
        from .runner import register  # late: it imports layers, which ask for the platform

        register()

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "standin_npu.punica.StandInPunica"
