"""The heat map of quantisation error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cpgemm.dlpack import as_native, framework_of
from cpgemm.errors import ArgumentTypeError, reject
from cpgemm.layout import is_cupy
from cpgemm.plot_style import Page, Theme, drawing, require_matplotlib, theme_named
from cpgemm.scaled import ScaledTensor, require_scaled
from cpgemm.streams import working_stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CELLS", "CORNER", "ELEMENTS", "Errors", "Per", "measured", "quantization_error"]

Per = Literal["block", "element"]

CELLS = 512
"""Blocks that are looked at along either axis, at most; of more, every n-th."""
ELEMENTS = 1 << 24
"""Elements that are looked at, at most."""
CORNER = (192, 384)
"""Rows and columns of the upper left corner whose elements are shown."""

_HALF_ULP = 100 * 2.0**-4  # per cent: e4m3 has 3 bits behind the point
_WIDTH, _HIGH = 9.5, 4.4  # inches of the page, of the axes


@dataclass(frozen=True)
class Errors:
    """Relative errors in per cent, float64, a cell each, and how cells lie in the tensor.

    ``cell``: rows and columns of a cell.  ``step``: of how many cells along either axis one is
    here.  ``whole``: relative 2-norm error of all that was looked at.
    """

    values: np.ndarray
    cell: tuple[int, int]
    step: tuple[int, int]
    whole: float


def quantization_error(
    x: Any,
    tensor: ScaledTensor,
    *,
    per: Per = "block",
    limit: float | None = None,
    theme: str = "light",
) -> Figure:
    """How far ``tensor`` is from ``x``, the (R, K) floats that it was quantised from.

    ``per`` "block": the 2-norm of the error over that of ``x`` for each block that shares a scale
    (large tensors: evenly spaced blocks, ``CELLS`` along an axis and ``ELEMENTS`` elements at
    most).  "element": \\|error\\| over \\|x\\| in the upper left corner of 192 x 384.  ``limit``:
    per cent at the top of the colour scale, by default the largest for blocks, and for elements
    6.25, what rounding to e4m3's normal numbers can do at most.  ``theme``: "light" or "dark".

    Arrays may be of any library; what is drawn is copied to the host.  Raises ``ArgumentError`` or
    ``ArgumentTypeError`` for operands that do not belong together.
    """
    require_matplotlib()
    colors = theme_named(theme)
    if limit is not None and not limit > 0:
        reject("limit", "must be a number of per cent above 0", limit, "Leave it out.")
    errors = measured(x, tensor, per)
    with drawing(colors):
        figure = _draw(errors, tensor, per, limit, colors)
        figure.draw_without_rendering()
    return figure


def measured(x: Any, tensor: ScaledTensor, per: Per = "block") -> Errors:
    """The errors that ``quantization_error`` draws."""
    require_scaled("tensor", tensor, "Quantise x with cpgemm.quantize.")
    framework = framework_of(x)
    x = as_native("x", x)
    if per not in ("block", "element"):
        reject("per", "must be 'block' or 'element'", repr(per), "Leave it out for blocks.")
    if tensor.ndim != 2 or 0 in tensor.shape:
        mend = "Take a group: ScaledTensor(t.data[g], t.scales[g], t.granularity)."
        reject("tensor", "must have 2 axes and elements", f"shape {tensor.shape}", mend)
    if tuple(x.shape) != tensor.shape:
        reject("x", f"must have the tensor's shape {tensor.shape}", tuple(x.shape), "Give both.")
    if x.dtype.kind not in "f" and x.dtype.name != "bfloat16":
        reject("x", "must hold floats", x.dtype, "Convert it.", kind=ArgumentTypeError)
    rows, columns, step = _chosen(tensor, per)
    exact = _host(x, rows, columns, framework).astype(np.float64)
    rounded = _rounded(tensor, rows, columns)
    error = rounded - exact
    whole = _relative(np.sum(error**2), np.sum(exact**2))
    if per == "element":
        values = _relative(error**2, exact**2)
        return Errors(values, (1, 1), (1, 1), float(whole))
    cell = tensor.granularity
    return Errors(_relative(_sums(error**2, cell), _sums(exact**2, cell)), cell, step, float(whole))


def _chosen(tensor: ScaledTensor, per: Per) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Indices of the rows and of the columns that are looked at, and the steps between cells."""
    shape = tensor.shape
    if per == "element":
        rows, columns = (np.arange(min(a, b)) for a, b in zip(shape, CORNER, strict=True))
        return rows, columns, (1, 1)
    steps = []
    left = ELEMENTS
    for axis in (1, 0):
        size, cell = shape[axis], tensor.granularity[axis]
        cells = -(-size // cell)
        most = max(min(CELLS, left // cell), 1)
        steps.append(-(-cells // most))
        left //= -(-cells // steps[-1]) * cell
    step = (steps[1], steps[0])
    rows, columns = (
        np.flatnonzero(np.arange(size) // cell % every == 0)
        for size, cell, every in zip(shape, tensor.granularity, step, strict=True)
    )
    return rows, columns, step


def _host(x: Any, rows: np.ndarray, columns: np.ndarray, framework: Any) -> np.ndarray:
    """Those rows and columns on the host; copied as bits, for which CuPy has kernels."""
    bits = np.dtype(f"u{x.dtype.itemsize}")
    if not is_cupy(x):
        return np.asarray(x)[np.ix_(rows, columns)]
    import cupy

    with working_stream(framework, x.data.device_id):
        taken = x.view(bits)[cupy.asarray(rows)][:, cupy.asarray(columns)]
        return np.asarray(taken.get()).view(x.dtype)


def _rounded(tensor: ScaledTensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The values that the tensor stands for, float64."""
    height, width = tensor.granularity
    codes = _host(tensor.data, rows, columns, tensor.framework).astype(np.float64)
    scales = _host(tensor.scales, rows // height, columns // width, tensor.framework)
    return codes * scales.astype(np.float64)


def _sums(squares: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Sums over cells; the last ones may be short."""
    for axis in (0, 1):
        starts = np.arange(0, squares.shape[axis], cell[axis])
        squares = np.add.reduceat(squares, starts, axis=axis)
    return squares


def _relative(error: Any, exact: Any) -> Any:
    """Per cent; 0 where nothing is lost of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.sqrt(np.where(error == 0, 0.0, error / exact))


# ------------------------------------------------------------------------------------ the picture


def _draw(
    errors: Errors, tensor: ScaledTensor, per: Per, limit: float | None, theme: Theme
) -> Figure:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    values = errors.values
    finite = values[np.isfinite(values)]
    most = float(finite.max()) if finite.size else 0.0
    top = limit or (_HALF_ULP if per == "element" else most) or 1.0
    granularity = " x ".join(map(str, tensor.granularity))
    shape = " x ".join(map(str, tensor.shape))
    what = "block that shares a scale" if per == "block" else "element"
    captions = [
        f"{shape}, a scale for each {granularity}, {tensor.scale_format}. Relative error of all "
        f"that is shown: {errors.whole:.2f} %; largest of one {per}: {most:.2f} %."
    ]
    captions += _sampled(errors, tensor, per)
    title = f"Quantisation error of each {what}"
    page = Page(theme, title, captions, (), width=_WIDTH, content=_HIGH + 0.55)
    wide = page.room - 0.75 - 1.2
    axes = page.axes(0.75, 0.1, wide, _HIGH)
    rows, columns = values.shape
    high, broad = errors.cell[0] * errors.step[0], errors.cell[1] * errors.step[1]
    # The last cells may be short; those that are left out lie between.
    extent = (0, min(columns * broad, tensor.shape[1]), min(rows * high, tensor.shape[0]), 0)
    cmap = colormaps["magma"].with_extremes(bad=theme.grid)
    image = axes.imshow(
        np.where(np.isfinite(values), values, np.nan), extent=extent, aspect="auto",
        interpolation="nearest" if values.size < 10_000 else "antialiased", cmap=cmap,
        vmin=0.0, vmax=top,
    )  # fmt: skip
    axes.grid(False)
    axes.set_xlabel("column (K)")
    axes.set_ylabel("row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    side = page.axes(0.75 + wide + 0.25, 0.1, 0.2, _HIGH)
    bar = page.figure.colorbar(image, cax=side, extend="max" if most > top else "neither")
    bar.outline.set_visible(False)  # type: ignore[operator, unused-ignore]
    side.set_ylabel("relative error (%)")
    return page.figure


def _sampled(errors: Errors, tensor: ScaledTensor, per: Per) -> list[str]:
    if per == "element":
        rows, columns = errors.values.shape
        return (
            [f"The upper left corner, {rows} x {columns}."]
            if errors.values.size < tensor.data.size
            else []
        )
    if errors.step == (1, 1):
        return []
    down, across = errors.step
    return [f"A sample: one of {down} rows and one of {across} columns of blocks."]
