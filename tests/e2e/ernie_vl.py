"""A random small Ernie 4.5 VL, with the names and the config of the published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import multimodal

IMAGE = 500  # the token that stands for a patch of an image
TEXT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 3,  # the first has no experts; images reach the answer from the second
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "intermediate_size": 128,
    "initializer_range": 0.1,
    "moe_intermediate_size": [128, 64],  # of text and of vision experts
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
ROPE = {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [6, 6, 4]}
TOKENS = {
    "image_start_token_id": 501,
    "image_end_token_id": 502,
    "video_start_token_id": 503,
    "video_end_token_id": 504,
}
PUBLISHED = {
    **TEXT,
    **TOKENS,
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_moe_vl",
    "dtype": "float32",
    "hidden_act": "silu",
    "rope_parameters": ROPE,
    "freq_allocation": 4,
    "moe_num_experts": [8, 8],
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [2, 2],
    "im_patch_id": IMAGE,
    "pixel_hidden_size": 64,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "use_temporal_conv": True,
    "vision_config": {**VISION, "embed_dim": 64, "mlp_ratio": 2, "in_channels": 3},
    "auto_map": {
        "AutoConfig": "configuration_ernie.ErnieConfig",
        "AutoProcessor": "processing_ernie.ErnieProcessor",
    },
}
CONFIG = """
from transformers import PretrainedConfig


class ErnieConfig(PretrainedConfig):
    model_type = "ernie4_5_moe_vl"

    def __init__(self, vision_config=None, **more):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**more)
"""

PROCESSOR = """
import numpy
import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin


class Images:
    size = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}
    image_mean, image_std, rescale_factor = [0.5, 0.4, 0.3], [0.3, 0.4, 0.5], 1 / 255


def patches(image):  # the pixels of a patch together, and the patches of a token
    pixels = torch.tensor(numpy.asarray(image)).view(2, 2, 14, 2, 2, 14, 3)
    return pixels.permute(0, 3, 1, 4, 6, 2, 5).reshape(16, -1)


class ErnieProcessor(ProcessorMixin):
    attributes, spatial_conv_size, temporal_conv_size = [], 2, 2

    def __init__(self, tokenizer):
        self.tokenizer, self.image_processor = tokenizer, Images()

    @classmethod
    def from_pretrained(cls, path, **more):
        return cls(AutoTokenizer.from_pretrained(path))

    def __call__(self, text=None, images=(), videos=(), **more):
        found = {"input_ids": [self.tokenizer(one)["input_ids"] for one in text]}
        if images:
            found["images"] = torch.cat([patches(one) for one in images])
            found["grid_thw"] = torch.tensor([[1, 4, 4]] * len(images))
        return BatchFeature(found)
"""
WORDS = {
    IMAGE: "<|IMAGE_PLACEHOLDER|>",
    501: "<|IMAGE_START|>",
    502: "<|IMAGE_END|>",
    506: "<|image@placeholder|>",
    507: "<|video@placeholder|>",
}


def write_processor(folder: Path) -> None:
    """Write a tokenizer, and a processor that gives what that of the published checkpoints does."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    words = {WORDS.get(i, f"t{i}"): i for i in range(TEXT["vocab_size"])}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(kinds.WordLevel(words, unk_token="t0")),
        additional_special_tokens=list(WORDS.values()),
    ).save_pretrained(folder)
    (folder / "processing_ernie.py").write_text(PROCESSOR)
    auto = {"auto_map": {"AutoProcessor": PUBLISHED["auto_map"]["AutoProcessor"]}}
    (folder / "processor_config.json").write_text(json.dumps(auto))


def build(folder: Path) -> tuple[Path, Path]:
    """Write the checkpoint. Returns its folder, and that of the one with transformers' names."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config={**TEXT, "moe_num_experts": 8, "rope_parameters": ROPE},
        vision_config={**VISION, "intermediate_size": 128},
        tie_word_embeddings=False,
        image_token_id=IMAGE,
        video_token_id=505,
        **TOKENS,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("ln.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias") or "vision_tower" in name or "resampler" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    names = {
        name.replace("model.vision_model.", "vision_model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(names, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    (folder / "configuration_ernie.py").write_text(CONFIG)
    multimodal.write_twin(model, folder / multimodal.TWIN)
    return folder, folder / multimodal.TWIN
