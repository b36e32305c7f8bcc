"""Writes the README's table of features from supported.toml: python tests/unit/table.py"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from vllm_moe_lora import supported
from vllm_moe_lora.patchset.mail import in_words

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- from supported.toml -->\n", "<!-- end -->\n"
WORDS = ("engine", "import", "source")


def ranges(features: dict[str, dict[str, str]], name: str, word: str) -> str:
    """The releases in which a feature is known by ``word``, neighbours joined by "to"."""
    order, parts = list(features), []
    found = [i for i, release in enumerate(order) if features[release].get(name) == word]
    for _, group in groupby(enumerate(found), lambda pair: pair[1] - pair[0]):
        run = [order[i] for _, i in group]
        parts.append(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}")
    return ", ".join(parts) or "–"


def table() -> str:
    """The table, as Markdown."""
    features = supported.releases()
    lines = ["| feature | *engine* | *import* | *source* |", "|---|---|---|---|"]
    for name in sorted({name for found in features.values() for name in found}):
        what = in_words(name)
        cells = " | ".join(ranges(features, name, word) for word in WORDS)
        lines.append(f"| `{name}`: {what[0].lower()}{what[1:]} | {cells} |")
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The README with the table of today."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
