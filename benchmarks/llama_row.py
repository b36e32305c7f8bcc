"""The rows of cpu_engine.py for what people take instead of vLLM on a CPU: llama.cpp.

The same model in bf16 with random weights, and an adapter of the same rank on the same modules, as
GGUF files of the forms that llama.cpp's converters write. Static batches, no scheduler, no server.
Wants llama-cpp-python (built here from its sdist, with its default flags) and gguf.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANK = 16


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield name, shape and whether the adapter targets it, for all weights but norms."""
    hidden, experts = config["hidden_size"], config["num_experts"]
    inner, shared = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    yield "token_embd", (config["vocab_size"], hidden), False
    yield "output", (config["vocab_size"], hidden), False
    for i in range(config["num_hidden_layers"]):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{i}.{name}", (hidden, hidden), True
        yield f"blk.{i}.ffn_gate_inp", (experts, hidden), True
        yield f"blk.{i}.ffn_gate_inp_shexp", (1, hidden), True
        for kind, lead, width in (("exps", (experts,), inner), ("shexp", (), shared)):
            yield f"blk.{i}.ffn_gate_{kind}", (*lead, width, hidden), True
            yield f"blk.{i}.ffn_up_{kind}", (*lead, width, hidden), True
            yield f"blk.{i}.ffn_down_{kind}", (*lead, hidden, width), True


def write(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """Write model.gguf and adapter.gguf, unless they are there."""
    import gguf
    import torch

    model, adapter = folder / "model.gguf", folder / "adapter.gguf"
    if adapter.exists():
        return model, adapter
    generator = torch.Generator().manual_seed(0)

    def add(writer: Any, name: str, shape: tuple[int, ...], std: float) -> None:
        drawn = (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)
        raw = drawn.view(torch.uint8).numpy()  # the last axis counts bytes
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    def finish(writer: Any) -> None:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    writer = gguf.GGUFWriter(str(model), "qwen2moe", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    ones = torch.ones(config["hidden_size"]).numpy()
    for i in range(config["num_hidden_layers"]):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
        for name in ("attn_q", "attn_k", "attn_v"):
            writer.add_tensor(f"blk.{i}.{name}.bias", 0 * ones)
    writer.add_tensor("output_norm.weight", ones)
    for name, shape, _ in _shapes(config):
        # A gate of the shared expert is a vector there.
        add(writer, f"{name}.weight", shape[1:] if shape[0] == 1 else shape, 0.02)
    finish(writer)

    writer = gguf.GGUFWriter(str(adapter), "qwen2moe", use_temp_file=True)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for name, (*lead, out, inn), targeted in _shapes(config):
        if targeted:
            add(writer, f"{name}.weight.lora_a", (*lead, RANK, inn), 0.01)
            add(writer, f"{name}.weight.lora_b", (*lead, out, RANK), 0.01)
    finish(writer)
    return model, adapter


def child(spec: dict[str, Any], cases: dict[str, tuple[int, int]], steps: int) -> None:
    """Answer as `cpu_engine.child` does: for each name of a case on stdin, print seconds a step."""
    import ctypes

    import llama_cpp as api
    import torch

    config = json.loads(Path(spec["model"], "config.json").read_text())
    model_file, adapter_file = write(Path(spec["model"]), config)
    vocabulary, threads = config["vocab_size"], len(os.sched_getaffinity(0))
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(
        str(model_file).encode(), api.llama_model_default_params()
    )
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 2048, 2048, 8
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(model, params)
    assert context, "llama.cpp made no context"
    if spec["active"]:
        lora = api.llama_adapter_lora_init(model, str(adapter_file).encode())
        assert lora, "llama.cpp refused the adapter"
        one = (api.llama_adapter_lora_p_ctypes * 1)(lora)
        assert not api.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(1.0))
    memory = api.llama_get_memory(context)
    batch = api.llama_batch_init(2048, 0, 1)

    def run(rows: int, length: int, tokens: int) -> list[float]:
        api.llama_memory_clear(memory, True)
        given = torch.randint(0, vocabulary, (rows, length)).tolist()
        start_at, taken = 0, []
        for _ in range(tokens):
            start = time.perf_counter()
            batch.n_tokens, last = 0, []
            for row, new in enumerate(given):
                for i, token in enumerate(new):
                    n = batch.n_tokens
                    batch.token[n], batch.pos[n] = token, start_at + i
                    batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                    batch.logits[n] = i == len(new) - 1
                    batch.n_tokens = n + 1
                last.append(batch.n_tokens - 1)
            assert api.llama_decode(context, batch) == 0
            start_at += len(given[0])
            logits = (api.llama_get_logits_ith(context, i)[:vocabulary] for i in last)
            given = [[int(torch.tensor(one).argmax())] for one in logits]
            taken.append(time.perf_counter() - start)
        return taken

    run(1, 16, 2)
    print("RESULT " + json.dumps(int(api.llama_model_size(model))), flush=True)
    for line in sys.stdin:
        rows, length = cases[line.strip()]
        decode = length <= 16
        taken = run(rows, length, 1 + steps if decode else 1)
        print("RESULT " + json.dumps(taken[1:] if decode else taken), flush=True)
