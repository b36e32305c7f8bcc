"""A child: one engine with --enable-return-routed-experts, and rounds of requests.

Its job is a JSON file: "model", "adapters" {name: folder}, "options" of `LLM`, and "rounds", lists
of requests {"prompt", "adapter", "max_tokens", "abort": steps after which it is aborted, or None,
"routes": what `extra_args` gets as routed_experts, or None, "like": "prompt" or "answer", of which
log-probs are wanted}.
The result: for each request a dict, and how many requests were preempted.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler


def main(spec, result):
    """Under a guard, because workers that are spawned import this file, too."""
    job = json.loads(Path(spec).read_text())
    options = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_logprobs": 512,
        "disable_log_stats": True,
        "dtype": "float32",
        "enable_return_routed_experts": True,
    }
    if job["adapters"]:
        options |= {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16}
    preempted, preempt = [], Scheduler._preempt_request

    def _preempt_request(self, request, *args, **more):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **more)

    Scheduler._preempt_request = _preempt_request
    engine = LLM(job["model"], **{**options, **job["options"]}).llm_engine
    adapters = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(job["adapters"].items(), start=1)
    }
    answers = [run(engine, adapters, asked, f"{i}") for i, asked in enumerate(job["rounds"])]
    engine.engine_core.shutdown()
    assert "vllm-aux-output-writer" not in {thread.name for thread in threading.enumerate()}
    torch.save((answers, len(preempted)), result)


def log_probs(entries):
    rows = torch.full((len(entries), 512), float("-inf"))
    for row, entry in zip(rows, entries, strict=True):
        for token, one in (entry or {}).items():
            row[token] = one.logprob
    return rows


def run(engine, adapters, requests, tag):
    found, aborts, step = {}, [], 0
    for i, request in enumerate(requests):
        extra = request.get("routes")
        params = SamplingParams(
            max_tokens=request["max_tokens"],
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=512 if request.get("like") else None,
            prompt_logprobs=512 if request.get("like") == "prompt" else None,
            routed_experts_prompt_start=request.get("start", 0),
            extra_args=None if extra is None else {"routed_experts": extra},
        )
        name = f"{tag}-{i}"
        found[name] = {"error": "", "finished": False}
        try:
            engine.add_request(
                name,
                {"prompt_token_ids": request["prompt"]},
                params,
                lora_request=adapters.get(request["adapter"]),
            )
        except VLLMValidationError as error:
            found[name]["error"] = str(error)
        if request.get("abort") is not None:
            aborts.append((request["abort"], name))
    while engine.has_unfinished_requests():
        for name in [name for when, name in aborts if when == step]:
            engine.abort_request([name])
        for output in engine.step():
            answer = output.outputs[0]
            if not output.finished:
                continue
            routes = answer.routed_experts
            found[output.request_id] |= {
                "finished": answer.finish_reason != "abort",
                "tokens": list(answer.token_ids),
                "cached": output.num_cached_tokens,
                "dtype": None if routes is None else str(routes.dtype),
                "routes": None if routes is None else torch.from_numpy(routes.astype("int64")),
            }
            if answer.logprobs:
                found[output.request_id]["logprobs"] = log_probs(answer.logprobs)
            if output.prompt_logprobs:
                found[output.request_id]["prompt_logprobs"] = log_probs(output.prompt_logprobs)
        step += 1
    return list(found.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
