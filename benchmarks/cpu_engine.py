#!/usr/bin/env python3
"""What LoRA on MoE costs on a CPU, in a real vLLM engine, everything in one run.

    python benchmarks/cpu_engine.py [--quant bf16 int4] [--layers 4] [--repeats 5] [--rows a b c1]

Layers of Qwen1.5-MoE-A2.7B's shape (hidden 2048, 60 experts, top 4, intermediate 1408, shared
5632), random weights, small vocabulary so that the layers are what is measured. Each row is an
engine of its own:

  default  vLLM as it starts by default: compiled, without LoRA, plugin off
  a        the same with --enforce-eager
  b        plugin, LoRA enabled (4 slots, rank 16), no adapter loaded
  b'       the same with four adapters loaded and none in the batch
  c1       every request with one and the same adapter
  c4       requests spread over four adapters
  c1e      c1 with --enforce-eager
  peft     PEFT in transformers, one adapter (only if asked for, and bf16 only); see peft_row.py
  llama    llama.cpp without LoRA, and llama1 with one adapter (the same); see llama_row.py

The engine of row "default" is there all the time. Each other row is measured in turns with it, so
that the machine is the same for both, and its speed is a share of "default" in those turns; see
turns.py. With --alone (8 layers in bf16 take 10 to 12 GB each) there is one at a time, "default"
first and last: on a shared machine that says little. cpu_slots.py measures fewer slots than
adapters.

INT4 (GPTQ, group 128): upstream offers its CPU INT4 experts only with AMX. On a CPU without AMX the
rows without LoRA are vLLM's own class with that one check lifted by this script; the operators are
the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import bars
import turns

HIDDEN, EXPERTS, TOP_K, INNER, SHARED, VOCAB = 2048, 60, 4, 1408, 5632, 1024
CASES = {"decode batch 1": (1, 16), "decode batch 8": (8, 16), "prefill 512": (1, 512)}
STEPS = 24
PEFT_STEPS = 4  # a step takes some hundred times as long


def config(layers: int, quant: str) -> dict[str, Any]:
    built: dict[str, Any] = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": SHARED,
        "intermediate_size": SHARED,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if quant == "int4":
        built["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        }
    return built


def write_adapter(folder: Path, layers: int, seed: int, rank: int = 16) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name: str, out: int, inn: int) -> None:
        for part, shape in (("A", (rank, inn)), ("B", (out, rank))):
            draw = torch.randn(shape, generator=generator) * 0.01
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = draw.to(torch.bfloat16)

    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            add(f"{block}.self_attn.{name}", HIDDEN, HIDDEN)
        add(f"{block}.mlp.gate", EXPERTS, HIDDEN)
        add(f"{block}.mlp.shared_expert_gate", 1, HIDDEN)
        places = [(f"{block}.mlp.experts.{e}", INNER) for e in range(EXPERTS)]
        for place, inner in [*places, (f"{block}.mlp.shared_expert", SHARED)]:
            add(f"{place}.gate_proj", inner, HIDDEN)
            add(f"{place}.up_proj", inner, HIDDEN)
            add(f"{place}.down_proj", HIDDEN, inner)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
        )
    )


def build(spec: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return an `LLM` and a `LoRARequest` for each adapter; ``spec`` is `Engine`'s."""
    import torch
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    if spec["lift_amx"]:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

        CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    adapters = spec["adapters"]
    slots = {"max_loras": spec.get("max_loras", 4), "max_cpu_loras": len(adapters)}
    lora = {"enable_lora": True, "max_lora_rank": 16, **slots} if adapters else {}
    llm = LLM(
        spec["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=spec["eager"],
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=256 << 20,  # so that two engines of 8 layers fit into 24 GB
        **lora,
    )
    torch.manual_seed(0)  # the same prompts for each engine
    return llm, [LoRARequest(str(i), i + 1, path) for i, path in enumerate(adapters)]


def steps(llm: Any, batch: int, length: int, tokens: int, adapters: list[Any]) -> list[float]:
    """Return the seconds of each engine step of one batch: the prefill's, then each token's."""
    import torch
    from vllm import SamplingParams

    engine = llm.llm_engine
    prompts = torch.randint(0, VOCAB, (batch, length)).tolist()
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(prompts):
        chosen = adapters[i % len(adapters)] if adapters else None
        request = {"prompt_token_ids": prompt}
        engine.add_request(f"{time.monotonic_ns()}-{i}", request, sampling, lora_request=chosen)
    taken = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - start)
    return taken


def child(spec: dict[str, Any]) -> None:
    """One engine: for each name of a case on stdin, print how long its steps take."""
    if spec["by"] == "slots":
        import_module("cpu_slots").child(spec)
        return
    if spec["by"] != "vllm":
        few = PEFT_STEPS if spec["by"] == "peft" else STEPS
        import_module(f"{spec['by']}_row").child(spec, CASES, few)
        return
    llm, requests = build(spec)
    if spec["warm"]:
        steps(llm, 4, 4, 2, requests)
    active = requests[: spec["active"]]
    for batch, length in CASES.values():
        steps(llm, batch, length, 3, active)
    weights = sum(
        llm.apply_model(lambda m: sum(p.numel() * p.element_size() for p in m.parameters()))
    )
    print("RESULT " + json.dumps(weights), flush=True)
    for line in sys.stdin:
        batch, length = CASES[line.strip()]
        decode = length <= 16
        taken = steps(llm, batch, length, 1 + STEPS if decode else 1, active)
        print("RESULT " + json.dumps(taken[1:][:STEPS] if decode else taken[:1]), flush=True)


class Engine:
    """One row's engine, in a process of its own. ``weights`` are the bytes of its parameters."""

    def __init__(self, row: str, spec: dict[str, Any]) -> None:
        inherited = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
        env = {
            **inherited,
            "VLLM_MOE_LORA": "1" if spec["adapters"] else "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        began = time.perf_counter()
        self.row, self.errors = row, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(spec)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.weights = self._result()
        took = time.perf_counter() - began
        print(f"  {row}: started in {took:.0f} s, {self.peak()}", file=sys.stderr, flush=True)

    def peak(self) -> str:
        """Return the most memory that the process had so far, as Linux says it."""
        status = Path(f"/proc/{self.process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return "".join(" ".join(line.split()) for line in lines if line.startswith("VmHWM"))

    def _result(self) -> Any:
        assert self.process.stdout is not None
        printed = []
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
            printed.append(line)
        self.errors.seek(0)
        sys.exit(f"row {self.row} failed:\n{(''.join(printed) + self.errors.read())[-3000:]}")

    def seconds(self, case: str) -> Any:
        """Run a case; return how long each step took (what cpu_slots.child says, if it is that)."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return self._result()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def files(folder: Path, quant: str, layers: int) -> tuple[str, list[str]]:
    """Write the model's configuration and four adapters, unless there; return where they are."""
    model, adapters = folder / quant, [folder / f"adapter{i}" for i in range(4)]
    model.mkdir(exist_ok=True, parents=True)
    (model / "config.json").write_text(json.dumps(config(layers, quant)))
    for i, adapter in enumerate(adapters):
        if not adapter.exists():
            write_adapter(adapter, layers, seed=i)
    return str(model), [str(adapter) for adapter in adapters]


def one_by_one(
    order: list[str], rows: dict[str, dict[str, Any]], start: Any, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return what `measure` returns, with one engine at a time."""
    taken: dict[str, dict[str, list[float]]] = {row: {case: [] for case in CASES} for row in order}
    found: dict[str, dict[str, float]] = {}
    for row in order:
        engine = start(row, rows[row])
        found[row] = {"weights": engine.weights}
        for case in CASES:
            here = [t for _ in range(args.repeats) for t in engine.seconds(case)]
            print(f"  {row}, {case}: {1e3 * median(here):.2f} ms", file=sys.stderr, flush=True)
            taken[row][case] += here
        engine.end()
    for row, case in ((row, case) for row in found for case in CASES):
        own = median(taken[row][case])
        found[row] |= {case: 1e3 * own, f"{case} share": median(taken["default"][case]) / own}
    return found


def measure(folder: Path, quant: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return row -> case -> milliseconds a step; with " share" its speed as a share of default."""
    import torch

    model, adapters = files(folder, quant, args.layers)
    bare: dict[str, Any] = {"adapters": [], "active": 0, "warm": False, "eager": False}
    bare["by"] = "vllm"
    lora = {**bare, "adapters": adapters}
    rows: dict[str, dict[str, Any]] = {
        "a": {**bare, "eager": True},
        "b": lora,
        "b'": {**lora, "warm": True},
        "c1": {**lora, "active": 1},
        "c4": {**lora, "active": 4},
        "c1e": {**lora, "active": 1, "eager": True},
        "peft": {**bare, "by": "peft"},
        "llama": {**bare, "by": "llama"},
        "llama1": {**bare, "by": "llama", "active": 1},
    }
    lift = quant == "int4" and not torch.cpu._is_amx_tile_supported()

    def start(row: str, how: dict[str, Any]) -> Engine:
        lifted = lift and not how["adapters"]
        return Engine(row, {"model": model, "lift_amx": lifted, **how})

    chosen = [row for row in rows if row in args.rows]
    if args.alone:
        return one_by_one(["default", *chosen, "default"], {"default": bare, **rows}, start, args)
    default = start("default", bare)
    found: dict[str, dict[str, float]] = {"default": {"weights": default.weights}}
    references: dict[str, list[float]] = {case: [] for case in CASES}
    for row in chosen:
        engine = start(row, rows[row])
        found[row] = {"weights": engine.weights}
        for case in CASES:
            taken, again = turns.turns(default, engine, case, args.repeats)
            own = median([t for _, one in taken for t in one])
            references[case] += [t for one, _ in taken for t in one]
            middle, low, high = turns.share(taken)
            found[row] |= {case: 1e3 * own, f"{case} share": middle}
            print(f"  {row}, {case}: {1e3 * own:.2f} ms, {middle:.3f} (quartiles {low:.3f} to "
                  f"{high:.3f}), {again} turns disturbed", file=sys.stderr, flush=True)  # fmt: skip
        engine.end()
        print(f"  {quant} {row}: {found[row]}", file=sys.stderr, flush=True)
    default.end()
    found["default"] |= {case: 1e3 * median(taken) for case, taken in references.items() if taken}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant", nargs="+", default=["bf16", "int4"], choices=["bf16", "int4"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=["a", "b", "b'", "c1", "c4", "c1e"])
    parser.add_argument("--alone", action="store_true", help="one engine at a time, less memory")
    parser.add_argument("--folder", type=Path, help="keep model and adapters here for another run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, help="draw the shares of the first --quant here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    results = {}
    with tempfile.TemporaryDirectory(prefix="moe-lora-bench-") as name:
        folder = args.folder or Path(name)
        for quant in args.quant:
            results[quant] = measure(folder, quant, args)
    if args.svg:
        args.svg.write_text(bars.svg(results[args.quant[0]], CASES))
    if args.json:
        print(json.dumps(results, indent=1))
        return
    import torch

    print(f"{torch.get_num_threads()} threads, {torch.__version__}, {args.layers} layers; "
          f"ms a step, median, and speed as a share of default")  # fmt: skip
    for quant, rows in results.items():
        print(f"\n| {quant} | {' | '.join(CASES)} | weights |")
        print("|---" * (len(CASES) + 2) + "|")
        for row, found in rows.items():
            cells = [f"{found[c]:.2f} ({found.get(f'{c} share', 1):.2f})" for c in CASES]
            size = found["weights"] / rows["default"]["weights"]
            print(f"| {row} | {' | '.join(cells)} | {size:.3f} |")


if __name__ == "__main__":
    main()
