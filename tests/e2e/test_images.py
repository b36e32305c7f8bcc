"""LoRA on a vision tower and its connector: requests with images, adapter == merged.

The model is a LLaVA around a Qwen3-MoE. vLLM has LoRA on LLaVA's tower with
--enable-tower-connector-lora, and none without it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from images import picture
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import adapters, engine, models, oracle

pytestmark = [pytest.mark.cpu_engine, pytest.mark.long]

IMAGE = 500  # the token that stands for an image
PATCHES = 16
TOWER = {"enable_tower_connector_lora": True}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    import transformers
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    vision = {
        # CLIP has a token more than vLLM 0.32 counts for its LoRA.
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = transformers.LlavaConfig(
        text_config=models.text_config("qwen3_moe").to_dict(),
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.text_config.architectures = ["Qwen3MoeForCausalLM"]
    model = transformers.LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if of_tower(name) and (parameter.ndim > 1 or name.endswith("bias")):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    # transformers 5 leaves out "vision_model", which vLLM wants, and published checkpoints have.
    named = {
        re.sub(r"(vision_tower)\.(?!vision_model)", r"\1.vision_model.", name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    words = {f"t{i}": i for i in range(models.VOCAB)}
    words["<image>"] = words.pop(f"t{IMAGE}")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(kinds.WordLevel(words, unk_token="t0")),
        additional_special_tokens=["<image>"],
    )
    size = {"shortest_edge": 56}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size={"height": 56, "width": 56})
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
    )
    processor.save_pretrained(folder)
    return folder, images


PROMPTS = [([1, 2, IMAGE, 9, 11], 1), ([7, 300, 17, IMAGE, 44], 2), ([1, 2, 3], None)]


def expected(checkpoint, images):
    import transformers

    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for tokens, seed in PROMPTS:
        at = tokens.index(IMAGE) if IMAGE in tokens else len(tokens)
        ids = tokens[:at] + [IMAGE] * PATCHES + tokens[at + 1 :] if IMAGE in tokens else tokens
        pixels = images(picture(seed), return_tensors="pt") if seed is not None else {}
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False, **pixels).logits
        found.append(logits[0, -1].float().log_softmax(-1))
    return found


def of_tower(name):
    return "vision_tower" in name or "projector" in name


def test_tower_and_connector(llava, tmp_path, no_torchvision):
    folder, images = llava
    parts = {"tower": of_tower, "text": lambda name: not of_tower(name), "all": lambda name: True}
    paths, want = {}, {None: expected(folder, images)}
    for seed, (name, keep) in enumerate(parts.items(), start=1):
        paths[name] = str(adapters.write(folder, tmp_path / name, keep=keep, seed=seed))
        merged = oracle.merge(folder, Path(paths[name]), tmp_path / f"{name}-merged")
        want[name] = expected(merged, images)
    names = [None, *parts]
    rounds = [[(tokens, seed, name) for tokens, seed in PROMPTS] for name in names]
    rounds += [[(tokens, seed, name) for name in names] for tokens, seed in PROMPTS]
    job = {"model": str(folder), "adapters": paths, "rounds": rounds, "options": TOWER, "load": []}
    script = Path(__file__).with_name("images.py")
    (answers, _), _ = engine.saved_by(script, job, no_torchvision)
    for i, name in enumerate(names):
        for j in range(len(PROMPTS)):
            # Without an image the tower does nothing.
            works = name is not None and (name != "tower" or PROMPTS[j][1] is not None)
            compare(answers[i][j], want, name, j, works)
            compare(answers[len(names) + j][i], want, name, j, works)  # all adapters in one batch
    # Without the flag upstream has no LoRA on the tower.
    job |= {"options": {}, "rounds": [], "load": list(parts)}
    (_, outcomes), _ = engine.saved_by(script, job, no_torchvision)
    assert outcomes[1] == "ok"
    for outcome in (outcomes[0], outcomes[2]):
        assert "but vLLM has no LoRA on vision_tower and multi_modal_projector" in outcome


def compare(got, want, name, prompt, works):
    top = want[name][prompt].topk(40).indices
    difference = (got - want[name][prompt])[top].abs().max().item()
    effect = (want[None][prompt] - want[name][prompt])[top].abs().max().item()
    print(name, prompt, difference, effect)
    assert difference <= 1e-3, f"{name}, prompt {prompt}: {difference:.2e}"
    assert not works or effect >= 0.02
