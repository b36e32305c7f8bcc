"""Names that differ between trainers and vLLM for one and the same module."""

from __future__ import annotations

from collections.abc import Iterable

# What may stand before "layers." in the name of a text model's module. Anything else ("mtp",
# "visual", "audio_tower", ...) is another part of the model and no spelling of it.
_LEADS = {"model", "language_model", "text_model", "thinker", "llm", "base_model", "transformer"}

_SAME = {
    "block_sparse_moe": "mlp",  # Mixtral in transformers 5 and in vLLM
    "attn": "self_attn",  # gpt-oss in vLLM; Tinker
    "unembed_tokens": "lm_head",  # Tinker
}


def core(name: str) -> str:
    """A name without what trainers spell differently; the name itself where nothing is known.

    >>> core("language_model.model.layers.3.mlp.experts")
    'layers.3.mlp.experts'
    >>> core("model.layers.3.block_sparse_moe.experts")
    'layers.3.mlp.experts'
    >>> core("mtp.layers.0.mlp.experts")
    'mtp.layers.0.mlp.experts'
    """
    words = name.split(".")
    start = next((i for i, word in enumerate(words) if word not in _LEADS), len(words))
    rest = [_SAME.get(word, word) for word in words[start:]]
    return ".".join(rest) if rest and rest[0] in ("layers", "lm_head", "embed_tokens") else name


class Spellings:
    """Finds the model's own name for a name that an adapter uses."""

    def __init__(self, places: Iterable[str]) -> None:
        self._own = set(places)
        self._by_core: dict[str, str | None] = {}
        for name in self._own:
            key = core(name)
            self._by_core[key] = None if key in self._by_core else name

    def find(self, name: str) -> str | None:
        """The model's name; None where it has no such module, or two that could be meant."""
        return name if name in self._own else self._by_core.get(core(name))
