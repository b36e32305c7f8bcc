#!/usr/bin/env python3
"""What loading an adapter costs: file -> canonical -> activated in a slot, beside upstream.

    python benchmarks/adapter_load.py                  # Qwen3-30B-A3B, ranks 16, 32, per expert
    python benchmarks/adapter_load.py --layout flat    # one fused adapter, on vLLM's 3-D wrapper

Both sides run vLLM's own `LoRAModel.from_local_checkpoint`, `LoRAModelManager._add_adapter` and
`activate_adapter` on the real LoRA layers of a model without its weights; each in a process of its
own, with the file in the page cache. "first" is the first load of the process, whose memory the
system has to hand out; "again" the median of the later ones. "copy" is one copy of the same bytes
from the page cache into fresh memory. Extra memory is anonymous memory at its highest, less the
slots, sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HIDDEN, INNER, EXPERTS = 2048, 768, 128  # Qwen3-30B-A3B


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--layout", choices=("per-expert", "flat"), default="per-expert")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where the adapters are written (several GB)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(_child(args)))
        return
    print(
        f"{args.layout}, {args.layers} layers x {EXPERTS} experts, bf16; first and again, seconds"
    )
    head = f"{'upstream /':>11} {'/ copy':>12} {'extra / file':>13}"
    print(f"{'rank':>4} {'MiB':>6} {'':>9} {'first':>6} {'again':>6} {head}")
    for rank in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            adapter = Path(name)
            size = _write(adapter, args.layers, rank, args.layout)
            rows = {side: _run(args, side, adapter, rank) for side in ("copy", "upstream", "ours")}
        for side, row in rows.items():
            first, again = row["first"], row["seconds"]
            faster = [rows["upstream"]["first"] / first, rows["upstream"]["seconds"] / again]
            slower = [first / rows["copy"]["first"], again / rows["copy"]["seconds"]]
            print(
                f"{rank:>4} {size / 2**20:>6.0f} {side:>9} {first:>6.2f} {again:>6.2f} "
                f"{faster[0]:>5.1f} {faster[1]:>5.1f} {slower[0]:>6.2f} {slower[1]:>5.2f} "
                f"{row['extra'] / size:>13.2f}"
            )


def _write(folder: Path, layers: int, rank: int, layout: str) -> int:
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    shapes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    if layout == "flat":
        shapes = {".base_layer": (2 * INNER, HIDDEN), "": (HIDDEN, INNER)}
    pool = torch.randn(2**24).to(torch.bfloat16) * 0.01
    for layer in range(layers):
        base = f"base_model.model.model.layers.{layer}.mlp.experts"
        for name, (out, inn) in shapes.items():
            for expert in range(EXPERTS if layout == "per-expert" else 1):
                key = f"{base}.{expert}.{name}" if layout == "per-expert" else f"{base}{name}"
                r = rank if layout == "per-expert" else rank * EXPERTS
                tensors[f"{key}.lora_A.weight"] = pool[: r * inn].view(r, inn).clone()
                tensors[f"{key}.lora_B.weight"] = pool[: out * r].view(out, r).clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3 * rank, "target_modules": ["experts"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    os.sync()  # the disk is quiet when the clock runs
    return (folder / "adapter_model.safetensors").stat().st_size


def _run(args: argparse.Namespace, side: str, adapter: Path, rank: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--adapter", str(adapter)]
    command += ["--layers", str(args.layers), "--layout", args.layout, "--ranks", str(rank)]
    command += ["--repeats", str(args.repeats)]
    env = {**os.environ, "VLLM_MOE_LORA": "1" if side == "ours" else "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _child(args: argparse.Namespace) -> dict[str, float]:
    import torch

    file = args.adapter / "adapter_model.safetensors"
    size = file.stat().st_size
    with file.open("rb") as data:  # into the page cache
        while data.read(2**24):
            pass
    if args.side == "copy":

        def once(number: int) -> Any:
            storage = torch.UntypedStorage.from_file(str(file), False, size)
            return torch.empty(0, dtype=torch.uint8).set_(storage).clone()

    else:
        if args.side == "ours":
            import vllm_moe_lora

            vllm_moe_lora.register()
        manager = _manager(args.layers, args.ranks[0], args.layout)

        def once(number: int) -> Any:
            return _load(manager, str(args.adapter), number)

    times, peak, before = [], _Peak(), _anonymous()
    with peak:
        for number in range(1, args.repeats + 1):
            start = time.perf_counter()
            kept = once(number)
            times.append(time.perf_counter() - start)
            if args.side != "copy":
                manager.remove_adapter(number)
            del kept
    return {
        "first": times[0],
        "seconds": statistics.median(times[1:]),
        "extra": max(0, peak.highest - before),
    }


def _load(manager: Any, folder: str, number: int) -> Any:
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    with torch.inference_mode():
        helper = PEFTHelper.from_local_dir(folder, None)
        lora = LoRAModel.from_local_checkpoint(
            folder,
            manager.expected,
            helper,
            lora_model_id=number,
            device="cpu",
            dtype=torch.bfloat16,
        )
        manager._add_adapter(lora)
        manager.activate_adapter(number)
    return lora


def _manager(layers: int, rank: int, layout: str) -> Any:
    """vLLM's manager and LoRA layers around experts that have sizes and no weights."""
    import torch
    from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.lora.model_manager import AdapterLRUCache, LoRAModelManager

    flat = layout == "flat"
    config = SimpleNamespace(
        max_loras=1,
        max_cpu_loras=2,
        max_lora_rank=rank,
        lora_dtype=torch.bfloat16,
        fully_sharded_loras=False,
        enable_moe_shared_loras=False,
        enable_mixed_moe_lora_format=False,
        target_modules=None,
    )
    model_config = SimpleNamespace(architectures=["Qwen3MoeForCausalLM"])
    parallel = SimpleNamespace(ep_rank=0, use_ep=False, tp_size=1, tp_rank=0)
    moe = SimpleNamespace(
        hidden_dim=HIDDEN,
        hidden_dim_unpadded=HIDDEN,
        intermediate_size_per_partition=INNER,
        intermediate_size_per_partition_unpadded=INNER,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        is_act_and_mul=True,
        moe_parallel_config=parallel,
    )
    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager.modules, manager.packed_modules = {}, {}
    for layer in range(layers):
        wrapper = (FusedMoE3DWithLoRA if flat else FusedMoEWithLoRA).__new__(
            FusedMoE3DWithLoRA if flat else FusedMoEWithLoRA
        )
        torch.nn.Module.__init__(wrapper)
        wrapper.moe_config, wrapper.base_layer = moe, SimpleNamespace(moe_config=moe)
        wrapper.tp_size, wrapper.tp_rank, wrapper.device = 1, 0, torch.device("cpu")
        wrapper._w13_slices, wrapper.enable_moe_shared_loras = 1 if flat else 2, False
        wrapper._moe_kernel = SimpleNamespace(fused_experts=None)
        wrapper.create_lora_weights(1, config, model_config)
        wrapper.reset_lora(0)  # zeros on paper become memory when they are first written
        name = f"model.layers.{layer}.mlp.experts"
        manager.modules[name] = wrapper
        if not flat:
            manager.packed_modules[name] = [
                f"{name}.{e}.{p}"
                for e in range(EXPERTS)
                for p in ("gate_proj", "down_proj", "up_proj")
            ]
    manager.expected = {"experts"} | {
        f"experts.{e}.{p}" for e in range(EXPERTS) for p in ("gate_proj", "down_proj", "up_proj")
    }
    manager.model = SimpleNamespace(config=model_config)
    manager.moe_lora_unwrapped = {}  # the model is a name only
    manager.lora_config, manager._is_moe, manager._is_3d_moe_model = config, True, flat
    manager._is_non_gated_moe = manager._use_ep = manager.is_pooling_model = False
    manager._enable_mixed_moe_lora_format = manager._enable_moe_shared_loras = False
    manager.supports_mm = False
    manager.lora_index_to_id = [None]
    manager._registered_adapters = AdapterLRUCache(2, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(1, manager._deactivate_adapter)
    return manager


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class _Peak:
    """Highest anonymous memory while the block runs."""

    def __enter__(self) -> None:
        self.highest, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, _anonymous())


if __name__ == "__main__":
    main()
