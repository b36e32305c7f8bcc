"""Reads `supported.toml`, the table of the vLLM releases that the plugin supports.

For each release the file says how every feature was checked. For each hook's target it has the
hashes of the source texts that the hook was written for, and the releases that contain them.
"""

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

LEVELS = ("engine", "import", "source")  # how a feature was checked; see supported.toml
PATH = Path(__file__).with_name("supported.toml")


@functools.cache
def table() -> dict[str, Any]:
    """Return the whole file.

    It has two keys: "releases" (release -> feature -> level) and "hashes" (target -> digest ->
    list of releases).
    """
    with PATH.open("rb") as file:
        return tomllib.load(file)


def releases() -> dict[str, dict[str, str]]:
    """Return the supported releases -> {feature: how it was checked, one of `LEVELS`}."""
    return dict(table().get("releases", {}))


def release_of(version: str) -> str:
    """Return the release that a version was built from.

    Wheels of one release may have suffixes: "0.11.1.post2" -> "0.11.1", "0.32.0+cpu" -> "0.32.0".
    """
    return re.sub(r"(\.post\d+)?(\+.*)?$", "", version)


def nearest(release: str) -> str:
    """Return the supported release whose hooks are used for ``release``.

    This is ``release`` itself if it is supported, otherwise the last supported one before it, and
    the first one if there is none before it.
    """
    from packaging.version import Version

    known = sorted(releases(), key=Version)
    before = [one for one in known if Version(one) <= Version(release)]
    return before[-1] if before else known[0]


def made_for(release: str, hooks: Iterable[Hook]) -> list[Hook]:
    """Return the hooks to apply on ``release``: those made for the `nearest` supported release."""
    known = nearest(release)
    made = releases()[known]
    return [hook for hook in hooks if hook.feature in made and hook.made_for(known)]


def hashes(release: str) -> dict[str, set[str]]:
    """Return target -> the digests that its source may have in ``release``.

    For an unsupported release these are the digests of all supported ones: a source that has not
    changed since is accepted.
    """
    known = release in releases()
    return {
        target: {digest for digest, where in found.items() if release in where or not known}
        for target, found in table().get("hashes", {}).items()
    }
