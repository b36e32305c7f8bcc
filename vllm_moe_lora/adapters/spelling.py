"""Matches module names that trainers and vLLM spell differently."""

from __future__ import annotations

from collections.abc import Iterable

# Words that may stand before "layers." in the name of a text model's module. Trainers add them or
# leave them out. Any other word ("mtp", "visual", ...) names another part of the model.
_LEADS = {"model", "language_model", "text_model", "thinker", "llm", "base_model", "transformer"}

_SYNONYMS = {
    "block_sparse_moe": "mlp",  # Mixtral in transformers 5 and in vLLM
    "moe": "mlp",  # Step-3.5 in vLLM and in its published checkpoints
    "share_expert": "shared_experts",  # the same
    "attn": "self_attn",  # gpt-oss in vLLM; Tinker
    "attention": "self_attn",  # the published checkpoints of Ling and Ring
    "unembed_tokens": "lm_head",  # Tinker
}


def core(name: str) -> str:
    """Reduce a module's name to the part that every trainer spells alike.

    A name that does not look like a text model's module is returned unchanged.

    >>> core("language_model.model.layers.3.mlp.experts")
    'layers.3.mlp.experts'
    >>> core("model.layers.3.block_sparse_moe.experts")
    'layers.3.mlp.experts'
    >>> core("mtp.layers.0.mlp.experts")
    'mtp.layers.0.mlp.experts'
    """
    words = name.split(".")
    start = next((i for i, word in enumerate(words) if word not in _LEADS), len(words))
    rest = [_SYNONYMS.get(word, word) for word in words[start:]]
    if rest[2:3] == ["shared_experts"]:  # a layer's own in Step-3.5's published checkpoints
        rest.insert(2, "mlp")
    if rest[2:4] == ["self_attn", "dense"]:  # Ling's and Ring's; vLLM has o_proj in some layers
        rest[3] = "o_proj"
    if rest[2:4] == ["mlp", "router"]:  # Granite's in transformers; vLLM calls it a gate
        rest[3:] = ["gate"]
    return ".".join(rest) if rest and rest[0] in ("layers", "lm_head", "embed_tokens") else name


class Spellings:
    """Finds the model's own name for a module, given the name that an adapter uses.

    Args:
        modules: names of the model's modules.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._own = set(modules)
        self._by_core: dict[str, str | None] = {}
        for name in self._own:
            key = core(name)
            self._by_core[key] = None if key in self._by_core else name

    def find(self, name: str) -> str | None:
        """The model's name, or None if no module or more than one could be meant."""
        return name if name in self._own else self._by_core.get(core(name))
