"""Child: layers that `vllm-moe-lora tune` takes out of a model's config.json; prints JSON.

``argv``: the model's folder, the tensor parallel size, and 1 for expert parallelism. In Triton's
interpreter, with Marlin's operators in loops; the model is the release's own, built without memory
as rank 0 of process groups that do not exist.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import bf16_exact  # noqa: F401
import marlin
import packages
import quantised_experts as layers
import stage

TOKENS = 7


def main(folder, tensor_parallel, expert_parallel):
    packages.modules()
    import vllm
    import vllm.lora.layers.fused_moe

    import vllm_moe_lora
    from vllm_moe_lora import probe
    from vllm_moe_lora.layers.gpu import choose
    from vllm_moe_lora.tuning import clock, model_layers, session

    stage._operators()
    layers.method_of("gptq")
    marlin.stand_in()
    layers.choose("gptq")
    os.environ["VLLM_MOE_LORA"] = "1"
    with stage.as_cuda():
        vllm_moe_lora.register()
    question = probe.Question(
        folder, int(tensor_parallel), expert_parallel == "1", max_loras=2, max_lora_rank=8
    )
    with model_layers.built(question, "cpu") as found:
        [shape] = found.shapes
        served = found.served(shape)
        more = {"on_gpu": False, "checked": (TOKENS,), "sizes": (2,), "served": served}
        here = choose.conditions("cpu")
        one = session.Session(served.shape, here, clock.StubClock(), lambda *_: None, **more)
        one.check()
        one.measure(float("inf"))
    answer = {
        "release": vllm.__version__.partition("+")[0],
        "asked": str(shape),
        "as_served": str(served.shape),
        "shape": vars(served.shape),
        "map": None if one.layer.expert_map is None else one.layer.expert_map.tolist(),
        "refused": one.refused,
        "remarks": one.remarks,
        "timed": sorted(one.times[2]),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
