"""What the site changes in pages that GitHub shows as they are; called by MkDocs (mkdocs.yml)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">'
    r'<img src="(?P<light>[^"]+)" alt="(?P<alt>[^"]*)"></picture>'
)
_ARGUMENT = re.compile(r"(?<=[.;])\s+((?:<code>\w+</code>(?:, | and )?)+: )")
_FILE = re.compile(r"(?<![/\w])docs/(\w+)\.md(?![^<]*</a>)")
_SHIM = "https://unpkg.com/iframe-worker/shim"  # what the theme would fetch
# Pages of the site that hold a file from outside of docs/.
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Links out of docs/ lead to the page that holds the file, or become plain text.

    Pictures in two colours follow the reader's choice on the page, not only the system's.
    """
    docs = Path(config.docs_dir).resolve()
    here = (docs / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        path = (here / target).resolve()
        if path.is_relative_to(docs):
            return found.group(0)
        name = _PAGES.get(str(path.relative_to(docs.parent)))
        if name is None:
            return label
        up = "../" * (len(here.relative_to(docs).parts))
        return f"[{label}]({up}{name}{anchor})"

    markdown = _LINK.sub(link, markdown)
    return _PICTURE.sub(r"![\g<alt>](\g<light>#only-light)![\g<alt>](\g<dark>#only-dark)", markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Docstrings on the API pages: a line for each argument, links for files of docs/."""
    if not page.file.src_uri.startswith("api/"):
        return html
    html = _ARGUMENT.sub(r"<br>\1", html)
    return _FILE.sub(r'<a href="../\1.html">docs/\1.md</a>', html)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """The script that lets the search run from disk is the site's own."""
    return output.replace(_SHIM, page.file.url.count("/") * "../" + "site/search_from_disk.js")


def on_post_template(output: str, **_: Any) -> str:
    """The same for the page of missing pages, whose links are the server's."""
    return output.replace(_SHIM, "/site/search_from_disk.js")
