"""vllm/lora/peft_helper.py: keeps the whole adapter_config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _from_dict(original: Callable[..., Any]) -> Any:
    def from_dict(cls: type[Any], config_dict: dict[str, Any]) -> Any:
        helper = original(config_dict)
        # The dataclass has no fields for target_parameters, layout markers and (up to 0.31)
        # rank_pattern and alpha_pattern. adapters/config.py reads them.
        helper.moe_lora_raw = dict(config_dict)
        return helper

    return classmethod(from_dict)


HOOKS = (
    Hook(
        feature="adapters",
        target="vllm.lora.peft_helper:PEFTHelper.from_dict",
        make=_from_dict,
        releases=">=0.11.1,<0.34",
        why="the keys of adapter_config.json that say which layout the tensors have are dropped",
        upstream="",
        until="upstream keeps the whole adapter_config.json",
    ),
)
