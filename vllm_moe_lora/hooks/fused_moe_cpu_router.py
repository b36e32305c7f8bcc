"""vllm/model_executor/layers/fused_moe/router/cpu_router.py: which experts a token gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        from vllm.config import get_current_vllm_config_or_none

        from ..layers.cpu.routing import in_one_group, lacks_scheme

        config = get_current_vllm_config_or_none()
        if config is not None and config.lora_config is not None and lacks_scheme(self):
            self.custom_routing_function = in_one_group(self)

    return __init__


HOOKS = (
    Hook(
        feature="cpu-experts",
        target="vllm.model_executor.layers.fused_moe.router.cpu_router:CPURouter.__init__",
        make=_init,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="without groups of experts it asserts softmax, so that Step-3.5 does not start on a "
        "CPU, and ignores e_score_correction_bias, so that Ernie 4.5 chooses other experts",
        upstream="",
        until="upstream's CPURouter takes sigmoid and a bias without groups",
    ),
)
