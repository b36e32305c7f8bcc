#!/usr/bin/env python3
"""Reinforcement learning of a MoE adapter on a CPU: Hugging Face and PEFT train, vLLM samples.

    python examples/rl_loop.py                          # in fp32, then in bf16; plots rl_loop.svg
    python examples/rl_loop.py --quant gptq --noise     # INT4 base weights, with QeRL's noise

A random tiny Qwen3-MoE answers questions with a few tokens, each "yes" or "no". The reward is the
share of right ones: at first about a half. Each step samples a group of answers to each question,
trains LoRA on the experts by a group-relative policy gradient, and pushes the adapter from memory
into the running engine. Printed for each step: the reward, the time of the push, and the mean
difference between the sampler's and the trainer's log-probs of the sampled tokens, where the
trainer's routers choose experts themselves, and where they take the sampler's (R3).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

YES, NO = 7, 11  # token ids
PREFIX = [(13 * i + 5) % 500 for i in range(40)]  # of all questions; more than a block of the cache
SIZES = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "norm_topk_prob": True,
    "moe_intermediate_size": 64,
}
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group", type=int, default=16, help="answers to each question")
    parser.add_argument("--tokens", type=int, default=4, help="of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--quant", choices=["gptq"], help="INT4 base weights; in bfloat16 only")
    parser.add_argument("--noise", action="store_true", help="adaptive noise on norms, as in QeRL")
    parser.add_argument("--plot", default="rl_loop.svg")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dtypes is None:
        options.dtypes = ["bfloat16"] if options.quant else ["float32", "bfloat16"]
    if options.quant and options.dtypes != ["bfloat16"]:
        parser.error("--quant gptq: vLLM's INT4 experts on a CPU compute in bfloat16 only")
    return options


class Trainer:
    """PEFT's LoRA on the experts of a Hugging Face model."""

    def __init__(self, checkpoint: Path, dtype: str, options: argparse.Namespace) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.torch = torch
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        self.routes: Any = None
        for i, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(self._replay(i))
        self.config = LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, self.config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.lr, weight_decay=0)

    def _replay(self, layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            """R3: the router takes the experts that the sampler took, with its own weights."""
            if self.routes is None:
                return output
            logits, _, _ = output
            ids = self.routes[:, layer]
            scores = logits.float().softmax(-1).gather(1, ids)
            return logits, (scores / scores.sum(-1, keepdim=True)).to(logits.dtype), ids

        return hook

    def log_probs(self, samples: list[Any], replay: bool) -> Any:
        """Log-probs [samples, tokens, vocab] before each token of each answer."""
        torch = self.torch
        ids = torch.tensor([sample["prompt"] + sample["tokens"] for sample in samples])
        if replay:
            routes = [torch.from_numpy(sample["routes"].astype("int64")) for sample in samples]
            self.routes = torch.cat(routes)  # one row for each token but the last
        try:
            logits = self.model(ids[:, :-1], use_cache=False).logits
        finally:
            self.routes = None
        return logits[:, -len(samples[0]["tokens"]) :].float().log_softmax(-1)

    def tensors(self) -> dict[str, Any]:
        """The adapter, under PEFT's names."""
        from peft import get_peft_model_state_dict

        return {k: v.detach() for k, v in get_peft_model_state_dict(self.model).items()}

    def step(self, samples: list[Any], group: int) -> tuple[float, float]:
        """One step of the policy gradient; returns the mean differences without and with R3."""
        torch = self.torch
        answers = torch.tensor([sample["tokens"] for sample in samples])
        sampler = torch.tensor([sample["log_probs"] for sample in samples])
        rewards = torch.tensor([sample["reward"] for sample in samples]).view(-1, group)
        # Relative to the other answers to the same question.
        deviation = rewards.std(1, keepdim=True) + 1e-4
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / deviation).view(-1, 1)
        differences = []
        with torch.no_grad():
            free = self.log_probs(samples, replay=False)
        forced = self.log_probs(samples, replay=True)
        for found in (free, forced.detach()):
            chosen = found.gather(-1, answers[..., None])[..., 0]
            differences.append((chosen - sampler).abs().mean().item())
        # The sampler may choose from "yes" and "no" only.
        policy = forced[..., [YES, NO]].log_softmax(-1)
        taken = torch.where(answers == YES, policy[..., 0], policy[..., 1])
        loss = -(advantages * taken).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return differences[0], differences[1]


class Sampler:
    """vLLM with LoRA, routes and, if asked for, noise."""

    def __init__(self, checkpoint: Path, dtype: str, options: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        self.options = options
        self.llm = LLM(
            str(checkpoint),
            dtype=dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=64,
            block_size=32,
            disable_log_stats=True,
            enable_lora=True,
            max_lora_rank=16,
            enable_return_routed_experts=True,
            worker_extension_cls="vllm_moe_lora.rl.Worker",
        )
        self.params = SamplingParams(
            n=options.group,
            temperature=1.0,
            max_tokens=options.tokens,
            ignore_eos=True,
            allowed_token_ids=[YES, NO],
            logprobs=0,
            detokenize=False,
        )
        self.adapter: Any = None

    def push(self, tensors: dict[str, Any], config: dict[str, Any], step: int) -> float:
        """Give the engine the adapter of this step; returns the seconds it took."""
        from vllm_moe_lora import rl

        began = time.perf_counter()
        self.adapter = rl.push(self.llm, "policy", tensors, config)
        seconds = time.perf_counter() - began
        if self.options.noise:
            rl.set_noise(self.llm, step, self.options.steps, start=1e-2, end=1e-4, stages=5)
        return seconds

    def sample(self, questions: list[tuple[list[int], int]]) -> list[dict[str, Any]]:
        """A group of answers to each question, with log-probs, routes and rewards."""
        prompts = [{"prompt_token_ids": PREFIX + tokens} for tokens, _ in questions]
        outputs = self.llm.generate(prompts, self.params, lora_request=self.adapter, use_tqdm=False)
        samples = []
        for output, (_, right) in zip(outputs, questions, strict=True):
            for answer in output.outputs:
                tokens = list(answer.token_ids)
                entries = zip(tokens, answer.logprobs, strict=True)
                samples.append(
                    {
                        "prompt": list(output.prompt_token_ids),
                        "tokens": tokens,
                        "log_probs": [entry[token].logprob for token, entry in entries],
                        "routes": answer.routed_experts,
                        "reward": sum(token == right for token in tokens) / len(tokens),
                    }
                )
        return samples


def train(dtype: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """The whole loop in one dtype; returns what was printed."""
    import torch

    from vllm_moe_lora.tiny import models, quantise

    torch.manual_seed(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        served = full = models.build("qwen3_moe", Path(made, "model"), options.seed, **SIZES)
        if options.quant:
            served, full = Path(made, "int4"), Path(made, "dequantised")
            quantise.quantise(Path(made, "model"), served, full, options.quant)
        sampler = Sampler(served, dtype, options)
        trainer = Trainer(full, dtype, options)
        # Each question is three tokens of its own; half of the answers are "yes".
        ids = torch.randperm(400)[: 3 * options.questions].view(-1, 3).tolist()
        questions = [(tokens, YES if i % 2 else NO) for i, tokens in enumerate(ids)]
        config = trainer.config.to_dict()
        print(f"{dtype}\nstep  reward  push ms  mismatch  with R3", flush=True)
        for step in range(options.steps):
            seconds = sampler.push(trainer.tensors(), config, step)
            samples = sampler.sample(questions)
            free, forced = trainer.step(samples, options.group)
            reward = sum(sample["reward"] for sample in samples) / len(samples)
            row = {"reward": reward, "push": seconds, "mismatch": free, "mismatch_r3": forced}
            rows.append(row)
            print(
                f"{step:4}  {reward:6.3f}  {1e3 * seconds:7.1f}  {free:8.1e}  {forced:7.1e}",
                flush=True,
            )
    return rows


def plot(results: dict[str, list[dict[str, float]]], file: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (it is in the extra dev)", file=sys.stderr)
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for dtype, rows in results.items():
        left.plot([row["reward"] for row in rows], label=dtype)
        right.plot([row["mismatch"] for row in rows], label=dtype)
        right.plot([row["mismatch_r3"] for row in rows], "--", label=f"{dtype}, R3")
    left.set(xlabel="step", ylabel="reward", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="mean |Δ log-prob|", yscale="log")
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    print(f"wrote {file}")


def main() -> None:
    options = parse()
    if options.child:
        Path(options.child).write_text(json.dumps(train(options.dtypes[0], options)))
        return
    results = {}
    for dtype in options.dtypes:  # an engine each, in a process of its own
        with tempfile.TemporaryDirectory() as made:
            file = Path(made, "rows.json")
            command = [sys.executable, __file__, *sys.argv[1:], "--dtypes", dtype]
            command += ["--child", str(file)]
            subprocess.run(command, env={**os.environ, **SETTINGS}, check=True)
            results[dtype] = json.loads(file.read_text())
    for dtype, rows in results.items():
        last = [row["reward"] for row in rows[-5:]]
        free, forced = (
            sum(row[key] for row in rows) / len(rows) for key in ("mismatch", "mismatch_r3")
        )
        print(
            f"{dtype}: reward {rows[0]['reward']:.3f} -> {sum(last) / len(last):.3f}, "
            f"mismatch {free:.1e}, with R3 {forced:.1e}"
        )
    plot(results, options.plot)


if __name__ == "__main__":
    main()
