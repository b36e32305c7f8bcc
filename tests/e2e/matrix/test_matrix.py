"""Engine settings x adapters x requests x order of loads, drawn; every answer == merged.

    pytest tests/e2e/matrix                                  the same draws in every run
    pytest tests/e2e/matrix --minutes 20                     new draws; it shrinks what it finds
    pytest tests/e2e/matrix --minutes 20 --hypothesis-seed N the draws of another run

With MOE_LORA_ALL=1 in the environment engines of two processes are drawn, too.

What is compared is which adapter an answer is of, in fp32 to 2e-3; that no factor is ignored is for
the tests of one thing at a time. Base answers are compared with an engine without LoRA, too.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import time
from pathlib import Path

import drawn
import expected
import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from processes import PROCESSES

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("matrix_engine.py")
# Of drawing. Two minutes in all with MOE_LORA_ALL=1, where processes are drawn, too.
ALL = os.environ.get("MOE_LORA_ALL") == "1"
SECONDS = {False: 80 if ALL else 15, True: 40}


def run(case, options, steps, lora=True):
    """The answers of one engine in a process of its own."""
    adapters = {name: str(path) for name, path in case.adapters.items()} if lora else {}
    how = {name: value for name, value in options.items() if name not in ("family", "lora")}
    if lora:
        how |= {"enable_lora": True, **options["lora"]}
    job = {"model": str(case.model), "adapters": adapters, "options": how, "steps": steps}
    env = {"VLLM_MOE_LORA": "auto" if lora else "0"}
    if "tensor_parallel_size" in options:
        env |= PROCESSES
    return engine.saved_by(SCRIPT, job, env, timeout=180)[0]


def compare(oracle, options, steps):
    """Run the steps, and return what is wrong, and how many answers were compared."""
    found = expected.Compared(options, oracle)
    answers = run(oracle.case, options, steps)
    base = [
        # With a seed and a prompt in chunks bare vLLM's engine ends, see test_ordinary.py.
        {
            **step,
            "requests": [{**r, "seed": None} for r in step["requests"] if r["adapter"] is None],
        }
        for step in steps
        if step["do"] == "batch"
    ]
    # Upstream's INT4 experts want AMX, which few machines have.
    has_plain = bool(base) and options["family"] != "int4"
    plain = iter(run(oracle.case, options, base, lora=False) if has_plain else [])
    pinned = set()
    for number, (step, got) in enumerate(zip(steps, answers, strict=True)):
        if step["do"] == "batch":
            without = iter(next(plain)) if has_plain else itertools.repeat(None)
            # Bare vLLM divides the logits of drafted tokens by uninitialised memory if any request
            # of a batch is sampled, see test_ordinary.py, too.
            drafted = "speculative_config" in options and any(
                asked.get("temperature") for asked in step["requests"]
            )
            for i, (asked, one) in enumerate(zip(step["requests"], got, strict=True)):
                where = f"step {number}, request {i} ({asked['adapter']})"
                sentences = expected.refusals(options, asked["adapter"], pinned)
                if not refused(found, where, one, sentences):
                    found.request(where, asked, one)
                if asked["adapter"] is None and not drafted:
                    low = options["dtype"] != "float32"
                    if text := expected.same_base(where, asked, one, next(without), low):
                        found.wrong.append(text)
            continue
        name, where = step["adapter"], f"step {number}, {step['do']} {step['adapter']}"
        if step["do"] == "remove":
            pinned.discard(name)
        elif not refused(found, where, got, expected.refusals(options, name, pinned)):
            if step["do"] == "pin":
                pinned.add(name)
            elif step["do"] == "beam":
                found.beam(where, step, got)
    found.finish()
    return found


def refused(found, where, got, sentences):
    """Whether an adapter was refused. It has to be, with one of ``sentences`` if there are any."""
    was = isinstance(got, str) and got != "ok"
    if was != bool(sentences) or (was and not any(one in got for one in sentences)):
        found.wrong.append(f"{where}: {got if was else 'served'}; to be refused: {sentences}")
        return True
    return was


@pytest.fixture(scope="module")
def oracles(make_case):
    """oracles(family): made when it is first drawn."""

    @functools.cache
    def made(family):
        case = make_case("qwen2_moe", ("gptq", 32, True)) if family == "int4" else make_case(family)
        return expected.Oracle(expected.prepare(case))

    return made


@pytest.mark.parametrize(
    "processes",
    [pytest.param(False, id="one"), pytest.param(True, id="processes", marks=pytest.mark.long)],
)
@pytest.mark.timeout(0)  # --minutes may ask for more; each engine has a limit of its own
def test_drawn(oracles, request, processes):
    minutes = request.config.getoption("--minutes")
    given_seed = request.config.getoption("--hypothesis-seed") or ""
    own = random.randrange(10**6) if minutes else 0
    first = int(given_seed) if given_seed.isdigit() else own
    end, seen, answers = time.monotonic() + (60 * minutes or SECONDS[processes]), set(), []

    def draw(number):
        failed = []

        @seed(number)
        @settings(
            max_examples=8,
            deadline=None,
            database=None,
            print_blob=False,
            phases=[Phase.generate, *([Phase.shrink] if minutes else [])],
            suppress_health_check=list(HealthCheck),
        )
        @given(drawn.engines(processes))
        def test(example):
            options, steps = example
            # Hypothesis varies each draw a few times. Other settings are worth more of the time.
            if not failed and (time.monotonic() > end or repr(options) in seen):
                return
            seen.add(repr(options))
            note(f"--hypothesis-seed={number}")
            failed.append(example)
            found = compare(oracles(options["family"]), options, steps)
            if found.wrong:
                print(
                    "\n".join(found.wrong), options, sep="\n", flush=True
                )  # it may shrink for long
            assert not found.wrong, "\n".join(found.wrong)
            failed.pop()
            answers.append(found.answers)

        test()

    for number in itertools.count(first):
        print(f"--hypothesis-seed={number}: {len(answers)} engines, {sum(answers)} answers")
        if time.monotonic() > end:
            break
        draw(number)
    assert sum(answers) > 0
