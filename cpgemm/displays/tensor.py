"""A ``ScaledTensor`` in a notebook: what it is, and how its codes use e4m3.

The codes are counted on the device that holds them, by a few small kernels, when the tensor is
shown and not before.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpgemm.displays.html import BLUE, ORANGE, Markup, card, element, facts, note, svg
from cpgemm.layout import array_module, is_cupy
from cpgemm.streams import working_stream

if TYPE_CHECKING:
    from cpgemm.scaled import ScaledTensor

__all__ = ["SAMPLE", "Codes", "count_codes", "tensor_html"]

SAMPLE = 1 << 22
"""Codes that are looked at, at most: of larger tensors every n-th row (and, where one row is longer
than that, every n-th column), n the smallest that keeps to it."""

_LARGEST, _NAN, _MAGNITUDE = 0x7E, 0x7F, 0x7F  # e4m3fn codes without their sign
_BIAS = 7


@dataclass(frozen=True)
class Codes:
    """How often each e4m3 code occurs, and the range of the scales.

    ``counts``: int64, (256,), by code.  ``row_step``, ``column_step``: 1 when all were counted.
    ``scale_low``, ``scale_high``: smallest and largest of all scales; None for an empty tensor.
    """

    counts: np.ndarray
    row_step: int
    column_step: int
    scale_low: float | None
    scale_high: float | None

    @property
    def total(self) -> int:
        """Codes that were counted."""
        return int(self.counts.sum())

    @property
    def magnitudes(self) -> np.ndarray:
        """Counts by code without its sign, (128,)."""
        return self.counts[:128] + self.counts[128:]

    def share(self, magnitude: int) -> float:
        """Share of one code, both signs; 0 for an empty tensor."""
        return float(self.magnitudes[magnitude]) / max(self.total, 1)

    @property
    def zero_share(self) -> float:
        """Share of zeros."""
        return self.share(0)

    @property
    def saturated_share(self) -> float:
        """Share of codes of the largest magnitude, 448."""
        return self.share(_LARGEST)

    @property
    def nan_share(self) -> float:
        """Share of NaN."""
        return self.share(_NAN)

    @property
    def exponents(self) -> dict[str, int]:
        """Counts by exponent of the code's value, with zeros, subnormals and NaN apart."""
        counts = self.magnitudes
        named = {"zero": int(counts[0]), "subnormal": int(counts[1:8].sum())}
        for exponent in range(1, 16):
            codes = counts[8 * exponent : 8 * exponent + 8]
            named[str(exponent - _BIAS)] = int(codes.sum())
        named[str(15 - _BIAS)] -= int(counts[_NAN])
        named["NaN"] = int(counts[_NAN])
        return named


def count_codes(tensor: ScaledTensor) -> Codes:
    """Count the codes of a tensor, or of a sample of its rows (``SAMPLE``).

    On a GPU this launches on the current stream of the tensor's library and waits for it.
    """
    data, scales = tensor.data, tensor.scales
    if data.size == 0:
        return Codes(np.zeros(256, np.int64), 1, 1, None, None)
    groups, (rows, columns) = int(np.prod(data.shape[:-2])), data.shape[-2:]
    row_step = min(-(-data.size // SAMPLE), rows)
    taken = groups * -(-rows // row_step)
    column_step = min(max(-(-taken * columns // SAMPLE), 1), columns)
    xp = array_module(data)
    on_device = is_cupy(data)
    where = (
        working_stream(tensor.framework, data.data.device_id)
        if on_device
        else contextlib.nullcontext()
    )
    with where:
        codes = data.view(np.uint8)[..., ::row_step, ::column_step]
        counts = xp.bincount(codes.ravel().astype(np.int32), minlength=256)
        ends = xp.stack([scales.min(), scales.max()])
        if on_device:
            counts, ends = counts.get(), ends.get()
    return Codes(
        np.asarray(counts, np.int64), row_step, column_step, float(ends[0]), float(ends[1])
    )


def tensor_html(tensor: ScaledTensor) -> str:
    """The display of a tensor."""
    from cpgemm.machine import format_bytes

    codes = count_codes(tensor)
    shape = " x ".join(map(str, tensor.shape))
    block = " x ".join(map(str, tensor.granularity))
    scales = " x ".join(map(str, tensor.scales.shape))
    order = "K-major" if tensor.is_k_major else "not K-major"
    pairs: list[tuple[str, object]] = [
        ("granularity", block),
        ("scales", f"{scales}, {tensor.scale_format}"),
        ("memory", f"{format_bytes(tensor.nbytes)} ({tensor.nbytes:,} bytes)"),
        ("where", f"{tensor.device}, {tensor.framework}"),
        ("layout", order),
    ]
    if codes.scale_low is None:
        return card("ScaledTensor", shape, facts(pairs), note("No elements."))
    pairs += [
        ("scale range", f"{codes.scale_low:.4g} to {codes.scale_high:.4g}"),
        ("at ±448", f"{codes.saturated_share:.2%}"),
        ("zeros", f"{codes.zero_share:.2%}"),
    ]
    if codes.nan_share:
        pairs.append(("NaN", f"{codes.nan_share:.2%}"))
    return card("ScaledTensor", shape, facts(pairs), _histogram(codes), note(*_said(codes)))


def _said(codes: Codes) -> list[str]:
    said = [
        "Codes by exponent of two; orange: ±448, the largest code, "
        "which quantising gives to the largest value of each block. "
    ]
    if codes.row_step > 1 or codes.column_step > 1:
        steps = f"every {_nth(codes.row_step)} row"
        if codes.column_step > 1:
            steps += f" and every {_nth(codes.column_step)} column"
        said.append(f"Shares are those of a sample: {steps}, {codes.total:,} codes.")
    return said


def _nth(count: int) -> str:
    if count % 100 in (11, 12, 13):
        return f"{count}th"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"


_BAR, _GAP, _HIGH = 20, 5, 64


def _histogram(codes: Codes) -> Markup:
    shown = {name: count for name, count in codes.exponents.items() if name != "NaN" or count}
    most = max(shown.values())
    parts: list[Markup] = []
    for at, (name, count) in enumerate(shown.items()):
        left, middle = at * (_BAR + _GAP), at * (_BAR + _GAP) + _BAR / 2
        height = _HIGH * count / most
        orange = _HIGH * int(codes.magnitudes[_LARGEST]) / most if name == "8" else 0.0
        exponent = name.lstrip("-").isdigit()
        what = f"exponent {name}" if exponent else name
        parts.append(
            element(
                "g",
                element("title", f"{what}: {count:,} codes, {count / codes.total:.2%}"),
                # Of the whole height and invisible, so that a low bar can be pointed at.
                _bar(left, 0, _HIGH, "transparent"),
                _bar(left, _HIGH - height + orange, height - orange, BLUE),
                *([_bar(left, _HIGH - height, orange, ORANGE)] if orange else []),
            )
        )
        label = name.replace("-", "\u2212") if exponent else name[:4].replace("subn", "sub")
        parts.append(
            element("text", label, x=middle, y=_HIGH + 12, text_anchor="middle", font_size=9.5)
        )
    width = len(shown) * (_BAR + _GAP) - _GAP
    line = element(
        "line", x1=0, x2=width, y1=_HIGH, y2=_HIGH, stroke="currentColor", stroke_opacity=".4"
    )
    return svg(width, _HIGH + 18, "Codes by exponent", *parts, line)


def _bar(left: float, top: float, height: float, color: str) -> Markup:
    return element("rect", x=left, y=f"{top:.2f}", width=_BAR, height=f"{height:.2f}", fill=color)
