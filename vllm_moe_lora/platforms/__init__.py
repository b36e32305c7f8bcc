"""The hooks into packages that bring a platform to vLLM from outside of its tree.

There is one file for each package. It defines `HOOKS`, as the files of `hooks/` do, and `HASHES`:
for each target the digests of the sources that somebody read, and the releases of the package that
have them. The `releases` of these hooks are vLLM's, as those of all others.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..patching import Hook


def for_platform(platform: Any, version: str) -> tuple[list[Hook], dict[str, set[str]]]:
    """Return the hooks into the package that ``platform`` comes from, and their digests.

    Args:
        platform: vLLM's current platform.
        version: the release of vLLM, such as "0.23.0".

    Returns:
        The hooks made for that release, none if we have none for the package; and target -> the
        `patching.digest`s that its source may have.
    """
    package = type(platform).__module__.partition(".")[0]
    if package not in {module.name for module in pkgutil.iter_modules(__path__)}:
        return [], {}
    found = importlib.import_module(f"{__name__}.{package}")
    hooks = [hook for hook in found.HOOKS if hook.made_for(version)]
    return hooks, {hook.target: set(found.HASHES[hook.target]) for hook in hooks}
