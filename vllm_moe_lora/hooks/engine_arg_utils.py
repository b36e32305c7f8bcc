"""vllm/engine/arg_utils.py"""

from __future__ import annotations

from types import MethodType
from typing import Any

from ..patching import Hook


def _from_cli_args(original: MethodType) -> Any:
    def from_cli_args(cls: type[Any], args: Any) -> Any:
        from ..targets import server_adapters

        made = original.__func__(cls, args)
        server_adapters.note(args, made)
        return made

    return classmethod(from_cli_args)


HOOKS = (
    Hook(
        feature="untargeted-experts",
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        make=_from_cli_args,
        releases=">=0.11.1,<0.34",
        why="the adapters of --lora-modules are not known to the engine, which therefore keeps "
        "room for LoRA on experts that none of them has",
        upstream="",
        until="upstream asks for each layer whether LoRA may target it",
        layers=True,
    ),
)
