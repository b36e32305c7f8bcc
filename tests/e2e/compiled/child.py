"""A child whose engine is compiled, and whose adapters change between two rounds of requests.

The environment variable ACTIONS is JSON, {"2": [["unload", "a"]]}: adapter a is removed before the
third round. After each round the child prints "MODE", the compilation mode, and whether the model
was traced, or loaded from what was traced before.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys

from torch._dynamo.utils import counters
from vllm import LLM
from vllm.lora.request import LoRARequest

from vllm_moe_lora.tiny import engine

# Of tiny/engine.py, for other tests; torch reads it when it is asked to compile.
del os.environ["TORCHDYNAMO_DISABLE"]
# What is patched in is what runs.
home = engine.home()
actions = json.loads(os.environ.get("ACTIONS", "{}"))
spec = json.load(open(sys.argv[1]))  # noqa: SIM115
numbers = {name: number for number, name in enumerate(spec["adapters"], start=1)}
_generate, rounds = LLM.generate, 0


def _is_compiled(model):
    loaded = any(getattr(m, "aot_compiled_fn", None) for m in model.modules())
    traced = counters["inline_call"] or counters["stats"].get("calls_captured", 0) > 100
    return bool(loaded or traced)


def _generating(self, *args, **more):
    global rounds
    for action, *rest in actions.get(str(rounds), []):
        getattr(sys.modules[__name__], action)(self.llm_engine, *rest)
    rounds += 1
    answer = _generate(self, *args, **more)
    mode = self.llm_engine.vllm_config.compilation_config.mode.name
    print("MODE", mode, *self.apply_model(_is_compiled), flush=True)
    return answer


def unload(llm, name):
    assert llm.remove_lora(numbers[name])


def replace(llm, name, by):
    """``name`` gets the factors of another adapter, in its place."""
    shutil.copytree(spec["adapters"][by], spec["adapters"][name], dirs_exist_ok=True)
    request = LoRARequest(name, numbers[name], spec["adapters"][name], load_inplace=True)
    assert llm.add_lora(request)


def load(llm, name):
    assert llm.add_lora(LoRARequest(name, numbers[name], spec["adapters"][name]))


if os.environ.get("WITHOUT_OPERATOR"):
    compiled = importlib.import_module(f"{home}.layers.cpu.compiled")
    _take = compiled._take
    compiled._take = lambda name, *args: "o_proj" not in name and _take(name, *args)

if os.environ.get("OLDER_VERSION"):
    # Other code, in which the names by which the model calls its gates lead around their LoRA.
    fingerprint = importlib.import_module(f"{home}.fingerprint")
    aliases = importlib.import_module(f"{home}.layers.shared_experts.aliases")
    fingerprint._code, aliases.rewire = lambda: "older", lambda model, wrappers: []

LLM.generate = _generating

if __name__ == "__main__":
    engine.main(*sys.argv[1:])
