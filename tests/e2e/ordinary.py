"""A child that does with an engine what users do; each function is one story, its answer is JSON.

python ordinary.py STORY '{"model": folder, "adapters": {name: folder}, ...}'
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

PROMPT = [5, 9, 11, 300, 17, 44, 2, 8]


OPTIONS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_logprobs": 512,
    "dtype": "float32",
    "enable_lora": True,
    "max_lora_rank": 16,
}


def start(job, **options):
    return LLM(job["model"], **OPTIONS, **options)


def requests(job):
    return {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(job["adapters"].items(), start=1)}


def said(call):
    """The text of what ``call`` raises, "" if it does not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def tokens(llm, *loras, number=4, prompt=PROMPT, **how):
    params = SamplingParams(
        temperature=0, max_tokens=number, ignore_eos=True, detokenize=False, **how
    )
    asked = [{"prompt_token_ids": prompt}] * len(loras)
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


def seeds(job):
    """Seeded requests; their prompts are computed in steps of job["step"] tokens."""
    llm = start(job, max_loras=2, max_num_batched_tokens=job["step"])
    asked = [None, *requests(job).values()]
    params = [
        SamplingParams(temperature=1, seed=seed, max_tokens=6, ignore_eos=True, detokenize=False)
        for seed in range(len(asked))
    ]
    prompts = [{"prompt_token_ids": PROMPT * 3}] * len(asked)
    outputs = llm.generate(prompts, params, lora_request=asked, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def drafts(job):
    """Sampled requests whose tokens are drafted; for each its prompt, tokens and all scores."""
    words = {"num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = start(
        job,
        max_loras=2,
        async_scheduling=False,  # upstream refuses both
        logprobs_mode="processed_logprobs",
        speculative_config={"method": "ngram", **words},
    )
    asked = [None, *requests(job).values()]
    params = [
        SamplingParams(
            temperature=heat, seed=1, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=512
        )
        for heat in (0.5, 0, 2)
    ]
    prompts = [{"prompt_token_ids": PROMPT * 3}] * len(asked)
    outputs = llm.generate(prompts, params, lora_request=asked, use_tqdm=False)
    found = []
    for output, how in zip(outputs, params, strict=True):
        one = output.outputs[0]
        scores = [[step[t].logprob for t in range(512)] for step in one.logprobs]
        found.append((PROMPT * 3, list(one.token_ids), how.temperature, scores))
    return found


def pinned(job):
    """A batch that needs the place of a pinned adapter, in its slots and in memory."""
    llm, loras = start(job, max_loras=2, max_cpu_loras=2), requests(job)
    a, b, c = loras.values()
    want = [tokens(llm, one)[0] for one in (None, a, b, c)]
    engine = llm.llm_engine
    engine.add_lora(a)
    engine.pin_lora(a.lora_int_id)
    batches = [tokens(llm, None, b, c), tokens(llm, None, a, b, c), tokens(llm, a)]
    manager = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    slots = manager.lora_manager._adapter_manager._active_adapters
    found = {
        "want": want,
        "batches": batches,
        "held": sorted(engine.list_loras()),
        "pinned": sorted(slots.pinned_items),
    }
    tokens(llm, b, c)  # its place is taken once more
    engine.add_lora(a)
    engine.pin_lora(a.lora_int_id)
    found["again"] = sorted(slots.pinned_items)
    tokens(llm, b, c)
    engine.remove_lora(a.lora_int_id)
    tokens(llm, a)
    return {**found, "removed": sorted(slots.pinned_items)}


def replaced(job):
    """New weights under an old name and path, by `LLMEngine.add_lora` and load_inplace."""
    llm, loras = start(job, max_loras=2, block_size=32), requests(job)
    prompt = PROMPT * 5  # a whole block of it is kept in the prefix cache
    want = [tokens(llm, one, number=8, prompt=prompt)[0] for one in loras.values()]
    paths = [one.lora_path for one in loras.values()]
    folder, found = f"{paths[0]}-moving", []
    for path, inplace in zip(paths, (False, True), strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(path, folder)
        llm.llm_engine.add_lora(LoRARequest("moving", 9, folder, load_inplace=inplace))
        moving = LoRARequest("moving", 9, folder)
        found.append(tokens(llm, moving, number=8, prompt=prompt)[0])
    return {"want": want, "found": found}


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


def steady(job):
    """Requests for one adapter never pause, its files are gone, and another one wants its place."""
    from vllm_moe_lora.loading import admit

    admit.ROOM_SECONDS = 0.5
    a, b = requests(job).values()
    params = SamplingParams(
        temperature=0,
        max_tokens=24,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    done = {"a": [], "b": []}

    async def ask(llm, number, lora):
        async for output in llm.generate(
            {"prompt_token_ids": PROMPT}, params, f"{lora.lora_name}-{number}", lora_request=lora
        ):
            done["a" if lora is a else "b"].append(list(output.outputs[0].token_ids))

    async def story():
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**OPTIONS, model=job["model"], max_loras=1, max_cpu_loras=1)
        )
        await ask(llm, "first", b)
        await ask(llm, "first", a)
        shutil.rmtree(a.lora_path)
        tasks = []
        for number in range(12):  # a new one before the last has ended
            tasks.append(asyncio.create_task(ask(llm, number, a)))
            if number == 3:
                tasks.append(asyncio.create_task(ask(llm, number, b)))
            await asyncio.sleep(0.15)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await ask(llm, "last", b)
        llm.shutdown()
        return [str(one) for one in found if one is not None]

    errors = asyncio.run(story())
    return {"errors": errors, **done}


async def answer(llm, params, number, lora):
    """The tokens of one request to a server."""
    async for output in llm.generate(
        {"prompt_token_ids": PROMPT}, params, str(number), lora_request=lora
    ):
        last = list(output.outputs[0].token_ids)
    return last


def pinned_online(job):
    """All slots hold pinned adapters, one of them is removed, and an adapter has no files."""
    a, b = requests(job).values()
    lost = LoRARequest("lost", 3, f"{a.lora_path}-is-not-there")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    numbers = iter(range(99))

    async def story():
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**OPTIONS, model=job["model"], max_loras=1, max_cpu_loras=2)
        )

        async def ask(lora):
            try:
                return await answer(llm, params, next(numbers), lora)
            except Exception as error:
                return str(error)

        found = {"before": [await ask(a), await ask(b)]}
        await llm.add_lora(a)
        await llm.pin_lora(a.lora_int_id)
        found["pinned"] = [await ask(a), await ask(b), await ask(a)]
        await llm.remove_lora(a.lora_int_id)
        found["removed"] = [await ask(b), await ask(a)]
        found["lost"] = [await ask(lost), await ask(b)]
        llm.shutdown()
        return found

    return asyncio.run(story())


def displaced_online(job):
    """A server's batch takes the place of a pinned adapter; then it is pinned again."""
    from vllm_moe_lora.loading import admit

    admit.ROOM_SECONDS = 0  # no load waits until others are idle
    a, b, c = requests(job).values()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    numbers = iter(range(99))

    async def story():
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**OPTIONS, model=job["model"], max_loras=2, max_cpu_loras=2)
        )

        async def ask(lora):
            return await answer(llm, params, next(numbers), lora)

        want = [await ask(one) for one in (a, b, c)]
        await llm.add_lora(a)
        await llm.pin_lora(a.lora_int_id)
        both = await asyncio.gather(ask(b), ask(c))
        held = sorted(await llm.engine_core.list_loras_async())
        await llm.pin_lora(a.lora_int_id)
        again = sorted(await llm.engine_core.list_loras_async())
        found = {"want": want, "got": [await ask(a), *both], "held": held, "again": again}
        llm.shutdown()
        return found

    return asyncio.run(story())


if __name__ == "__main__":
    print("@" + json.dumps(globals()[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
    os._exit(0)
