"""Environments, made by pip from a wheel that is made here: no registry is asked."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from benchmarks import installs
from benchmarks.installs import NotInstalled, megabytes, python_packages


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    file = tmp_path / "tiny-1.0-py3-none-any.whl"
    about = {"METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n", "RECORD": ""}
    about["WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("tiny.py", "said = 'tiny'\n")
        for name, text in about.items():
            packed.writestr(f"tiny-1.0.dist-info/{name}", text)
    return file


def test_an_environment_holds_what_it_was_asked_for(wheel: Path, tmp_path: Path) -> None:
    folder = python_packages("it", str(wheel), within=tmp_path)
    command = [str(folder / "bin" / "python"), "-c", "import tiny; print(tiny.said)"]

    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "tiny\n"
    assert 0 < megabytes(folder) < 1


def test_an_environment_is_used_again_until_its_pins_change(wheel: Path, tmp_path: Path) -> None:
    mark = python_packages("it", str(wheel), within=tmp_path) / "mark"
    mark.touch()
    python_packages("it", str(wheel), within=tmp_path)
    assert mark.exists()

    python_packages("it", str(wheel), "tiny", within=tmp_path)
    assert not mark.exists()


def test_a_failed_installation_is_told_in_a_line_and_tried_again(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match=r"^it is not installed: its installation failed$"):
        python_packages("it", "no-such-package==1", within=tmp_path)

    assert python_packages("it", str(wheel), within=tmp_path).is_dir()


def test_without_node_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_node() -> None:
        raise RuntimeError("a long text")

    monkeypatch.setattr(installs, "find_node", find_node)

    with pytest.raises(NotInstalled, match="there is no Node that is new enough"):
        installs.node_packages("it", {"any": "1"}, {}, within=tmp_path)


def test_the_size_is_that_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(1_500_000))
    (tmp_path / "link").symlink_to(tmp_path / "deep")

    assert megabytes(tmp_path) == pytest.approx(1.5, abs=0.001)
