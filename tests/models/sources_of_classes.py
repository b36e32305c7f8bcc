"""What the source of vLLM's MoE classes says about LoRA, read without importing vLLM."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

from vllm_moe_lora.sources import find, module_file, parse, read

MODELS = "vllm.model_executor.models"
# Lists in vLLM's registry whose classes may be served with LoRA.
LISTS = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
MOE = re.compile(r"FusedMoE|get_expert_mapping|expert_params_mapping|\b\w*Mo[eE]\w*\(")


@dataclass
class Class:
    """One class of the registry.

    Attributes:
        target: "module:Class" of its definition.
        declares: whether it has vLLM's SupportsLoRA among its bases.
        packed: merged module -> parts, of the class and its bases. An entry that only some configs
            have is there, too.
        stacked: merged module -> parts, as its file and those of its bases load weights.
        files: those files.
    """

    target: str
    declares: bool = False
    packed: dict[str, list[str]] = field(default_factory=dict)
    stacked: dict[str, set[str]] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)


@functools.cache
def registered(tree: Path) -> dict[str, tuple[str, str]]:
    """Architecture -> (module, class), of the registry of a release."""
    found = {}
    for node in parse(read(module_file(tree, f"{MODELS}.registry"))).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(target, "id", "") in LISTS and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant):
                    module, name = ast.literal_eval(value)
                    module = module if module.startswith("vllm.") else f"{MODELS}.{module}"
                    found[key.value] = module, name
    return found


def moe_classes(tree: Path) -> dict[str, Class]:
    """Target -> class, for all classes of the registry that have routed experts.

    A class with several implementations, one a platform, is there with each of them.
    """
    found: dict[str, Class] = {}
    for module, name in registered(tree).values():
        for place in _implementations(tree, module, name):
            one = _read(tree, f"{place}:{name}")
            if one is not None and any(MOE.search(read(file)) for file in one.files):
                found[one.target] = one
    return found


def wrappers(tree: Path) -> dict[str, Class]:
    """Target -> multimodal class without LoRA whose text model is what the config says."""
    found = {}
    for module, name in registered(tree).values():
        for place in _implementations(tree, module, name):
            one = _read(tree, f"{place}:{name}")
            if one is None or one.declares:
                continue
            if any("init_vllm_registered_model(" in read(file) for file in one.files):
                found[one.target] = one
    return found


def _implementations(tree: Path, module: str, name: str) -> list[str]:
    """The modules below ``module`` that define the class."""
    try:
        file = module_file(tree, module)
    except LookupError:
        return []
    if file.name != "__init__.py":
        return [module]
    places = []
    for one in sorted(file.parent.rglob("*.py")):
        if re.search(rf"^class {name}\b", read(one), re.MULTILINE):
            parts = one.relative_to(tree).with_suffix("").parts
            places.append(".".join(parts))
    return places


def _read(tree: Path, target: str) -> Class | None:
    try:
        found = find(tree, target)
    except LookupError:
        return None
    one = Class(f"{found.module}:{found.node.name}")
    todo, seen = [found], set()
    while todo:
        here = todo.pop(0)
        if (here.file, here.node.name) in seen or not isinstance(here.node, ast.ClassDef):
            continue
        seen.add((here.file, here.node.name))
        one.files.add(here.file)
        for parts in _packed(here.node):
            for whole, words in parts.items():
                one.packed.setdefault(whole, words)
        for base in here.node.bases:
            name = base.id if isinstance(base, ast.Name) else ""
            one.declares |= name == "SupportsLoRA"
            try:
                todo.append(find(tree, f"{here.module}:{name}"))
            except LookupError:
                continue
    for file in one.files:
        for whole, words in stacked(read(file)).items():
            one.stacked.setdefault(whole, set()).update(words)
    return one


def _packed(node: ast.ClassDef) -> list[dict[str, list[str]]]:
    """The literals that are assigned to packed_modules_mapping, or to an entry of it."""
    found = []
    for one in ast.walk(node):
        targets = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", None)]
        text = ast.unparse(targets[0]) if targets[0] is not None else ""
        if not isinstance(one, ast.Assign | ast.AnnAssign) or "packed_modules_mapping" not in text:
            continue
        for value in ast.walk(one.value) if one.value is not None else ():
            if isinstance(value, ast.Dict):
                found.append(_entries(value))
        if isinstance(targets[0], ast.Subscript) and isinstance(one.value, ast.List):
            found.append({ast.literal_eval(targets[0].slice): ast.literal_eval(one.value)})
    return found


def _entries(node: ast.Dict) -> dict[str, list[str]]:
    """The entries of a dictionary that are literals."""
    found = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(value, ast.List):
            found[key.value] = ast.literal_eval(value)
    return found


@functools.cache
def stacked(text: str) -> dict[str, set[str]]:
    """Merged module -> its parts, as a file's literals say it in one of two ways.

    (".qkv_proj", ".q_proj", "q") in a list, or ".q_proj": (".qkv_proj", "q") in a dictionary.
    """
    found: dict[str, set[str]] = {}
    for node in ast.walk(parse(text)):
        entries: list[list[ast.expr]] = []
        if isinstance(node, ast.Tuple) and len(node.elts) == 3:
            entries = [node.elts]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            entries = [
                [value.elts[0], key, value.elts[1]]
                for key, value in pairs
                if key is not None and isinstance(value, ast.Tuple) and len(value.elts) == 2
            ]
        for whole, part, shard in entries:
            if all(isinstance(one, ast.Constant) for one in (whole, part, shard)):
                _add(found, whole.value, part.value, shard.value)
    return found


def _add(found: dict[str, set[str]], whole: object, part: object, shard: object) -> None:
    if not (isinstance(whole, str) and isinstance(part, str) and isinstance(shard, int | str)):
        return
    if shard == "" or "proj" in str(shard):  # three names, not a name's place in another
        return
    last = [name.strip(".").removesuffix(".weight").split(".")[-1] for name in (whole, part)]
    if last[0] != last[1] and all(re.fullmatch(r"\w+", name) for name in last):
        found.setdefault(last[0], set()).add(last[1])


@functools.cache
def merged(text: str) -> set[str]:
    """Attributes that a file makes merged linear layers.

    vLLM has LoRA on them only if a class has them in its ``packed_modules_mapping``.
    """
    return {
        target.attr
        for node in ast.walk(parse(text))
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
        and re.search(r"^(Merged\w*|QKV)ParallelLinear$", ast.unparse(node.value.func))
    }


# Functions that run while a model is built or loaded.
LOADING = re.compile(r"^__init__$|load|process_weights|post_|init_|_build|_make|setup|prepare_w")


@functools.cache
def read_directly(text: str) -> dict[str, int]:
    """Linear layers of a file whose weight a function reads in a step -> line.

    A LoRA layer around such a module is not called there.
    """
    tree = parse(text)
    linears = {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Attribute)
        and re.search(r"Linear$", ast.unparse(node.value.func))
        and not ast.unparse(node.value.func).startswith("nn.")
    }
    found: dict[str, int] = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or LOADING.search(function.name):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute) or node.attr not in ("weight", "weight_packed"):
                continue
            if isinstance(node.value, ast.Attribute) and node.value.attr in linears:
                found.setdefault(node.value.attr, node.lineno)
    return found
