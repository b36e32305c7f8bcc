"""Hugging Face's own routes, and its log-probs when it is told which experts to take."""

from __future__ import annotations

from pathlib import Path

import torch


class Model:
    """A checkpoint in fp32. Its layers' routers can be watched, and overruled."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.norm_topk_prob = getattr(self.model.config, "norm_topk_prob", False)
        layers = self.model.model.layers
        self.routed = [i for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")]
        self.layers = len(layers)
        self.top_k = self.model.config.num_experts_per_tok
        self.seen: dict[int, torch.Tensor] = {}
        self.forced: torch.Tensor | None = None
        for i in self.routed:
            block = layers[i].mlp
            block.experts.register_forward_pre_hook(self._see(i))
            block.gate.register_forward_hook(self._overrule(i))

    def _see(self, layer):
        def hook(module, args):
            self.seen[layer] = args[1].clone()

        return hook

    def _overrule(self, layer):
        def hook(module, args, output):
            if self.forced is None:
                return output
            logits, _, _ = output
            ids = self.forced[:, layer]
            scores = logits.float().softmax(-1).gather(1, ids)
            if self.norm_topk_prob:
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores.to(logits.dtype), ids

        return hook

    def __call__(self, ids, forced=None):
        """Log-probs after each of ``ids`` [tokens, vocab], and routes [tokens, layers, top_k].

        ``forced`` [tokens, layers, top_k] overrules the routers (softmax routers only).
        """
        self.forced = None if forced is None else torch.as_tensor(forced).long()
        with torch.no_grad():
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        routes = torch.zeros(len(ids), self.layers, self.top_k, dtype=torch.long)
        for layer, seen in self.seen.items():
            routes[:, layer] = seen
        return logits.float().log_softmax(-1), routes


class Truth:
    """Hugging Face's routes of a case's base model (None) and of each merged adapter."""

    def __init__(self, case):
        self.models = {None: Model(case.plain)}
        for name in case.adapters:
            case.want(name)
            self.models[name] = Model(case.folder / f"{name}-merged")

    def check(self, name, ids, have, start=0):
        """Every row of ``have`` names the experts Hugging Face takes for ``ids`` from ``start``."""
        _, want = self.models[name](ids)
        assert have.shape == want[start:].shape, "prompt + generated - 1 rows"
        torch.testing.assert_close(have.sort(-1).values, want[start:].sort(-1).values)
        return want
