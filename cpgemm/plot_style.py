"""What all pictures share: colours, the page with its header, and saving.

matplotlib is used through its objects only, and within ``drawing``: the caller's rcParams neither
change nor show, and pyplot is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpgemm.errors import MissingDependencyError, reject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "THEMES",
    "Page",
    "Style",
    "Theme",
    "bar_place",
    "drawing",
    "require_matplotlib",
    "save",
    "style_of",
    "text_inches",
    "theme_named",
]

DPI = 120
_SMALL, _TEXT, _HEAD = 8.0, 9.0, 13.0  # points
_MARGIN = 0.25  # inches, around everything
_LINE = 0.19  # inches, of a line of the header


@dataclass(frozen=True)
class Theme:
    """Colours on one background; ``colors`` by contender without its `` pdl``."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    colors: Mapping[str, str]
    spare: tuple[str, ...]


# Okabe's and Ito's hues, moved apart by a search under simulated protanopia, deuteranopia and
# tritanopia, and all at least 3:1 against the background.  tests/test_bench_plots.py checks both.
THEMES = (
    Theme(
        "light",
        paper="#ffffff",
        ink="#1b1f24",
        muted="#6a717a",
        grid="#e3e6ea",
        colors={
            "cpgemm": "#1040cc",
            "cublaslt block": "#b48a1c",
            "deep_gemm": "#0c9664",
            "cutlass": "#2b2730",
            "cublaslt tensor": "#cc4aac",
        },
        spare=("#c2410c", "#0e7490", "#5f6b1f"),
    ),
    Theme(
        "dark",
        paper="#0d1117",
        ink="#e6edf3",
        muted="#929ba6",
        grid="#262d36",
        colors={
            "cpgemm": "#3a7bff",
            "cublaslt block": "#f0bf3a",
            "deep_gemm": "#20cd7c",
            "cutlass": "#f4f6f8",
            "cublaslt tensor": "#ee66c2",
        },
        spare=("#ff8a5c", "#5fd3e6", "#c3d16a"),
    ),
)


def theme_named(name: object) -> Theme:
    """``light`` or ``dark``; ``ArgumentError`` for another name."""
    for theme in THEMES:
        if theme.name == name:
            return theme
    reject("theme", "must be 'light' or 'dark'", repr(name), "Leave it out for light.")


# In the order of bars; others follow.
_KNOWN = ("cpgemm", "cublaslt block", "cutlass", "deep_gemm", "cublaslt tensor")
_MARKERS = {
    "cpgemm": "o",
    "cublaslt block": "s",
    "deep_gemm": "D",
    "cutlass": "v",
    "cublaslt tensor": "^",
}
_SPARE_MARKERS = ("P", "X", "p")
_PDL = " pdl"


@dataclass(frozen=True)
class Style:
    """How a contender is drawn.  PDL: a paler colour, hatched bars, broken lines."""

    color: str
    marker: str
    pdl: bool

    @property
    def line(self) -> tuple[float, tuple[float, ...]] | str:
        """Line style."""
        return (0, (3, 1.5)) if self.pdl else "solid"


def style_of(theme: Theme, contender: str) -> Style:
    """The same contender looks the same in every picture, known or not."""
    base, pdl = contender.removesuffix(_PDL), contender.endswith(_PDL)
    spare = sum(base.encode())
    color = theme.colors.get(base) or theme.spare[spare % len(theme.spare)]
    marker = _MARKERS.get(base) or _SPARE_MARKERS[spare % len(_SPARE_MARKERS)]
    return Style(_blend(color, theme.paper, 0.4) if pdl else color, marker, pdl)


def bar_place(contender: str) -> tuple[int, str]:
    """Sorts contenders in the order of their bars and of the legend."""
    base = contender.removesuffix(_PDL)
    return _KNOWN.index(base) if base in _KNOWN else len(_KNOWN), contender


def _blend(color: str, other: str, share: float) -> str:
    pairs = ((int(color[at : at + 2], 16), int(other[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


# ------------------------------------------------------------------------------------- matplotlib


def require_matplotlib() -> None:
    """Raise ``MissingDependencyError`` with the command that mends it, unless it is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib: drawing pictures needs it; it is not installed. "
            'Run: pip install "matplotlib>=3.8" (or "cpgemm[plot]").'
        ) from error


@contextlib.contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """matplotlib's own defaults and the theme's colours, whatever the user has set."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": _SMALL,
                "axes.titlesize": _TEXT,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.labelsize": _SMALL,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "axes.facecolor": theme.paper,
                "axes.edgecolor": theme.muted,
                "axes.labelcolor": theme.ink,
                "grid.color": theme.grid,
                "grid.linewidth": 0.8,
                "figure.facecolor": theme.paper,
                "savefig.facecolor": theme.paper,
                "text.color": theme.ink,
                "xtick.color": theme.muted,
                "ytick.color": theme.muted,
                "xtick.labelcolor": theme.ink,
                "ytick.labelcolor": theme.ink,
                "hatch.color": theme.paper,
                "hatch.linewidth": 1.2,
                "legend.frameon": False,
                "legend.fontsize": _TEXT,
                # The same report gives the same file.
                "svg.hashsalt": "cpgemm",
            }
        )
        yield


@functools.lru_cache(maxsize=4096)
def text_inches(text: str, points: float = _SMALL) -> float:
    """Width of the widest line of ``text``, within ``drawing``."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(size=points)
    widths = (TextPath((0, 0), line, prop=font).get_extents().x1 for line in text.split("\n"))
    return max((float(width) for width in widths if width > 0), default=0.0) / 72


class Page:
    """A figure of ``width`` inches: title, captions, legend, and below them ``content`` inches.

    Axes are placed in inches from the upper left corner of the content, so that room for labels is
    what it was planned to be at any size.
    """

    def __init__(
        self,
        theme: Theme,
        title: str,
        captions: Sequence[str],
        handles: Sequence[Any],
        *,
        width: float,
        content: float,
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from cpgemm.plot_figure import Picture

        room = width - 2 * _MARGIN
        self.theme, self.width = theme, width
        self.figure: Figure = Picture(figsize=(width, 10), dpi=DPI)
        canvas = FigureCanvasAgg(self.figure)
        lines = _wrapped(title, room, _HEAD)
        small = [line for caption in captions for line in _wrapped(caption, room, _TEXT)]
        legend, legend_height = None, 0.0
        columns = len(handles)
        while columns:
            if legend:
                legend.remove()
            legend = self.figure.legend(
                handles=list(handles), loc="upper left", ncols=columns, borderaxespad=0, borderpad=0
            )
            extent = legend.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call, unused-ignore]
            legend_height = extent.height / DPI + 0.1
            if extent.width / DPI <= room or columns == 1:
                break
            # As many rows as are needed, equally full.
            rows = math.ceil(len(handles) / (columns - 1))
            columns = min(columns - 1, math.ceil(len(handles) / rows))
        head = _MARGIN + 1.5 * _LINE * len(lines) + _LINE * len(small) + 0.1
        self._top = head + legend_height
        self.height = self._top + content + _MARGIN
        self.figure.set_size_inches(width, self.height)
        top = _MARGIN
        for text, points, color, step in (
            *((line, _HEAD, theme.ink, 1.5 * _LINE) for line in lines),
            *((line, _TEXT, theme.muted, _LINE) for line in small),
        ):
            self.figure.text(
                _MARGIN / width,
                1 - top / self.height,
                text,
                fontsize=points,
                color=color,
                weight="bold" if points == _HEAD else "normal",
                va="top",
            )
            top += step
        if legend:
            legend.set_bbox_to_anchor((_MARGIN / width, 1 - head / self.height))

    @property
    def room(self) -> float:
        """Inches between the left and the right margin."""
        return self.width - 2 * _MARGIN

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """New axes; inches from the upper left corner of the content, labels not counted."""
        bottom = self.height - self._top - top - height
        return self.figure.add_axes(
            (
                (_MARGIN + left) / self.width,
                bottom / self.height,
                width / self.width,
                height / self.height,
            )
        )


def _wrapped(text: str, room: float, points: float) -> list[str]:
    width = text_inches(text, points) * (1.15 if points == _HEAD else 1.02)  # bold is wider
    return textwrap.wrap(text, max(20, int(len(text) * min(1.0, room / max(width, 1e-6)))))


def save(figure: Figure, path: Path, formats: Sequence[str]) -> list[Path]:
    """Write ``path`` with each of the suffixes; a file is replaced once it is whole."""
    written = []
    for suffix in formats:
        buffer = io.BytesIO()
        # A date would make each file another one.
        metadata: dict[str, str | None] = {"Date": None} if suffix == "svg" else {}
        figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata)
        target = path.with_name(f"{path.name}.{suffix}")
        partial = target.with_name(target.name + ".part")
        partial.write_bytes(buffer.getvalue())
        partial.replace(target)
        written.append(target)
    return written
