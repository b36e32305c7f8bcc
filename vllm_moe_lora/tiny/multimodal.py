"""Random small checkpoints of multimodal MoE models, with the names of the published ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_moe_lora.tiny.oracle import load_tensors


@dataclass(frozen=True)
class Wrapper:
    """A multimodal class around a text model.

    Attributes:
        text: the text model, a key of `models.FAMILIES`.
        config: name of the class of its config in transformers.
        architecture: what vLLM calls the class.
        vision: entries of the vision model's config.
        more: entries of the config itself.
        published: (pattern, replacement) for names that transformers writes differently from the
            published checkpoints.
        keep: beginnings of the names that a checkpoint of the text model alone has; empty for all.
        text_config: what the published config.json of the text model says, where it differs from
            transformers'. An entry None is one that it does not have.
    """

    text: str
    config: str
    architecture: str
    vision: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    published: tuple[tuple[str, str], ...] = ()
    keep: tuple[str, ...] = ()
    text_config: dict[str, Any] = field(default_factory=dict)


_STEP: dict[str, Any] = {
    "text": "step3p7_text",
    "config": "Step3p7Config",
    "vision": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "mlp_ratio": 2.0,
    },
    "more": {"image_token_id": 500},
    "text_config": {
        "model_type": "step3p5",
        "architectures": ["Step3p5ForCausalLM"],
        "num_attention_groups": 2,
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "moe_router_activation": "sigmoid",
        "moe_layers_enum": "1",
        "norm_expert_weight": True,
        "use_head_wise_attn_gate": True,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 8,
            "num_attention_groups": 2,
            "head_dim": 32,
        },
        "rope_theta": 10000.0,
        "rope_parameters": None,
        "per_layer_config": None,
        "num_sliding_attention_heads": None,
        "mlp_layer_types": None,
    },
}

WRAPPERS = {
    "kimi_k25": Wrapper(
        "deepseek_v3",
        "Kimi_K25Config",
        "KimiK25ForConditionalGeneration",
        vision={
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        more={
            "projection_hidden_size": 64,
            "image_token_id": 500,
            "video_token_id": 501,
            "vision_start_token_id": 502,
            "vision_end_token_id": 503,
        },
        # transformers 5.19 also writes the text model's layers as "blocks", and more.
        published=(
            (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
            (r"^model\.mm_projector\.", "mm_projector."),
            (r"^vision_tower\.encoder\.patch_embed\.", "vision_tower.patch_embed."),
        ),
    ),
    "aria": Wrapper(
        "aria_text",
        "AriaConfig",
        "AriaForConditionalGeneration",
        vision={
            "model_type": "idefics3_vision",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        more={"image_token_index": 500, "projector_patch_to_query_dict": {"16": 4}},
    ),
    "step3p7": Wrapper(architecture="Step3p7ForConditionalGeneration", **_STEP),
    "step3p5": Wrapper(
        architecture="Step3p5ForCausalLM",
        keep=("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
        **_STEP,
    ),
}


def random_model(wrapper: Wrapper, text: Any) -> Any:
    """Return a random transformers model of a class of `WRAPPERS`.

    Args:
        wrapper: a value of `WRAPPERS`.
        text: the config of its text model.
    """
    import transformers

    config = getattr(transformers, wrapper.config)(
        text_config=text.to_dict(),
        vision_config=wrapper.vision,
        tie_word_embeddings=text.tie_word_embeddings,
        **wrapper.more,
    )
    return transformers.AutoModelForImageTextToText.from_config(config)


TWIN = "transformers"  # folder in a checkpoint's: the same weights with transformers' own names


def write_twin(model: Any, folder: Path) -> None:
    """Write the checkpoint that transformers would, if it did not restore published names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_published(wrapper: Wrapper, folder: Path) -> None:
    """Give the checkpoint in ``folder`` the names of published ones, and vLLM's architecture."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in load_tensors(folder).items():
        if wrapper.keep and not name.startswith(wrapper.keep):
            continue
        for pattern, replacement in wrapper.published:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | wrapper.text_config
    left_out = [name for name, value in wrapper.text_config.items() if value is None]
    config["text_config"] = {name: text[name] for name in text if name not in left_out}
    if wrapper.keep:
        config = config["text_config"]
    config["architectures"] = [wrapper.architecture]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
