"""A child that prints what the slots of an engine's experts hold, in bytes.

Prints "HELD [slots, adapters, ranks]" after each batch: bytes of the experts' slots, bytes of the
tensors of the adapters that the worker has, and the sum of the ranks that the experts take slots to
have. With MOE_LORA_TEST_DENSE=1 the slots are views of dense stacks, into which adapters are
copied, as vLLM's are; without it a dense stack of experts is an error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

import torch
from vllm import LLM
from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
from vllm.lora.model_manager import LoRAModelManager

from vllm_moe_lora.tiny import engine

_home = engine.home()
slot_stack = importlib.import_module(f"{_home}.kernels.slot_stack")
manager = None


def _stacks():
    for module in manager.modules.values():
        if isinstance(module, FusedMoEWithLoRA):
            for name, value in vars(module).items():
                if name.startswith("w") and name.endswith("_stacked"):
                    yield from value


def _held():
    adapters = ranks = 0
    for module in manager.modules.values():
        if isinstance(module, FusedMoEWithLoRA):
            if hasattr(module, "_moe_kernel"):
                ranks += int(module._moe_kernel.fused_experts._ranks.sum())
            else:  # up to 0.27 the experts read the slots alone
                ranks += sum(module.w2_lora_a_stacked[0].ranks())
    for lora in manager.list_adapters().values():
        for name, module in manager.modules.items():
            if isinstance(module, FusedMoEWithLoRA) and name in lora.loras:
                both = lora.loras[name]
                adapters += sum(map(slot_stack.nbytes, (*both.lora_a, *both.lora_b)))
    return sum(one.nbytes for one in _stacks()), adapters, ranks


_made, _generate = LoRAModelManager.__init__, LLM.generate


def _created(self, *args, **more):
    global manager
    _made(self, *args, **more)
    manager = self


def _after(self, *args, **more):
    answer = _generate(self, *args, **more)
    print("HELD", json.dumps(_held()), flush=True)
    return answer


LoRAModelManager.__init__, LLM.generate = _created, _after
if os.environ.get("MOE_LORA_TEST_DENSE") == "1":

    def _write(self, slot, factor):
        if not hasattr(self, "whole"):
            self.whole = torch.zeros(self.shape, dtype=self.dtype)
        self.whole[slot] = 0
        self.whole[slot, :, : factor.shape[1], : factor.shape[2]].copy_(factor)
        rank = factor.shape[self.rank_axis]
        self._put(slot, self.whole[slot].narrow(self.rank_axis, 0, rank))

    slot_stack.SlotStack.write = _write
else:
    _zeros = torch.zeros

    def _no_stacks(*args, **more):
        made = _zeros(*args, **more)
        experts = made.dim() == 4 and made.shape[1] > 1
        assert not experts or made.is_meta, f"a dense stack: {list(made.shape)}"
        return made

    torch.zeros = _no_stacks

if __name__ == "__main__":
    engine.main(*sys.argv[1:])
