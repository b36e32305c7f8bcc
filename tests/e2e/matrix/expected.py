"""What each answer of a drawn engine has to be: by transformers, with the adapter merged."""

from __future__ import annotations

import json
import shutil
import statistics

import drawn
import layouts
import torch
from engine_cases import Case
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from vllm_moe_lora.tiny import oracle

FILE = "adapter_model.safetensors"
# fp32: rounding in different orders. bf16: an answer's mean difference, as a share of the adapter's
# effect, or of the log-probs' spread for the base model. Where two experts are nearly tied, routing
# may differ, and the share was up to 0.7. So the median of three answers or more decides. Of fewer
# it is only seen that the adapter was not ignored, which is a share of 1.
LIMIT, BASE_LIMIT, SHARE, SHARE_OF_FEW = 2e-3, 2e-4, 0.25, 0.9


def prepare(case: Case) -> Case:
    """Give the checkpoint a tokenizer (structured output wants one) and make the adapters."""
    words = {"<unk>": 0, "<bos>": 1, "<eos>": 2, **{f"t{i};": i for i in range(3, 512)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        eos_token="<eos>",
        unk_token="<unk>",
    )
    model = shutil.copytree(case.model, case.folder / "with-tokenizer")
    tokenizer.save_pretrained(model)
    case.model = model
    last = lambda *words: lambda name: name.endswith(words)  # noqa: E731
    case.add("all", seed=1)
    case.add("small", seed=2, rank=3, alpha=9)
    case.add("wide", seed=3, rank=16, alpha=16)
    case.add("attention", lambda name: "self_attn" in name, seed=4)
    case.add("experts", lambda name: ".experts." in name, seed=5, rank=4)
    case.add(
        "gates", lambda n: "shared_expert" in n or n.endswith("gate"), seed=6, rank=5, size=0.3
    )
    case.add("head", last("q_proj"), seed=7, rank=4)
    _add_lm_head(case)
    tied, outer = (layouts.Truth(seed=8, inner=128), layouts.Truth(seed=9, inner=128, one_a=True))
    for name, truth, tensors in (
        ("packed", tied, layouts.packed(tied)),
        ("shared-outer", outer, layouts.shared_outer(outer)),
    ):
        case.adapters[name] = layouts.save(case.folder / name, tensors, truth)
        layouts.merge(case.plain, truth, case.folder / f"{name}-merged")
    case.adapters[drawn.BAD] = shutil.copytree(case.adapters["all"], case.folder / drawn.BAD)
    tensors = load_file(case.adapters[drawn.BAD] / FILE)
    next(t for k, t in tensors.items() if "layers.1.mlp.experts.3.up_proj" in k)[0, 0] = torch.nan
    save_file(tensors, case.adapters[drawn.BAD] / FILE)
    return case


def _add_lm_head(case: Case) -> None:
    folder = case.adapters["head"]
    tensors, g = load_file(folder / FILE), torch.Generator().manual_seed(7)
    name = "base_model.model.lm_head.lora_{}.weight"
    tensors[name.format("A")] = 0.1 * torch.randn(4, 128, generator=g)
    tensors[name.format("B")] = 0.1 * torch.randn(512, 4, generator=g)
    save_file(tensors, folder / FILE)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": ["q_proj", "lm_head"]}))


class Oracle:
    """transformers' fp32 answers of the base model (None) and of each merged adapter."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._models: dict = {}
        self._known: dict = {}

    def _model(self, name: str | None) -> torch.nn.Module:
        if name not in self._models:
            folder = self.case.plain if name is None else self.case.folder / f"{name}-merged"
            if not folder.exists():
                oracle.merge(self.case.plain, self.case.adapters[name], folder)
            self._models[name] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return self._models[name]

    def __call__(self, name: str | None, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [tokens, vocab], and the last token's hidden state [hidden] of length 1."""
        key = (name, tuple(ids))
        if key not in self._known:
            with torch.no_grad():
                found = self._model(name)(
                    torch.tensor([ids]), use_cache=False, output_hidden_states=True
                )
            last = found.hidden_states[-1][0, -1].float()
            self._known[key] = found.logits[0].float(), last / last.norm()
        return self._known[key]


def refusals(options: dict, name: str | None, pinned: set[str]) -> list[str]:
    """Parts of the sentences that may refuse an adapter; none if it is served."""
    if name is None:
        return []
    lora, found = options["lora"], []
    words, rank = drawn.ADAPTERS["all" if name == drawn.BAD else name]
    if name not in pinned and len(pinned) >= lora["max_loras"]:
        found.append("slots hold pinned adapters")
    if name == drawn.BAD:
        found.append("NaN")
    if rank > lora["max_lora_rank"]:
        found.append("max-lora-rank")
    targets = lora.get("lora_target_modules")
    if targets and not words <= set(targets):
        found.append("lora-target-modules")
    if "lm_head" in words and (options["family"] != "qwen3_moe" or "runner" in options):
        found.append("lm_head")
    if "experts" in words and lora["enable_moe_shared_loras"] and name != "shared-outer":
        found.append("experts have different lora_A, but this engine stores one")
    return found


class Compared:
    """Collects what differs between the answers of an engine and what they have to be."""

    def __init__(self, options: dict, want: Oracle) -> None:
        self._options, self._want = options, want
        self._low = options["dtype"] != "float32"
        self.wrong: list[str] = []
        self.answers = 0
        self._shares: dict[str, set[float]] = {}

    def _is_low(self, name: str | None) -> bool:
        return self._low or (name is not None and self._options["lora"]["lora_dtype"] != "auto")

    def near(self, where: str, name: str | None, have, want, base, spread=None) -> None:
        """One tensor of an answer: fp32 by its largest difference, others by the median share.

        Pass what `spread` says of more numbers where ``want`` has few: two may be close by chance.
        """
        if not have.numel() and have.shape == want.shape:  # aborted before its first token
            return
        self.answers += 1
        if have.shape != want.shape or not torch.isfinite(have).all():
            self.wrong.append(f"{where}: shape {list(have.shape)}, or not finite")
        elif self._is_low(name):
            spread = self.spread(name, want, base) if spread is None else spread
            share = (have - want).abs().mean().item() / spread
            self._shares.setdefault(name or "base", set()).add(share)  # equal requests count once
        elif (difference := (have - want).abs().max().item()) > LIMIT:
            self.wrong.append(f"{where}: differs by {difference:.2e}")

    @staticmethod
    def spread(name: str | None, want: torch.Tensor, base: torch.Tensor) -> float:
        """An adapter's effect, or how far the base model's numbers are from each other."""
        return ((want - base).abs().mean() if name else want.std()).item()

    def finish(self) -> None:
        for name, shares in self._shares.items():
            found = statistics.median(shares)
            if not found <= (SHARE if len(shares) > 2 else SHARE_OF_FEW):
                of = f"of {len(shares)} answers"
                self.wrong.append(f"{name}: difference {found:.2f} of the effect, median {of}")

    def _scores(self, asked: dict, logits, allowed=None):
        """What this logprobs_mode returns for logits [positions, vocab]."""
        mode = self._options["logprobs_mode"]
        if mode.startswith("processed"):
            logits = logits / (asked.get("temperature") or 1.0)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        return logits if mode.endswith("logits") else logits.log_softmax(-1)

    def request(self, where: str, asked: dict, got: object) -> None:
        """One request that was not refused."""
        name, prompt = asked["adapter"], asked["prompt"]
        if "runner" in self._options:
            want, base = (self._want(one, prompt)[1] for one in (name, None))
            self.near(where, name, got, want, base)
            return
        if got is None and "abort" in asked:
            return
        choices, of_prompt = got
        if len(choices) != asked.get("n", 1):
            self.wrong.append(f"{where}: {len(choices)} choices")
        for tokens, scores in choices:
            self._choice(where, asked, tokens, scores)
        if asked.get("prompt_logprobs"):
            want, base = (self._want(one, prompt)[0][:-1] for one in (name, None))
            if len(prompt) > 1:
                self.near(
                    f"{where} (prompt)",
                    name,
                    of_prompt,
                    *(self._scores({}, w) for w in (want, base)),
                )

    def _choice(self, where, asked, tokens, scores) -> None:
        name, prompt = asked["adapter"], asked["prompt"]
        if "regex" not in asked and len(tokens) != asked["max_tokens"] and "abort" not in asked:
            self.wrong.append(f"{where}: {len(tokens)} tokens")
        start = len(prompt) - 1
        want, base = (self._want(one, prompt + tokens)[0][start:-1] for one in (name, None))
        allowed = None
        if "regex" in asked:  # vLLM masks logits before it takes scores of any mode
            if not set(tokens) <= {2, 3, 4, 40, 50, 60}:
                self.wrong.append(f"{where}: {tokens} is not what the regex allows")
            allowed = scores > -1e30
            spread = self.spread(name, *(self._scores(asked, one) for one in (want, base)))
            want, base = (self._scores(asked, one, allowed)[allowed] for one in (want, base))
            self.near(where, name, scores[allowed], want, base, spread)
            return
        self.near(where, name, scores, *(self._scores(asked, one) for one in (want, base)))
        if not asked.get("temperature") and not self._is_low(name):
            for row, token in zip(want, tokens, strict=True):
                if row.max() - row[token] > LIMIT:
                    self.wrong.append(f"{where}: {token} is not the likeliest")

    def beam(self, where: str, step: dict, got: list) -> None:
        name, prompt = step["adapter"], step["prompt"]
        if len(got) != step["width"]:
            self.wrong.append(f"{where}: {len(got)} beams")
        for tokens, total in got:
            sums = []
            for one in (name, None):
                rows = self._want(one, prompt + tokens)[0][len(prompt) - 1 : -1].log_softmax(-1)
                sums.append(rows.gather(1, torch.tensor(tokens)[:, None]).sum())
            have = torch.tensor(total)
            if self._is_low(name):  # one number: too few for a mean
                self.answers += 1
            else:
                self.near(where, name, have, *sums)


def same_base(where: str, asked: dict, got: object, plain: object, low: bool) -> str:
    """What differs between a base answer and that of an engine without LoRA; "" if nothing."""
    if plain is None or got is None:  # aborted: when it was depends on the other requests
        return ""
    if isinstance(plain, str):
        return "" if isinstance(got, str) else f"{where}: refused without LoRA: {plain}"
    limit = 0.3 if low else BASE_LIMIT
    if torch.is_tensor(plain):
        pairs = [(got, plain)]
    else:
        pairs = []
        for (tokens, scores), (tokens0, scores0) in zip(got[0], plain[0], strict=True):
            # After the first different token, which is a tie within the limit, texts differ.
            both = list(zip(tokens, tokens0, strict=False))
            equal = next((i for i, (a, b) in enumerate(both) if a != b), len(both) - 1)
            pairs.append((scores[: equal + 1], scores0[: equal + 1]))
        if plain[1] is not None:
            pairs.append((got[1], plain[1]))
    for have, want in pairs:
        finite = torch.isfinite(want)
        if not torch.equal(finite, torch.isfinite(have)):
            return f"{where}: other tokens are allowed than without LoRA"
        difference = (have - want)[finite].abs()
        found = (difference.mean() if low else difference.max()).item() if len(difference) else 0
        if found > limit:
            return f"{where}: differs by {found:.2e} from an engine without LoRA"
    return ""
