"""Makes the patches of a vLLM release: one for the decorator `seam`, then one for each feature."""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_moe_lora import supported
from vllm_moe_lora.hooks import all_hooks
from vllm_moe_lora.patching import Hook
from vllm_moe_lora.patchset.closure import BASE, PACKAGE, closure, files_needed
from vllm_moe_lora.patchset.weave import Seam, SeamError, add_seams, remove_seams
from vllm_moe_lora.sources import Found, Reader, find, module_file

HOME = "vllm/lora/moe_lora"  # where files of this package are put in a tree
FIRST = "moe-lora-seams"  # the name of the first patch
INIT = '''"""LoRA on Mixture-of-Experts models: the decorator `seam`, and the code it applies."""

from .seams import seam

__all__ = ["seam"]

RELEASE = "{release}"
'''


class SeriesError(Exception):
    """No patches can be made for a tree. The text says which hook is the reason, and why."""


@dataclass
class Patch:
    """One patch.

    Attributes:
        name: of the patch file, without ".patch": the feature's name, or `FIRST`.
        hooks: the hooks that it applies.
        files: path below the tree -> the file's text before the patch (None for a new file) and
            after it.
    """

    name: str
    hooks: list[Hook] = field(default_factory=list)
    files: dict[str, tuple[str | None, str]] = field(default_factory=dict)


def upstream_text(file: Path) -> str:
    """Return a file's text as vLLM has it: without seams, if it has any."""
    # Not read_text, which would change the ends of lines.
    return remove_seams(file.read_bytes().decode())


def hooks_of(release: str) -> list[Hook]:
    """Return the hooks that the plugin applies on a supported release, for all platforms."""
    return supported.made_for(release, all_hooks())


def series(tree: Path, release: str, reader: Reader = upstream_text) -> list[Patch]:
    """Make the patches for ``release``, in the order in which they are applied.

    Args:
        tree: the folder that contains ``vllm/``.
        release: a supported release, from supported.toml.
        reader: returns a file's text without seams.

    Raises:
        SeriesError: a hook of the release cannot become a seam in this tree.
    """
    first = Patch(FIRST)
    shipped = closure(BASE)
    first.files = {f"{HOME}/__init__.py": (None, INIT.format(release=release))}
    first.files |= _new_files(shipped)
    patches = [first]
    seams: dict[str, list[Seam]] = {}
    features: dict[str, list[Hook]] = {}
    for hook in hooks_of(release):
        features.setdefault(hook.feature, []).append(hook)
    for feature in sorted(features):
        patch = Patch(feature)
        touched: dict[str, list[Seam]] = {}
        for hook in sorted(features[feature], key=lambda one: one.target):
            try:
                if found := _seam_of(tree, hook, reader):
                    path, seam = found
                    touched.setdefault(path, []).append(seam)
                    patch.hooks.append(hook)
            except (LookupError, SyntaxError, UnicodeError) as error:
                raise SeriesError(f"{hook.target}: {error}") from error
        new = files_needed(patch.hooks) - shipped
        shipped |= new
        patch.files = _new_files(new)
        for path in sorted(touched):
            text, before = reader(tree / path), seams.get(path, [])
            seams[path] = [*before, *touched[path]]
            try:
                patch.files[path] = (add_seams(text, before), add_seams(text, seams[path]))
            except SeamError as error:
                raise SeriesError(f"{path}: {error}") from error
        if patch.hooks:
            patches.append(patch)
    return patches


def _new_files(paths: Iterable[str]) -> dict[str, tuple[str | None, str]]:
    """Return the entries of `Patch.files` for files of this package."""
    return {
        f"{HOME}/{path}": (None, (PACKAGE / path).read_bytes().decode()) for path in sorted(paths)
    }


def _seam_of(tree: Path, hook: Hook, reader: Reader) -> tuple[str, Seam] | None:
    """Find the place of a hook's seam.

    Returns:
        The file's path below the tree, and the seam. None if the hook replaces nothing in this
        release.

    Raises:
        LookupError: the hook's target is not in the tree.
        SeriesError: no seam can replace the target.
    """
    module, _, name = hook.target.partition(":")
    found = find(tree, hook.target, reader)
    if not hook.hashed and found.module == module:
        raise SeriesError(f"{hook.target} is a constant, and a constant cannot be decorated")
    if hook.hashed and _returns_original(hook, found, reader):
        return None
    if found.inherited:
        return _override(tree, hook, found, reader)
    if found.module == module:
        return _relative(tree, found.file), Seam(hook.feature, name)
    if "." in name:
        # A method of a class that the module imports. There is only one such class, so the seam can
        # be where the class is defined.
        return _relative(tree, found.file), Seam(hook.feature, name, module=module)
    if found.node.name != name or hook.also:
        raise SeriesError(
            f"{hook.target} is imported under another or several names; the hook's target must be "
            f"{found.module}:{found.node.name}, where it is defined"
        )
    # Like the plugin, replace the name in this module only.
    file = module_file(tree, module)
    return _relative(tree, file), Seam(hook.feature, name, "name", module)


def _override(tree: Path, hook: Hook, found: Found, reader: Reader) -> tuple[str, Seam]:
    """Return file and seam for an inherited target: a new method that calls the inherited one."""
    module, _, name = hook.target.partition(":")
    owner = find(tree, f"{module}:{name.rpartition('.')[0]}", reader)
    decorators = [ast.unparse(one) for one in getattr(found.node, "decorator_list", ["?"])]
    kind = {(): "override", ("property",): "property"}.get(tuple(decorators))
    if kind is None or type(found.node).__name__ != "FunctionDef" or owner.module != module:
        raise SeriesError(
            f"{hook.target} is inherited from {found.module}; a seam can only replace inherited "
            "methods and properties without further decorators"
        )
    return _relative(tree, owner.file), Seam(hook.feature, name, kind)


def _relative(tree: Path, file: Path) -> str:
    return file.relative_to(tree).as_posix()


def _returns_original(hook: Hook, found: Found, reader: Reader) -> bool:
    """Return whether ``hook.make`` returns the original, so that a seam would do nothing.

    ``make`` gets a function that is compiled from the target's source. Such a function can be
    inspected, but not called, and nothing of the tree is run.
    """
    original: Any = _function(reader(found.file), str(found.file), found.line)
    for decorator in getattr(found.node, "decorator_list", ()):
        kind = getattr(decorator, "id", "")
        if kind == "property":
            original = property(original)
        elif kind == "classmethod":
            original = types.MethodType(original, object)
    try:
        return hook.make(original) is original
    except Exception:  # `make` does more with the original than inspect it
        return False


@functools.lru_cache(maxsize=512)
def _function(text: str, name: str, line: int) -> Any:
    """Compile the function that begins in ``line``, with an empty module around it."""
    name = f"<{name} without seams>"
    # `inspect.getsource` takes the source from here.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    todo = [compile(text, name, "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        if code.co_firstlineno == line and code.co_name != "<module>":
            cells = tuple(types.CellType() for _ in code.co_freevars)
            return types.FunctionType(code, {}, code.co_name, None, cells)
        todo += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return None
