"""The grouped products through their public calls, on NumPy and on the GPU.

Tests that take ``xp`` run twice: the NumPy path has the same contract as the kernels.
"""

import importlib
import threading

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import assert_guards_intact, to_numpy, widen
from grouped_checks import (
    CONTIGUOUS,
    LAYOUTS,
    Case,
    assert_same_bits,
    bits,
    contiguous,
    experts,
    index_of,
    masked,
    random_index,
    take_rows,
    tokens,
)

import cpgemm
from cpgemm.config import AdaptiveKernelConfig
from cpgemm.errors import ArgumentError
from cpgemm.grouped import FLAT, TALL, prepare_grouped
from cpgemm.grouped_heuristics import grouped_configurations
from cpgemm.grouped_reference import grouped_reference
from cpgemm.scaled import ScaledTensor

BF16 = np.dtype(ml_dtypes.bfloat16)
POISON = 0xFFFF
LOWEST, HIGHEST = -(2**31), 2**31 - 1

both_dtypes = pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
contiguous_layout = pytest.mark.parametrize("layout", CONTIGUOUS)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    return importlib.import_module(request.param)


# ------------------------------------------------------------------------- against the reference


@both_dtypes
@each_layout
def test_every_size_from_0_to_129_in_one_call(rng, xp, layout, out_dtype):
    case = Case(rng, layout, rng.permutation(130), 200, 144, xp, out_dtype=out_dtype)
    assert case.call() is case.out
    case.check()


@pytest.mark.parametrize(("n", "k"), [(8, 16), (576, 272), (256, 1040), (1032, 384)])
@each_layout
def test_random_ragged_sizes(rng, xp, layout, n, k):
    sizes = rng.integers(0, 400, 9) * rng.integers(0, 2, 9) + rng.integers(0, 3, 9)
    spare = 0 if layout == "masked" else 128 * int(rng.integers(0, 3))
    case = Case(rng, layout, sizes, n, k, xp, first=int(rng.integers(0, 150)), spare=spare)
    case.call()
    case.check()


@each_layout
@pytest.mark.parametrize("size", [1, 64, 129, 700])
def test_single_group(rng, xp, layout, size):
    case = Case(rng, layout, [size], 264, 272, xp, spare=0 if layout == "masked" else 40)
    case.call()
    case.check()


@each_layout
def test_all_tokens_in_the_last_group(rng, xp, layout):
    case = Case(rng, layout, [0] * 31 + [333], 136, 256, xp)
    case.call()
    case.check()


@each_layout
def test_512_groups_with_most_empty(rng, xp, layout):
    sizes = np.zeros(512, np.int64)
    sizes[[0, 511, *rng.integers(1, 511, 10)]] = rng.integers(1, 140, 12)
    case = Case(rng, layout, sizes, 72, 128, xp)
    case.call()
    case.check()


@each_layout
def test_all_groups_empty(rng, xp, layout):
    case = Case(rng, layout, [0] * 5, 136, 256, xp, first=3, spare=130, m_max=70)
    case.call()
    case.check()


@contiguous_layout
@pytest.mark.parametrize("fill_padding", [False, True])
def test_no_rows_at_all(rng, xp, layout, fill_padding):
    case = Case(rng, layout, [0] * 5, 136, 256, xp, fill_padding=fill_padding)
    assert case.a.shape == (0, 256)
    assert case.call() is case.out
    assert case.call(out=None).shape == (0, 136)
    case.check()


def test_no_rows_at_all_masked(rng, xp):
    case = Case(rng, "masked", [0] * 5, 136, 256, xp)
    assert case.call() is case.out
    assert case.call(out=None).shape == (5, 0, 136)
    case.check()


@each_layout
def test_no_columns(rng, xp, layout):
    case = Case(rng, layout, [3, 0, 130], 0, 256, xp)
    assert case.call(out=None).shape == case.problem.shape


@pytest.mark.parametrize("m_max", [1, 64, 130])
def test_masked_counts_0_1_and_m_max(rng, xp, m_max):
    case = Case(rng, "masked", [0, 1, m_max, m_max, 1, 0, m_max], 200, 400, xp, m_max=m_max)
    case.call()
    case.check()


@pytest.mark.parametrize("k", [16, 128, 144, 1168])
@pytest.mark.parametrize("n", [8, 120, 136, 200, 392])
def test_tails_of_n_and_k(rng, xp, n, k):
    case = Case(rng, "offsets", [5, 0, 128, 61], n, k, xp, out_dtype="float32")
    case.call()
    case.check()


@both_dtypes
@contiguous_layout
def test_fill_padding_zeroes_rows_of_no_group(rng, xp, layout, out_dtype):
    sizes = [1, 0, 129, 256, 60]
    case = Case(
        rng, layout, sizes, 200, 144, xp, out_dtype=out_dtype, first=77, spare=300,
        fill_padding=True,
    )  # fmt: skip
    for _ in range(2):
        case.call()
        case.check()
        case.set_index(random_index(rng, layout, 5, case.problem.m))


@contiguous_layout
def test_many_random_divisions_of_the_same_rows(rng, xp, layout):
    case = Case(rng, layout, [300, 200, 0, 284, 1, 500], 136, 256, xp, spare=256)
    for _ in range(6):
        case.set_index(random_index(rng, layout, 6, case.problem.m))
        case.call()
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (7168, 2048)])
@pytest.mark.parametrize(
    ("layout", "sizes", "m_max"),
    [
        ("offsets", [700, 0, 1031, 129], None),
        ("m_indices", [512, 1024], None),
        ("masked", [20] * 32, 64),
        ("masked", [4] * 8, 4),
        ("masked", [256, 200, 1, 99], 256),
    ],
)
def test_mixture_of_experts_sizes(rng, layout, sizes, m_max, n, k):
    import cupy as cp

    case = Case(rng, layout, sizes, n, k, cp, m_max=m_max)
    case.call()
    case.check()


def forms(out_dtype):
    """Every kernel, the adaptive ones with tall and with flat tiles."""
    for config in grouped_configurations(out_dtype):
        for form in (TALL, FLAT) if isinstance(config, AdaptiveKernelConfig) else (None,):
            yield config, form


@pytest.mark.gpu
@both_dtypes
@each_layout
def test_every_configuration(rng, layout, out_dtype):
    """Each kernel, whatever the choice for these sizes would be, with and without zero-filling."""
    import cupy as cp

    sizes = [0, 1, 77, 128, 129, 0, 300, 64, 192, 193, 400]
    for config, form in forms(out_dtype):
        for fill_padding in {False, layout != "masked"}:
            case = Case(
                rng, layout, sizes, 392, 400, cp, out_dtype=out_dtype, first=9, spare=140,
                fill_padding=fill_padding,
            )  # fmt: skip
            if config.why_not_layout(layout, case.problem.n):
                with pytest.raises(ArgumentError, match="config: must suit"):
                    prepare_grouped(case.problem, config, case.a, case.b, case.out, case.index)()
                continue
            prepare_grouped(case.problem, config, case.a, case.b, case.out, case.index, form=form)()
            case.check()


@pytest.mark.gpu
@each_layout
def test_gpu_agrees_with_the_numpy_path(rng, layout):
    import cupy as cp

    case = Case(rng, layout, [40, 0, 129, 7, 260], 264, 400, cp, out_dtype="float32")
    case.call()
    cpu = case.on_cpu()
    expected = grouped_reference(case.problem, cpu.a, cpu.b, cpu.out, cpu.index)
    owned = case.cover() > 0
    got = to_numpy(case.flat_out)[owned]
    expected = expected.reshape(-1, got.shape[1])[owned]
    assert np.linalg.norm(got - expected) <= 5e-4 * np.linalg.norm(expected)


# ------------------------------------------------------------------- layouts against each other


@both_dtypes
def test_contiguous_layouts_agree_bit_for_bit(rng, xp, out_dtype):
    """Sizes that are multiples of 128 are the same rows in all three layouts."""
    sizes = [128, 0, 384, 256, 0, 128]
    a, b = tokens(rng, sum(sizes), 272, xp), experts(rng, len(sizes), 200, 272, xp)
    results = [
        contiguous(a, b, **{layout: xp.asarray(index_of(layout, sizes)[0])}, out_dtype=out_dtype)
        for layout in CONTIGUOUS
    ]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@both_dtypes
def test_ragged_and_padded_and_masked_agree_bit_for_bit(rng, xp, out_dtype):
    """The same groups packed, with aligned starts (two spellings), and one per slab."""
    sizes = np.array([77, 0, 128, 1, 300, 129, 5])
    first = Case(rng, "ends", sizes, 200, 272, xp, out_dtype=out_dtype)
    first.call()
    owned = np.flatnonzero(first.cover())
    expected = bits(first.flat_out)[xp.asarray(owned)]

    indices = xp.asarray(index_of("m_indices", sizes)[0])
    same_rows = contiguous(first.a, first.b, m_indices=indices, out_dtype=out_dtype)
    assert_same_bits(bits(same_rows)[xp.asarray(owned)], expected)

    packed = take_rows(first.plain_a, owned)
    offsets = xp.asarray(index_of("offsets", sizes)[0])
    ragged = contiguous(packed, first.b, offsets=offsets, out_dtype=out_dtype)
    assert_same_bits(ragged, expected)

    slabs = Case(rng, "masked", sizes, 200, 272, xp, out_dtype=out_dtype, b=first.b)
    rows = np.flatnonzero(slabs.cover())
    slabs.plain_a.data.view(np.uint8)[xp.asarray(rows)] = packed.data.view(np.uint8)
    slabs.plain_a.scales[xp.asarray(rows)] = packed.scales
    slabs.set_index(sizes.astype(np.int32))
    slabs.call()
    assert_same_bits(bits(slabs.flat_out)[xp.asarray(rows)], expected)


@each_layout
def test_one_group_is_the_dense_product(rng, xp, layout):
    case = Case(rng, layout, [256], 264, 400, xp, out_dtype="float32")
    case.call()
    dense = widen(cpgemm.gemm(case.plain_a, case.group_of_b(0), out_dtype="float32"))
    difference = xp.linalg.norm(widen(case.flat_out) - dense)
    assert float(difference) <= 1e-5 * float(xp.linalg.norm(dense))


@pytest.mark.parametrize("hint", [0, 1, 20, 130, 10**9])
def test_any_expected_m_gives_the_right_result(rng, xp, hint):
    case = Case(rng, "masked", [20, 0, 130, 1, 64], 200, 272, xp)
    case.call(expected_m=hint)
    case.check()


# ---------------------------------------------------------------------------- the rest of the call


@each_layout
def test_output_dtype_follows_out(rng, xp, layout):
    case = Case(rng, layout, [3, 130], 136, 256, xp)
    assert case.call(out=None, out_dtype=None).dtype == BF16
    assert case.call(out=None, out_dtype="float32").dtype == np.float32
    single = xp.empty(case.problem.shape, np.float32)
    assert case.call(out=single, out_dtype=None) is single


@each_layout
def test_a_new_output_is_returned_without_out(rng, xp, layout):
    case = Case(rng, layout, [3, 0, 130, 64], 136, 256, xp)
    out = case.call(out=None)
    assert out.shape == case.problem.shape and isinstance(out, xp.ndarray)
    case.check_rows(out.reshape(case.flat_out.shape), case.cover() > 0)


@each_layout
def test_index_needs_four_byte_alignment_only(rng, xp, layout):
    case = Case(rng, layout, [3, 0, 130, 64], 136, 256, xp)
    for shift in (1, 2, 3):
        memory = xp.full(case.index.size + 4, HIGHEST, np.int32)
        index = memory[shift : shift + case.index.size]
        index[...] = case.index
        case.index = index
        case.call()
        case.check()


def test_b_with_a_row_pitch(rng, xp):
    case = Case(rng, "offsets", [30, 129, 0], 136, 272, xp)
    case.call()
    expected = bits(case.flat_out).copy()
    wide = xp.full((3, 136, 272 + 128), 0x7F, np.uint8)
    wide[..., :272] = case.b.data.view(np.uint8)
    case.b = ScaledTensor.from_arrays(wide[..., :272], case.b.scales, (128, 128))
    case.call()
    assert_same_bits(case.flat_out, expected)


@each_layout
def test_nan_of_a_row_stays_in_that_row(rng, xp, layout):
    """Tiles overlap the next group's rows and matrices: neither side may see the other's NaN."""
    case = Case(rng, layout, [3, 70, 129, 1], 200, 272, xp)
    case.call()
    expected = bits(case.flat_out).copy()
    row = case.ranges[1][1]  # the first row of the second group
    codes = case.a.data.view(np.uint8)
    if layout == "masked":
        codes[1, 0, 17] = 0x7F
    else:
        codes[row, 17] = 0x7F
    case.call()
    result = bits(case.flat_out)
    changed = (result != expected).any(axis=1)
    assert bool(changed[row]) and int(changed.sum()) == 1
    assert bool(xp.isnan(widen(case.flat_out[row : row + 1])).all())


@each_layout
def test_runs_are_bitwise_equal(rng, xp, layout):
    case = Case(rng, layout, [3, 0, 300, 129, 128, 1], 264, 1024, xp)
    case.call()
    first = bits(case.flat_out).copy()
    for _ in range(4):
        case.poison[...] = np.iinfo(case.poison.dtype).max
        case.call()
        assert bool((bits(case.flat_out) == first).all())


def test_broken_rules_leave_out_untouched(rng, xp):
    case = Case(rng, "offsets", [5, 6], 136, 256, xp)
    with pytest.raises(ArgumentError, match="exactly one of them must be given; got offsets and"):
        case.call(offsets=case.index, ends=case.index[:2])
    with pytest.raises(ArgumentError, match=r"^offsets: must have shape \(3,\)"):
        case.call(offsets=case.index[:2])
    slabs = Case(rng, "masked", [5, 6], 136, 256, xp)
    with pytest.raises(ArgumentError, match=r"^masked_m: must have shape \(2,\)"):
        slabs.call(masked_m=slabs.index[:1])
    with pytest.raises(ArgumentError, match=r"^a: must have 2 axes"):
        contiguous(slabs.a, slabs.b, offsets=case.index)
    with pytest.raises(ArgumentError, match=r"^a: must have 3 axes"):
        masked(case.a, case.b, masked_m=slabs.index)
    for untouched in (case, slabs):
        assert bool((untouched.poison == POISON).all())


# ------------------------------------------------------------------- contents that break the rules

# For 300 rows in 4 groups, for the masked layout 4 groups of 70 rows.
BAD_CONTENTS = {
    "offsets": [
        [0, 200, 100, 250, 300],
        [0, 50, 100, 400, 10**6],
        [-50, 20, 100, 200, 300],
        [-5, -4, -3, -2, -1],
        [300, 200, 100, 50, 0],
        [500, 600, 700, 800, 900],
        [LOWEST, HIGHEST, LOWEST, HIGHEST, 0],
        [HIGHEST] * 5,
    ],
    "ends": [
        [100, 50, 300, 290],
        [60, 130, 400, 300],
        [-1, -200, 100, 300],
        [260, 0, 0, 300],
        [LOWEST, HIGHEST, LOWEST, HIGHEST],
        [HIGHEST, HIGHEST, 0, 130],
    ],
    "masked": [
        [-1, 71, 5, 70],
        [HIGHEST, LOWEST, 0, 1],
        [71, 1000, 10**6, 2**30],
        [-70, -1, LOWEST, 3],
    ],
    "m_indices": [
        np.repeat([4, 1, 0], [128, 128, 44]),
        np.repeat([0, -2, 3], [128, 128, 44]),
        np.repeat([HIGHEST, 2, LOWEST], [128, 128, 44]),
    ],
}
# Two groups in one block: what becomes of the block's own rows is open.
MIXED_BLOCKS = [
    np.repeat([1, 2, 3, 0], [50, 78, 128, 44]),
    np.repeat([-1, 2, 3, 0], [50, 78, 128, 44]),
    np.repeat([2, -1, 2, 3, 0], [50, 20, 58, 128, 44]),
    np.repeat([2, HIGHEST, 3, 0], [127, 1, 128, 44]),
]


def _case_of_300_rows(rng, layout, xp, **options):
    if layout == "masked":
        return Case(rng, layout, [70, 3, 0, 70], 200, 144, xp, **options)
    if layout == "offsets":
        return Case(rng, layout, [100, 0, 50, 150], 200, 144, xp, **options)
    return Case(rng, layout, [128, 0, 128, 0], 200, 144, xp, spare=44, **options)


@pytest.mark.gpu
@both_dtypes
@each_layout
def test_bad_contents_write_nothing_else(rng, layout, out_dtype, monkeypatch):
    """Guard bands and rows of no group stay; rows that just one group claims are right."""
    import cupy as cp

    monkeypatch.delenv("CPGEMM_CHECK", raising=False)
    case = _case_of_300_rows(rng, layout, cp, out_dtype=out_dtype)
    for index in BAD_CONTENTS[layout]:
        case.set_index(np.asarray(index, np.int32))
        case.call()
        case.check(norm=False)


@pytest.mark.gpu
@contiguous_layout
def test_bad_contents_fill_nothing_else(rng, layout, monkeypatch):
    import cupy as cp

    monkeypatch.delenv("CPGEMM_CHECK", raising=False)
    case = _case_of_300_rows(rng, layout, cp, fill_padding=True)
    for index in BAD_CONTENTS[layout] + (MIXED_BLOCKS if layout == "m_indices" else []):
        case.set_index(np.asarray(index, np.int32))
        case.call()
        assert_guards_intact(case.poison, case.problem.rows, case.problem.n)


@pytest.mark.gpu
def test_mixed_blocks_harm_no_other_block(rng, monkeypatch):
    import cupy as cp

    monkeypatch.delenv("CPGEMM_CHECK", raising=False)
    case = _case_of_300_rows(rng, "m_indices", cp)
    for index in MIXED_BLOCKS:
        case.set_index(index.astype(np.int32))
        case.call()
        assert_guards_intact(case.poison, case.problem.rows, case.problem.n)
        case.check_rows(case.flat_out, np.arange(300) >= 128, norm=False)


@each_layout
def test_bad_contents_are_named(rng, xp, layout, monkeypatch):
    """NumPy arrays are always checked, those on a GPU with CPGEMM_CHECK=1."""
    case = _case_of_300_rows(rng, layout, xp)
    if xp is not np:
        monkeypatch.setenv("CPGEMM_CHECK", "1")
    name = "masked_m" if layout == "masked" else layout
    for index in BAD_CONTENTS[layout] + (MIXED_BLOCKS if layout == "m_indices" else []):
        case.index[...] = xp.asarray(np.asarray(index, np.int32))
        with pytest.raises(ArgumentError, match=rf"^{name}: must .*; got {name}\["):
            case.call()
        assert bool((case.poison == POISON).all()), "a rejected call has written"
    case.set_index(random_index(rng, layout, 4, case.problem.m))
    case.call()
    case.check(norm=False)


@pytest.mark.gpu
def test_checking_while_a_graph_is_captured_is_an_error(rng, monkeypatch):
    import cupy as cp

    case = Case(rng, "offsets", [30, 0, 100], 136, 256, cp)
    case.call()
    monkeypatch.setenv("CPGEMM_CHECK", "1")
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(ArgumentError, match="CPGEMM_CHECK: must be 0 while a graph is"):
                case.call()
        finally:
            stream.end_capture()


# --------------------------------------------------------------------- streams, graphs, no waiting


@pytest.mark.gpu
@each_layout
def test_graph_replay_follows_the_counts(rng, layout):
    """Capture fails on any synchronisation; replay must read the counts of its own time."""
    import cupy as cp

    case = Case(rng, layout, [300, 0, 129, 84, 200], 200, 400, cp, spare=128, m_max=300)
    case.call()
    stream = cp.cuda.Stream(non_blocking=True)
    case.poison[...] = POISON
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        case.call()
        graph = stream.end_capture()
    assert bool((case.poison == POISON).all()), "captured, so nothing may have run yet"
    for _ in range(4):
        case.set_index(random_index(rng, layout, 5, case.problem.m))
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        case.check()


@pytest.mark.gpu
@each_layout
def test_the_host_neither_waits_nor_reads(rng, layout):
    """The call returns behind a closed gate, and uses counts that are written behind it too."""
    import cupy as cp

    case = Case(rng, layout, [300, 0, 129, 84, 200], 200, 400, cp, spare=128, m_max=300)
    old = case.index.copy()
    stream = cp.cuda.Stream(non_blocking=True)
    case.set_index(random_index(rng, layout, 5, case.problem.m))
    new = case.index.copy()
    cp.cuda.Device().synchronize()
    with stream:  # once without the gate: loads every kernel, which may wait
        case.index[...] = old
        case.call()
        case.poison[...] = POISON
        stream.synchronize()

        gate = threading.Event()
        try:
            stream.launch_host_func(lambda _: gate.wait(10), None)
            case.index[...] = new
            case.call()
            returned_early = not stream.done
        finally:
            gate.set()
        stream.synchronize()
    assert returned_early, "the call has waited for its stream"
    case.check()


@pytest.mark.gpu
@each_layout
def test_pdl_waits_for_the_counts(rng, layout, monkeypatch):
    """Launched early, a kernel must not read the counts before its predecessor is done."""
    import cupy as cp

    monkeypatch.setenv("CPGEMM_PDL", "1")
    case = Case(rng, layout, [100, 0, 50, 150], 200, 400, cp, spare=128, m_max=200)
    for _ in range(4):
        case.set_index(random_index(rng, layout, 4, case.problem.m))
        case.call()
        case.call()
        case.check()


@pytest.mark.gpu
@each_layout
def test_no_compile_for_other_counts(rng, layout):
    import cupy as cp

    case = Case(rng, layout, [100, 0, 50, 150], 136, 256, cp, spare=128, m_max=200)
    case.call()
    with cpgemm.freeze():
        for _ in range(4):
            case.set_index(random_index(rng, layout, 4, case.problem.m))
            case.call()
            case.check()


@pytest.mark.gpu
def test_index_of_another_kind_is_refused(rng):
    import cupy as cp

    case = Case(rng, "offsets", [100, 0, 50], 136, 256, cp)
    with pytest.raises(TypeError, match=r"^offsets: must be a CuPy array, as a is; got numpy"):
        case.call(offsets=case.index.get())
