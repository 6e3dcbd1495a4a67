"""Pages of docs/: code runs, names and docstrings are complete, anchors and pictures are there."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from doc_pages import PAGES, ROOT, Block, name_of, python_blocks, run_blocks, why_not

import cpgemm
from cpgemm.deep_gemm.absent import ABSENT

API = ROOT / "docs" / "api"
# Documented beside what `__all__` holds: what public functions return, and what pages call.
ALSO = {
    "cpgemm.checkpoint.load_array",
    "cpgemm.cost_model.Candidate",
    "cpgemm.heuristics.Explanation",
    "cpgemm.cost_model.Machine",
    "cpgemm.reference.exact_product",
    "cpgemm.reference.gemm_reference",
    "cpgemm.render.KernelSource",
    "cpgemm.tuned.TunedChoice",
    "cpgemm.tuned.TunedExplanation",
    "cpgemm.tuning.TuneResult",
    "cpgemm.kernel_view.KernelResources",
    "cpgemm.occupancy.Occupancy",
    "cpgemm.instruction_counts.InstructionCounts",
    "cpgemm.machine_code.Loop",
    "cpgemm.kernel_diff.KernelDifference",
    "cpgemm.template_kernel.TemplateKernel",
    "cpgemm.kernel_check.CheckResult",
}

# ---------------------------------------------------------------------------------------- blocks


def runs() -> list[Any]:
    """A page for each set of needs that its blocks have."""
    return [
        pytest.param(page, needs, id="-".join([name_of(page), *sorted(needs)]))
        for page in PAGES
        for needs in sorted({block.needs for block in python_blocks(page)}, key=sorted)
    ]


@pytest.mark.parametrize(("page", "needs"), runs())
def test_python_blocks_run(
    page: Path, needs: frozenset[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder; a page may stand in for another module while it runs."""
    for need in sorted(needs):
        if reason := why_not(need):
            pytest.skip(f"blocks of {name_of(page)} need {need}: {reason}")
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    try:
        run_blocks(page, needs)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "deep_gemm"]:
            del sys.modules[name]
        sys.modules.update({k: v for k, v in before.items() if k.startswith("deep_gemm")})


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^[ >]*(?:```|~~~) *(?:python|py|pycon|python3)\b", text, re.MULTILINE)
        assert len(fences) == len(python_blocks(page)), name_of(page)
        marks = re.findall(r"<!--\s*needs", text)
        assert len(marks) == sum(bool(block.needs) for block in python_blocks(page)), name_of(page)


def test_a_mark_above_a_block_is_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nx = 1\n```\n\n<!-- needs: gpu torch -->\n```python\nx = 2\n```\n"
        "\n```python\nx += 1\nassert False, x\n```\n"
    )
    first, second, third = python_blocks(page)
    assert first == Block(3, "x = 1\n", frozenset())
    assert second.needs == {"gpu", "torch"} and second.line == 8
    with pytest.raises(AssertionError, match="2") as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno + 1 == third.line + 2  # lines of the page, counted from 1
    with pytest.raises(ValueError, match="write gpu or one of"):
        why_not("tpu")


# ----------------------------------------------------------------------------------------- names


def all_of(module: str) -> list[str]:
    """``__all__`` as it is written, so that torch and JAX need not be there."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def hidden_by_module(name: str) -> bool:
    """Whether a module of this name defines what is meant; by its file: torch may be absent."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        return False
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = (node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return path.stem in defined


@functools.cache
def public_names() -> dict[str, str]:
    """Every public name with how the API pages spell it.

    A name that a module has as well is spelled by what it is in that module: `cpgemm.gemm` is
    `cpgemm.gemm.gemm` there.  Modules are not names; what they hold is.
    """
    modules = ["cpgemm", *(f"cpgemm.{name}" for name in cpgemm._SUBMODULES)]
    modules += [
        f"cpgemm.{name}"
        for name in cpgemm.__all__
        if isinstance(getattr(cpgemm, name), types.ModuleType)
    ]
    found = {}
    for module in dict.fromkeys(modules):
        for name in all_of(module):
            full = f"{module}.{name}"
            if full in modules or (module == "cpgemm.deep_gemm" and name in ABSENT):
                continue
            spelled = f"{full}.{name}" if hidden_by_module(full) else full
            found[full] = spelled
    return found


def api_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md")))


def tabled() -> list[str]:
    """Second names of an object, and modules: in tables of the API pages."""
    return re.findall(r"^\| `(cpgemm\.[\w.]+)` \|", api_text(), re.MULTILINE)


def in_full() -> list[str]:
    """What the API pages show in full."""
    return re.findall(r"^::: (\S+)", api_text(), re.MULTILINE)


def documented() -> list[str]:
    return in_full() + tabled()


def test_api_pages_and_public_names_are_equal() -> None:
    found, wanted = documented(), set(public_names().values()) | ALSO
    assert len(found) == len(set(found)), "a name stands twice on the API pages"
    missing, unknown = sorted(wanted - set(found)), sorted(set(found) - wanted)
    assert not missing, f"add `::: NAME` to a page of docs/api for {missing}"
    assert not unknown, f"not public (or not in ALSO): {unknown}"


def test_each_public_module_has_a_page() -> None:
    pages = {page.stem for page in API.glob("*.md")} - {"index"}
    modules = {full.split(".")[1] for full in public_names() if full.count(".") == 2}
    assert pages == modules, (
        "docs/api/NAME.md for each public module, and a line of nav in mkdocs.yml"
    )


def test_names_beside_the_public_ones_exist() -> None:
    for name in ALSO:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


# ------------------------------------------------------------------------------------ docstrings


@functools.cache
def package() -> Any:
    """The package as griffe reads it: nothing is imported."""
    griffe = pytest.importorskip("griffe", reason="griffe (extra docs) is not installed")
    return griffe.load("cpgemm", search_paths=[str(ROOT)], resolve_aliases=True)


def described(name: str) -> Any:
    """What ``name`` stands for, behind all re-exports."""
    found = package()[name.removeprefix("cpgemm.")]
    return found.final_target if found.is_alias else found


def text_of(found: Any) -> str:
    return found.docstring.value if found.docstring else ""


def parameters_of(found: Any) -> list[str]:
    """Those that a caller may name; for a dataclass its fields."""
    if found.is_class and any(base.canonical_name.endswith("Error") for base in found.bases):
        return []
    return [
        parameter.name
        for parameter in found.parameters
        if parameter.name not in ("self", "cls")
        and parameter.kind.value not in ("variadic positional", "variadic keyword")
        and not parameter.name.startswith("_")
    ]


def words_of(found: Any) -> set[str]:
    """Words of the docstring, of base classes, and of what it names ("as in ``gemm``")."""
    text = text_of(found)
    if found.is_class and "__init__" in found.members:
        text += text_of(found.members["__init__"])
    words = set(re.findall(r"\w+", text))
    if found.is_class:
        words = words.union(*(words_of(base) for base in found.resolved_bases))
    for name in re.findall(r"\bas\s+in\s+``(\w+)``", text):
        if name in found.module.members and name != found.name:
            words |= words_of(described(f"{found.module.path}.{name}"))
    return words


def rejects(found: Any) -> bool:
    """Whether a call can raise on purpose, in what its module holds or by a checking function."""
    module = found.module
    tree = ast.parse("".join(f"{line}\n" for line in module.source.splitlines()))
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    if found.is_class:
        methods = [
            m.name for m in found.members.values() if m.name in ("__init__", "__post_init__")
        ]
        start = [
            node
            for cls in ast.walk(tree)
            if isinstance(cls, ast.ClassDef) and cls.name == found.name
            for node in cls.body
            if isinstance(node, ast.FunctionDef) and node.name in methods
        ]
    else:
        start = [functions[found.name]]
    seen: set[str] = set()
    while start:
        node = start.pop()
        for inner in ast.walk(node):
            if isinstance(inner, ast.Raise) and inner.exc is not None:
                return True
            if isinstance(inner, ast.Call):
                called = ast.unparse(inner.func).rpartition(".")[2]
                if called == "reject" or called.startswith(("check_", "require_")):
                    return True
                if called in functions and called not in seen:
                    seen.add(called)
                    start.append(functions[called])
    return False


def classes() -> list[str]:
    return [name for name in in_full() if name.rpartition(".")[2][0].isupper()]


@pytest.mark.parametrize("name", classes())
def test_docstrings_of_methods_are_complete(name: str) -> None:
    """What the site shows of a class: no name with an underscore in front but ``__call__``."""
    found = described(name)
    if not found.is_class:  # `dlpack.Framework`
        return
    hidden = ("of_checked", "prepare", "signature", "extra_repr")  # as in mkdocs.yml
    hidden = (*hidden, "stage", "check_field", "operands", "apply_to")
    for method in found.members.values():
        public = not method.name.startswith("_") or method.name == "__call__"
        if method.is_alias or not method.is_function or not public or method.name in hidden:
            continue
        assert text_of(method), f"{name}.{method.name} has no docstring"
        words = words_of(method) | words_of(found)
        unnamed = [parameter for parameter in parameters_of(method) if parameter not in words]
        assert not unnamed, f"the docstring of {name}.{method.name} says nothing of {unnamed}"


@pytest.mark.parametrize("name", in_full())
def test_docstrings_are_complete(name: str) -> None:
    """Every parameter is named, and that it raises where it does."""
    found = described(name)
    if found.is_module:
        assert text_of(found), name
        return
    assert text_of(found), f"{name} has no docstring"
    if found.is_attribute:
        return
    words = words_of(found)
    unnamed = [parameter for parameter in parameters_of(found) if parameter not in words]
    assert not unnamed, f"the docstring of {name} says nothing of {unnamed}"
    if rejects(found):
        said = any(re.match(r"[Rr]aise|[Rr]eject|[Rr]efuse|errors$", word) for word in words)
        assert said, f"{name} raises and does not say so"


# ----------------------------------------------------------------------------------------- links


def slugs(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and the site make them, and those of API directives."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s]+", "-", line) for line in plain} | set(
        re.findall(r"^::: (\S+)", text, re.MULTILINE)
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_anchors_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        if "://" not in target:
            path = (page.parent / target).resolve() if target else page
            assert anchor in slugs(path), f"{name_of(page)}: {target}#{anchor}"


def test_pictures_are_what_their_script_draws() -> None:
    folder = ROOT / "docs" / "pictures"
    drawn = runpy.run_path(str(folder / "draw.py"))["PICTURES"]
    assert {path.stem for path in folder.glob("*.svg")} == set(drawn)
    for name, draw in drawn.items():
        text = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert text == str(draw()), "run: python docs/pictures/draw.py"
        used = [page for page in PAGES if f"pictures/{name}.svg" in page.read_text("utf-8")]
        assert used, f"no page shows {name}.svg"
