"""No adapter hurts the server: every kind is refused with a sentence, and nothing else changes."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS
from hostile.kinds import harmless, kinds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from server import Server

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine


@pytest.fixture(scope="module")
def case(make_case):
    case = make_case("qwen2_moe")
    case.add("good", seed=1, rank=6)  # no size of the model: a transposed factor is seen
    return case


def _made(case, number, change):
    folder = case.folder / f"bad-{number}"
    shutil.copytree(case.adapters["good"], folder)
    change(folder)
    return folder


def test_there_are_two_hundred_kinds():
    names = [name for name, _ in kinds()]
    assert len(set(names)) == len(names) >= 200


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    good = {"good": str(case.adapters["good"])}
    resolved = case.folder / "resolved"
    resolved.mkdir()
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    env["VLLM_LORA_RESOLVER_CACHE_DIR"] = str(resolved)
    with Server(case.model, tmp_path_factory.mktemp("server"), good, **env) as server:
        server.want = {name: server.log_probs(name, PROMPTS[1]) for name in (None, "good")}
        yield server


def _unhurt(server):
    """Base model and good adapter answer with the bits they had before."""
    urllib.request.urlopen(f"{server.url}/health", timeout=10)
    return all(server.log_probs(name, PROMPTS[1]) == was for name, was in server.want.items())


def test_every_kind_is_refused(case, server):
    """Loaded at a running server: 400 or 404, a sentence, and the same bits after."""
    failed = []
    for number, (kind, change) in enumerate(kinds()):
        folder = _made(case, number, change)
        status, text = server.load(f"bad-{number}", folder)
        if status not in (400, 404) or len(text) < 20:
            failed.append(f"{kind}: {status} {text[:300]}")
        if (folder / "executed").exists():
            failed.append(f"{kind}: executed")
        if not _unhurt(server):
            failed.append(f"{kind}: others changed")
        shutil.rmtree(folder)
    assert server.load("late", case.adapters["good"])[0] == 200
    assert server.log_probs("late", PROMPTS[1]) == server.want["good"]
    assert not failed, f"{len(failed)}:\n" + "\n".join(failed)


def test_the_table_is_of_these_kinds():
    """README.md beside the kinds is written by table.py, which runs upstream too."""
    rows = (Path(__file__).parent / "hostile" / "README.md").read_text().splitlines()
    rows = [row.split(" | ") for row in rows if row.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [name for name, _ in kinds()]
    assert all(row[2].startswith(("refused, 400", "refused, 404")) for row in rows)


def test_odd_adapters_load(case, server):
    for number, (kind, change, whose) in enumerate(harmless()):
        folder = _made(case, f"odd-{number}", change)
        assert server.load(kind, folder)[0] == 200, kind
        said = server.log_probs(kind, PROMPTS[1])
        same = {
            name or "base": max(
                abs(said[token] - was.get(token, 99.0)) for token in list(said)[:10]
            )
            for name, was in server.want.items()
        }
        for name, difference in same.items():
            assert (difference < 1e-3) == (name == whose), (kind, same)
        assert _unhurt(server), kind


def _resolvable(case, name, folder):
    """A copy of the good adapter that vLLM's resolver for folders takes for this model."""
    shutil.copytree(case.adapters["good"], folder / name)
    file = folder / name / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(case.model)}))
    return folder / name


def test_resolved_adapters(case, server):
    """By vLLM's resolver: served, refused with the reason, and not from another folder."""
    resolved = case.folder / "resolved"
    _resolvable(case, "fine", resolved)
    _on_nan = dict(kinds())["expert up, lora_A: NaN"]
    _on_nan(_resolvable(case, "damaged", resolved))
    _resolvable(case, "secret", case.folder)
    assert server.log_probs("fine", PROMPTS[1]) == server.want["good"]
    body = {"prompt": PROMPTS[1], "max_tokens": 1}
    status, text = server.post("/v1/completions", {"model": "damaged", **body})
    assert status == 400
    assert "layers.1.mlp.experts" in text, "which layer"
    assert "(expert 3, " in text, "which expert"
    for name in ("../secret", str(case.folder / "secret")):
        status, text = server.post("/v1/completions", {"model": name, **body})
        assert status == 404, text
    assert _unhurt(server)


FILE = "adapter_model.safetensors"


@st.composite
def changes(draw):
    """One change of an adapter's folder: of a tensor, of a name, of bytes, or of the config."""
    sort = draw(st.sampled_from(["tensor", "name", "bytes", "config"]))
    which, where = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))
    value = draw(
        st.sampled_from([0.0, -1.0, 1e30, -3e38, math.inf, math.nan, 1e-40, 512, 2**31, 2**63])
    )

    def edit_tensors(folder):
        tensors = load_file(folder / FILE)
        key = sorted(tensors)[which % len(tensors)]
        if sort == "name":
            parts = key.split(".")
            at, words = where % len(parts), ["experts", "99", "lora_A", "default", "", "-1", "w13"]
            parts[at] = words[which % len(words)]
            tensors[".".join(parts)] = tensors.pop(key)
        else:
            one = tensors[key].clone()
            acts = [
                lambda: one.view(-1).index_fill_(0, torch.tensor([where % one.numel()]), value),
                lambda: one[: where % (one.shape[0] + 1)],
                lambda: one[:, : where % (one.shape[1] + 1)],
                lambda: one.repeat(1 + where % 3, 1 + which % 2),
                lambda: one.flatten().view(-1, *one.shape[::-1]),
                lambda: one.to([torch.float16, torch.float64, torch.int32][where % 3]),
            ]
            changed = acts[which % len(acts)]()
            tensors[key] = (one if changed.shape == one.shape else changed).contiguous()
        save_file(tensors, folder / FILE)

    def edit_bytes(folder):
        data = bytearray((folder / FILE).read_bytes())
        # The header is a small part of the file, and most of what can be wrong.
        at = where % (len(data) if which % 2 else 4096)
        data[at : at + which % 5] = bytes(range(which % 7))
        (folder / FILE).write_bytes(data)

    def edit_config(folder):
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        fields = [*config, "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"]
        entries = [value, int(min(value, 2**62)) if math.isfinite(value) else 0, None, [], {}]
        entries += ["", "x" * 9999, True, [value], {"q_proj": value}, {".*": "8"}]
        config[fields[which % len(fields)]] = entries[where % len(entries)]
        file.write_text(json.dumps(config))

    return {"bytes": edit_bytes, "config": edit_config}.get(sort, edit_tensors)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,  # the same in every run: what it finds once becomes a kind
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(changes(), min_size=1, max_size=3))
def test_generated_adapters(case, server, drawn):
    """Refused with a sentence, or served; in both cases nobody else notices."""
    folder = case.folder / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case.adapters["good"], folder)
    for change in drawn:
        with contextlib.suppress(Exception):  # the file may be beyond further changes
            change(folder)
    server.counted = getattr(server, "counted", 0) + 1
    status, text = server.load(f"generated {server.counted}", folder)
    if status == 200:
        try:
            server.log_probs(f"generated {server.counted}", PROMPTS[1])
        except AssertionError as error:
            # Finite and huge, an alpha of 1e30 say: its own answer is spoilt, see test_isolation.
            if "not JSON compliant" not in str(error):
                raise
    else:
        assert status in (400, 404), text
        assert len(text) >= 20
    assert _unhurt(server)


@pytest.mark.parametrize("processes", ["0", "1"], ids=["in process", "engine core apart"])
def test_offline_requests(case, processes):
    """`LLM.generate` with a bad adapter raises, and the next call answers as before."""
    chosen = ["expert up, lora_A: missing", "expert down, lora_B: NaN", "file: cut in half"]
    chosen += ["attention, lora_A: a column too few", "config: DoRA", "folder: no config"]
    every = dict(kinds())
    paths = {"good": str(case.adapters["good"])}
    for number, kind in enumerate(chosen):
        paths[f"bad {number}"] = str(_made(case, f"{processes}-{number}", every[kind]))
    job = engine.Job(
        str(case.model),
        paths,
        [[(p, "good") for p in PROMPTS] + [(p, None) for p in PROMPTS]],
        options={"dtype": "float32"},
        load=[name for name in paths if name != "good"],
        by_request=True,
    )
    answers, outcomes, _ = engine.run(
        job, {"VLLM_ENABLE_V1_MULTIPROCESSING": processes}, timeout=300
    )
    for kind, outcome in zip(chosen, outcomes, strict=True):
        assert outcome != "ok", kind
        assert len(outcome) > 40, (kind, outcome)
    for batch in answers[1:]:
        for (tokens, have), (first_tokens, first) in zip(batch, answers[0], strict=True):
            assert tokens == first_tokens
            assert (have - first).abs().max() <= 1e-5
