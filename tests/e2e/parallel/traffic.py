"""A child: adapters come and go on two worker processes under traffic.

python traffic.py '{"model": folder, "adapters": {name: folder}}'; the answer is JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

import forked  # noqa: F401
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

PROMPT = [5, 9, 11, 300, 17, 44, 2, 8]
OPTIONS = {
    "tensor_parallel_size": 2,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "dtype": "float32",
    "enable_lora": True,
    "max_lora_rank": 16,
    "max_loras": 2,
    "max_cpu_loras": 2,
}


async def ask(llm, lora, name, number=12):
    """The greedy tokens, or the text of the error."""
    params = SamplingParams(
        temperature=0,
        max_tokens=number,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt, found = {"prompt_token_ids": PROMPT}, []
    try:
        async for output in llm.generate(prompt, params, name, lora_request=lora):
            found = list(output.outputs[0].token_ids)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return found


async def story(job):
    loras = {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(job["adapters"].items(), start=1)}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**OPTIONS, model=job["model"]))
    names = [None, *(name for name in loras if name != "damaged")]
    found = {"alone": [await ask(llm, loras.get(n), f"alone-{n}") for n in names]}
    tasks = []
    for number in range(4):
        for name in [*names, "damaged"]:
            tasks.append(asyncio.create_task(ask(llm, loras.get(name), f"{number}-{name}")))
            await asyncio.sleep(0.02)
        await llm.remove_lora(loras[names[1 + number % 3]].lora_int_id)
    found["traffic"] = await asyncio.gather(*tasks)
    return found


if __name__ == "__main__":
    print("@" + json.dumps(asyncio.run(story(json.loads(sys.argv[1])))), flush=True)
    os._exit(0)
