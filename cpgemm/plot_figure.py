"""The figure class of pictures; imports matplotlib, and is imported only to draw."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

__all__ = ["Picture"]


class Picture(Figure):  # type: ignore[misc, unused-ignore]
    """A figure that a notebook shows without pyplot, in the colours that it was drawn in."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()
