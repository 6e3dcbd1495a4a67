"""A progress bar in a notebook's cell: one display that is updated in place, without widgets."""

from __future__ import annotations

import time

from IPython.display import display

from cpgemm.displays.html import card, element

__all__ = ["NotebookBar"]

_EVERY = 0.1  # seconds between two updates: each is a message to the browser


class NotebookBar:
    """A bar over ``total`` steps under the running cell; call it once a step, with its name."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._count, self._step, self._open = 0, "", True
        self._began = self._shown = time.monotonic()
        self._handle = display(self, display_id=True)

    def __call__(self, name: str) -> None:
        """Count a step."""
        self._count, self._step = self._count + 1, name
        if time.monotonic() - self._shown >= _EVERY:
            self._show()

    def close(self) -> None:
        """Leave one line that says how far it came and how long it took."""
        self._step, self._open = "", False
        self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._handle is not None:
            self._handle.update(self)

    def __repr__(self) -> str:
        seconds = time.monotonic() - self._began
        return f"{self._label} {self._count}/{self._total} {seconds:.1f} s {self._step}".rstrip()

    def _repr_html_(self) -> str:
        seconds = time.monotonic() - self._began
        text = f"{self._count}/{self._total}, {seconds:.1f} s"
        if not self._open:
            return card(self._label, text)
        bar = element(
            "progress", value=self._count, max=self._total,
            style="width:14rem;max-width:60%;vertical-align:middle;margin-right:8px",
        )  # fmt: skip
        return card(self._label, text, element("div", bar, element("span", self._step)))
