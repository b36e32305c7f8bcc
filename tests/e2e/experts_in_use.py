"""A child that says how an engine runs its routed experts, and what LoRA does in each batch.

Prints "EXPERTS [classes of experts, wrapped layers, size of their stacks]" once the engine has
its model, and "CALLS n" after each batch: how often functions of LoRA on experts were entered.
"""

from __future__ import annotations

import importlib
import json
import sys

from vllm import LLM

from vllm_moe_lora.tiny import engine

# What is patched in is what runs.
_home = engine.home()
cpu_experts, cpu_int4, cpu_unquantized = (
    importlib.import_module(f"{_home}.layers.cpu.{name}")
    for name in ("experts", "int4", "unquantized")
)
calls = 0


def _counted(name, *users):
    real = getattr(users[0], name)

    def call(*args, **more):
        global calls
        calls += 1
        return real(*args, **more)

    for module in users:
        setattr(module, name, call)


_counted("make_pairs", cpu_experts)
_counted("make_plan", cpu_experts)
_counted("token_slots", cpu_experts)
_counted("shrink", cpu_unquantized, cpu_int4)
_counted("expand_add", cpu_unquantized, cpu_int4)


def _experts(model):
    """[classes of experts, wrapped layers, numbers that their stacks may hold]"""
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    modules = list(model.modules())
    layers = [m for m in modules if isinstance(m, RoutedExperts)]
    assert layers
    wrappers = [m for m in modules if isinstance(m, FusedMoEWithLoRA)]
    stacks = [
        one
        for wrapper in wrappers
        for name in vars(wrapper)
        if name.startswith("w") and name.endswith("_stacked")
        for one in getattr(wrapper, name)
    ]
    kinds = {type(m.quant_method.moe_kernel.fused_experts).__name__ for m in layers}
    return sorted(kinds), len(wrappers), sum(one.shape.numel() for one in stacks)


_made, _generate = LLM.__init__, LLM.generate


def _init(self, *args, **more):
    _made(self, *args, **more)
    (found,) = self.apply_model(_experts)
    print("EXPERTS", json.dumps(found), flush=True)


def _counting(self, *args, **more):
    global calls
    calls = 0
    answer = _generate(self, *args, **more)
    print("CALLS", calls, flush=True)
    return answer


LLM.__init__, LLM.generate = _init, _counting

if __name__ == "__main__":
    engine.main(*sys.argv[1:])
