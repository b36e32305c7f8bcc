"""verl's files push adapters into one release's real LoRA manager: ``python verl_world.py JOB``.

The job is JSON: verl (the folder of its wheel), model, adapters (a file of torch.save: name ->
(tensors, config)), out. The answer: for each adapter what the slots hold, see world.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import packages
import world

sys.path.append(str(Path(__file__).resolve().parents[2] / "e2e" / "rl"))


def main(job):
    import vllm_moe_lora

    vllm_moe_lora.register()
    import torch
    import verl_pushing

    verl_pushing.install(job["verl"])
    from verl.utils.vllm import VLLMHijack
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    _, manager = world.build(job["model"])
    VLLMHijack.hijack()
    worker = object.__new__(type("Worker", (vLLMColocateWorkerExtension,), {}))
    worker.add_lora = manager.add_adapter
    answer = {"status": vllm_moe_lora.status()}
    for name, (tensors, config) in torch.load(job["adapters"]).items():
        manager.remove_adapter(123)  # as update_weights_from_ipc does first
        try:
            worker._update_weights(list(tensors.items()), config, base_sync_done=True)
        except Exception as error:
            answer[name] = f"{type(error).__name__}: {error}"
            continue
        modules = manager._adapter_manager.modules
        answer[name] = {key: world.slots(module) for key, module in modules.items()}
    torch.save(answer, job["out"])


if __name__ == "__main__":
    packages.install()
    with open(sys.argv[1]) as file:
        main(json.load(file))
    os._exit(0)
