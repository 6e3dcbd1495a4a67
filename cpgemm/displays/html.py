"""The parts that displays are made of: elements, cards, lists of facts, tables, bars.

Everything that goes in is escaped, unless it is ``Markup`` that these functions made; markupsafe
comes with jinja2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from markupsafe import Markup, escape

__all__ = [
    "BLUE", "GREEN", "ORANGE", "PURPLE", "RED", "Markup", "card", "element", "facts", "folded",
    "note", "svg", "table",
]  # fmt: skip

# At least 3:1 against the white, #111 and #1e1e1e of notebook themes.
BLUE, ORANGE, GREEN, PURPLE, RED = "#3b82f6", "#d97706", "#16966a", "#a05ce0", "#dc4b4b"

_SANS = "font-family:system-ui,-apple-system,'Segoe UI',sans-serif;font-size:13px;line-height:1.45"
_RULE = "1px solid color-mix(in srgb,currentColor 22%,transparent)"
_FAINT = "opacity:.68"
# Notebooks stripe tables, align them right and give their rows backgrounds of their own.
_PLAIN = "background:transparent;border:0;color:inherit"


def element(tag: str, *children: object, style: str = "", **attributes: object) -> Markup:
    """One element; ``_`` in the names of attributes stands for ``-``, at their end for nothing."""
    given = {"style": style, **attributes} if style else attributes
    inside = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in given.items()
    )
    return Markup(f"<{tag}{inside}>{''.join(escape(child) for child in children)}</{tag}>")


def card(title: str, subtitle: str, *parts: object) -> str:
    """The frame of a display: a heading and parts below each other."""
    head = element(
        "div",
        element("strong", title, style="font-size:14px"),
        " ",
        element("span", subtitle, style=_FAINT),
        style="overflow-wrap:anywhere",
    )
    style = f"{_SANS};color:inherit;padding:2px 0"
    return str(element("div", head, *parts, style=style, class_="cpgemm"))


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Names with their values, side by side as far as there is room."""
    cells = [
        element(
            "div",
            element("div", name, style=f"{_FAINT};font-size:11px"),
            element("div", value, style="font-variant-numeric:tabular-nums"),
        )
        for name, value in pairs
    ]
    return element("div", *cells, style="display:flex;flex-wrap:wrap;gap:6px 24px;margin:6px 0 8px")


def note(*children: object) -> Markup:
    """A line in small print."""
    return element(
        "div",
        *children,
        style=f"{_FAINT};font-size:11.5px;margin:4px 0;max-width:60rem;overflow-wrap:anywhere",
    )


def folded(summary: str, *children: object) -> Markup:
    """Something that opens at a click."""
    return element(
        "details",
        element("summary", summary, style="cursor:pointer"),
        *children,
        style="margin:4px 0",
    )


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Collection[str] = (),
    strong: int | None = None,
    caption: str = "",
) -> Markup:
    """A table that scrolls by itself where the notebook is narrow.

    Columns named in ``numbers`` align right; the row at ``strong`` is bold.
    """

    def cell(tag: str, column: str, value: object, more: str) -> Markup:
        align = "right" if column in numbers else "left"
        style = f"{_PLAIN};padding:2px 10px 2px 0;text-align:{align};white-space:nowrap"
        return element(tag, value, style=f"{style};{more}")

    heads = [
        cell("th", name, name, f"border-bottom:{_RULE};font-weight:600;vertical-align:bottom")
        for name in columns
    ]
    lines = [
        element(
            "tr",
            *(
                cell("td", name, value, "font-weight:600" if at == strong else "")
                for name, value in zip(columns, row, strict=True)
            ),
            style=_PLAIN,
        )
        for at, row in enumerate(rows)
    ]
    title = (
        [element("caption", caption, style="text-align:left;color:inherit;font-weight:600")]
        if caption
        else []
    )
    whole = element(
        "table",
        *title,
        element("thead", element("tr", *heads, style=_PLAIN)),
        element("tbody", *lines),
        style=f"{_PLAIN};border-collapse:collapse;margin:4px 0;font-size:12px;"
        "font-variant-numeric:tabular-nums",
    )
    return element("div", whole, style="overflow-x:auto")


def svg(width: float, height: float, title: str, *children: object) -> Markup:
    """A drawing of ``width`` x ``height`` units, shown at that size in pixels or narrower."""
    return element(
        "svg",
        element("title", title),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        role="img",
        style="max-width:100%;height:auto;display:block;overflow:visible",
        fill="currentColor",
        font_size="11",
        xmlns="http://www.w3.org/2000/svg",
    )
