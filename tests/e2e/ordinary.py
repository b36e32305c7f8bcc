"""A child that does with an engine what users do; each function is one story, its answer is JSON.

python ordinary.py STORY '{"model": folder, "adapters": {name: folder}, ...}'
"""

from __future__ import annotations

import json
import os
import shutil
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

PROMPT = [5, 9, 11, 300, 17, 44, 2, 8]


def start(job, **options):
    return LLM(
        job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_logprobs=512,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        **options,
    )


def requests(job):
    return {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(job["adapters"].items(), start=1)}


def said(call):
    """The text of what ``call`` raises, "" if it does not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def tokens(llm, *loras, number=4, **how):
    params = SamplingParams(
        temperature=0, max_tokens=number, ignore_eos=True, detokenize=False, **how
    )
    asked = [{"prompt_token_ids": PROMPT}] * len(loras)
    outputs = llm.generate(asked, params, lora_request=list(loras), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(job):
    """[request][position][token] of prompts of several lengths, base and adapters in one batch."""
    llm, loras = start(job, max_loras=4), requests(job)
    params = SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=512
    )
    rounds = []
    for batch in job["batches"]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in batch],
            params,
            lora_request=[loras.get(name) for _, name in batch],
            use_tqdm=False,
        )
        rounds.append(
            [
                [[step[t].logprob for t in range(512)] for step in output.prompt_logprobs[1:]]
                for output in outputs
            ]
        )
    return rounds


def identity(job):
    """Ids that are none, an id of another adapter, slots that are all pinned."""
    llm, loras = start(job, max_loras=2, max_cpu_loras=4), requests(job)
    a, b, c = loras.values()
    first = tokens(llm, None, a, b)
    found = {}
    for name, number in (("huge", 2**70), ("a float", 1.5), ("a bool", True)):
        odd = LoRARequest(name, 7, b.lora_path)
        odd.lora_int_id = number
        found[name] = said(lambda odd=odd: tokens(llm, None, odd))
    found["taken"] = said(lambda: tokens(llm, LoRARequest("another", 1, b.lora_path)))
    llm.llm_engine.add_lora(c)
    for one in (a, b):
        llm.llm_engine.add_lora(one)
        llm.llm_engine.pin_lora(one.lora_int_id)
    found["pinned"] = said(lambda: tokens(llm, None, c))
    found["same"] = tokens(llm, None, a, b) == first
    llm.llm_engine.remove_lora(a.lora_int_id)
    found["after"] = said(lambda: tokens(llm, None, c))
    return found


def evicted(job):
    """Files of an adapter vanish while a request uses it, and another adapter needs its place."""
    llm, loras = start(job, max_loras=1, max_cpu_loras=1), requests(job)
    a, b = loras.values()
    want = [tokens(llm, one, number=24)[0] for one in (a, b)]
    base = tokens(llm, None)
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    got = {}

    def step():
        for output in engine.step():
            got[output.request_id] = list(output.outputs[0].token_ids)

    engine.add_request("a", {"prompt_token_ids": PROMPT}, params, lora_request=a)
    for _ in range(3):
        step()
    shutil.rmtree(a.lora_path)
    engine.add_request("b", {"prompt_token_ids": PROMPT}, params, lora_request=b)
    while engine.has_unfinished_requests():
        step()
    same = sorted(found in want for found in got.values())
    return {"same": same, "asked": len(got), "base": tokens(llm, None) == base}


if __name__ == "__main__":
    print("@" + json.dumps(globals()[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
    os._exit(0)
