"""The punica wrapper, whose making puts the platform's MoE LoRA layers before upstream's."""

from __future__ import annotations

import importlib
import os

import vllm.lora.utils
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class StandInPunica(PunicaWrapperCPU):
    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        # "module:class,class"; late, because layers import what asks for the platform.
        module, _, names = os.environ["STANDIN_LAYERS"].partition(":")
        own = [getattr(importlib.import_module(module), name) for name in names.split(",")]
        known = vllm.lora.utils._all_lora_classes
        vllm.lora.utils._all_lora_classes = (*own, *(c for c in known if c not in own))
