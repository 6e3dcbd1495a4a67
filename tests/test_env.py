"""Paths and environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpgemm import env
from cpgemm.errors import ArgumentError


def test_package_data_folders_hold_headers_and_templates() -> None:
    assert list(env.header_dir().glob("*.cuh"))
    assert list(env.template_dir().glob("*.cu.j2"))


def test_a_missing_data_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        env._data_dir("no_such_folder")


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path / "chosen"))
    assert env.cache_dir() == tmp_path / "chosen"
    monkeypatch.delenv("CPGEMM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / "cpgemm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / ".cache" / "cpgemm"
    assert not env.cache_dir().exists(), "asking must not create it"


def test_cache_dir_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPGEMM_CACHE_DIR", "~/kernels")
    assert env.cache_dir() == Path.home() / "kernels"


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPGEMM_COMPILER", raising=False)
    assert env.compiler() == "nvrtc"
    monkeypatch.setenv("CPGEMM_COMPILER", " NVCC ")
    assert env.compiler() == "nvcc"
    monkeypatch.setenv("CPGEMM_COMPILER", "gcc")
    with pytest.raises(ArgumentError, match=r"CPGEMM_COMPILER.*nvrtc or nvcc.*'gcc'.*Unset"):
        env.compiler()


def test_nvcc_path_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text("")
    monkeypatch.delenv("CPGEMM_NVCC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert env.nvcc_path() is None
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert env.nvcc_path() == str(home / "bin" / "nvcc")
    monkeypatch.setenv("CPGEMM_NVCC", "/my/nvcc")
    assert env.nvcc_path() == "/my/nvcc"


def test_pdl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPGEMM_PDL", raising=False)
    assert env.pdl() is False
    monkeypatch.setenv("CPGEMM_PDL", "1")
    assert env.pdl() is True
    monkeypatch.setenv("CPGEMM_PDL", "yes")
    with pytest.raises(ArgumentError, match=r"CPGEMM_PDL.*0 or 1.*'yes'.*Unset"):
        env.pdl()


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPGEMM_CHECK", raising=False)
    assert env.check() is False
    monkeypatch.setenv("CPGEMM_CHECK", " 1 ")
    assert env.check() is True
    monkeypatch.setenv("CPGEMM_CHECK", "0")
    assert env.check() is False
    monkeypatch.setenv("CPGEMM_CHECK", "true")
    with pytest.raises(ArgumentError, match=r"CPGEMM_CHECK.*0 or 1.*'true'.*Unset"):
        env.check()


def test_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for value, on, file in (
        (None, True, None),
        ("", True, None),
        ("1", True, None),
        (" 0 ", False, None),
        (str(tmp_path / "mine.json"), True, tmp_path / "mine.json"),
        ("~/mine.json", True, Path.home() / "mine.json"),
    ):
        if value is None:
            monkeypatch.delenv("CPGEMM_TUNED", raising=False)
        else:
            monkeypatch.setenv("CPGEMM_TUNED", value)
        assert (env.tuned(), env.tuned_file()) == (on, file)
