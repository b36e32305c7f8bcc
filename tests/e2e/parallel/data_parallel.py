"""A child with one server's engine, `AsyncLLM`, of two data-parallel ranks: two processes, gloo.

python data_parallel.py JOB RESULT: the job is JSON with "model", "adapters" (name -> folder),
"options", "stories": functions of this file, and what these take. What they return is saved to the
file RESULT.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import forked  # noqa: F401 -- its workers are forks
import gloo
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

VOCAB = 512


class Server:
    """One engine of two ranks, and what is asked of it."""

    def __init__(self, job):
        given = {"max_loras": 2, "max_cpu_loras": 8, "max_lora_rank": 16, **job["options"]}
        args = AsyncEngineArgs(
            model=job["model"],
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            max_logprobs=VOCAB,
            data_parallel_size=2,
            enable_lora=True,
            **given,
        )
        self.engine = AsyncLLM.from_engine_args(args)
        self.number = itertools.count()
        self.adapters = {
            name: LoRARequest(name, i, path)
            for i, (name, path) in enumerate(job["adapters"].items(), start=1)
        }

    async def ask(self, rank, prompt, name=None, tokens=1, step=None):
        """Tokens and log-probs [tokens, vocab] of a request to one rank."""
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=VOCAB, detokenize=False
        )
        stream = self.engine.generate(
            {"prompt_token_ids": prompt},
            params,
            f"request {next(self.number)}",
            lora_request=self.adapters[name] if name else None,
            data_parallel_rank=rank,
        )
        async for output in stream:
            found = output.outputs[0]
            if step is not None:
                step.set()
        logprobs = torch.full((len(found.token_ids), VOCAB), float("-inf"))
        for row, entry in zip(logprobs, found.logprobs, strict=True):
            for token, logprob in entry.items():
                row[token] = logprob.logprob
        return list(found.token_ids), logprobs

    async def together(self, *asked, **how):
        """Answers to several requests at once: (rank, prompt, name) each."""
        return await asyncio.gather(*(self.ask(*one, **how) for one in asked))


async def said(awaitable):
    """The text of what it raises, "" if it does not."""
    try:
        await awaitable
    except Exception as error:
        # vLLM raises an error without text for those of one request.
        return f"{type(error).__name__}: {error.__cause__ or error}"
    return ""


async def rounds(server, job):
    """Each round's requests at once: (rank, prompt, name) each."""
    return [await server.together(*batch) for batch in job["rounds"]]


async def loads(server, job):
    """Adapters come and go on one rank while the other one generates. Returns name -> answers."""
    long, short = job["prompts"]
    first = asyncio.Event()
    # a keeps its slot: b, c and d have to follow one another in the other one.
    running = asyncio.create_task(server.ask(0, long, "a", tokens=60, step=first))
    await first.wait()
    found = {"b": [], "c": [], "d": []}
    for name in ("b", "c", "d", "b"):
        found[name].append(await server.ask(1, short, name, tokens=2))
    found["still running"] = not running.done()
    found["a"] = [await running]
    # More adapters than slots, over both ranks.
    names = ["a", "b", "c", "d", "b", "a"]
    answers = await server.together(
        *((i % 2, short, name) for i, name in enumerate(names)), tokens=5
    )
    for name, answer in zip(names, answers, strict=True):
        found[name].append(answer)
    return found


async def replaced(server, job):
    """New files for an adapter while a request of it runs; then it is removed, in use again."""
    long, short = job["prompts"]
    folder, first = Path(server.adapters["old"].lora_path), asyncio.Event()
    running = asyncio.create_task(server.ask(0, long, "old", tokens=30, step=first))
    await first.wait()
    for file in Path(job["new"]).iterdir():
        shutil.copy(file, folder / f"{file.name}.part")
        os.replace(folder / f"{file.name}.part", folder / file.name)
    again = copy.copy(server.adapters["old"])
    again.load_inplace = True
    early = running.done()
    await server.engine.add_lora(again)
    found = {"waited": running.done() and not early, "old": [await running]}
    found["new"] = list(await server.together((0, short, "old"), (1, long, "old")))
    first = asyncio.Event()
    running = asyncio.create_task(server.ask(1, short, "old", tokens=30, step=first))
    await first.wait()
    await server.engine.remove_lora(server.adapters["old"].lora_int_id)
    found["waited for removal"] = running.done()
    found["new"] += [await running, await server.ask(0, short, "old", tokens=5)]
    # Rank 1 had no requests meanwhile. It still has the adapter, and need not read it again.
    folder.rename(folder.with_name("gone"))
    found["new"].append(await server.ask(1, long, "old"))
    return found


async def refused(server, job):
    """A damaged adapter, beside requests of a good one."""
    long, short = job["prompts"]
    texts, good = await asyncio.gather(
        asyncio.gather(*(said(server.ask(rank, short, "damaged")) for rank in (0, 1, 1))),
        server.together((0, long, "a"), (1, short, "a"), tokens=20),
    )
    return {"texts": texts, "a": [*good, await server.ask(1, long, "a")]}


async def died(server, job):
    """One rank's processes end while both generate: how the requests of both end."""
    long, short = job["prompts"]
    first = asyncio.Event()
    asked = [said(server.ask(0, long, "a", tokens=200, step=first))]
    asked.append(said(server.ask(1, short, "a", tokens=200)))
    running = asyncio.gather(*asked)
    await first.wait()
    begun = time.monotonic()
    server.engine.engine_core.resources.engine_manager.processes[1].kill()
    texts = await asyncio.wait_for(running, 60)
    after = await asyncio.wait_for(said(server.ask(0, short, "a")), 60)
    return {"texts": [*texts, after], "seconds": time.monotonic() - begun}


async def stories(server, job):
    return {name: await globals()[name](server, job) for name in job["stories"]}


async def main(job, result):
    server = Server(job)
    torch.save(await stories(server, job), result)


if __name__ == "__main__":
    gloo.install()
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
