"""Templates of a user: what comes first, what the digest covers, whose lines errors name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_kernels import GOLDEN, needs_nvrtc
from user_kernels import NAIVE, dense_copy

from cpgemm import env
from cpgemm.compiler import compile_count, compile_kernel, ptx_of
from cpgemm.config import KernelConfig
from cpgemm.errors import ArgumentError, CompileError, KernelWarning
from cpgemm.heuristics import configurations
from cpgemm.kernels import gemm_source
from cpgemm.render import KernelSource
from cpgemm.user_template import render_file

CONFIG = configurations("bfloat16")[0]


def rendered(path: Path, entry: str = "cpgemm_dense", **changes: Any) -> KernelSource:
    values = {"config": CONFIG, "epilogue": None, **changes.pop("values", {})}
    return render_file(
        path, name="mine", entry=entry, values=values, shared_bytes=CONFIG.shared_bytes, **changes
    )


def body(source: KernelSource) -> str:
    return source.text.partition("\n\n")[2]


def place(source: KernelSource, text: str) -> tuple[str, int]:
    """Where the line of the rendered text that holds ``text`` comes from."""
    assert source.origin is not None
    lines = [at for at, line in enumerate(source.text.split("\n"), 1) if text in line]
    found = source.origin.locate(lines[0])
    assert found is not None
    return found


def line_of(path: Path, text: str) -> int:
    lines = path.read_text().split("\n")
    return next(at for at, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("template", ["dense.cu.j2", "dense_split.cu.j2"])
def test_a_copy_renders_to_the_same_text(tmp_path: Path, template: str) -> None:
    config = next(c for c in configurations("bfloat16") if c.template == template)
    source = rendered(
        dense_copy(tmp_path, template=template), values={"config": config, "epilogue": None}
    )
    assert body(source) == body(gemm_source(config))
    assert "from mine.cu.j2; edit the template" in source.text and not source.strict


def test_marks_leave_no_trace(tmp_path: Path) -> None:
    source = rendered(dense_copy(tmp_path))
    assert not re.search("[\ue000-\uf8ff]", source.text)
    assert source.origin is not None
    assert len(source.origin.lines) == source.text.count("\n") + 1


def test_every_line_leads_back(tmp_path: Path) -> None:
    """A line without Jinja in it must stand in the template at the place that the map gives."""
    path = dense_copy(tmp_path)
    source = rendered(path)
    assert source.origin is not None
    texts = {str(file): file.read_text().split("\n") for file in
             (path, env.template_dir() / "wgmma.j2")}  # fmt: skip
    same = 0
    for line, found in zip(source.text.split("\n"), source.origin.lines, strict=True):
        if found is None:
            assert line.startswith("//") or not line, "the banner"
            continue
        written = texts[found[0]][found[1] - 1]
        if "{" + "{" not in written and "{%" not in written:
            assert written == line or not line.strip()
            same += 1
    assert same > 90
    assert place(source, "constexpr int kBlockN =") == (
        str(path), line_of(path, "constexpr int kBlockN"),
    )  # fmt: skip
    assert place(source, "wgmma.fence.sync.aligned")[0].endswith("wgmma.j2")


def test_lines_through_loops_conditions_includes_and_filters(tmp_path: Path) -> None:
    (tmp_path / "part.j2").write_text("int part_one;\nint part_two;\n")
    path = tmp_path / "mine.cu.j2"
    path.write_text(
        "int first;\n"
        "{# two lines of\n   comment #}\n"
        "{% for i in range(2) %}\n"
        "int loop_{{ i }};\n"
        "  {% if i == 1 %}\n"
        "int chosen;\n"
        "  {% endif %}\n"
        "{% endfor %}\n"
        '{% include "part.j2" %}\n'
        "{% filter upper %}\n"
        "int loud;\n"
        "{% endfilter %}\n"
        "{%- set lines = 'int a;\\nint b;' %}\n"
        "{{ lines }}\n"
        "int last;\n"
    )
    source = rendered(path)
    own = str(path)
    assert [place(source, text) for text in ("first", "loop_0", "loop_1", "chosen", "last")] == [
        (own, 1), (own, 5), (own, 5), (own, 7), (own, 16),
    ]  # fmt: skip
    assert place(source, "part_two") == (str(tmp_path / "part.j2"), 2)
    assert place(source, "INT LOUD") == (own, 12)
    assert place(source, "int b;") == (own, 15)


def test_lines_where_a_template_sees_the_marks(tmp_path: Path) -> None:
    """The length of a captured text differs with marks; the text must not, nor its lines."""
    path = tmp_path / "mine.cu.j2"
    path.write_text(
        "{% set text %}abc{% endset %}\nint length = {{ text | length }};\n"
        "{% if text | length > 3 %}\nint marked;\n{% endif %}\nint last;\n"
    )
    source = rendered(path)
    assert "int length = 3;" in source.text and "marked" not in source.text
    assert place(source, "int last;") == (str(path), 6)
    assert place(source, "int length")[0] == str(path)


# ---------------------------------------------------------------------------- folders and digests


def test_the_users_folder_comes_first(tmp_path: Path) -> None:
    path = dense_copy(tmp_path)
    plain = rendered(path)
    for folder, name in ((env.template_dir(), "wgmma.j2"), (env.header_dir(), "promotion.cuh")):
        text = (folder / name).read_text()
        changed = text.replace("{% endmacro %}", "// changed\n{% endmacro %}")
        (tmp_path / name).write_text(changed if name == "wgmma.j2" else f"{text}// changed\n")
        assert rendered(path).digest != plain.digest, name
        assert ("// changed" in rendered(path).text) == (name == "wgmma.j2")
        (tmp_path / name).write_text(text)
        assert rendered(path).digest == plain.digest, "contents count, not places"


def test_a_header_that_only_headers_include(tmp_path: Path) -> None:
    path = dense_copy(tmp_path)
    plain = rendered(path)
    assert '#include "pipeline.cuh"' not in plain.text
    text = (env.header_dir() / "pipeline.cuh").read_text()
    (tmp_path / "pipeline.cuh").write_text(f"{text}// mine\n")
    assert rendered(path).digest != plain.digest


def test_the_digest_holds_no_path(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    digests = set()
    for folder in folders:
        folder.mkdir()
        digests.add(rendered(dense_copy(folder)).digest)
    assert len(digests) == 1


def test_golden_files_stay() -> None:
    """The package's own rendering knows nothing of all this."""
    source = gemm_source(KernelConfig(256, 128, 3))
    assert source.origin is None and source.strict
    assert source.text == (GOLDEN / f"{source.name}.cu").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------- Jinja's errors


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{{ config.stages }}", "{{ config.stagess }}", "no attribute 'stagess'"),
        (
            "{{ config.stages }}",
            "{{ stages }}",
            "'stages' is undefined; got the names config, epilogue",
        ),
        ("{{ config.stages }}", "{{ config.stages / 0 }}", "ZeroDivisionError"),
        ("{{ config.stages }}", "{{ config.stages ", "expected token"),
        ("{{ config.stages }}", "{% if %}", "Expected an expression"),
        ('"wgmma.j2"', '"wgma.j2"', "'wgma.j2' is not there. Did you mean wgmma.j2"),
        ('"mainloop.cuh"', '"mainlop.cuh"', "includes 'mainlop.cuh'.*Did you mean mainloop.cuh"),
    ],
)
def test_jinjas_errors_name_the_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = dense_copy(tmp_path, (old, new))
    line = line_of(path, new)
    with pytest.raises(CompileError, match=rf"{re.escape(str(path))}:{line}\b.*{says}") as caught:
        rendered(path)
    if "include" not in says:
        assert f">{line:6d} | " in str(caught.value)


def test_errors_in_a_macro_name_the_macros_line(tmp_path: Path) -> None:
    text = (env.template_dir() / "wgmma.j2").read_text()
    macro = tmp_path / "wgmma.j2"
    macro.write_text(text.replace("range(n // 2)", "range(n // nothing)", 1))
    line = line_of(macro, "// nothing")
    with pytest.raises(CompileError, match=rf"{re.escape(str(macro))}:{line}: 'nothing' is undef"):
        rendered(dense_copy(tmp_path))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.cu.j2"
    path.write_bytes(b"int a;\xff\xfe")
    with pytest.raises(ArgumentError, match="path: must be text in UTF-8"):
        rendered(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("absent.cu.j2", "dense.cu.j2"):  # the package has the second one
        with pytest.raises(ArgumentError, match="path: must be a template's file"):
            rendered(tmp_path / name)


# ---------------------------------------------------------------------------- the compiler's errors


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(folder))
    return folder


@needs_nvrtc
@pytest.mark.parametrize("step", [compile_kernel, ptx_of])
def test_compiler_errors_name_the_line(tmp_path: Path, cache: Path, step: Any) -> None:
    path = dense_copy(tmp_path, ("threadIdx.x % 32;", "threadIdx.x % warp_size;"))
    line = line_of(path, "warp_size")
    with pytest.raises(CompileError) as caught:
        step(rendered(path))
    said = str(caught.value)
    assert f'{path}({line}): error: identifier "warp_size" is undefined' in said
    assert f"{path}:{line}\n" in said and f">{line:6d} |     const int lane" in said


@needs_nvrtc
def test_compiler_errors_in_a_macro_and_in_a_header(tmp_path: Path, cache: Path) -> None:
    path = dense_copy(tmp_path)
    macro, header = tmp_path / "wgmma.j2", tmp_path / "promotion.cuh"
    text = (env.template_dir() / macro.name).read_text()
    macro.write_text(text.replace("u64 a, u64 b) {", "u64 a, u65 b) {"))
    with pytest.raises(CompileError) as caught:
        compile_kernel(rendered(path))
    line = line_of(macro, "u65")
    assert f'{macro}({line}): error: identifier "u65"' in str(caught.value)
    assert f">{line:6d} | " in str(caught.value)
    macro.write_text(text)
    text = (env.header_dir() / header.name).read_text()
    header.write_text(text.replace("* column_scale[8", "* nothing[8", 1))
    with pytest.raises(CompileError) as caught:
        compile_kernel(rendered(path))
    line = line_of(header, "nothing")
    assert f'{header}({line}): error: identifier "nothing"' in str(caught.value)
    assert "cpgemm-headers-" not in str(caught.value), "the folder it was compiled in is gone"
    assert re.search(rf"at line \d+ of {re.escape(str(path))}", str(caught.value)), "instantiation"


@needs_nvrtc
def test_the_packages_headers_are_named_too(tmp_path: Path, cache: Path) -> None:
    path = dense_copy(tmp_path, ("Consumer<Tile> consumer", "Consumer<float> consumer"))
    with pytest.raises(CompileError) as caught:
        compile_kernel(rendered(path))
    assert f"{env.header_dir() / 'mainloop.cuh'}(" in str(caught.value)


# ------------------------------------------------------------------------------- what is recompiled


@needs_nvrtc
def test_only_what_changed_is_compiled(tmp_path: Path, cache: Path) -> None:
    path = dense_copy(tmp_path)
    before = compile_count()
    first = compile_kernel(rendered(path))
    assert not first.cached and compile_kernel(rendered(path)).cached
    path.write_text("{# a comment of Jinja changes nothing #}" + path.read_text())
    assert compile_kernel(rendered(path)).cached and compile_count() == before + 1
    path.write_text(path.read_text() + "\n// a comment of CUDA does\n")
    assert not compile_kernel(rendered(path)).cached
    header = tmp_path / "promotion.cuh"
    text = (env.header_dir() / header.name).read_text()
    changed = text.replace(
        "const float scale = row_scale *", "const float scale = 2.0f * row_scale *"
    )
    assert changed != text
    header.write_text(changed)
    doubled = compile_kernel(rendered(path))
    assert not doubled.cached and doubled.cubin.read_bytes() != first.cubin.read_bytes()
    header.unlink()
    assert compile_kernel(rendered(path)).cached and compile_count() == before + 3


@needs_nvrtc
def test_a_users_header_serves_the_packages_headers(tmp_path: Path, cache: Path) -> None:
    """promotion.cuh is included by mainloop.cuh, which lies in the package's folder."""
    (tmp_path / "promotion.cuh").write_text("#error mine\n")
    with pytest.raises(CompileError, match="mine"):
        compile_kernel(rendered(dense_copy(tmp_path)))


SPILLS = """
extern "C" __global__ void spills(float* p, int n) {
    float a[64];
    for (int i = 0; i < 64; i++) a[i] = p[i * n];
    for (int i = 0; i < n; i++) a[(i * 7 + n) & 63] += a[(i * 13) & 63];
    for (int i = 0; i < 64; i++) p[i * n] = a[i];
}
"""


@needs_nvrtc
def test_local_memory_warns_and_strict_refuses(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "spills.cu.j2"
    path.write_text(SPILLS)
    for _ in range(2):  # from the compiler, and from the cache
        with pytest.warns(KernelWarning, match="mine: local memory is used"):
            compile_kernel(rendered(path, "spills"))
    with pytest.raises(CompileError, match="mine is refused: local memory is used"):
        compile_kernel(rendered(path, "spills", strict=True))
    with pytest.warns(KernelWarning):
        compile_kernel(rendered(path, "spills"))


@needs_nvrtc
def test_the_naive_kernel_compiles_without_a_fault(cache: Path) -> None:
    source = render_file(NAIVE, name="naive", entry="naive_wgmma", values={"block_n": 64})
    report = compile_kernel(source).report
    assert report.faults() == () and report.wgmma == 4 and report.tma_loads == 0
