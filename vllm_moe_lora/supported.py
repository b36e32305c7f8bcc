"""Reads `supported.toml`: which vLLM releases are known and which sources were hooked there."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_moe_lora.patching import Hook

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LEVELS = ("engine", "import", "source")  # explained in the file
PATH = Path(__file__).with_name("supported.toml")


@functools.cache
def table() -> dict[str, Any]:
    """The whole file: "releases" (release -> notes) and "hashes" (target -> digest -> releases)."""
    with PATH.open("rb") as file:
        return tomllib.load(file)


def releases() -> dict[str, dict[str, str]]:
    """Known releases -> {feature: how it is known, one of `LEVELS`}."""
    return dict(table().get("releases", {}))


def release_of(version: str) -> str:
    """The release of a build: "0.11.1.post2" and "0.32.0+cpu" are rebuilt wheels of one."""
    return re.sub(r"(\.post\d+)?(\+.*)?$", "", version)


def nearest(release: str) -> str:
    """The known release that ``release`` is taken for: itself, the last before it, the first."""
    from packaging.version import Version

    known = sorted(releases(), key=Version)
    before = [one for one in known if Version(one) <= Version(release)]
    return before[-1] if before else known[0]


def made_for(release: str, hooks: Iterable[Hook]) -> list[Hook]:
    """The hooks made for ``release``, or for the known one that is `nearest` to it."""
    known = nearest(release)
    made = releases()[known]
    return [hook for hook in hooks if hook.feature in made and hook.made_for(known)]


def hashes(release: str) -> dict[str, set[str]]:
    """target -> digests of its source that hold for ``release``.

    For a release that is not known: the digests of all that are.
    """
    known = release in releases()
    return {
        target: {digest for digest, where in found.items() if release in where or not known}
        for target, found in table().get("hashes", {}).items()
    }
