"""A child that does the drawn steps with one engine: python matrix_engine.py JOB RESULT."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from vllm import LLM, PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams

VOCAB = 512


def params_of(asked, pooling):
    if pooling:
        return PoolingParams(task="embed")
    return SamplingParams(
        temperature=asked.get("temperature", 0),
        seed=asked.get("seed"),
        n=asked.get("n", 1),
        max_tokens=asked["max_tokens"],
        ignore_eos="regex" not in asked,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        logprobs=VOCAB,
        prompt_logprobs=VOCAB if asked.get("prompt_logprobs") else None,
        structured_outputs=StructuredOutputsParams(regex=asked["regex"])
        if "regex" in asked
        else None,
    )


def table(entries):
    """[positions, vocab] of vLLM's dicts."""
    found = torch.full((len(entries), VOCAB), float("nan"))
    for row, entry in zip(found, entries, strict=True):
        tokens = torch.tensor(list(entry))
        row[tokens] = torch.tensor([one.logprob for one in entry.values()])
    return found


def batch(llm, loras, step, pooling):
    """For each request its answer, or the text of its error."""
    engine, asked = llm.llm_engine, step["requests"]
    answers, waiting, now = {}, sorted(range(len(asked)), key=lambda i: asked[i]["at"]), 0
    while waiting or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            now = max(now, asked[waiting[0]]["at"])
        while waiting and asked[waiting[0]]["at"] <= now:
            i = waiting.pop(0)
            one = asked[i]
            try:
                engine.add_request(
                    str(i),
                    {"prompt_token_ids": one["prompt"]},
                    params_of(one, pooling),
                    lora_request=loras.get(one["adapter"]),
                    priority=one["priority"],
                )
            except Exception as error:
                answers[i] = f"{type(error).__name__}: {error}"
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = answer(output, pooling)
        now += 1
        gone = [str(i) for i, one in enumerate(asked) if one.get("abort") == now]
        if gone:
            engine.abort_request(gone)
    return [answers.get(i) for i in range(len(asked))]


def answer(output, pooling):
    if pooling:
        return output.outputs.data.float()
    choices = [(list(one.token_ids), table(one.logprobs)) for one in output.outputs]
    prompt = output.prompt_logprobs
    return choices, None if prompt is None else table(prompt[1:])


def call(llm, loras, step):
    engine, lora = llm.llm_engine, loras[step["adapter"]]
    try:
        if step["do"] == "remove":
            engine.remove_lora(lora.lora_int_id)
        else:
            engine.add_lora(lora)
        if step["do"] == "pin":
            engine.pin_lora(lora.lora_int_id)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def beam(llm, loras, step):
    """[(tokens, the sum of their log-probs)]"""
    params = BeamSearchParams(beam_width=step["width"], max_tokens=4, ignore_eos=True)
    prompt = {"prompt_token_ids": step["prompt"]}
    try:
        (found,) = llm.beam_search([prompt], params, lora_request=loras.get(step["adapter"]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    length = len(step["prompt"])
    return [(one.tokens[length:], one.cum_logprob) for one in found.sequences]


def main(file, result):
    job = json.loads(Path(file).read_text())
    if "tensor_parallel_size" in job["options"]:
        importlib.import_module("forked")  # of tests/e2e/parallel
    llm = LLM(
        job["model"],
        enforce_eager=True,
        max_model_len=256,
        max_logprobs=VOCAB,
        disable_log_stats=True,
        **job["options"],
    )
    loras = {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(job["adapters"].items(), start=1)}
    pooling = "runner" in job["options"]
    answers = []
    for step in job["steps"]:
        if step["do"] == "batch":
            answers.append(batch(llm, loras, step, pooling))
        else:
            answers.append((beam if step["do"] == "beam" else call)(llm, loras, step))
    torch.save(answers, result)
    print("@done", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
