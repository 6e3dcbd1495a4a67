"""Rendering: the golden text, strict names, the headers that a digest covers."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest
from tiny_kernels import GOLDEN

from cpgemm import env
from cpgemm.errors import ArgumentError, CompileError
from cpgemm.headers import find_headers
from cpgemm.render import KernelSource, render


@dataclasses.dataclass(frozen=True)
class Config:
    block_m: int = 64
    stages: int = 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the test template and its headers, in place of the package's own."""
    for file in GOLDEN.glob("tiny*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(env, "template_dir", lambda: tmp_path)
    monkeypatch.setattr(env, "header_dir", lambda: tmp_path)
    return tmp_path


def headers_of(text: str) -> list[str]:
    return [header.name for header in find_headers(text, (env.header_dir(),))]


def tiny(**changes: object) -> KernelSource:
    values = {"config": Config(), "threads": 128, "accumulate": False, **changes}
    return render("tiny.cu.j2", name="tiny_m64_s2", entry="tiny", values=values)


def test_golden() -> None:
    """CPGEMM_UPDATE_GOLDEN=1 writes the file anew; look at the difference before committing it."""
    golden = GOLDEN / "tiny_m64_s2.cu"
    text = tiny().text
    if os.environ.get("CPGEMM_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_fields_of_a_source() -> None:
    source = render(
        "tiny.cu.j2",
        name="tiny",
        entry="tiny",
        values={"config": Config(), "threads": 128, "accumulate": True},
        shared_bytes=4096,
    )
    assert (source.name, source.entry, source.template) == ("tiny", "tiny", "tiny.cu.j2")
    assert source.shared_bytes == 4096 and tiny().shared_bytes == 0
    assert len(source.digest) == 64 and "out[0] += 1.0f;" in source.text


def test_an_undefined_name_fails_and_is_located() -> None:
    with pytest.raises(CompileError, match=r"tiny\.cu\.j2:6: 'threads' is undefined.*accumulate"):
        render("tiny.cu.j2", name="t", entry="t", values={"config": Config(), "accumulate": 0})


def test_an_undefined_field_fails(folder: Path) -> None:
    (folder / "bad.cu.j2").write_text("int a;\nint b = {{ config.block_q }};\n")
    with pytest.raises(CompileError, match=r"bad\.cu\.j2:2: .*block_q"):
        render("bad.cu.j2", name="t", entry="t", values={"config": Config()})


def test_what_a_template_computes_is_located(folder: Path) -> None:
    """With the lines around, as for a template of a user (test_user_template.py)."""
    (folder / "bad.cu.j2").write_text("int a;\nint b = {{ 1 // threads }};\n")
    path = re.escape(str(folder / "bad.cu.j2"))
    with pytest.raises(CompileError, match=rf"{path}:2: ZeroDivisionError.*\n\n.*\n>     2 | int"):
        render("bad.cu.j2", name="t", entry="t", values={"threads": 0})


def test_a_malformed_template_is_located(folder: Path) -> None:
    (folder / "bad.cu.j2").write_text("int a;\n{% if %}\n")
    with pytest.raises(CompileError, match=r"bad\.cu\.j2:2"):
        render("bad.cu.j2", name="t", entry="t", values={})


def test_a_missing_template_suggests_one() -> None:
    with pytest.raises(CompileError, match=r"tiny_\.cu\.j2.*Did you mean tiny\.cu\.j2"):
        render("tiny_.cu.j2", name="t", entry="t", values={})


def test_a_missing_import_suggests_one(folder: Path) -> None:
    (folder / "near.j2").write_text("")
    (folder / "outer.cu.j2").write_text('{% from "nearr.j2" import x %}\n')
    with pytest.raises(CompileError, match=r"'nearr\.j2' is not there\. Did you mean near\.j2"):
        render("outer.cu.j2", name="t", entry="t", values={})


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", ".a", "x" * 121])
def test_a_name_must_be_a_file_name(name: str) -> None:
    with pytest.raises(ArgumentError, match="name: "):
        render("tiny.cu.j2", name=name, entry="t", values={})


def test_an_entry_must_be_an_identifier() -> None:
    with pytest.raises(ArgumentError, match="entry: must be a C identifier"):
        render("tiny.cu.j2", name="t", entry="a-b", values={})


def test_negative_shared_memory_is_refused() -> None:
    with pytest.raises(ArgumentError, match="shared_bytes: must not be negative; got -1"):
        render("tiny.cu.j2", name="t", entry="t", values={}, shared_bytes=-1)


def test_the_banner_stays_a_comment(folder: Path) -> None:
    (folder / "note.cu.j2").write_text("int a;\n")
    text = render("note.cu.j2", name="t", entry="t", values={"note": "one\nint b;\\"}).text
    assert "//   note = one int b;\n" in text
    assert [line for line in text.splitlines() if line and not line.startswith("//")] == ["int a;"]


def test_the_banner_holds_no_addresses() -> None:
    assert tiny(other=object()).digest == tiny(other=object()).digest


def test_header_closure_in_order_of_inclusion(folder: Path) -> None:
    (folder / "other.cuh").write_text('#pragma once\n  #  include "tiny_inner.cuh"\n')
    text = '#include "tiny.cuh"\n#include "other.cuh"\n#include <cuda/std/array>\n'
    assert headers_of(text) == ["tiny.cuh", "tiny_inner.cuh", "other.cuh"]
    assert headers_of('// #include "nowhere.cuh"\n') == []


def test_headers_in_circles_and_in_folders(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.cuh").write_text('#include "b.cuh"\n#include "../tiny_inner.cuh"\n')
    (folder / "sub" / "b.cuh").write_text('#include "a.cuh"\n')
    assert headers_of("#include <sub/a.cuh>\n") == ["sub/a.cuh", "sub/b.cuh", "tiny_inner.cuh"]


def test_a_missing_header_names_includer_and_suggests(folder: Path) -> None:
    (folder / "tiny_inner.cuh").write_text('#include "tinny.cuh"\n')
    with pytest.raises(CompileError, match=r"'tiny_inner\.cuh' includes 'tinny\.cuh'.*tiny\.cuh"):
        tiny()


def test_a_header_outside_the_folder_is_missing(folder: Path) -> None:
    (folder.parent / "outside.cuh").write_text("")
    with pytest.raises(CompileError, match="outside"):
        headers_of('#include "../outside.cuh"\n')


def test_digest_follows_values_and_included_headers_only(folder: Path) -> None:
    before = tiny().digest
    (folder / "unrelated.cuh").write_text("#pragma once\n")
    assert tiny().digest == before
    assert tiny(config=Config(stages=3)).digest != before
    (folder / "tiny_inner.cuh").write_text("#pragma once\nconstexpr float kFactor = 3.0f;\n")
    assert tiny().digest != before
