"""The kernels of the mixture-of-experts helpers: what is compiled in, launch grids, launches.

Arguments of the launching functions obey every rule already; CuPy's current device is theirs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cpgemm.compiler import load_kernel
from cpgemm.launch import launch
from cpgemm.quantize_kernels import INPUT_DTYPES, MAX_GRID_YZ
from cpgemm.render import KernelSource, render
from cpgemm.scaled import Array, ScaledTensor, pointer

__all__ = ["FLOAT_DTYPES", "MAX_GROUPS", "moe_sources"]

MAX_GROUPS = 4096  # bars of the histogram that moe_route keeps in shared memory
# What a grouped product writes, and hence what the helpers behind one read.
FLOAT_DTYPES = {name: INPUT_DTYPES[name] for name in ("bfloat16", "float32")}

OFFSETS_THREADS = 1024
ROUTE_THREADS = 512
ROUTE_LOADS = 4  # 16-byte loads that a thread has under way
TILE_THREADS = 256  # of the kernels that move rows by tiles of 64 chunks of 16 bytes
TILE_CHUNKS = 64
GATHER_ROWS = 32
QUANTIZE_ROWS = TILE_THREADS // TILE_CHUNKS * 4
COMBINE_THREADS = 128  # a kilobyte of a row, two of float32: divides the usual widths
COMBINE_LOADS = 4


@functools.cache
def _source(entry: str, dtype: str | None = None) -> KernelSource:
    """One kernel, rendered once in a process; ``dtype`` for those that come in several."""
    values: dict[str, dict[str, Any]] = {
        "moe_offsets": {"threads": OFFSETS_THREADS},
        "moe_route": {
            "threads": ROUTE_THREADS,
            "loads": ROUTE_LOADS,
            "max_groups": MAX_GROUPS,
        },
        "moe_gather": {"threads": TILE_THREADS},
        # Four loads under way in each of 1280 threads, and eight in each of 768: 80 and 96 KiB.
        "moe_gather_quantize": {"threads": TILE_THREADS, "blocks_per_sm": 5},
        "moe_swiglu": {"threads": TILE_THREADS, "blocks_per_sm": 3},
        "moe_combine": {"threads": COMBINE_THREADS, "loads": COMBINE_LOADS, "blocks_per_sm": 10},
    }
    chosen = dict(values[entry])
    name = entry
    if dtype is not None:
        chosen["dtype"] = dtype
        name = f"{entry}_{dtype}"
    return render(f"{entry}.cu.j2", name=name, entry=entry, values=chosen)


def moe_sources() -> list[KernelSource]:
    """Every kernel of the mixture-of-experts helpers: ten."""
    return [
        _source("moe_offsets"),
        _source("moe_route"),
        _source("moe_gather"),
        *(_source("moe_gather_quantize", name) for name in INPUT_DTYPES),
        *(_source("moe_swiglu", name) for name in FLOAT_DTYPES),
        *(_source("moe_combine", name) for name in FLOAT_DTYPES),
    ]


# ----------------------------------------------------------------------------------------- launches


def launch_offsets(counts: Array, offsets: Array, alignment: int) -> None:
    """``moe_offsets``: exclusive sums of rounded-up counts."""
    launch(
        load_kernel(_source("moe_offsets")),
        grid=1,
        block=OFFSETS_THREADS,
        args=[_address(counts), _address(offsets), np.int32(counts.size), np.int32(alignment)],
    )


def launch_route(
    ids: Array,
    offsets: Array,
    ends: Array,
    order: Array,
    position: Array,
    m_indices: Array | None,
    alignment: int,
) -> None:
    """``moe_route``: one block for each group and one for what is dropped."""
    groups = ends.size
    launch(
        load_kernel(_source("moe_route")),
        grid=groups + 1,
        block=ROUTE_THREADS,
        args=[
            _address(ids),
            _address(offsets),
            _address(ends),
            _address(order),
            _address(position),
            np.uint64(0) if m_indices is None else _address(m_indices),
            np.int32(ids.size),
            np.int32(groups),
            np.int32(alignment),
            np.int32(order.size),
        ],
    )


def launch_gather(x: ScaledTensor, order: Array, top_k: int, out: ScaledTensor) -> None:
    """``moe_gather``: codes and scales of rows."""
    rows, columns = out.shape
    launch(
        load_kernel(_source("moe_gather")),
        grid=_grid(rows, columns, GATHER_ROWS, 16),
        block=TILE_THREADS,
        args=[
            _address(x.data),
            _address(x.scales),
            _address(order),
            _address(out.data),
            _address(out.scales),
            np.int32(x.shape[0]),
            np.int32(top_k),
            np.int32(rows),
            np.int32(columns),
            np.int64(x.data.strides[0]),
            np.int64(x.scales.strides[1] // 4),
            np.int64(out.data.strides[0]),
            np.int64(out.scales.strides[1] // 4),
        ],
    )


def launch_gather_quantize(x: Array, order: Array, top_k: int, out: ScaledTensor) -> None:
    """``moe_gather_quantize``: rows of floats, quantised on the way."""
    rows, columns = out.shape
    launch(
        load_kernel(_source("moe_gather_quantize", _name(x))),
        grid=_grid(rows, columns, QUANTIZE_ROWS, 16 // x.itemsize),
        block=TILE_THREADS,
        args=[
            _address(x),
            _address(order),
            _address(out.data),
            _address(out.scales),
            np.int32(x.shape[0]),
            np.int32(top_k),
            np.int32(rows),
            np.int32(columns),
            np.int32(out.scale_format == "pow2"),
            np.int64(x.strides[0]),
            np.int64(out.data.strides[0]),
            np.int64(out.scales.strides[1] // 4),
        ],
    )


def launch_swiglu(h: Array, offsets: Array | None, out: ScaledTensor) -> None:
    """``moe_swiglu``: silu(gate) * up, quantised."""
    rows, columns = out.shape
    launch(
        load_kernel(_source("moe_swiglu", _name(h))),
        grid=_grid(rows, columns, QUANTIZE_ROWS, 16 // h.itemsize),
        block=TILE_THREADS,
        args=[
            _address(h),
            np.uint64(0) if offsets is None else _address(offsets),
            _address(out.data),
            _address(out.scales),
            np.int32(0 if offsets is None else offsets.size - 1),
            np.int32(rows),
            np.int32(columns),
            np.int32(out.scale_format == "pow2"),
            np.int64(h.strides[0]),
            np.int64(out.data.strides[0]),
            np.int64(out.scales.strides[1] // 4),
        ],
    )


def launch_combine(y: Array, position: Array, weights: Array, out: Array) -> None:
    """``moe_combine``: weighted sums of each token's rows."""
    tokens, top_k = position.shape
    columns = out.shape[1]
    launch(
        load_kernel(_source("moe_combine", _name(out))),
        grid=(-(-columns * out.itemsize // (16 * COMBINE_THREADS)), min(tokens, MAX_GRID_YZ)),
        block=COMBINE_THREADS,
        args=[
            _address(y),
            _address(position),
            _address(weights),
            _address(out),
            np.int32(y.shape[0]),
            np.int32(tokens),
            np.int32(top_k),
            np.int32(columns),
            np.int64(y.strides[0]),
            np.int64(out.strides[0]),
        ],
    )


def _grid(rows: int, columns: int, tile_rows: int, chunk: int) -> tuple[int, int]:
    """Tiles of one row are neighbours; rows beyond the limit go round again."""
    return (-(-columns // (TILE_CHUNKS * chunk)), min(-(-rows // tile_rows), MAX_GRID_YZ))


def _address(array: Array) -> np.uint64:
    return np.uint64(pointer(array))


def _name(array: Array) -> str:
    return next(name for name, dtype in INPUT_DTYPES.items() if array.dtype == dtype)
