"""A child that runs a job and also brings back the MoE LoRA buffers of the slot of each adapter.

It says, too, which names of vLLM's are no longer what they were before plugins were loaded: the
names come with the environment variable WATCHED, one a line.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys

import torch
import vllm.lora.utils
from vllm.lora.model_manager import LoRAModelManager


def _held(target):
    """What vars() of the owner holds, so that a class's own attributes count and no inherited."""
    module, _, path = target.partition(":")
    try:
        owner = importlib.import_module(module)
    except ImportError:
        return None  # a module that this release does not have has no copy of the name
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return inspect.getattr_static(owner, name)


WATCHED = os.environ["WATCHED"].split("\n")
BEFORE = {name: _held(name) for name in WATCHED}
CLASSES = vllm.lora.utils._all_lora_classes


def _stacks(module):
    return {
        name: [one.clone() for one in getattr(module, name)]
        for name in (f"{w}_lora_{side}_stacked" for w in ("w13", "w2") for side in "ab")
    }


def main(spec, result):
    from vllm_moe_lora.tiny import engine  # not before `BEFORE`: it imports the plugin

    managers = []
    made = LoRAModelManager.__init__

    def init(self, *args, **more):
        made(self, *args, **more)
        managers.append(self)

    LoRAModelManager.__init__ = init
    engine.main(spec, result)
    (manager,) = managers
    buffers = {
        name: _stacks(module)
        for name, module in manager.modules.items()
        if hasattr(module, "w13_lora_a_stacked")
    }
    torch.save((manager.lora_index_to_id, buffers), os.environ["BUFFERS"])
    now = vllm.lora.utils._all_lora_classes
    from vllm.platforms import current_platform

    import vllm_moe_lora

    facts = {
        "changed": [name for name in WATCHED if _held(name) is not BEFORE[name]],
        "classes": [c.__module__ for c in now[: len(now) - len(CLASSES)]],
        "upstream's classes": all(
            a is b for a, b in zip(now[-len(CLASSES) :], CLASSES, strict=True)
        ),
        "wrappers": sorted({type(manager.modules[name]).__module__ for name in buffers}),
        "platform": [current_platform.is_out_of_tree(), current_platform.is_cpu()],
        "status": vllm_moe_lora.status(),
    }
    print("FACTS", json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
