"""A child that pushes adapters from memory into an engine; each function is one story.

python pushing.py STORY JOB RESULT. JOB is JSON: model, prompts, and adapters (name -> folder, whose
files are read once and then deleted).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_moe_lora.tiny import engine
from vllm_moe_lora.tiny.oracle import load_tensors

HOME = engine.home()
push = importlib.import_module(f"{HOME}.rl").push
VOCAB = 512
OPTIONS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_logprobs": VOCAB,
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 2,
    "max_cpu_loras": 2,
    "max_lora_rank": 16,
    "block_size": 32,
    "worker_extension_cls": f"{HOME}.rl.Worker",
}
opened = []  # files of adapters that anybody opened


def taken(job):
    """name -> (tensors, config); the files are gone after it, and opening any is noted."""
    found = {}
    for name, folder in job["adapters"].items():
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        found[name] = {k: t.clone() for k, t in load_tensors(Path(folder)).items()}, config
        shutil.rmtree(folder)
    sys.addaudithook(_watch)
    return found


def _watch(event, args):
    if event == "open" and isinstance(args[0], str) and "adapter" in Path(args[0]).name:
        opened.append(args[0])


def greedy(number=1):
    return SamplingParams(
        temperature=0, max_tokens=number, ignore_eos=True, detokenize=False, logprobs=VOCAB
    )


def rows(output):
    """Log-probs [tokens, vocab] of an output."""
    steps = output.outputs[0].logprobs
    return torch.tensor([[step[token].logprob for token in range(VOCAB)] for step in steps])


def said(call, *args, **more):
    try:
        call(*args, **more)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def bad(tensors, config):
    """What must be refused: kind -> (tensors, config)."""
    first, last = min(tensors), max(k for k in tensors if "experts" in k)
    nan = tensors[last].clone()
    nan.view(-1)[-1] = float("nan")
    wide = {k: t.repeat(9, 1) if "lora_A" in k else t.repeat(1, 9) for k, t in tensors.items()}
    return {
        "missing": ({k: t for k, t in tensors.items() if k != last}, config),
        "foreign": ({**tensors, "x.lost_proj.lora_A.weight": torch.ones(2, 2)}, config),
        "nan": ({**tensors, last: nan}, config),
        "shape": ({**tensors, first: tensors[first][:, :-1]}, config),
        "rank": (wide, {**config, "r": 72}),
        "integers": ({**tensors, last: tensors[last].int()}, config),
        "dora": (tensors, {**config, "use_dora": True}),
        "nothing": ({}, config),
    }


def steps(job):
    """Successive versions under one name, bad ones between them, an engine in this process."""
    adapters, prompts = taken(job), [{"prompt_token_ids": p} for p in job["prompts"]]
    llm = LLM(job["model"], **OPTIONS)

    def ask(request):
        outputs = llm.generate(prompts, greedy(), lora_request=request, use_tqdm=False)
        return torch.cat([rows(one) for one in outputs]), [one.num_cached_tokens for one in outputs]

    found = {"base": ask(None)[0], "versions": [], "cached": [], "refused": {}, "same": []}
    request = None
    for tensors, config in adapters.values():
        request = push(llm, "policy", tensors, config)
        answers, cached = ask(request)
        again, hits = ask(request)
        found["versions"].append(answers)
        found["cached"].append((max(cached), max(hits)))
        found["again"] = (again - answers).abs().max().item()
    before = ask(request)[0]
    for kind, damaged in bad(tensors, config).items():
        found["refused"][kind] = said(push, llm, "policy", *damaged)
        found["same"].append(torch.equal(ask(request)[0], before))

    # Inside of the worker, where the front end does not see it.
    names = list(adapters)
    for name in names[:2]:
        tensors, config = adapters[name]
        args = ("inside", tensors, config, 5)
        llm.collective_rpc("moe_lora_push", args=args)
        inside = type(request)("inside", 5, "vllm-moe-lora-memory:/inside")
        answers, cached = ask(inside)
        found["versions"].append(answers)
        found["cached"].append((max(cached), max(ask(inside)[1])))

    # Requests in flight: refused, or aborted.
    engine = llm.llm_engine
    engine.add_request("r", prompts[0], greedy(20), lora_request=request)
    engine.step()
    found["in use"] = said(push, llm, "policy", *adapters[names[0]])
    found["abort"] = said(push, llm, "policy", *adapters[names[0]], in_flight="abort")
    found["left"] = engine.has_unfinished_requests()
    found["versions"].append(ask(request)[0])

    # More than fit: the oldest goes, and says so when it is asked for.
    for name in ("other", "third"):
        push(llm, name, *adapters[names[1]])
    found["gone"] = said(ask, request)
    found["kept"] = torch.equal(ask(None)[0], found["base"])
    config = llm.llm_engine.vllm_config.parallel_config
    config.worker_extension_cls = ""
    found["off"] = said(push, llm, "policy", *adapters[names[0]])
    found["opened"] = opened
    return found


async def _serve(job):
    adapters, prompts = taken(job), [{"prompt_token_ids": p} for p in job["prompts"]]
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(job["model"], **OPTIONS))
    found, numbers = {}, iter(range(1000))

    async def ask(request, number=4, prompt=2):
        async for output in engine.generate(
            prompts[prompt], greedy(number), f"r{next(numbers)}", lora_request=request
        ):
            last = output
        return list(last.outputs[0].token_ids), last.outputs[0].finish_reason

    (one, two, *_) = adapters.values()
    request = await push(engine, "policy", *one)
    found["one"] = await ask(request, 24)
    found["base"] = await ask(None, 24)
    await push(engine, "policy", *two)
    found["two"] = await ask(request, 24)
    # Back to the first while requests run: theirs is the second to their end, later ones wait.
    running = [asyncio.create_task(ask(request, 24)), asyncio.create_task(ask(None, 24))]
    await asyncio.sleep(0.1)
    pushing = asyncio.create_task(push(engine, "policy", *one))
    await asyncio.sleep(0.02)
    later = asyncio.create_task(ask(request, 24))
    found["running"], found["other"], found["later"] = await asyncio.gather(*running, later)
    await pushing
    # Two at once, and one that is refused among them.
    damaged = {k: t for k, t in two[0].items() if k != min(two[0])}
    found["at once"] = [
        repr(one)
        for one in await asyncio.gather(
            push(engine, "policy", *one),
            push(engine, "policy", damaged, two[1]),
            push(engine, "policy", *two),
            return_exceptions=True,
        )
    ]
    found["after"] = await ask(request, 24)
    await engine.collective_rpc("reload_weights")  # the same base; the adapter stays
    found["reloaded"] = await ask(request, 24)
    # Aborted on request.
    running = asyncio.create_task(ask(request, 200))
    await asyncio.sleep(0.2)
    await push(engine, "policy", *one, in_flight="abort")
    found["aborted"] = (await running)[1]
    found["swapped"] = await ask(request, 24)
    mine = f"moe-lora-{os.getpid()}-"
    found["segments"] = [name for name in os.listdir("/dev/shm") if name.startswith(mine)]
    pushing = asyncio.create_task(push(engine, "policy", *two))
    await asyncio.sleep(0)
    engine.shutdown()
    try:
        await asyncio.wait_for(pushing, 20)
        found["down"] = "ok"
    except BaseException as error:
        found["down"] = f"{type(error).__name__}: {error}"
    found["opened"] = opened
    return found


def serve(job):
    return asyncio.run(_serve(job))


if __name__ == "__main__":
    story, spec, result = sys.argv[1:]
    torch.save(globals()[story](json.loads(Path(spec).read_text())), result)
    os._exit(0)
