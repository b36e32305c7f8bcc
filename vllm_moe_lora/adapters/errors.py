"""Why an adapter cannot be used."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 10


class AdapterError(ValueError):
    """An adapter is damaged, incomplete or for another model; the text names tensor and cure."""


def listed(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
