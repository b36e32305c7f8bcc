"""A model with LoRA, traced by torch.compile: adapters that come, go and change act all the same.

VLLM_CPU_CI_ENV is vLLM's own variable for tests: Dynamo traces the model, and the graph is run
without generating C++. What is traced wrongly is wrong here, too. test_inductor.py generates C++.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS, compare_fp32, compare_low_precision
from hostile.kinds import kinds
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine, oracle

pytestmark = pytest.mark.cpu_engine
CHILD = Path(__file__).with_name("child.py")
TRACED = {"VLLM_CPU_CI_ENV": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def run(job, env=TRACED, compiled=True, **actions):
    """Run ``job`` in an engine that compiles, or says that it does not."""
    job.options = {"enforce_eager": False, **job.options}
    steps = {number.removeprefix("before_"): what for number, what in actions.items()}
    answers, outcomes, log = engine.run(job, {**env, "ACTIONS": json.dumps(steps)}, script=CHILD)
    assert log.count("MODE ") == log.count(f"MODE DYNAMO_TRACE_ONCE {compiled}") == len(answers)
    return answers, outcomes, log


def job(case, rounds, **options):
    paths = {name: str(path) for name, path in case.adapters.items()}
    return engine.Job(str(case.model), paths, rounds, options=options)


def _everything(name):
    return "conv" not in name and "kv_b_proj" not in name


FAMILIES = ["qwen2_moe", "gpt_oss"]
if os.environ.get("MOE_LORA_ALL") == "1":
    FAMILIES += ["qwen3_moe", "mixtral", "olmoe", "glm4_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(make_case, family):
    """Alone and in mixed batches, two ranks; the first batches have no adapter."""
    case = make_case(family)
    in_first = family == "gpt_oss"
    case.add("all", _everything, seed=1, in_first=in_first)
    case.add("small", _everything, seed=2, rank=4, alpha=12, in_first=in_first)
    names = [None, "small", "all"]
    rounds = [[(p, name) for p in PROMPTS] for name in names]
    rounds.append([(p, name) for p in PROMPTS for name in names])
    rounds.append(rounds[0])
    answers, _, _ = run(job(case, rounds, dtype="float32"))
    for i, name in enumerate(names):
        compare_fp32([lp[-1] for _, lp in answers[i]], case, name)
        compare_fp32([lp[-1] for _, lp in answers[3][i::3]], case, name)
    compare_fp32([lp[-1] for _, lp in answers[4]], case, None)


def test_adapters_change_after_compilation(make_case):
    """Removed, loaded again, replaced in place, of another rank; more adapters than slots."""
    case = make_case("qwen2_moe")
    for seed, rank in enumerate((4, 16, 8), start=1):
        case.add("abc"[seed - 1], seed=seed, rank=rank)
    rounds = [[(p, name) for p in PROMPTS] for name in "abcab"]
    rounds += [[(p, None) for p in PROMPTS], [(p, "a") for p in PROMPTS]]
    wanted = [(name, case.want(name)) for name in ("a", "b", "c", "a", "b", None, "c")]
    answers, _, _ = run(
        job(case, rounds, dtype="float32", max_loras=2),
        before_3=[["unload", "a"], ["load", "a"]],
        before_4=[["unload", "a"]],
        before_6=[["replace", "b", "c"], ["load", "a"], ["replace", "a", "c"]],
    )
    for answer, (name, _) in zip(answers, wanted, strict=True):
        compare_fp32([lp[-1] for _, lp in answer], case, name)


@pytest.mark.parametrize(
    "part",
    [
        "layers.0.mlp.gate",
        "layers.1.mlp.shared_expert_gate",
        "layers.1.mlp.shared_expert.down_proj",
        "layers.0.self_attn.k_proj",
        "layers.1.self_attn.o_proj",
        "experts.",
    ],
)
def test_one_part(parts, part):
    """Each fails if LoRA on this part alone is dropped."""
    case, answers = parts
    compare_fp32([lp[-1] for _, lp in answers[part]], case, part)


@pytest.fixture(scope="module")
def parts(make_case):
    (mark,) = test_one_part.pytestmark
    case, names = make_case("qwen2_moe"), mark.args[1]
    for seed, part in enumerate(names):
        case.add(
            part,
            lambda n, p=part: n.endswith(p) or (p == "experts." and p in n),
            seed=seed,
            size=0.4,
        )
    rounds = [[(p, name) for p in PROMPTS] for name in names]
    answers, _, _ = run(job(case, rounds, dtype="float32"))
    return case, dict(zip(names, answers, strict=True))


def test_decode(make_case):
    """Generated token by token, in a batch with and without adapters."""
    case = make_case("qwen2_moe")
    case.add("a", seed=1)
    case.add("b", seed=2, rank=4)
    requests = [(p, name) for p in PROMPTS for name in (None, "a", "b")]
    todo = job(case, [requests], dtype="float32")
    todo.max_tokens = 4
    answers, _, _ = run(todo)
    for (prompt, name), (tokens, logprobs) in zip(requests, answers[0], strict=True):
        want = case.forced(name, prompt, tokens)
        for step in range(4):
            top = want[step].topk(40).indices
            assert (logprobs[step] - want[step])[top].abs().max() <= 1e-3, (name, step)


def test_int4(make_case):
    case = make_case("qwen2_moe", ("gptq", 64, True))
    case.add("all")
    rounds = [[(p, name) for p in PROMPTS] for name in (None, "all")]
    answers, _, _ = run(job(case, rounds, dtype="bfloat16"))
    compare_low_precision([lp[-1] for _, lp in answers[1]], case, "all")


def test_hostile(make_case):
    """Refused after compilation, and all others keep their bits."""
    case = make_case("qwen2_moe")
    case.add("good", seed=1, rank=6)
    todo = job(case, [[(p, name) for p in PROMPTS for name in (None, "good")]], dtype="float32")
    for number, (_, change) in enumerate(list(kinds())[::30]):
        name = f"bad-{number}"
        change(shutil.copytree(case.adapters["good"], case.folder / name))
        todo.adapters[name] = str(case.folder / name)
        todo.load.append(name)
    answers, outcomes, _ = run(todo)
    assert len(outcomes) > 5
    assert "ok" not in outcomes
    compare_fp32([lp[-1] for _, lp in answers[0][1::2]], case, "good")
    for again in answers[1:]:
        assert all(torch.equal(a[1], b[1]) for a, b in zip(answers[0], again, strict=True))


def test_embeddings(make_case):
    """LoRA on the input and output embeddings, of which only the first is inside the model."""
    case = make_case("qwen3_moe")
    case.add("all")
    merged = case.folder / "with-embeddings-merged"
    case.want("all")
    shutil.copytree(case.folder / "all-merged", merged)
    weights = load_file(merged / "model.safetensors")
    folder = shutil.copytree(case.adapters["all"], case.folder / "with-embeddings")
    lora = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, where in (("model.embed_tokens", "embedding_"), ("lm_head", "")):
        vocab, hidden = weights[f"{name}.weight"].shape
        sizes = (vocab, hidden) if where else (hidden, vocab)
        a = torch.randn(8, sizes[0], generator=generator) * 0.1
        b = torch.randn(sizes[1], 8, generator=generator) * 0.1
        end = "" if where else ".weight"
        lora[f"base_model.model.{name}.lora_{where}A{end}"] = a
        lora[f"base_model.model.{name}.lora_{where}B{end}"] = b
        delta = 2 * (b @ a)
        weights[f"{name}.weight"] += delta.t() if where else delta
    save_file(lora, folder / "adapter_model.safetensors")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    case.adapters["with-embeddings"] = folder
    case.oracles["with-embeddings"] = oracle.log_probs(merged, PROMPTS)
    names = [None, "with-embeddings", "all"]
    rounds = [[(p, name) for p in PROMPTS for name in names]]
    answers, _, _ = run(job(case, rounds, dtype="float32"))
    for i, name in enumerate(names):
        compare_fp32([lp[-1] for _, lp in answers[0][i::3]], case, name)
    for one, all_ in zip(case.want("with-embeddings"), case.want("all"), strict=True):
        assert (one[-1] - all_[-1]).abs().max() > 0.02, "the embeddings' LoRA does something"


def test_a_layer_without_operator_is_not_compiled(make_case):
    """Then the whole model runs eagerly, as before, and says so."""
    case = make_case("qwen2_moe")
    case.add("all")
    env = {**TRACED, "WITHOUT_OPERATOR": "1"}
    answers, _, log = run(job(case, [[(p, "all") for p in PROMPTS]], dtype="float32"), env, False)
    compare_fp32([lp[-1] for _, lp in answers[0]], case, "all")
    assert log.count("there is no operator for LoRA on") == 1


def test_without_a_compiler(make_case):
    """No g++: said, and eager; vLLM itself would stop at the start."""
    case = make_case("qwen2_moe")
    case.add("all")
    job_ = job(case, [[(p, "all") for p in PROMPTS]], dtype="float32", enforce_eager=False)
    answers, _, log = engine.run(job_, {"CXX": "no-such-g++"}, script=CHILD)
    compare_fp32([lp[-1] for _, lp in answers[0]], case, "all")
    assert "torch.compile needs the C++ compiler no-such-g++" in log
    assert "MODE NONE False" in log


def test_what_the_user_switches_off_stays_off(make_case):
    case = make_case("qwen2_moe")
    case.add("all")
    for how in ({"enforce_eager": True}, {"compilation_config": {"mode": 0}}):
        todo = job(case, [[(PROMPTS[0], "all")]], **{"enforce_eager": False, **how})
        _, _, log = engine.run(todo, TRACED, script=CHILD)
        assert "MODE NONE False" in log, how
    # tiny/engine.py sets TORCHDYNAMO_DISABLE, with which vLLM without LoRA does not start.
    _, _, log = engine.run(job(case, [[(PROMPTS[0], "all")]], enforce_eager=False), TRACED)
    assert "'mode': <CompilationMode.NONE" in log
