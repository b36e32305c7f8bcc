"""What hypothesis draws: the settings of an engine, and what users do with it.

An engine's settings are keyword arguments of `vllm.LLM`. What users do is a list of steps, each a
dict that `matrix_engine.py` carries out: a batch of requests, a beam search, or a call that adds,
removes or pins an adapter.
"""

from __future__ import annotations

import random

from hypothesis import strategies as st

MAX_LEN = 256
# One has shared experts, the other takes LoRA on lm_head; the third has INT4 weights (GPTQ).
FAMILIES = ("qwen2_moe", "qwen3_moe", "int4")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Adapter -> the words of --lora-target-modules that cover it, and its rank. See expected.py.
ADAPTERS = {
    "all": ({*ATTENTION, "experts", "others"}, 8),
    "small": ({*ATTENTION, "experts", "others"}, 3),
    "wide": ({*ATTENTION, "experts", "others"}, 16),
    "attention": (set(ATTENTION), 8),
    "experts": ({"experts"}, 4),
    "gates": ({"others"}, 5),
    "head": ({"q_proj", "lm_head"}, 4),
    "packed": ({"experts"}, 4),
    "shared-outer": ({"experts"}, 4),
}
BAD = "bad"  # one number is NaN: refused everywhere

_random = random.Random(0)
# Requests share beginnings, for the prefix cache; one text repeats itself, for n-gram drafts.
TEXTS = [[_random.randrange(3, 512) for _ in range(90)] for _ in range(3)]
TEXTS.append([7, 300, 41, 12, 90] * 18)


@st.composite
def settings(draw, processes: bool) -> dict:
    """Keyword arguments of `vllm.LLM`, and the model's family.

    With ``processes`` always tensor parallelism 2.
    """
    pick = lambda *of: draw(st.sampled_from(of))  # noqa: E731
    family = pick("qwen2_moe", "qwen2_moe", "qwen3_moe", "qwen3_moe", "int4")
    found: dict = {
        "family": family,
        "dtype": pick("float32", "float32", "float32", "bfloat16"),
        "max_num_seqs": pick(8, 3, 1),
        "enable_prefix_caching": pick(True, False),
        "scheduling_policy": pick("fcfs", "priority"),
        "async_scheduling": pick(False, True),
    }
    if family == "int4":
        found["dtype"] = "bfloat16"
    block = pick(None, 32, 64)
    if block is not None:
        found["block_size"] = block
        if pick(False, True):  # so few that requests are preempted
            found["num_gpu_blocks_override"] = MAX_LEN // block + pick(1, 4)
    # Fewer tokens a step than a prompt has: chunked prefill.
    found["max_num_batched_tokens"] = pick(256, 32, 64)
    if found["max_num_batched_tokens"] == 256:
        found["enable_chunked_prefill"] = pick(True, False)
    if pick(*[False] * 5, True):
        found |= {"runner": "pooling", "convert": "embed"}
    else:
        modes = ["raw_logprobs"] * 3 + ["processed_logprobs", "raw_logits", "processed_logits"]
        found["logprobs_mode"] = pick(*modes)
        if pick(False, False, True):
            found["async_scheduling"] = False  # upstream refuses both
            words = {"num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
            found["speculative_config"] = {"method": "ngram", **words}
    if processes:
        found["tensor_parallel_size"] = 2
    slots = pick(1, 2, 4)
    found["lora"] = lora = {
        "max_loras": slots,
        "max_cpu_loras": slots + pick(0, 1, 4),
        "max_lora_rank": pick(16, 8, 32),
        "lora_dtype": pick("auto", "auto", "auto", "bfloat16"),
        "enable_mixed_moe_lora_format": pick(False, True),
        "enable_moe_shared_loras": pick(False, False, True),
    }
    targets = pick(None, None, None, ATTENTION, ["experts"], [*ATTENTION, "experts"])
    if targets:
        lora["lora_target_modules"] = targets
    if processes:
        lora["fully_sharded_loras"] = pick(False, True)
    return found


@st.composite
def requests(draw, options: dict) -> dict:
    """One request. It comes before step ``at`` of its batch."""
    pick = lambda *of: draw(st.sampled_from(of))  # noqa: E731
    text, length = draw(st.integers(0, len(TEXTS) - 1)), draw(st.integers(1, 60))
    tail = draw(st.lists(st.integers(3, 511), max_size=3))
    found = {
        "prompt": TEXTS[text][:length] + tail,
        "adapter": pick(None, None, None, *ADAPTERS, *ADAPTERS, BAD),
        "at": pick(0, 0, 0, 1, 2, 5),
        "priority": draw(st.integers(0, 2)) if options["scheduling_policy"] == "priority" else 0,
    }
    if "runner" in options:
        return found
    found["max_tokens"] = draw(st.integers(1, 8))
    if pick(*[False] * 7, True):
        found["abort"] = found["at"] + draw(st.integers(1, 4))
    kind = pick("greedy", "greedy", "greedy", "regex", "prompt", "sampled", "several")
    if kind in ("sampled", "several"):
        found["temperature"] = pick(0.7, 1.5)
        found["seed"] = draw(st.integers(0, 99))
        found["n"] = 3 if kind == "several" else 1
    elif kind == "regex":
        found["regex"] = "(t3;|t4;)(t40;|t50;|t60;){2,9}"
    elif kind == "prompt":
        found["prompt_logprobs"] = True
    return found


def steps(options: dict) -> st.SearchStrategy[list[dict]]:
    """What users do with an engine of these settings."""
    batch = st.lists(requests(options), min_size=1, max_size=6).map(
        lambda asked: {"do": "batch", "requests": asked}
    )
    names = st.sampled_from([*ADAPTERS, BAD])
    calls = st.builds(
        lambda what, name: {"do": what, "adapter": name},
        st.sampled_from(["add", "add", "remove", "pin"]),
        names,
    )
    beam = st.builds(
        lambda text, name, width: {
            "do": "beam",
            "prompt": TEXTS[text][:20],
            "adapter": name,
            "width": width,
        },
        st.integers(0, len(TEXTS) - 1),
        st.sampled_from([None, *ADAPTERS]),
        st.integers(2, 3),
    )
    logprobs = options.get("logprobs_mode", "").endswith("logprobs")
    kinds = [batch, batch, batch, calls, *([beam] if logprobs else [])]
    return st.lists(st.one_of(kinds), min_size=6, max_size=14)


@st.composite
def engines(draw, processes: bool) -> tuple[dict, list[dict]]:
    options = draw(settings(processes))
    return options, draw(steps(options))
