"""Stand-ins for models of a hub that vLLM's tests ask for: hub.py FOLDER, an HF_HOME to be.

Of the class that the test names, with its defaults for what scheduling looks at, but tiny, with
random weights and a tokenizer of numbered words. Without them two tests of three could not run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

_TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 2048}
_LLAMA = {"max_position_embeddings": 8192}
MODELS = {
    "facebook/opt-125m": (OPTConfig, _OPT),
    "facebook/opt-350m": (OPTConfig, _OPT),
    "hmellor/tiny-random-LlamaForCausalLM": (LlamaConfig, _LLAMA),
    "meta-llama/Llama-3.2-1B": (LlamaConfig, _LLAMA),
    "meta-llama/Llama-3.2-1B-Instruct": (LlamaConfig, _LLAMA),
    "meta-llama/Llama-3.2-3B-Instruct": (LlamaConfig, _LLAMA),
    "Qwen/Qwen3-0.6B": (Qwen3Config, {"max_position_embeddings": 40960}),
}


def main(home: Path) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 1024)}}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    for name, (config, more) in MODELS.items():
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        revision = "0" * 40
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config(**{**_TINY, **more}), dtype=torch.float32)
        for part in (model, tokenizer):
            part.save_pretrained(folder / "snapshots" / revision)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(revision)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
