"""A child: one engine whose norms get noise. Arguments: the job as JSON, and the result's file.

"steps" of the job are lists: ["ask"], ["noise", step, {arguments}], ["clear"], ["busy", step] for
noise while a request runs, ["load", factor] for norms that are loaded again, times ``factor``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_moe_lora.rl import noise

job, result = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
llm = LLM(
    job["model"],
    skip_tokenizer_init=True,
    enforce_eager=True,
    max_model_len=256,
    max_num_seqs=8,
    max_logprobs=512,
    dtype=job["dtype"],
    block_size=32,
    enable_return_routed_experts=True,
    enable_lora=bool(job["adapter"]),
    worker_extension_cls="vllm_moe_lora.rl.Worker",
    **job["options"],
)
adapter = LoRARequest("a", 1, job["adapter"]) if job["adapter"] else None
sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=512, detokenize=False)


def ask():
    found = []
    for lora in (None, adapter) if adapter else (None,):
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        for output in llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False):
            row = torch.full((512,), float("-inf"))
            for token, one in output.outputs[0].logprobs[0].items():
                row[token] = one.logprob
            routes = torch.from_numpy(output.outputs[0].routed_experts.astype("int64"))
            found.append((row, routes, output.num_cached_tokens))
    return found


def weights(worker=None):
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return {name: p.data for name, p in model.named_parameters() if "norm" in name}


def do(what, *args):
    if what == "ask":
        return ask()
    if what == "noise":
        return noise.set_noise(llm, args[0], 100, **args[1])
    if what == "clear":
        return noise.clear_noise(llm)
    if what == "load":
        for data in weights().values():
            data.mul_(args[0])
        return None
    engine = llm.llm_engine
    engine.add_request("busy", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=9))
    engine.step()
    try:
        return do("noise", args[0], {})
    finally:
        engine.abort_request(["busy"])
        while engine.has_unfinished_requests():
            engine.step()


found = []
for step in job["steps"]:
    try:
        answer = do(*step)
    except Exception as error:  # any error is an answer
        answer = f"{type(error).__name__}: {error}"
    found.append((answer, {name: data.clone() for name, data in weights().items()}))
torch.save(found, result)
