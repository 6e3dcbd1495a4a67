"""The site that `make docs` builds: no warnings, links lead somewhere, nothing is fetched."""

from __future__ import annotations

import html.parser
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, name_of


class Html(html.parser.HTMLParser):
    """Ids of a page, its links, and what a browser fetches with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "source", "iframe") and "src" in given:
            self.fetched.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.fetched.append(given["href"])
        self.fetched += [part.split()[0] for part in given.get("srcset", "").split(",") if part]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does it: a warning is an error."""
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocs_include_markdown_plugin"):
        pytest.importorskip(module, reason=f"{module} (extra docs) is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        check=False, capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Html]:
    found = {path.resolve(): Html(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def test_links_of_the_site(site: Path, pages: dict[Path, Html]) -> None:
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or path.name == "404.html":  # whose links are the server's
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            if target.is_dir():
                target /= "index.html"
            assert target.is_relative_to(site.resolve()), f"{path.name}: {link}"
            assert target.exists(), f"{path.name}: {link}"
            if url.fragment and target in pages:
                anchor = urllib.parse.unquote(url.fragment)
                assert anchor in pages[target].ids | {"__"}, f"{path.name}: {link}"


def test_the_site_fetches_nothing_from_elsewhere(site: Path, pages: dict[Path, Html]) -> None:
    for path, page in pages.items():
        assert any("search_from_disk.js" in source for source in page.fetched), path
        for source in page.fetched:
            if source.startswith("data:"):
                continue
            url = urllib.parse.urlsplit(source)
            assert not url.netloc, f"{path.name}: {source}"
            folder = (
                site if url.path.startswith("/") else path.parent
            )  # 404.html names the server's
            assert (folder / url.path.lstrip("/")).resolve().exists(), f"{path.name}: {source}"
    for style in site.rglob("*.css"):
        text = style.read_text("utf-8")
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text), style


def test_every_public_name_has_an_anchor(site: Path, pages: dict[Path, Html]) -> None:
    text = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    ids = set().union(*(pages[path].ids for path in pages if path.parent.name == "api"))
    assert set(re.findall(r"^::: (\S+)", text, re.MULTILINE)) <= ids


def test_no_mermaid_is_left_undrawn(pages: dict[Path, Html], site: Path) -> None:
    """The theme would fetch the library that draws it."""
    for path in pages:
        assert 'class="mermaid"' not in path.read_text("utf-8"), path
    for page in PAGES:
        assert "```mermaid" not in page.read_text("utf-8"), name_of(page)
