"""The README is short, its table is that of supported.toml, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_it_fits_on_a_screen_or_two():
    assert len(table.README.read_text().splitlines()) <= 120


def test_its_table_is_that_of_supported_toml():
    text = table.README.read_text()
    assert table.written(text) == text, "run python tests/unit/table.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_can_be_reached():
    """From the README, or from a page that it names."""
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text())
        queue += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= seen
