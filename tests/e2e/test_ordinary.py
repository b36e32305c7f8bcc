"""What ordinary users do: nobody else's answer changes, and the engine goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS, compare_fp32, told
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine, oracle

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("ordinary.py")
FILE = "adapter_model.safetensors"


def tell(story, case, *names, **more):
    """The answer of one of the stories of ordinary.py."""
    job = {"model": str(case.model), "adapters": {n: str(case.adapters[n]) for n in names}, **more}
    return told(SCRIPT, story, json.dumps(job))


@pytest.fixture(scope="module")
def case(make_case):
    case = make_case("qwen2_moe")
    for seed, name in enumerate("abc", start=1):
        case.add(name, seed=seed)
    return case


def _on_lm_head(case):
    """An adapter on lm_head alone."""
    folder, g = case.folder / "head", torch.Generator().manual_seed(7)
    shutil.copytree(case.adapters["a"], folder)
    rows, columns = load_file(case.plain / "model.safetensors")["lm_head.weight"].shape
    factors = {"A": torch.randn(4, columns, generator=g), "B": torch.randn(rows, 4, generator=g)}
    name = "base_model.model.lm_head.lora_{}.weight"
    save_file({name.format(side): 0.1 * t for side, t in factors.items()}, folder / FILE)
    _config(folder, r=4, lora_alpha=8, target_modules=["lm_head"])
    return folder


def test_prompt_logprobs_with_an_adapter_on_lm_head(make_case):
    """Each prompt's rows get the prompt's own adapter, whatever else is in the batch."""
    case = make_case("mixtral")
    case.add("a", seed=1)
    case.adapters["head"] = _on_lm_head(case)
    long, short = list(range(20, 47)), list(range(60, 69))
    batches = [
        [(long, None), (short, "head")],
        [(short, "head"), (long, "a"), (PROMPTS[1], None)],
        [(short, None)],
    ]
    answers = tell("prompt_logprobs", case, "a", "head", batches=batches)
    for batch, found in zip(batches, answers, strict=True):
        for (prompt, name), have in zip(batch, found, strict=True):
            case.want(name)
            merged = case.plain if name is None else case.folder / f"{name}-merged"
            want = oracle.log_probs(merged, [prompt])[0][:-1]
            assert (torch.tensor(have) - want).abs().max() <= 1e-3, (name, len(prompt))
    base = oracle.log_probs(case.plain, [short])[0][:-1]
    assert (torch.tensor(answers[0][1]) - base).abs().max() > 0.02, "the adapter does something"


def test_ids_and_pinned_slots(case):
    found = tell("identity", case, "a", "b", "c")
    for name in ("huge", "a float", "a bool"):
        assert "lora_int_id" in found[name], found
    assert "this id belongs to 'a'" in found["taken"]
    assert "all 2 slots hold pinned adapters" in found["pinned"]
    assert found["same"], "others are answered as before"
    assert found["after"] == ""


def test_a_batch_that_needs_the_slot_of_a_pinned_adapter(case):
    """The scheduler counts the batch's own adapters only; a pinned one has a slot, too."""
    found = tell("pinned", case, "a", "b", "c")
    base, a, b, c = found["want"]
    assert found["batches"] == [[base, b, c], [base, a, b, c], [a]]
    assert a != b
    assert 1 in found["held"], "the pinned adapter stays in memory when others need room"
    assert found["pinned"] == [1], "and is pinned to a slot again"
    assert found["again"] == [1], "also by a call, while it has no place"
    assert found["removed"] == [], "but not what has its id after it was removed"


@pytest.mark.long
def test_new_weights_under_an_old_name(case):
    """Offline; bare vLLM finds the prefixes that were computed with the old weights."""
    found = tell("replaced", case, "a", "b")
    assert found["found"] == found["want"]
    assert found["want"][0] != found["want"][1]


@pytest.mark.long
def test_slots_pinned_and_files_lost_online(case):
    found = tell("pinned_online", case, "a", "b")
    a, b = found["before"]
    assert a != b
    assert found["pinned"][::2] == [a, a]
    assert "all 1 slots hold pinned adapters" in found["pinned"][1]
    assert found["removed"] == [b, a], "nothing is pinned any more"
    assert "LoRA adapter 3" in found["lost"][0]
    assert found["lost"][1] == b, "the engine goes on"


@pytest.mark.long
def test_a_pinned_adapter_that_lost_its_place_is_pinned_again_online(case):
    found = tell("displaced_online", case, "a", "b", "c")
    assert found["got"] == found["want"]
    assert found["held"] == [2, 3], "the batch needed both places"
    assert 1 in found["again"]


def test_seeded_requests_in_chunks(case):
    """Bare vLLM's engine ends on a CPU ("CPU Generator does not use offset"), without LoRA, too."""
    at_once, in_chunks = (tell("seeds", case, "a", "b", step=step) for step in (256, 8))
    assert at_once == in_chunks
    assert at_once[0] != at_once[1] != at_once[2]


def test_sampled_requests_with_drafts(case):
    """Bare vLLM divides the logits of drafted tokens by uninitialised memory, without LoRA, too."""
    found = tell("drafts", case, "a", "b")
    for name, (prompt, answer, heat, scores) in zip((None, "a", "b"), found, strict=True):
        case.want(name)
        merged = case.plain if name is None else case.folder / f"{name}-merged"
        want = oracle.log_probs(merged, [prompt + answer])[0][len(prompt) - 1 : -1]
        want = (want / (heat or 1)).log_softmax(-1)
        assert (torch.tensor(scores) - want).abs().max() <= 1e-3, name


def test_an_adapter_in_use_whose_files_vanish(case):
    shutil.copytree(case.adapters["a"], case.folder / "vanishing")
    case.adapters["vanishing"] = case.folder / "vanishing"
    found = tell("evicted", case, "vanishing", "b")
    assert found == {"same": [True, True], "asked": 2, "base": True}


def test_steady_requests_of_an_adapter_whose_files_vanish(case):
    """The other load gets its turn after a while; each request ends, right or with the sentence."""
    shutil.copytree(case.adapters["a"], case.folder / "gone")
    case.adapters["gone"] = case.folder / "gone"
    found = tell("steady", case, "gone", "b")
    first, others = found["a"][0], found["a"][1:]
    assert len(found["b"]) == 3, found["errors"]
    assert found["b"][0] == found["b"][1] == found["b"][2] != first
    assert all(one == first for one in others)
    assert len(others) + len(found["errors"]) == 12
    assert len(others) >= 4, "those that had begun when the load had waited long enough"
    for text in found["errors"]:
        assert text.startswith("LoRA adapter 1: 'gone' is not in memory, and there is no"), text


def _config(folder, **entries):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def _all(change):
    def edit(folder):
        tensors = load_file(folder / FILE)
        save_file({k: change(t).contiguous() for k, t in tensors.items()}, folder / FILE)

    return edit


def _renamed(prefix):
    def edit(folder):
        tensors = load_file(folder / FILE)
        save_file({prefix + k: t for k, t in tensors.items()}, folder / FILE)

    return edit


def _sharded(folder, lost=""):
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    parts = {"adapter_model-00001-of-00002.safetensors": names[::2]}
    parts["adapter_model-00002-of-00002.safetensors"] = names[1::2]
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {key: file for file, keys in parts.items() for key in keys}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": index}))
    if lost:
        (folder / lost).unlink()


def _bom(folder):
    file = folder / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


# Both for an adapter on attention alone, which vLLM's own reader took, and for one with experts.
SERVED = {
    "sharded": _sharded,
    "torch.compile": _renamed("_orig_mod."),
    "DDP": _renamed("module."),
}
REFUSED = {
    "new embeddings": (
        lambda folder: save_file({"x": torch.ones(2)}, folder / "new_embeddings.safetensors"),
        "new_embeddings.safetensors",
    ),
    "int8": (_all(lambda t: (t * 10).to(torch.int8)), "LoRA factors must be float32"),
    "bool": (_all(lambda t: t > 0), "LoRA factors must be float32"),
    "int64": (_all(lambda t: t.long()), "LoRA factors must be float32"),
    "fp8": (_all(lambda t: t.to(torch.float8_e4m3fn)), "LoRA factors must be float32"),
    "empty": (lambda folder: save_file({}, folder / FILE), "it has no tensors"),
    "zeros, a row too few": (_all(lambda t: torch.zeros_like(t)[:-1]), "rank"),
    "zeros, too wide": (_all(lambda t: torch.zeros(t.shape[0], t.shape[1] + 3)), ""),
    "r is 8, rank is 4": (lambda folder: _config(folder, r=8), "adapter_config.json gives it"),
    "VERA": (lambda folder: _config(folder, peft_type="VERA"), "\"peft_type\" is 'VERA'"),
    "IA3": (lambda folder: _config(folder, peft_type="IA3"), "\"peft_type\" is 'IA3'"),
    "PiSSA": (lambda folder: _config(folder, init_lora_weights="pissa"), '"init_lora_weights"'),
    "replication": (
        lambda folder: _config(folder, layer_replication=[[0, 1], [0, 2]]),
        '"layer_replication"',
    ),
    "a shard missing": (
        lambda folder: _sharded(folder, "adapter_model-00002-of-00002.safetensors"),
        "is missing",
    ),
    "a byte order mark": (_bom, "byte order mark"),
}


@pytest.mark.parametrize("experts", [False, True], ids=["attention", "experts"])
def test_every_adapter_is_read_as_strictly(make_case, experts):
    """Adapters without experts on a MoE model go by the same reader."""
    case = make_case("qwen2_moe")
    case.add("good", (lambda n: True) if experts else (lambda n: "self_attn" in n), rank=4)
    for name, change in {**SERVED, **{n: edit for n, (edit, _) in REFUSED.items()}}.items():
        folder = case.folder / name.replace(" ", "-").replace(",", "")
        shutil.copytree(case.adapters["good"], folder)
        change(folder)
        case.adapters[name] = folder
    names = [None, "good", *SERVED]
    job = engine.Job(
        str(case.model),
        {n: str(p) for n, p in case.adapters.items()},
        [[(p, name) for p in PROMPTS] for name in names],
        options={"dtype": "float32"},
        load=list(REFUSED),
    )
    answers, outcomes, _ = engine.run(job)
    for name, batch in zip(names[1:], answers[1:], strict=False):
        case.oracles[name] = case.want("good")
        compare_fp32([lp[-1] for _, lp in batch], case, name)
    for (name, (_, text)), outcome in zip(REFUSED.items(), outcomes, strict=True):
        assert "LoRA adapter " in outcome, (name, outcome)
        assert text in outcome, (name, outcome)
    for batch in answers[len(names) :]:  # the base model, after each refusal
        for (_, have), (_, want) in zip(batch, answers[0], strict=True):
            assert torch.equal(have, want)
