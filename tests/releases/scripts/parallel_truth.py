"""One layer of routed experts, an adapter on it, and what they answer as a whole, in fp32 loops."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model.model.layers.0.mlp.experts"
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Layer:
    """Weights of all experts: ``w1``, ``w3`` [experts, inner, hidden], ``w2`` the other way.

    ``biases``: by the weight's name, [experts, out]; none by themselves.
    """

    def __init__(self, experts, hidden, inner, seed=3):
        g = torch.Generator().manual_seed(seed)
        self.experts, self.hidden, self.inner = experts, hidden, inner
        self.w1, self.w3 = (
            torch.randn(experts, inner, hidden, generator=g) / hidden**0.5 for _ in range(2)
        )
        self.w2 = torch.randn(experts, hidden, inner, generator=g) / inner**0.5
        self.biases = {}


class Adapter:
    """Factors by projection and expert, all different: {"w1": {0: (a, b)}, ...}.

    Args:
        layer: it is for.
        ragged: ranks differ between experts and projections, and some of both have no factors.
        tied: gate and up share their lora_a, as fused layouts want.
        shared: all experts share w1's and w3's lora_a and w2's lora_b.
        some: nothing for gate.
    """

    def __init__(self, layer, rank, seed, ragged=False, tied=False, shared=False, some=False):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g) * 0.6 / shape[-1] ** 0.5

        self.layer, self.rank, self.alpha, self.ranks = layer, rank, 2.0 * rank, {}
        self.factors = {"w1": {}, "w3": {}, "w2": {}}
        outer_a, outer_b = draw(rank, layer.hidden), draw(layer.hidden, rank)
        for expert in range(layer.experts):
            for name, pairs in self.factors.items():
                r = rank
                if some and name == "w1":
                    continue
                if ragged:
                    r = 1 + (3 * expert + ord(name[1])) % rank
                    if expert % 4 == 1 or (expert % 4 == 2 and name == "w2"):
                        continue
                out, inn = layer.inner, layer.hidden
                if name == "w2":
                    out, inn = inn, out
                a, b = draw(r, inn), draw(out, r)
                if tied and name == "w3":
                    a = self.factors["w1"][expert][0]
                if shared:
                    a, b = (a, outer_b) if name == "w2" else (outer_a, b)
                pairs[expert] = (a, b)
                if r != rank:
                    self.ranks[f"experts.{expert}.{NAMES[name]}"] = r

    def delta(self, name, expert):
        """[out, in] in fp32, 0 where the adapter has nothing."""
        if expert not in self.factors[name]:
            return torch.zeros(())
        a, b = self.factors[name][expert]
        return self.alpha / a.shape[0] * (b @ a)

    def per_expert(self):
        """As PEFT writes it for models of one module an expert."""
        return {
            f"{PREFIX}.{expert}.{NAMES[name]}.lora_{side}.weight": tensor.clone()
            for name, pairs in self.factors.items()
            for expert, both in pairs.items()
            for side, tensor in zip("AB", both, strict=True)
        }

    def fused(self, interleaved):
        """As PEFT's target_parameters writes it; for tied adapters of one rank."""

        def rows(name):
            pairs = [self.factors[name][e] for e in range(self.layer.experts)]
            return torch.cat([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

        def columns(b):  # [experts, out, rank] -> [out, rank * experts], by rank, then by expert
            return b.permute(1, 2, 0).flatten(1).contiguous()

        (a, gate), (_, up), (down_a, down_b) = map(rows, ("w1", "w3", "w2"))
        both = torch.stack([gate, up], 2).flatten(1, 2) if interleaved else torch.cat([gate, up], 1)
        return {
            f"{PREFIX}.base_layer.lora_A.weight": a,
            f"{PREFIX}.base_layer.lora_B.weight": columns(both),
            f"{PREFIX}.lora_A.weight": down_a,
            f"{PREFIX}.lora_B.weight": columns(down_b),
        }

    def write(self, folder, tensors):
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "bias": "none"}
        config |= {"target_modules": ["experts"], "rank_pattern": self.ranks}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


def answer(layer, x, ids, weights, adapters, on_input=False, activation=None):
    """[tokens, hidden] in fp32.

    Args:
        adapters: one for each token, None for the base model.
        on_input: the router's weight goes on the expert's input (Llama-4), not on its output.
    """
    activation = activation or (lambda gate, up: torch.nn.functional.silu(gate) * up)
    out = torch.zeros(len(x), layer.hidden)
    for token, adapter in enumerate(adapters):
        for place, expert in enumerate(ids[token].tolist()):
            weight = weights[token, place]

            def times(name, value, expert=expert, adapter=adapter):
                merged = getattr(layer, name)[expert]
                if adapter is not None:
                    merged = merged + adapter.delta(name, expert)
                bias = layer.biases.get(name)
                return merged @ value if bias is None else merged @ value + bias[expert]

            row = x[token].float() * (weight if on_input else 1)
            row = times("w2", activation(times("w1", row), times("w3", row)))
            out[token] += row if on_input else weight * row
    return out
