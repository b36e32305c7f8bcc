"""Kimi K2.5: requests with images, LoRA on its text model, adapter == merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from engine_cases import ROTARY_IN_TORCH
from images import picture
from test_images import compare

from vllm_moe_lora.tiny import engine, models, oracle

pytestmark = [pytest.mark.cpu_engine, pytest.mark.long]

IMAGE = 500  # the token that stands for an image
PROMPTS = [([1, 2, IMAGE, 9, 11], 1), ([7, 300, 17, IMAGE, 44], 2), ([1, 2, 3], None)]
MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.4, 0.5]
# preprocessor_config.json as it is published, with small limits
PROCESSOR = {
    "media_proc_cfg": {
        "patch_size": 14,
        "merge_kernel_size": 2,
        "temporal_merge_kernel_size": 4,
        "in_patch_limit": 64,
        "in_patch_limit_each_frame": 64,
        "in_patch_limit_video": None,
        "patch_limit_on_one_side": 512,
        "fixed_output_tokens": None,
        "image_mean": MEAN,
        "image_std": STD,
    }
}


def with_processor(model, folder):
    """The checkpoint with what vLLM needs for images."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    shutil.copytree(model, folder)
    words = {"<|media_pad|>" if i == IMAGE else f"t{i}": i for i in range(models.VOCAB)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(kinds.WordLevel(words, unk_token="t0")),
        additional_special_tokens=["<|media_pad|>"],
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def expected(checkpoint, prompts=PROMPTS):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for tokens, seed in prompts:
        ids = [one for t in tokens for one in ([IMAGE] * 4 if t == IMAGE else [t])]
        more = {}
        if seed is not None:
            pixels = torch.tensor(numpy.asarray(picture(seed))) / 255
            pixels = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
            patches = pixels.view(4, 14, 4, 14, 3).permute(0, 2, 4, 1, 3).reshape(16, 3, 14, 14)
            more = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False, **more).logits
        found.append(logits[0, -1].float().log_softmax(-1))
    return found


def test_text_model(make_case, no_torchvision):
    case = make_case("kimi_k25")
    want, names = {None: expected(case.plain)}, [None, "all", "other"]
    (another,) = expected(case.plain, [(PROMPTS[0][0], 2)])
    assert (want[None][0] - another).abs().max() > 0.1  # the image changes the answer
    for name, how in {"all": {}, "other": {"seed": 2, "rank": 4, "alpha": 12}}.items():
        case.add(name, lambda module: "kv_b_proj" not in module, **how)
        target = case.folder / f"{name}-merged"
        want[name] = expected(oracle.merge(case.plain, case.adapters[name], target))
    rounds = [[(tokens, seed, name) for tokens, seed in PROMPTS] for name in names]
    rounds.append([(tokens, seed, name) for name in names for tokens, seed in PROMPTS])
    job = {
        "model": str(with_processor(case.model, case.folder / "kimi")),
        "adapters": {name: str(path) for name, path in case.adapters.items()},
        "rounds": rounds,
        "load": [],
        "chunks": True,
        "options": {
            "limit_mm_per_prompt": {"vision_chunk": 1},
            "skip_mm_profiling": True,
            "max_num_seqs": 16,
            **ROTARY_IN_TORCH,
        },
    }
    script = Path(__file__).with_name("images.py")
    (answers, _), _ = engine.saved_by(script, job, no_torchvision)
    for i, name in enumerate(names):
        for j in range(len(PROMPTS)):
            compare(answers[i][j], want, name, j, name is not None)
            compare(answers[-1][len(PROMPTS) * i + j], want, name, j, name is not None)
