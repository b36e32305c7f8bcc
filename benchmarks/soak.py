#!/usr/bin/env python3
"""Many adapters through few slots for minutes: right answers, no leak, how long things take.

    python benchmarks/soak.py

A real server on loopback (tiny Qwen3-MoE, fp32, CPU) with 4 slots and 16 adapters in memory. Eight
clients load, unload, replace (load_inplace) and ask 200 adapters at random for 5 minutes, while one
more streams from the base model. Every answer is compared with the adapter merged into the weights
in Hugging Face transformers (fp32). Then the same for a dense model on bare vLLM, plugin off.
Exit code 1 if ours gave a wrong answer, lost a request, or grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from server import Server

PROMPTS = [list(range(3 + 40 * i, 3 + 40 * i + n)) for i, n in enumerate((5, 12, 40, 70))]
CLIENTS, STREAM, TOLERANCE = 8, 200, 1e-3  # TOLERANCE: as in tests/e2e, fp32 against fp32
OPTIONS = ["--max-loras", "4", "--max-cpu-loras", "16", "--max-num-seqs", "16"]


class Soak:
    """Clients of one server, each with adapters of its own, and what they saw."""

    def __init__(self, server: Server, folders: list[Path], oracles: list[list], ends: float):
        self.server, self.folders, self.oracles = server, folders, oracles
        self.ends, self.begun = ends, time.monotonic()
        self.counts: Counter[str] = Counter()
        self.took: dict[str, list[float]] = {"load": [], "request": [], "gap": []}
        self.memory: list[tuple[float, float]] = []
        self.trouble: list[str] = []

    def run(self, work: Path) -> None:
        jobs = [threading.Thread(target=self._client, args=(work, n)) for n in range(CLIENTS)]
        jobs += [threading.Thread(target=self._stream), threading.Thread(target=self._watch)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()

    def _client(self, work: Path, number: int) -> None:
        dice = random.Random(number)
        mine = range(number, len(self.folders) - 1, CLIENTS)
        loaded: dict[int, int] = {}  # name -> whose weights it has
        while time.monotonic() < self.ends:
            act = dice.choices(("ask", "load", "unload", "replace"), (60, 22, 10, 8))[0]
            one = dice.choice([*loaded] or [None])
            try:
                if act == "load" or one is None:
                    one = dice.choice(mine)
                    if one not in loaded:
                        self._load(work, one, one, loaded, inplace=False)
                elif act == "ask":
                    self._ask(f"adapter-{one}", loaded[one], dice)
                elif act == "unload":
                    body = {"lora_name": f"adapter-{one}"}
                    status, text = self.server.post("/v1/unload_lora_adapter", body)
                    self._seen("unload", status == 200, text)
                    del loaded[one]
                else:
                    self._load(work, one, dice.choice(range(len(self.folders) - 1)), loaded, True)
            except Exception as error:
                self._seen(act, False, f"{type(error).__name__}: {error}")

    def _load(self, work: Path, name: int, whose: int, loaded: dict, inplace: bool) -> None:
        folder = work / f"adapter-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folders[whose], folder)
        begun = time.monotonic()
        status, text = self.server.load(folder.name, folder, load_inplace=inplace)
        self.took["load"].append(time.monotonic() - begun)
        self._seen("replace" if inplace else "load", status == 200, text)
        loaded[name] = whose

    def _ask(self, name: str | None, whose: int, dice: random.Random) -> None:
        which, begun = dice.randrange(len(PROMPTS)), time.monotonic()
        said = self.server.log_probs(name, PROMPTS[which])
        self.took["request"].append(time.monotonic() - begun)
        want = self.oracles[whose][which]
        worst = max(abs(value - want[token].item()) for token, value in said.items())
        self._seen("ask", worst <= TOLERANCE, f"WRONG: {name} differs by {worst:.1e}")

    def _stream(self) -> None:
        """Gaps between the tokens of a base request; the prompt's own are not counted."""
        first, dice = None, random.Random(0)
        while time.monotonic() < self.ends:
            try:
                tokens, last = [], None
                for token in self.server.tokens(None, PROMPTS[0], STREAM):
                    now = time.monotonic()
                    if last is not None:
                        self.took["gap"].append(now - last)
                    last = now
                    tokens.append(token)
                first = first or tokens
                self._seen("stream", tokens[:8] == first[:8], "WRONG: base tokens changed")
                self._ask(None, -1, dice)
            except Exception as error:
                self._seen("stream", False, f"{type(error).__name__}: {error}")

    def _watch(self) -> None:
        while time.monotonic() < self.ends:
            self.memory.append((time.monotonic() - self.begun, _resident(self.server.pid)))
            time.sleep(1)

    def _seen(self, what: str, well: bool, text: str) -> None:
        self.counts[what] += 1
        if not well:
            self.counts["wrong" if text.startswith("WRONG") else "failed"] += 1
            self.trouble.append(f"{what}: {text[:200]}")

    def growth(self) -> float:
        """Resident memory at the end over that after a third of the time."""
        length = self.memory[-1][0]
        warm = [size for t, size in self.memory if 0.33 <= t / length <= 0.45]
        end = [size for t, size in self.memory if t / length >= 0.9]
        return statistics.median(end) / statistics.median(warm)


def _resident(pid: int) -> float:
    """Bytes of a process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        todo += children.get(one, [])
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
        except OSError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE")


def _prepare(family: str, root: Path, number: int) -> tuple[Path, list[Path], list[list]]:
    """Model, adapters, and for each (the last: none) the oracle's last log-probs per prompt."""
    from vllm_moe_lora.tiny import adapters, models, oracle

    model = models.build(family, root / "model")
    folders, oracles = [], []
    for seed in range(number):
        folder = adapters.write(model, root / f"{seed}", seed=seed, rank=2 + seed % 7)
        merged = oracle.merge(model, folder, root / "merged")
        folders.append(folder)
        oracles.append([found[-1] for found in oracle.log_probs(merged, PROMPTS)])
    oracles.append([found[-1] for found in oracle.log_probs(model, PROMPTS)])
    return model, [*folders, model], oracles


def soak(family: str, seconds: float, number: int, **env: str) -> Soak:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model, folders, oracles = _prepare(family, root, number)
        settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", **env}
        with Server(model, root, options=OPTIONS, **settings) as server:
            done = Soak(server, folders, oracles, time.monotonic() + seconds)
            done.run(root / "served")
    return done


def _row(name: str, done: Soak) -> str:
    def at(what: str, share: float) -> str:
        times = sorted(done.took[what]) or [0.0]
        return f"{1000 * times[min(len(times) - 1, int(share * len(times)))]:.0f}"

    cells = [name, str(done.counts["load"] + done.counts["replace"]), str(done.counts["ask"])]
    cells += [str(done.counts["wrong"]), str(done.counts["failed"]), f"{done.growth():.3f}"]
    cells += [f"{at(what, 0.5)} / {at(what, 0.99)}" for what in ("load", "request", "gap")]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--bare", type=float, default=100, help="seconds of bare vLLM; 0: without")
    args = parser.parse_args()
    ours = soak("qwen3_moe", args.seconds, args.adapters)
    rows = [_row("MoE, this package", ours)]
    trouble = ours.trouble
    if args.bare:
        bare = soak("qwen3", args.bare, args.adapters, VLLM_MOE_LORA="0")
        rows.append(_row("dense, bare vLLM", bare))
        trouble = [*trouble, *(f"bare: {text}" for text in bare.trouble)]
    print("times in ms, p50 / p99")
    print("| | loads | answers | wrong | lost | RSS end / warm | load | request | base token |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    for text, times in Counter(trouble).most_common(10):
        print(f"{times} × {text}")
    return int(bool(ours.trouble) or ours.growth() > 1.05)


if __name__ == "__main__":
    sys.exit(main())
