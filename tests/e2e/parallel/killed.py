"""A child: one of two worker processes is killed while requests run and an adapter is loaded.

python killed.py '{"model": folder, "adapters": {name: folder}, "rank": 0, 1 or null}'; the answer
is JSON: for each call how it ended, and after how many seconds. null is the engine's process.

With "api": "LLM" it is the offline engine, whose calls come one after the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time

import forked  # noqa: F401
import psutil
from traffic import OPTIONS, PROMPT
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

LIMIT = 60


def kill_worker(rank):
    """kill -9, as by the kernel if there is no memory; None: of the engine. Returns all workers."""
    started = [p for core in psutil.Process().children() for p in core.children()]
    started = [p for p in started if "resource_tracker" not in " ".join(p.cmdline())]
    workers = sorted(started, key=lambda p: p.pid)  # in the order of ranks
    assert len(workers) == 2, workers
    killed = workers[0].parent() if rank is None else workers[rank]
    killed.send_signal(signal.SIGKILL)
    return workers


def runs(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(error):
    return f"{type(error).__name__}: {error}"


class Calls:
    """Calls and how they ended."""

    def __init__(self):
        self.found, self.tasks = {}, {}

    def begin(self, name, call):
        self.tasks[name] = asyncio.create_task(self._watched(name, call))

    async def _watched(self, name, call):
        begun = time.monotonic()
        try:
            self.found[name] = str(await call)
        except Exception as error:
            self.found[name] = ended(error)
        print(f"{name}: {self.found[name]} after {time.monotonic() - begun:.1f} s", flush=True)


async def ask(llm, lora, name, running=None, number=200):
    """Greedy tokens; ``running`` is set at the first of them."""
    params = SamplingParams(temperature=0, max_tokens=number, ignore_eos=True, detokenize=False)
    tokens = []
    async for output in llm.generate({"prompt_token_ids": PROMPT}, params, name, lora_request=lora):
        tokens = list(output.outputs[0].token_ids)
        if running is not None:
            running.set()
    return f"{len(tokens)} tokens"


async def story(job):
    loras = {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(job["adapters"].items(), start=1)}
    options = OPTIONS if loras else {k: v for k, v in OPTIONS.items() if "lora" not in k}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options, model=job["model"]))
    a, b, c = (loras.get(name) for name in "abc")
    await ask(llm, a, "warm", number=2)
    calls, running = Calls(), [asyncio.Event(), asyncio.Event()]
    if job["busy"]:
        calls.begin("base", ask(llm, None, "base", running[0]))
        calls.begin("a", ask(llm, a, "a", running[1]))
        await asyncio.gather(*(one.wait() for one in running))
    if loras:  # its load has begun, and not ended
        calls.begin("b", ask(llm, b, "b"))
        await asyncio.sleep(job.get("after", 0.01))
    workers = kill_worker(job["rank"])
    print("killed", flush=True)
    calls.begin("at once", ask(llm, None, "at once"))
    if loras:
        calls.begin("c", ask(llm, c, "c"))
        calls.begin("add_lora", llm.add_lora(c))
    await asyncio.sleep(1)
    calls.begin("a second later", ask(llm, a, "a second later"))
    await asyncio.wait(calls.tasks.values(), timeout=LIMIT)
    calls.begin("afterwards", ask(llm, a, "afterwards"))
    await asyncio.wait([calls.tasks["afterwards"]], timeout=10)
    found = {name: calls.found.get(name, "hangs") for name in calls.tasks}
    end = time.monotonic() + 20  # vLLM terminates the other worker, then kills it
    while (left := sum(map(runs, workers))) and time.monotonic() < end:
        await asyncio.sleep(0.2)
    return {"calls": found, "errored": llm.errored, "workers left": left}


def offline(job):
    loras = {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(job["adapters"].items(), start=1)}
    options = OPTIONS if loras else {k: v for k, v in OPTIONS.items() if "lora" not in k}
    llm = LLM(job["model"], **options)
    a, b = (loras.get(name) for name in "ab")
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": PROMPT}
    llm.generate([prompt], params, lora_request=a, use_tqdm=False)
    found = {}
    if job["busy"]:
        threading.Timer(0.3, kill_worker, [job["rank"]]).start()
    else:
        kill_worker(job["rank"])
    for name, lora in (("first", a if job["busy"] else b), ("second", b)):
        try:
            for _ in range(20 if name == "first" else 1):
                llm.generate([prompt] * 2, params, lora_request=[None, lora], use_tqdm=False)
            found[name] = "served"
        except Exception as error:
            found[name] = ended(error)
        print(name, found[name], flush=True)
    return {"calls": found}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    answer = offline(job) if job.get("api") == "LLM" else asyncio.run(story(job))
    print("@" + json.dumps(answer), flush=True)
    os._exit(0)
