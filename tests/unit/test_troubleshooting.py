"""docs/troubleshooting.md has every sentence of ours that a user may meet."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentences

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def plain(text):
    """Without line breaks and the dots that stand for names."""
    return " ".join(text.replace("…", " ").split())


@pytest.mark.parametrize(("file", "sentence"), sorted(set(sentences.pieces())))
def test_it_has_the_sentence(file, sentence):
    page = plain(PAGE.read_text())
    words = plain(sentence).strip(" .,:;()")
    assert words in page, f"{file}: add {sentence!r} with its cause and cure"


def test_it_has_what_users_search_for():
    page = PAGE.read_text()
    for error in (
        "'SharedFusedMoE' object has no attribute 'w2_weight'",
        "There is no module or parameter named",
        "does not support LoRA yet",
        "No WNA16 MoE backend",
    ):
        assert error in page
