"""Ernie 4.5 VL: experts for text and experts for images, each with a gate of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import ernie_vl
import pytest
import torch
from engine_cases import ROTARY_IN_TORCH, Case, compare_low_precision, run_and_compare
from images import picture
from test_images import compare
from test_model_classes import renamed

from vllm_moe_lora import cli
from vllm_moe_lora.adapters.offline import check
from vllm_moe_lora.tiny import adapters, engine, oracle

pytestmark = pytest.mark.cpu_engine

TEXT_ONLY = {"trust_remote_code": True, "language_model_only": True, **ROTARY_IN_TORCH}
IMAGES = [([1, 2, 501, 506, 502, 9, 11], 1), ([7, 300, 501, 506, 502, 44], 2), ([1, 2, 3], None)]


def expected(checkpoint):
    import transformers

    scope = {}
    exec(ernie_vl.PROCESSOR, scope)
    mean, std = (torch.tensor(getattr(scope["Images"], f"image_{w}")) for w in ("mean", "std"))
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for tokens, seed in IMAGES:
        ids = [one for t in tokens for one in ([ernie_vl.IMAGE] * 4 if t == 506 else [t])]
        more = {}
        if seed is not None:
            pixels = scope["patches"](picture(seed)) / 255
            pixels = (pixels - mean.repeat_interleave(196)) / std.repeat_interleave(196)
            more = {
                "pixel_values": pixels,
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": torch.tensor([[int(i == ernie_vl.IMAGE) for i in ids]]),
                "moe_mm_token_type_ids": torch.tensor([[int(500 <= i <= 502) for i in ids]]),
            }
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False, **more).logits
        found.append(logits[0, -1].float().log_softmax(-1))
    return found


def written(case, name, checkpoint, keep, seed):
    """Add an adapter for ``checkpoint``, whose names it gets. Returns the merged weights."""
    path = adapters.write(checkpoint, case.folder / name, keep=keep, seed=seed)
    case.adapters[name] = path
    merged = oracle.merge(checkpoint, path, case.folder / f"{name}-merged")
    shutil.copy(case.plain / "config.json", merged)
    return merged


@pytest.fixture
def ernie(tmp_path):
    model, twin = ernie_vl.build(tmp_path / "model")
    return Case(tmp_path, model, twin)


def of_text(name):
    return "vision" not in name and "resampler" not in name and not name.endswith("mlp.gate")


def test_images(ernie, no_torchvision):
    """Requests with images: a step has rows of both kinds, which get experts and gates apart."""
    ernie_vl.write_processor(ernie.model)
    parts = {  # checkpoint, modules, layers with experts of one kind
        "all": (ernie.plain, lambda name: "language_model" in name, 4),
        "images": (ernie.plain, lambda name: "vision_moe" in name, 2),
        "published": (ernie.model, of_text, 4),  # experts 0 to 7 are for text, 8 to 15 for images
    }
    want = {None: expected(ernie.plain)}
    for seed, (name, (checkpoint, keep, layers)) in enumerate(parts.items(), start=1):
        want[name] = expected(written(ernie, name, checkpoint, keep, seed))
        assert check.fits(ernie.adapters[name], ernie.model).layers == layers
        assert cli.main(["inspect", str(ernie.adapters[name]), "--base", str(ernie.model)]) == 0
    names = [None, *parts]
    rounds = [[(tokens, seed, name) for tokens, seed in IMAGES] for name in names]
    rounds.append([(tokens, seed, name) for name in names for tokens, seed in IMAGES])
    job = {
        "model": str(ernie.model),
        "adapters": {name: str(path) for name, path in ernie.adapters.items()},
        "rounds": rounds,
        "load": [],
        "options": {
            "trust_remote_code": True,
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "max_num_seqs": 16,
            **ROTARY_IN_TORCH,
        },
    }
    (answers, _), _ = engine.saved_by(Path(__file__).with_name("images.py"), job, no_torchvision)
    for i, name in enumerate(names):
        for j, (_, image) in enumerate(IMAGES):
            works = name is not None and (name != "images" or image is not None)
            compare(answers[i][j], want, name, j, works)
            compare(answers[-1][len(IMAGES) * i + j], want, name, j, works)


@pytest.mark.long
def test_bf16(ernie, no_torchvision):
    """Its gates have fp32 weights and are called with fp32."""
    ernie.add("all", of_text)
    got = ernie.ask("all", env=no_torchvision, dtype="bfloat16", **TEXT_ONLY)
    compare_low_precision(got["all"], ernie, "all")


@pytest.mark.long
def test_text(ernie, no_torchvision):
    ernie.add("dense", lambda name: of_text(name) and "_moe." not in name)
    ernie.add("all", of_text, seed=2)
    load = {
        "beyond": (r"experts\.1\.", "experts.16."),
        "gate": (r"self_attn\.q_proj", "mlp.gate"),
        "tower": (r"model\.layers\.0\.self_attn\.o_proj", "vision_model.blocks.0.attn.proj"),
    }
    written(ernie, "published", ernie.model, of_text, 3)
    for name, change in load.items():
        ernie.adapters[name] = renamed(ernie.adapters["published"], ernie.folder / name, change)
    names = [None, "dense", "all"]
    outcomes, _ = run_and_compare(ernie, names, load=list(load), env=no_torchvision, **TEXT_ONLY)
    assert "experts.16 is not in the model, which has experts 0 to 15." in outcomes[0]
    assert "layers.0.mlp.gate" in outcomes[1]
    assert "it has LoRA on vision_model.blocks.0.attn.proj, but vLLM has no LoRA on" in outcomes[2]
