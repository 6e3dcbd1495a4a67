"""What tests of pictures look at: every text that a figure draws, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def drawn_texts(figure: Any) -> list[Any]:
    """The texts that are drawn, ticks and legends included, after drawing the figure."""
    from matplotlib.text import Text

    texts: list[Any] = []
    original = Text.draw

    def draw(self: Any, renderer: Any) -> None:
        original(self, renderer)
        if self.get_visible() and self.get_text().strip():
            texts.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        figure.canvas.draw()
    return texts


def boxes(figure: Any, texts: Sequence[Any]) -> list[tuple[str, Any]]:
    """Each text with its extent in pixels."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    return [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts]


def overlap(one: Any, other: Any, slack: float = 1.0) -> bool:
    """Whether two extents share more than ``slack`` pixels either way."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return wide > slack and high > slack
