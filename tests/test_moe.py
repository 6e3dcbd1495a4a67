"""Mixture-of-experts helpers: NumPy semantics, rules, kernels without and with a GPU."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import assert_guards_intact, guarded, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from cpgemm import env, moe, moe_kernels
from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.moe import Routing, route, routed_rows
from cpgemm.quantize import quantize
from cpgemm.scaled import ScaledTensor, empty_codes, empty_scales

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
FORMATS = ["float32", "pow2"]


def codes_of(tensor: ScaledTensor) -> np.ndarray:
    return np.asarray(to_numpy(tensor.data)).view(np.uint8)


def scales_of(tensor: ScaledTensor) -> np.ndarray:
    return np.asarray(to_numpy(tensor.scales))


def same_tensor(got: ScaledTensor, wanted: ScaledTensor) -> None:
    assert (got.shape, got.granularity, got.scale_format) == (
        wanted.shape,
        wanted.granularity,
        wanted.scale_format,
    )
    np.testing.assert_array_equal(codes_of(got), codes_of(wanted))
    np.testing.assert_array_equal(scales_of(got).view(np.uint32), scales_of(wanted).view(np.uint32))


def random_ids(
    rng: np.random.Generator, tokens: int, top_k: int, groups: int, kind: str = "mixed"
) -> np.ndarray:
    """Expert ids of several kinds; "mixed" drops some and leaves many experts without rows."""
    shape = (tokens, top_k)
    if kind == "one":
        return np.full(shape, groups - 1, np.int32)
    if kind == "dropped":
        return np.full(shape, -1, np.int32)
    if kind == "all":
        return rng.integers(0, groups, shape, dtype=np.int32)
    ids = rng.integers(-1, groups, shape, dtype=np.int32)
    ids[rng.random(shape) < 0.3] = groups // 2
    return ids


def plain_route(ids: np.ndarray, groups: int, alignment: int) -> dict[str, np.ndarray]:
    """The definition, one row after the other."""
    rows = routed_rows(*ids.shape, groups, alignment=alignment)
    order = np.full(rows, -1, np.int32)
    m_indices = np.full(rows, -1, np.int32)
    position = np.full(ids.shape, -1, np.int32)
    offsets, ends, row = [], [], 0
    for expert in range(groups):
        offsets.append(row)
        for flat, found in enumerate(ids.reshape(-1)):
            if found == expert:
                order[row], m_indices[row] = flat, expert
                position.reshape(-1)[flat] = row
                row += 1
        ends.append(row)
        row = -(-row // alignment) * alignment
    return {
        "offsets": np.array([*offsets, row], np.int32),
        "ends": np.array(ends, np.int32),
        "order": order,
        "position": position,
        "m_indices": m_indices,
    }


def same_routing(got: Routing, wanted: Routing | dict[str, np.ndarray]) -> None:
    for name in ("offsets", "ends", "order", "position", "m_indices"):
        array = getattr(got, name)
        if array is None:
            continue
        expected = wanted[name] if isinstance(wanted, dict) else getattr(wanted, name)
        assert array.dtype == np.int32
        np.testing.assert_array_equal(to_numpy(array), expected, err_msg=name)


IDS = st.tuples(st.integers(0, 30), st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda sizes: st.tuples(
        st.lists(
            st.lists(st.integers(-1, sizes[2] - 1), min_size=sizes[1], max_size=sizes[1]),
            min_size=sizes[0],
            max_size=sizes[0],
        ).map(lambda rows: np.array(rows, np.int32).reshape(sizes[0], sizes[1])),
        st.just(sizes[2]),
    )
)

# ------------------------------------------------------------------------------------ NumPy: routes


@settings(deadline=None)
@given(case=IDS, alignment=st.sampled_from([1, 3, 128, 256]))
def test_route_is_its_definition(case: tuple[np.ndarray, int], alignment: int) -> None:
    ids, groups = case
    routing = route(ids, groups, alignment=alignment, m_indices=alignment % 128 == 0)
    same_routing(routing, plain_route(ids, groups, alignment))


@settings(deadline=None)
@given(case=IDS, alignment=st.sampled_from([1, 128]))
def test_route_sorts_stably_and_loses_nothing(case: tuple[np.ndarray, int], alignment: int) -> None:
    ids, groups = case
    routing = route(ids, groups, alignment=alignment)
    flat = ids.reshape(-1)
    taken = routing.order[routing.order >= 0]
    assert sorted(taken) == list(np.flatnonzero(flat >= 0))
    keys = list(zip(flat[taken], taken, strict=True))
    assert keys == sorted(keys)  # by expert, then by index: sorted and stable
    kept = flat >= 0
    positions = routing.position.reshape(-1)
    np.testing.assert_array_equal(routing.order[positions[kept]], np.flatnonzero(kept))
    assert (positions[~kept] == -1).all()
    assert (routing.offsets % alignment == 0).all() and routing.offsets[-1] <= routing.rows
    counts = np.bincount(flat[kept], minlength=groups)
    np.testing.assert_array_equal(routing.ends - routing.offsets[:-1], counts)
    np.testing.assert_array_equal(
        moe.offsets_from_counts(counts.astype(np.int32), alignment=alignment), routing.offsets
    )


@settings(deadline=None)
@given(case=IDS)
def test_gather_then_combine_restores_rows(case: tuple[np.ndarray, int]) -> None:
    ids, groups = case
    ids = ids[:, :1].copy()
    x = np.arange(len(ids) * 16, dtype=np.float32).reshape(-1, 16) % 113 - 56
    routing = route(ids, groups, alignment=128)
    rows = moe.gather(quantize(x, scale_format="pow2"), routing).dequantize()
    assert (rows[routing.order < 0] == 0).all()
    back = moe.scatter_combine(rows, routing, np.ones(ids.shape, np.float32))
    kept = ids[:, 0] >= 0
    np.testing.assert_array_equal(back[kept], quantize(x, scale_format="pow2").dequantize()[kept])
    assert (back[~kept] == 0).all()


def test_rows_hold_the_worst_case() -> None:
    """One row for each group wastes most; more rows than groups, and fewer."""
    for tokens, groups in ((5, 9), (9, 5), (129 * 3, 3)):
        ids = np.minimum(np.arange(tokens), groups - 1).astype(np.int32)[:, None]
        if tokens == 129 * 3:
            ids = (np.arange(tokens) % groups).astype(np.int32)[:, None]
        routing = route(ids, groups, alignment=128, m_indices=True)
        assert routing.offsets[-1] <= routing.rows and routing.rows % 128 == 0
    assert routed_rows(8, 8, 256, alignment=128) == 64 * 128
    assert routed_rows(8, 8, 256) == 64
    assert routed_rows(0, 8, 256, alignment=128) == 0


def test_out_is_filled_and_returned(rng: np.random.Generator) -> None:
    out = Routing.empty(17, 2, 5, alignment=128, m_indices=True)
    for _ in range(2):
        ids = random_ids(rng, 17, 2, 5)
        assert route(ids, 5, alignment=128, m_indices=True, out=out) is out
        same_routing(out, plain_route(ids, 5, 128))
    counts = np.array([3, 0, 129], np.int32)
    sums = np.empty(4, np.int32)
    assert moe.offsets_from_counts(counts, alignment=128, out=sums) is sums
    assert sums.tolist() == [0, 128, 128, 384]
    assert moe.offsets_from_counts(np.zeros(0, np.int32)).tolist() == [0]


# ------------------------------------------------------------------------ NumPy: gather and combine


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", [F32, np.dtype(np.float16), BF16], ids=str)
def test_gathers_agree(rng: np.random.Generator, dtype: np.dtype, scale_format: Any) -> None:
    x = rng.standard_normal((13, 144)).astype(dtype)
    routing = route(random_ids(rng, 13, 3, 6), 6)
    got = moe.gather_quantized(x, routing, scale_format=scale_format)
    same_tensor(got, moe.gather(quantize(x, scale_format=scale_format), routing))
    for row, flat in enumerate(routing.order):
        if flat < 0:
            assert (codes_of(got)[row] == 0).all() and (got.scales[row] == 1).all()
        else:
            token = quantize(x[flat // 3][None], scale_format=scale_format)
            np.testing.assert_array_equal(codes_of(got)[row], codes_of(token)[0])
            np.testing.assert_array_equal(got.scales[row], token.scales[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_combine_is_its_definition(rng: np.random.Generator, dtype: np.dtype) -> None:
    routing = route(random_ids(rng, 11, 4, 5), 5, alignment=128)
    y = rng.standard_normal((routing.rows, 24)).astype(dtype)
    y[routing.order < 0] = np.nan  # what is not read cannot leak
    weights = rng.random((11, 4)).astype(np.float32)
    got = moe.scatter_combine(y, routing, weights)
    wanted = np.zeros((11, 24), np.float32)
    for t in range(11):
        for j in range(4):
            if routing.position[t, j] >= 0:
                wanted[t] += weights[t, j] * y[routing.position[t, j]].astype(np.float32)
    np.testing.assert_array_equal(got, wanted.astype(dtype))
    out = np.empty_like(got)
    assert moe.scatter_combine(y, routing, weights, out=out) is out
    np.testing.assert_array_equal(out, got)


# ------------------------------------------------------------------------------------ NumPy: SwiGLU


def test_silu_is_accurate() -> None:
    """Bound: |t| * ln 2 * 1.25 * 2^-24 for the rounding of t = -x / ln 2 and of its factor (both
    half a unit of at most 128), 2^-22 for the polynomial, a few 2^-24 for what follows."""
    x = np.concatenate(
        [np.linspace(-87.9, 120, 200001), np.logspace(-30, 2, 1000), -np.logspace(-30, 1.9, 1000)]
    ).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = wide / (1 + np.exp(-wide))
    error = np.abs(moe._silu(x) - wanted) / np.abs(wanted)
    bound = np.abs(wide) / np.log(2) * np.log(2) * 1.25 * 2.0**-24 + 2.0**-22 + 2.0**-22
    normal = np.abs(wanted) >= 2.0**-126  # below, the absolute rounding of denormals rules
    assert (error <= bound)[normal].all()
    assert error[normal].max() < 2.0**-17


def test_silu_at_the_ends() -> None:
    x = np.array([0.0, -0.0, -89, -1e30, 89, 3e38, np.inf, -np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        got = moe._silu(x)
    np.testing.assert_array_equal(
        got, np.array([0, 0, 0, 0, 89, 3e38, np.inf, np.nan, np.nan], np.float32)
    )


def test_silu_has_the_constants_of_the_header() -> None:
    text = (env.header_dir() / "moe.cuh").read_text(encoding="utf-8")
    body = text[text.index("constexpr float kMinusLog2E") :]
    found = [float.fromhex(digits) for digits in re.findall(r"-?0x1[.\w]*p[+-]\d+(?=f)", body)]
    wanted = [moe._MINUS_LOG2E, moe._ROUNDER, *moe._POWER[:-1]]
    assert found == [float(value) for value in wanted]


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_swiglu_quantizes_products(
    rng: np.random.Generator, dtype: np.dtype, scale_format: Any
) -> None:
    h = (3 * rng.standard_normal((9, 2 * 144))).astype(dtype)
    got = moe.swiglu_quantize(h, scale_format=scale_format)
    wide = h.astype(np.float32)
    product = moe._silu(wide[:, :144]) * wide[:, 144:]
    same_tensor(got, quantize(product, scale_format=scale_format))
    gate, up = h[:, :144].astype(np.float64), h[:, 144:].astype(np.float64)
    exact = gate / (1 + np.exp(-gate)) * up
    error = np.linalg.norm(got.dequantize() - exact) / np.linalg.norm(exact)
    assert error < 0.04  # a 4-bit significand: 2^-4 / sqrt(3) * 0.72 = 0.026, smallest codes more


def test_swiglu_leaves_rows_of_no_group(rng: np.random.Generator) -> None:
    h = rng.standard_normal((10, 64)).astype(np.float32)
    whole = moe.swiglu_quantize(h)
    h[:3] = h[8:] = np.nan
    out = quantize(np.full((10, 32), 7, np.float32))
    offsets = np.array([3, 3, 8], np.int32)
    assert moe.swiglu_quantize(h, offsets=offsets, out=out) is out
    np.testing.assert_array_equal(codes_of(out)[3:8], codes_of(whole)[3:8])
    np.testing.assert_array_equal(out.scales[3:8], whole.scales[3:8])
    for rows in (slice(3), slice(8, None)):
        assert (codes_of(out)[rows] == 0x7E).all() and (out.scales[rows] == 7 / 448).all()


def test_swiglu_of_what_is_not_finite() -> None:
    h = np.ones((1, 32), np.float32)
    h[0, :3] = [np.nan, np.inf, -np.inf]
    h[0, 19:21] = [np.nan, np.inf]
    got = codes_of(moe.swiglu_quantize(h))[0]
    assert (got[:5] == 0x7F).all() and (got[5:] == 0x7E).all()


@pytest.mark.parametrize("tokens", [0, 3])
def test_empty_arrays(tokens: int) -> None:
    ids = np.full((tokens, 2), -1, np.int32)
    routing = route(ids, 4)
    assert routing.offsets.tolist() == [0] * 5 and routing.rows == 2 * tokens
    a = moe.gather_quantized(np.ones((tokens, 32), np.float32), routing)
    assert a.shape == (2 * tokens, 32) and (codes_of(a) == 0).all()
    same_tensor(moe.gather(quantize(np.ones((tokens, 32), np.float32)), routing), a)
    h = np.ones((2 * tokens, 64), BF16)
    assert moe.swiglu_quantize(h, offsets=routing.offsets).shape == (2 * tokens, 32)
    y = moe.scatter_combine(h, routing, np.ones((tokens, 2), np.float32))
    assert y.shape == (tokens, 64) and (y == 0).all()


# ------------------------------------------------------------------------------- rules, one by one

EXPERTS = np.array([[0, 1], [1, -1], [2, 0]], np.int32)
ROUTING = route(EXPERTS, 3)
X = np.ones((3, 32), np.float32)
Y = np.ones((6, 32), np.float32)
WEIGHTS = np.ones((3, 2), np.float32)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


RULES: list[tuple[str, Any, type[Exception], str]] = [
    ("ids kind", lambda: route([[0]], 3), ArgumentTypeError, "expert_ids: must be a NumPy or"),
    ("ids dtype", lambda: route(EXPERTS.astype(np.int64), 3), ArgumentTypeError,
     "expert_ids: must have dtype int32; got int64. Convert"),
    ("ids axes", lambda: route(EXPERTS[0], 3), ArgumentError, "expert_ids: must have 2 axes"),
    ("ids strides", lambda: route(EXPERTS.T, 3), ArgumentError, "expert_ids: must be contiguous"),
    ("top_k", lambda: route(np.zeros((4, 0), np.int32), 3), ArgumentError,
     "expert_ids: must have at least one"),
    ("groups", lambda: route(EXPERTS, 0), ArgumentError, "groups: must be between 1 and 4096"),
    ("groups type", lambda: route(EXPERTS, 3.0), ArgumentTypeError, "groups: must be an integer"),
    ("ids range", lambda: route(EXPERTS, 2), ArgumentError,
     r"expert_ids: must be an expert, 0 to 1, .* expert_ids\[2, 0\] = 2"),
    ("alignment", lambda: route(EXPERTS, 3, alignment=0), ArgumentError, "alignment: must be betw"),
    ("m_indices", lambda: route(EXPERTS, 3, alignment=64, m_indices=True), ArgumentError,
     "m_indices: needs an alignment that is a multiple of 128"),
    ("route out type", lambda: route(EXPERTS, 3, out=EXPERTS), ArgumentTypeError,
     "out: must be a Routing"),
    ("route out", lambda: route(EXPERTS, 3, out=Routing.empty(3, 2, 4)), ArgumentError,
     r"out: must have positions of shape \(3, 2\), 3 groups"),
    ("route out overlap", lambda: route(ROUTING.position, 3, out=ROUTING), ArgumentError,
     "out: must not overlap expert_ids"),
    ("counts", lambda: moe.offsets_from_counts(np.array([1, -2], np.int32)), ArgumentError,
     r"counts: must not be negative; got counts\[1\] = -2"),
    ("counts sum", lambda: moe.offsets_from_counts(np.full(2, 2**30, np.int32)), ArgumentError,
     "counts: must sum up to at most"),
    ("counts out", lambda: moe.offsets_from_counts(np.ones(3, np.int32), out=np.ones(3, np.int32)),
     ArgumentError, r"out: must have shape \(4,\)"),
    ("counts out read-only",
     lambda: moe.offsets_from_counts(np.ones(3, np.int32), out=read_only(np.ones(4, np.int32))),
     ArgumentError, "out: must be writable"),
    ("routing order", lambda: Routing(ROUTING.offsets, ROUTING.ends, ROUTING.order[:5].copy(),
                                      ROUTING.position), ArgumentError,
     r"order: must have shape \(6,\)"),
    ("gather x", lambda: moe.gather(X, ROUTING), ArgumentTypeError, "x: must be a ScaledTensor"),
    ("gather granularity", lambda: moe.gather(quantize(X, (128, 128)), ROUTING), ArgumentError,
     r"x: must have granularity \(1, 128\)"),
    ("gather tokens", lambda: moe.gather(quantize(X[:2]), ROUTING), ArgumentError,
     "x: must have a row for each token of the routing, 3"),
    ("routing type", lambda: moe.gather(quantize(X), EXPERTS), ArgumentTypeError,
     "routing: must be a Routing"),
    ("gather out", lambda: moe.gather(quantize(X), ROUTING, out=quantize(X)), ArgumentError,
     r"out: must have the shape \(6, 32\)"),
    ("gather out format",
     lambda: moe.gather_quantized(X, ROUTING, out=quantize(Y, scale_format="pow2")), ArgumentError,
     "out: must have the shape .* format 'float32'"),
    ("x dtype", lambda: moe.gather_quantized(X.astype(np.float64), ROUTING), ArgumentTypeError,
     "x: must have dtype float32 or float16 or bfloat16"),
    ("x width", lambda: moe.gather_quantized(np.ones((3, 24), np.float32), ROUTING), ArgumentError,
     "x: must have a multiple of 16 columns; got 24"),
    ("x strides", lambda: moe.gather_quantized(np.ones((32, 3), np.float32).T, ROUTING),
     ArgumentError, "x: must have contiguous rows"),
    ("scale_format", lambda: moe.gather_quantized(X, ROUTING, scale_format="e8m0"), ArgumentError,
     "scale_format: must be"),
    ("h dtype", lambda: moe.swiglu_quantize(Y.astype(np.float16)), ArgumentTypeError,
     "h: must have dtype bfloat16 or float32"),
    ("h width", lambda: moe.swiglu_quantize(np.ones((3, 48), np.float32)), ArgumentError,
     "h: must have a multiple of 32 columns"),
    ("h axes", lambda: moe.swiglu_quantize(Y[0]), ArgumentError, "h: must have 2 axes"),
    ("offsets", lambda: moe.swiglu_quantize(Y, offsets=np.array([0, 7], np.int32)), ArgumentError,
     "offsets: must begin and end within the rows of h, 6; got 0 to 7"),
    ("offsets length", lambda: moe.swiglu_quantize(Y, offsets=np.array([0], np.int32)),
     ArgumentError, "offsets: must have groups . 1 elements"),
    ("swiglu out", lambda: moe.swiglu_quantize(Y, out=Y), ArgumentTypeError,
     "out: must be a ScaledTensor"),
    ("y rows", lambda: moe.scatter_combine(X, ROUTING, WEIGHTS), ArgumentError,
     "y: must have a row for each sorted row of the routing, 6"),
    ("y width", lambda: moe.scatter_combine(np.ones((6, 4), np.float32), ROUTING, WEIGHTS),
     ArgumentError, "y: must have a multiple of 8 columns"),
    ("weights dtype", lambda: moe.scatter_combine(Y, ROUTING, WEIGHTS.astype(BF16)),
     ArgumentTypeError, "weights: must have dtype float32"),
    ("weights shape", lambda: moe.scatter_combine(Y, ROUTING, WEIGHTS[:2]), ArgumentError,
     r"weights: must have shape \(3, 2\)"),
    ("combine out dtype",
     lambda: moe.scatter_combine(Y, ROUTING, WEIGHTS, out=np.ones((3, 32), BF16)), ArgumentError,
     "out: must have the dtype of y, float32, and shape"),
    ("combine out shape", lambda: moe.scatter_combine(Y, ROUTING, WEIGHTS, out=Y), ArgumentError,
     r"out: must have .* shape \(3, 32\); got float32, shape \(6, 32\)"),
    ("combine out overlap", lambda: moe.scatter_combine(Y, ROUTING, WEIGHTS, out=Y[:3]),
     ArgumentError, "out: must not overlap y"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "match"), [r[1:] for r in RULES], ids=[r[0] for r in RULES]
)
def test_rule(call: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        call()


# ------------------------------------------------------------------------------ kernels without GPU


def test_the_set_of_kernels() -> None:
    sources = moe.moe_sources()
    assert len(sources) == len({s.digest for s in sources}) == len({s.name for s in sources}) == 10
    assert {s.name for s in sources} >= {"moe_route", "moe_swiglu_bfloat16", "moe_offsets"}


@pytest.mark.parametrize("source", moe.moe_sources(), ids=lambda source: source.name)
def test_kernel_compiles_without_spills(
    source: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpgemm.compiler import compile_kernel

    monkeypatch.setenv("CPGEMM_CACHE_DIR", str(tmp_path))
    report = compile_kernel(source).report
    assert report.stack_bytes == report.spill_store_bytes == report.spill_load_bytes == 0
    assert report.static_shared_bytes <= 20 * 1024


def emulate_route(ids: np.ndarray, groups: int, alignment: int) -> dict[str, np.ndarray]:
    """moe_route, block by block and warp by warp, lanes as vectors; every store is counted."""
    flat = ids.reshape(-1)
    count, capacity = flat.size, routed_rows(*ids.shape, groups, alignment=alignment)
    warps, loads = moe_kernels.ROUTE_THREADS // 32, moe_kernels.ROUTE_LOADS
    step = loads * 128
    piece = -(-count // (warps * step)) * step
    lane = np.arange(32)
    names = {"offsets": groups + 1, "ends": groups, "order": capacity, "position": count}
    out = {name: np.full(size, -7, np.int32) for name, size in names.items()}
    stores = {name: np.zeros(size, np.int32) for name, size in names.items()}

    def store(name: str, index: Any, value: Any) -> None:
        out[name][index] = value
        np.add.at(stores[name], index, 1)

    def load(index: np.ndarray) -> np.ndarray:
        """(32, 4) buckets of four ids for each lane, and -1 behind the end."""
        at = index[:, None] + np.arange(4)
        found = np.where(at < count, flat[np.minimum(at, count - 1)], -1)
        return np.minimum(found.astype(np.uint32), np.uint32(groups)).astype(np.int64)

    for bucket in range(groups + 1):
        equal, less = np.zeros(warps, int), np.zeros(warps, int)
        histogram = np.zeros(bucket + 1, int)
        begin = np.arange(warps) * piece
        end = np.minimum(begin + piece, count)
        for warp in range(warps):
            for base in range(begin[warp], max(end[warp], begin[warp]), step):
                for i in range(loads):
                    # A lane whose first load is behind the end does nothing.
                    active = base + lane * 4 < end[warp]
                    found = load(base + lane * 4 + i * 128)[active]
                    equal[warp] += (found == bucket).sum()
                    less[warp] += (found < bucket).sum()
                    histogram += np.bincount(found[found < bucket], minlength=bucket + 1)
        padded = -(-histogram // alignment) * alignment
        start = int(padded.sum() if alignment > 1 else less.sum())
        nobody, members = bucket == groups, 0
        for warp in range(warps):
            following = start + equal[:warp].sum()
            # What nobody takes is counted with what lies behind the end; only zero or not matters.
            for base in range(begin[warp], end[warp] if equal[warp] else begin[warp], step):
                for i in range(loads):
                    index = base + i * 128 + lane * 4
                    member = (load(index) == bucket) & (index[:, None] + np.arange(4) < count)
                    before = np.cumsum(member.sum(axis=1)) - member.sum(axis=1)
                    row = following + before
                    for j in range(4):
                        for who in np.flatnonzero(member[:, j]):
                            taken = -1 if nobody else row[who]
                            store("position", index[who] + j, taken)
                            if not nobody:
                                store("order", taken, index[who] + j)
                        row = row + member[:, j]
                    following += member.sum()
        members = equal.sum()
        store("offsets", bucket, start)
        if not nobody:
            store("ends", bucket, start + members)
        first = start if nobody else start + members
        last = capacity if nobody else start + -(-members // alignment) * alignment
        for row in range(first, min(last, capacity)):
            store("order", row, -1)
    for name, written in stores.items():
        assert (written == 1).all(), f"{name}: something is not written exactly once"
    return out


@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("kind", ["mixed", "all", "one", "dropped"])
@pytest.mark.parametrize(("tokens", "top_k", "groups"), [(0, 2, 3), (7, 1, 5), (1301, 8, 9)])
def test_kernel_route_step_by_step(
    rng: np.random.Generator, tokens: int, top_k: int, groups: int, kind: str, alignment: int
) -> None:
    ids = random_ids(rng, tokens, top_k, groups, kind)
    got = emulate_route(ids, groups, alignment)
    wanted = route(ids, groups, alignment=alignment)
    for name, values in got.items():
        np.testing.assert_array_equal(values, getattr(wanted, name).reshape(-1), err_msg=name)


def test_kernel_ranks_by_ballots() -> None:
    """Rank of a lane's first member: bits of lower lanes in the four ballots; then its own."""
    rng = np.random.default_rng(3)
    for density in (0.02, 0.5, 1.0):
        member = rng.random((32, 4)) < density
        masks = [sum(1 << int(lane) for lane in np.flatnonzero(member[:, j])) for j in range(4)]
        ranks = []
        for lane in range(32):
            row = sum((mask & ((1 << lane) - 1)).bit_count() for mask in masks)
            for j in range(4):
                if member[lane, j]:
                    ranks.append(row)
                    row += 1
        assert ranks == list(range(int(member.sum())))


@pytest.mark.parametrize("name", ["gather", "quantize_bf16", "quantize_f32"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (35, 272), (130, 4112)])
def test_kernel_indices_cover_each_element_once(name: str, rows: int, columns: int) -> None:
    """Tiles, chunks and scales of the kernels that move rows, thread by thread."""
    threads, chunks = moe_kernels.TILE_THREADS, moe_kernels.TILE_CHUNKS
    elements = {"gather": 16, "quantize_bf16": 8, "quantize_f32": 4}[name]
    tile_rows = moe_kernels.GATHER_ROWS if name == "gather" else moe_kernels.QUANTIZE_ROWS
    tiles_x, tiles_y = moe_kernels._grid(rows, columns, tile_rows, elements)
    codes = np.zeros((rows, columns), np.int32)
    scales = np.zeros((rows, -(-columns // 128)), np.int32)
    thread = np.arange(threads)
    lane = thread % 32
    for x in range(tiles_x):
        column = x * chunks * elements + thread % chunks * elements
        for y in range(tiles_y):
            if name == "gather":
                step = threads // chunks
                slots = [thread // chunks + i * step for i in range(tile_rows // step)]
                scale_row, kblock = (
                    y * tile_rows + lane,
                    x * chunks * elements // 128 + thread // 32,
                )
                writes = kblock * 128 < columns
            else:
                slots = [thread // chunks * 4 + i for i in range(4)]
                scale_row = y * tile_rows + thread // chunks * 4 + lane % 4
                kblock = column // 128
                writes = (lane % (128 // elements) < 4) & (kblock * 128 < columns)
            for slot in slots:
                for r, c in zip(y * tile_rows + slot, column, strict=True):
                    if r < rows and c < columns:
                        codes[r, c : c + elements] += 1
            for r, kb in zip(scale_row[writes], kblock[writes], strict=True):
                if r < rows:
                    scales[r, kb] += 1
    assert (codes == 1).all() and (scales == 1).all()


# -------------------------------------------------------------------------------- kernels on a GPU


def on_device(x: np.ndarray) -> Any:
    """A CuPy array with the bits of ``x``."""
    import cupy

    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    return cupy.asarray(np.ascontiguousarray(x).view(unsigned)).view(x.dtype)


def routing_on_device(routing: Routing) -> Routing:
    """The arrays of a routing, uploaded."""
    return Routing(
        on_device(routing.offsets),
        on_device(routing.ends),
        on_device(routing.order),
        on_device(routing.position),
        None if routing.m_indices is None else on_device(routing.m_indices),
        routing.alignment,
    )


def scaled_on_device(tensor: ScaledTensor) -> ScaledTensor:
    """Codes and scales, uploaded; the scales come into their layout again."""
    return ScaledTensor.from_arrays(
        on_device(codes_of(tensor)),
        on_device(scales_of(tensor)),
        (1, 128),
        scale_format=tensor.scale_format,
    )


def hard_values(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Normal, with zero blocks, tiny and huge ones, NaN and infinities here and there."""
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 14, (shape[0], 1))).astype(np.float32)
    spots = rng.random(shape)
    x[spots < 1e-3] = np.inf
    x[(spots >= 1e-3) & (spots < 2e-3)] = -np.inf
    x[(spots >= 2e-3) & (spots < 3e-3)] = np.nan
    x[rng.random(shape[0]) < 0.1] = 0.0
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "all", "one", "dropped"])
@pytest.mark.parametrize("groups", [1, 8, 256, 512])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("tokens", [0, 1, 7, 1000])
def test_gpu_route_equals_numpy(
    rng: np.random.Generator, tokens: int, top_k: int, groups: int, kind: str
) -> None:
    ids = random_ids(rng, tokens, top_k, groups, kind)
    for alignment in (1, 128):
        options: Any = {"alignment": alignment, "m_indices": alignment == 128}
        same_routing(route(on_device(ids), groups, **options), route(ids, groups, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("alignment", [1, 100, 128])
@pytest.mark.parametrize(("tokens", "top_k", "groups"), [(40000, 8, 64), (3001, 3, 4096)])
def test_gpu_route_large(
    rng: np.random.Generator, tokens: int, top_k: int, groups: int, alignment: int
) -> None:
    ids = random_ids(rng, tokens, top_k, groups)
    same_routing(
        route(on_device(ids), groups, alignment=alignment), route(ids, groups, alignment=alignment)
    )


@pytest.mark.gpu
def test_gpu_route_drops_ids_out_of_range(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(rng, 100, 3, 7)
    wild = ids.copy()
    wild[ids == -1] = rng.choice(
        np.array([-(2**31), -2, 7, 8, 2**31 - 1], np.int32), (ids == -1).sum()
    )
    same_routing(route(on_device(wild), 7, alignment=128), route(ids, 7, alignment=128))
    monkeypatch.setenv("CPGEMM_CHECK", "1")
    with pytest.raises(ArgumentError, match="expert_ids: must be an expert, 0 to 6"):
        route(on_device(wild), 7)


@pytest.mark.gpu
@pytest.mark.parametrize("alignment", [1, 128])
def test_gpu_route_stays_within_its_arrays(rng: np.random.Generator, alignment: int) -> None:
    ids = random_ids(rng, 333, 3, 11)
    fresh = Routing.empty(333, 3, 11, alignment=alignment, m_indices=alignment == 128)
    names = ["offsets", "ends", "order", "position", "m_indices"]
    memory, views = [], []
    for name in names:
        array = getattr(fresh, name)
        if array is None:
            views.append(None)
            continue
        guard = on_device(np.full(array.size + 32, -99, np.int32))
        memory.append(guard)
        views.append(guard[16 : 16 + array.size].reshape(array.shape))
    out = Routing(*views, alignment)
    options: Any = {"alignment": alignment, "m_indices": alignment == 128}
    assert route(on_device(ids), 11, out=out, **options) is out
    same_routing(out, route(ids, 11, **options))
    for guard in memory:
        values = guard.get()
        assert (values[:16] == -99).all() and (values[-16:] == -99).all()


@pytest.mark.gpu
def test_gpu_route_rule_alignment() -> None:
    ids = on_device(np.zeros(9, np.int32))[1:].reshape(4, 2)
    with pytest.raises(ArgumentError, match="expert_ids: must start at a 16-byte aligned"):
        route(ids, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("groups", [0, 1, 31, 32, 256, 1023, 1024, 1025, 5000])
def test_gpu_offsets_equal_numpy(rng: np.random.Generator, groups: int, alignment: int) -> None:
    counts = rng.integers(0, 3000, groups, dtype=np.int32)
    counts[rng.random(groups) < 0.5] = 0
    guard = on_device(np.full(groups + 3, -99, np.int32))
    out = guard[1:-1]
    assert moe.offsets_from_counts(on_device(counts), alignment=alignment, out=out) is out
    wanted = moe.offsets_from_counts(counts, alignment=alignment)
    np.testing.assert_array_equal(guard.get(), [-99, *wanted, -99])


@pytest.mark.gpu
def test_gpu_offsets_of_bad_counts_are_bounded() -> None:
    counts = np.array([5, -3, 2**31 - 1, 7], np.int32)
    got = moe.offsets_from_counts(on_device(counts), alignment=128).get()
    assert got.tolist() == [0, 128, 128, 2**31 - 1, 2**31 - 1]


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("k", [16, 144, 1024, 7168])
@pytest.mark.parametrize(("tokens", "top_k", "groups"), [(1, 1, 1), (7, 8, 16), (300, 2, 8)])
def test_gpu_gathers_equal_numpy(
    rng: np.random.Generator,
    tokens: int,
    top_k: int,
    groups: int,
    k: int,
    alignment: int,
    scale_format: Any,
) -> None:
    routing = route(random_ids(rng, tokens, top_k, groups), groups, alignment=alignment)
    device = routing_on_device(routing)
    for dtype in (F32, np.dtype(np.float16), BF16):
        x = hard_values(rng, (tokens, k), dtype)
        wanted = moe.gather_quantized(x, routing, scale_format=scale_format)
        got = moe.gather_quantized(on_device(x), device, scale_format=scale_format)
        assert got.device.startswith("cuda") and got.is_k_major
        same_tensor(got, wanted)
        scaled = quantize(x, scale_format=scale_format)
        same_tensor(moe.gather(scaled_on_device(scaled), device), wanted)


def guarded_tensor(rows: int, k: int) -> tuple[Any, Any, ScaledTensor]:
    """Guarded memory of codes and of scales, and the tensor in its middle."""
    import cupy

    codes = on_device(np.full((rows + 2, k + 32), 0xA5, np.uint8))
    pitch = -(-rows // 4) * 4 + 8
    scales = on_device(np.full((-(-k // 128) + 2, pitch), -7.0, np.float32))
    out = ScaledTensor(
        codes[1 : rows + 1, 16 : k + 16].view(ml_dtypes.float8_e4m3fn),
        cupy.swapaxes(scales[1:-1, 4 : 4 + rows], 0, 1),
        (1, 128),
    )
    return codes, scales, out


def assert_tensor_guards(codes: Any, scales: Any, rows: int, k: int) -> None:
    bytes_now, scales_now = codes.get(), scales.get()
    bytes_now[1 : rows + 1, 16 : k + 16] = 0xA5
    scales_now[1:-1, 4 : 4 + rows] = -7.0
    assert (bytes_now == 0xA5).all() and (scales_now == -7.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "k"), [(5, 16), (67, 400), (129, 2064)])
def test_gpu_gathers_stay_within_out(rng: np.random.Generator, tokens: int, k: int) -> None:
    routing = route(random_ids(rng, tokens, 3, 9), 9)
    device = routing_on_device(routing)
    x = hard_values(rng, (tokens, k), BF16)
    wanted = moe.gather_quantized(x, routing)
    scaled = scaled_on_device(quantize(x))
    for call in (
        lambda out: moe.gather_quantized(on_device(x), device, out=out),
        lambda out: moe.gather(scaled, device, out=out),
    ):
        codes, scales, out = guarded_tensor(routing.rows, k)
        assert call(out) is out
        same_tensor(out, wanted)
        assert_tensor_guards(codes, scales, routing.rows, k)


@pytest.mark.gpu
def test_gpu_gather_reads_padded_tokens(rng: np.random.Generator) -> None:
    """Rows of the input apart, NaN between them; entries of no routing become zeros."""
    import cupy

    x = rng.standard_normal((20, 160)).astype(np.float32)
    _, view = guarded(20, 160, np.float32, cupy)
    view[...] = on_device(x)
    routing = route(random_ids(rng, 20, 2, 4), 4)
    same_tensor(
        moe.gather_quantized(view, routing_on_device(routing)), moe.gather_quantized(x, routing)
    )
    routing.order[:3] = [40, 2**31 - 1, -5]
    wanted = moe.gather_quantized(x, routing)
    same_tensor(moe.gather_quantized(view, routing_on_device(routing)), wanted)
    same_tensor(moe.gather(scaled_on_device(quantize(x)), routing_on_device(routing)), wanted)
    assert (codes_of(wanted)[:3] == 0).all()


@pytest.mark.gpu
def test_gpu_gather_goes_round_the_grid(rng: np.random.Generator) -> None:
    """More row tiles than a grid has, for both kernels."""
    tokens = 65535 * 32 + 70
    routing = route(rng.integers(0, 3, (tokens, 1), dtype=np.int32), 3)
    device = routing_on_device(routing)
    x = rng.standard_normal((tokens, 16), np.float32)
    scaled = quantize(x)
    wanted = moe.gather(scaled, routing)
    same_tensor(moe.gather_quantized(on_device(x), device), wanted)
    same_tensor(moe.gather(scaled_on_device(scaled), device), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("columns", [16, 144, 2048])
@pytest.mark.parametrize("rows", [0, 1, 7, 130])
def test_gpu_swiglu_equals_numpy(
    rng: np.random.Generator, rows: int, columns: int, dtype: np.dtype, scale_format: Any
) -> None:
    h = hard_values(rng, (rows, 2 * columns), dtype)
    same_tensor(
        moe.swiglu_quantize(on_device(h), scale_format=scale_format),
        moe.swiglu_quantize(h, scale_format=scale_format),
    )


@pytest.mark.gpu
def test_gpu_silu_equals_numpy_for_all_bfloat16_gates() -> None:
    """Every bfloat16 number as a gate, and the floats around the ends of exp's range."""
    gates = np.arange(1 << 16, dtype=np.uint16).view(BF16).astype(np.float32)
    near = np.linspace(-90, -86, 1 << 16, dtype=np.float32)
    for values in (gates, near):
        gate = values.reshape(-1, 16)
        h = np.concatenate([gate, np.full_like(gate, 3.0)], axis=1)
        for i in range(16):  # alone in its block, so that its magnitude decides the scale
            alone = np.zeros_like(h)
            alone[:, i], alone[:, 16:] = h[:, i], 3.0
            same_tensor(moe.swiglu_quantize(on_device(alone)), moe.swiglu_quantize(alone))


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "last"), [(0, 100), (0, 0), (3, 61), (37, 38), (99, 100)])
def test_gpu_swiglu_leaves_rows_of_no_group(
    rng: np.random.Generator, first: int, last: int
) -> None:
    h = rng.standard_normal((100, 288)).astype(BF16)
    wanted = moe.swiglu_quantize(h)
    offsets = np.array([first, first, last, last], np.int32)
    codes, scales, out = guarded_tensor(100, 144)
    assert moe.swiglu_quantize(on_device(h), offsets=on_device(offsets), out=out) is out
    assert_tensor_guards(codes, scales, 100, 144)
    np.testing.assert_array_equal(codes_of(out)[first:last], codes_of(wanted)[first:last])
    np.testing.assert_array_equal(scales_of(out)[first:last], wanted.scales[first:last])
    for rows in (slice(first), slice(last, None)):
        assert (codes_of(out)[rows] == 0xA5).all() and (scales_of(out)[rows] == -7).all()


@pytest.mark.gpu
def test_gpu_swiglu_clamps_offsets(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = rng.standard_normal((50, 64)).astype(np.float32)
    codes, scales, out = guarded_tensor(50, 32)
    wild = on_device(np.array([-9, 2**31 - 1], np.int32))
    moe.swiglu_quantize(on_device(h), offsets=wild, out=out)
    same_tensor(out, moe.swiglu_quantize(h))
    assert_tensor_guards(codes, scales, 50, 32)
    monkeypatch.setenv("CPGEMM_CHECK", "1")
    with pytest.raises(ArgumentError, match="offsets: must begin and end within"):
        moe.swiglu_quantize(on_device(h), offsets=wild, out=out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("columns", [8, 520, 7168])
@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_gpu_combine_equals_numpy(
    rng: np.random.Generator, tokens: int, top_k: int, columns: int, dtype: np.dtype
) -> None:
    import cupy

    routing = route(random_ids(rng, tokens, top_k, 16), 16, alignment=128)
    y = rng.standard_normal((routing.rows, columns)).astype(dtype)
    y[routing.order < 0] = np.nan
    weights = rng.random((tokens, top_k)).astype(np.float32)
    poison, out = guarded(tokens, columns, dtype, cupy)
    device = routing_on_device(routing)
    assert moe.scatter_combine(on_device(y), device, on_device(weights), out=out) is out
    wanted = moe.scatter_combine(y, routing, weights)
    bits = np.uint16 if dtype == BF16 else np.uint32
    np.testing.assert_array_equal(out.view(bits).get(), wanted.view(bits))
    assert_guards_intact(poison, tokens, columns)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gpu_combine_carries_what_is_not_finite(rng: np.random.Generator, dtype: np.dtype) -> None:
    routing = route(random_ids(rng, 64, 3, 8), 8)
    y = hard_values(rng, (routing.rows, 256), dtype)
    y[:3] = float(ml_dtypes.finfo(dtype).max)
    routing.position[0, 0] = 10**9  # of no routing: left out, as if dropped
    weights = (2 * rng.standard_normal((64, 3))).astype(np.float32)
    got = moe.scatter_combine(on_device(y), routing_on_device(routing), on_device(weights))
    np.testing.assert_array_equal(
        to_numpy(got).astype(np.float32),
        moe.scatter_combine(y, routing, weights).astype(np.float32),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("alignment", [1, 128])
def test_gpu_graph_replays_with_changed_ids(rng: np.random.Generator, alignment: int) -> None:
    """All helpers in one graph; new ids, values and weights in place change the result."""
    import cupy

    tokens, top_k, groups, k = 50, 4, 16, 256
    options: Any = {"alignment": alignment, "m_indices": alignment == 128}
    inputs = [
        on_device(np.zeros((tokens, top_k), np.int32)),
        on_device(np.zeros((tokens, k), np.float32)),
        on_device(np.zeros((tokens, top_k), np.float32)),
    ]
    ids, x, weights = inputs
    routing = Routing.empty(tokens, top_k, groups, xp=cupy, **options)

    def tensor(columns: int) -> ScaledTensor:
        shape = (routing.rows, columns)
        return ScaledTensor(
            empty_codes(shape, cupy),
            empty_scales(shape[0], -(-columns // 128), (1, 128), cupy),
            (1, 128),
        )

    scaled = quantize(x)
    a, gathered, activated = tensor(k), tensor(k), tensor(k // 2)
    h = on_device(np.zeros((routing.rows, k), np.float32))
    out = on_device(np.zeros((tokens, k), np.float32))
    sums = on_device(np.zeros(groups + 1, np.int32))

    def layer() -> None:
        route(ids, groups, out=routing, **options)
        moe.offsets_from_counts(routing.ends, out=sums)
        quantize(x, out=scaled)
        moe.gather(scaled, routing, out=gathered)
        moe.gather_quantized(x, routing, out=a)
        moe.swiglu_quantize(h, offsets=routing.offsets, out=activated)
        moe.scatter_combine(h, routing, weights, out=out)

    layer()  # compiles and loads
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        layer()
        graph = stream.end_capture()
    h_now = rng.standard_normal((routing.rows, k)).astype(np.float32)
    h.set(h_now)
    for kind in ("mixed", "one", "dropped", "all"):
        now = [
            random_ids(rng, tokens, top_k, groups, kind),
            rng.standard_normal((tokens, k)).astype(np.float32),
            rng.random((tokens, top_k)).astype(np.float32),
        ]
        for device, host in zip(inputs, now, strict=True):
            device.set(host)
        cupy.cuda.get_current_stream().synchronize()
        graph.launch(stream)
        stream.synchronize()
        wanted = route(now[0], groups, **options)
        same_routing(routing, wanted)
        np.testing.assert_array_equal(sums.get(), moe.offsets_from_counts(wanted.ends))
        same_tensor(a, moe.gather_quantized(now[1], wanted))
        same_tensor(gathered, moe.gather_quantized(now[1], wanted))
        rows = slice(0, int(wanted.offsets[-1]))
        swiglu = moe.swiglu_quantize(h_now)
        np.testing.assert_array_equal(codes_of(activated)[rows], codes_of(swiglu)[rows])
        np.testing.assert_array_equal(out.get(), moe.scatter_combine(h_now, wanted, now[2]))


@pytest.mark.gpu
def test_gpu_rule_devices(rng: np.random.Generator) -> None:
    x = on_device(X)
    with pytest.raises(ArgumentError, match="routing: must be where x is"):
        moe.gather_quantized(x, ROUTING)
    with pytest.raises(ArgumentError, match="weights: must be where y is"):
        moe.scatter_combine(on_device(Y), routing_on_device(ROUTING), WEIGHTS)
    with pytest.raises(ArgumentError, match="offsets: must be where h is"):
        moe.swiglu_quantize(on_device(Y), offsets=ROUTING.offsets)
    with pytest.raises(ArgumentError, match="x: must start at a 16-byte aligned address"):
        moe.gather_quantized(on_device(np.ones(97, np.float32))[1:].reshape(3, 32), ROUTING)
