"""vllm/engine/arg_utils.py: tells the engine if no adapter of --lora-modules has routed experts."""

from __future__ import annotations

from types import MethodType
from typing import Any

from ..patching import Hook


def _from_cli_args(original: MethodType) -> Any:
    def from_cli_args(cls: type[Any], args: Any) -> Any:
        from ..targets import server_adapters

        made = original.__func__(cls, args)
        server_adapters.record_no_experts(args, made)
        return made

    return classmethod(from_cli_args)


HOOKS = (
    Hook(
        feature="untargeted-experts",
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        make=_from_cli_args,
        releases=">=0.11.1,<0.34",
        why="the engine does not know the adapters of --lora-modules, so it runs the routed "
        "experts with a LoRA backend and allocates LoRA buffers for them, even if none of these "
        "adapters has LoRA on experts",
        upstream="",
        until="upstream enables LoRA for each layer only if an adapter may target it",
        layers=True,
    ),
)
