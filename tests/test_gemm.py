"""``gemm``, its named forms and ``GemmPlan`` on the NumPy path, and their GPU counterparts."""

import ml_dtypes
import numpy as np
import pytest
from gemm_checks import assert_close, assert_guards_intact, guarded, operands, to_numpy

import cpgemm
from cpgemm import settings
from cpgemm.config import SplitKernelConfig
from cpgemm.cost_model import H200
from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.heuristics import configurations
from cpgemm.plan import GemmPlan, plan_gemm
from cpgemm.problem import OUT_DTYPES, GemmProblem
from cpgemm.scaled import ScaledTensor

BF16 = np.dtype(ml_dtypes.bfloat16)
EVERY = [config for out_dtype in OUT_DTYPES for config in configurations(out_dtype)]


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (129, 200, 144), (70, 136, 512)])
def test_numpy_path(rng, m, n, k, out_dtype):
    a, b = operands(rng, m, n, k)
    out = cpgemm.gemm(a, b, out_dtype=out_dtype)
    assert out.shape == (m, n) and isinstance(out, np.ndarray)
    assert_close(out, a, b, norm=m * n > 1000)


def test_numpy_accumulates(rng):
    a, b = operands(rng, 33, 40, 256)
    c = rng.standard_normal((33, 40)).astype(BF16)
    assert_close(cpgemm.gemm(a, b, c=c), a, b, c)


def test_numpy_writes_into_a_pitched_out(rng):
    a, b = operands(rng, 33, 40, 256)
    poison, out = guarded(33, 40, BF16, np)
    assert cpgemm.gemm(a, b, out) is out
    assert_close(out, a, b)
    assert_guards_intact(poison, 33, 40)


def test_out_dtype_follows_out_and_c(rng):
    a, b = operands(rng, 4, 8, 128)
    assert cpgemm.gemm(a, b).dtype == BF16
    assert cpgemm.gemm(a, b, np.empty((4, 8), np.float32)).dtype == np.float32
    assert cpgemm.gemm(a, b, c=np.ones((4, 8), np.float32)).dtype == np.float32


@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 128), (4, 0, 128), (4, 16, 0), (0, 0, 0)])
def test_empty_sizes(rng, m, n, k):
    a, b = operands(rng, m, n, k)
    out = cpgemm.gemm(a, b, out_dtype="float32")
    assert out.shape == (m, n) and not out.any()
    c = rng.standard_normal((m, n), dtype=np.float32)
    np.testing.assert_array_equal(cpgemm.gemm(a, b, c=c), c)


def test_forms_by_name(rng):
    m, n, k = 40, 144, 272
    x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    a, b = cpgemm.quantize(x, (1, 128)), cpgemm.quantize(w, (128, 128))
    a_t = cpgemm.quantize(np.ascontiguousarray(x.T), (128, 1))
    b_t = cpgemm.quantize(np.ascontiguousarray(w.T), (128, 128))
    expected = cpgemm.gemm(a, b)
    for form, left, right in (
        (cpgemm.gemm_nt, a, b),
        (cpgemm.gemm_nn, a, b_t),
        (cpgemm.gemm_tn, a_t, b_t),
        (cpgemm.gemm_tt, a_t, b),
    ):
        np.testing.assert_array_equal(form(left, right), expected, err_msg=form.__name__)
    out = np.empty((m, n), BF16)
    assert cpgemm.gemm_nn(a, b_t, out) is out


@pytest.mark.parametrize("form", [cpgemm.gemm_nn, cpgemm.gemm_tn, cpgemm.gemm_tt])
def test_forms_name_what_is_no_scaled_tensor(form):
    with pytest.raises(ArgumentTypeError, match="must be a ScaledTensor"):
        form(np.ones((16, 16)), np.ones((16, 16)))


def test_plan_without_a_gpu_shows_its_kernel():
    plan = cpgemm.plan_gemm(4096, 7168, 2048)
    assert plan is cpgemm.plan_gemm(4096, 7168, 2048)
    assert plan.config.name in plan.source.text
    assert plan.explain().choice.config == plan.config


def test_shapes_share_kernels():
    first, second = cpgemm.plan_gemm(4096, 7168, 2048), cpgemm.plan_gemm(4095, 7168, 2048)
    assert first is not second and first.source is second.source


def test_plan_refuses_a_misfit_configuration():
    config = configurations("float32")[0]
    with pytest.raises(ArgumentError, match="config: must suit"):
        cpgemm.plan_gemm(64, 128, 128, config=config)


def test_batch_invariant_leaves_split_kernels_out(rng):
    split = plan_gemm(64, 2112, 7168)
    assert isinstance(split.config, SplitKernelConfig)
    for m in (1, 17, 64, 128, 512):
        plan = plan_gemm(m, 2112, 7168, deterministic="batch_invariant")
        assert not isinstance(plan.config, SplitKernelConfig)
    assert plan_gemm(64, 2112, 7168, deterministic=False) is split
    with pytest.raises(ArgumentError, match="one order for batch invariance"):
        plan_gemm(64, 2112, 7168, deterministic="batch_invariant", config=split.config)
    with pytest.raises(ArgumentError, match=r"deterministic.*batch_invariant"):
        plan_gemm(64, 2112, 7168, deterministic="always")
    a, b = operands(rng, 3, 16, 128)
    with pytest.raises(ArgumentError, match="deterministic"):
        cpgemm.gemm(a, b, deterministic="always")
    same = cpgemm.gemm(a, b, deterministic="batch_invariant", static_b=True)
    assert same.tobytes() == cpgemm.gemm(a, b).tobytes()


def test_static_weights_are_part_of_a_plan():
    assert plan_gemm(64, 7168, 2048, static_b=True).static_b
    assert not plan_gemm(64, 7168, 2048).static_b


def test_split_kernels_are_dependent_launches_with_static_weights_only():
    split = plan_gemm(64, 2112, 7168)
    assert isinstance(split.config, SplitKernelConfig) and not split.pdl
    try:
        settings.set_pdl(True)
        assert not split.pdl and plan_gemm(64, 2112, 7168, static_b=True).pdl
        assert plan_gemm(4096, 7168, 2048).pdl
    finally:
        settings.set_pdl(None)


def test_plan_refuses_empty_sizes():
    with pytest.raises(ArgumentError, match="must not be 0"):
        cpgemm.plan_gemm(0, 128, 128)


def test_plan_refuses_numpy_operands_and_other_problems(rng):
    a, b = operands(rng, 4, 8, 128)
    out = np.zeros((4, 8), BF16)
    with pytest.raises(ArgumentTypeError, match="a: must be on a GPU"):
        cpgemm.plan_gemm(4, 8, 128)(a, b, out)
    with pytest.raises(ArgumentError, match="must pose the planned"):
        cpgemm.plan_gemm(5, 8, 128)(a, b, out)
    assert not out.any()


# ------------------------------------------------------------------------------------------- GPU


def _bits(x):
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    EVERY,
    ids=lambda config: config.name,
)
def test_every_configuration(rng, config):
    """Each kernel on sizes that leave tails in M, N and K, with and without C, guards intact."""
    import cupy as cp

    out_dtype = config.out_dtype
    dtype = BF16 if out_dtype == "bfloat16" else np.dtype(np.float32)
    for m, n, k in ((1, 8, 16), (7, 576, 144), (129, 200, 1040), (600, 1032, 512)):
        a, b = operands(rng, m, n, k, cp)
        c = cp.asarray(rng.standard_normal((m, n), dtype=np.float32))
        c = (
            c
            if out_dtype == "float32"
            else cp.asarray(c.get().astype(BF16).view(np.uint16)).view(BF16)
        )
        for addend in (None, c):
            plan = cpgemm.plan_gemm(
                m, n, k, out_dtype=out_dtype, accumulate=addend is not None, config=config
            )
            poison, out = guarded(m, n, dtype, cp)
            plan(a, b, out, addend)
            assert_close(out, a, b, addend, norm=m * n > 1000)
            assert_guards_intact(poison, m, n)


@pytest.mark.gpu
def test_gpu_agrees_with_the_reference(rng):
    import cupy as cp

    a, b = operands(rng, 200, 264, 1152, cp)
    got = to_numpy(cpgemm.gemm(a, b, out_dtype="float32"))
    expected = cpgemm.gemm(to_numpy(a), to_numpy(b), out_dtype="float32")
    assert np.linalg.norm(got - expected) <= 5e-4 * np.linalg.norm(expected)


@pytest.mark.gpu
def test_gpu_forms_by_name(rng):
    import cupy as cp

    m, n, k = 40, 144, 272
    x = cp.asarray(rng.standard_normal((m, k), np.float32))
    w = cp.asarray(rng.standard_normal((n, k), np.float32))
    a, b = cpgemm.quantize(x, (1, 128)), cpgemm.quantize(w, (128, 128))
    a_t = cpgemm.quantize(cp.ascontiguousarray(x.T), (128, 1))
    b_t = cpgemm.quantize(cp.ascontiguousarray(w.T), (128, 128))
    expected = _bits(cpgemm.gemm(a, b)).get()
    for form, left, right in (
        (cpgemm.gemm_nn, a, b_t), (cpgemm.gemm_tn, a_t, b_t), (cpgemm.gemm_tt, a_t, b)
    ):  # fmt: skip
        np.testing.assert_array_equal(_bits(form(left, right)).get(), expected)


@pytest.mark.gpu
def test_gpu_c_may_be_out(rng):
    import cupy as cp

    a, b = operands(rng, 130, 264, 384, cp)
    c = cp.asarray(rng.standard_normal((130, 264), dtype=np.float32))
    out = c.copy()
    assert cpgemm.gemm(a, b, out, c=out) is out
    assert_close(out, a, b, c)


@pytest.mark.gpu
def test_gpu_runs_are_bitwise_equal(rng):
    import cupy as cp

    a, b = operands(rng, 300, 520, 2048, cp)
    first = _bits(cpgemm.gemm(a, b)).copy()
    assert all(bool((_bits(cpgemm.gemm(a, b)) == first).all()) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 128), (4, 0, 128), (4, 16, 0)])
def test_gpu_empty_sizes(rng, m, n, k):
    import cupy as cp

    a, b = operands(rng, m, n, k, cp)
    c = cp.asarray(rng.standard_normal((m, n), dtype=np.float32))
    assert not bool(cpgemm.gemm(a, b, out_dtype="float32").any())
    np.testing.assert_array_equal(cpgemm.gemm(a, b, c=c).get(), c.get())
    assert cpgemm.gemm(a, b).shape == (m, n)


@pytest.mark.gpu
def test_gpu_views_with_pitch(rng):
    """Operands that are slices of wider arrays: no copy is made and none is needed."""
    import cupy as cp

    wide_a, wide_b = operands(rng, 40, 136, 1024, cp)
    a = cpgemm.ScaledTensor.from_arrays(wide_a.data[:, 256:768], wide_a.scales[:, 2:6], (1, 128))
    b = cpgemm.ScaledTensor.from_arrays(wide_b.data[:, 256:768], wide_b.scales[:, 2:6], (128, 128))
    assert a.data.data.ptr == wide_a.data.data.ptr + 256
    assert_close(cpgemm.gemm(a, b), a, b)


@pytest.mark.gpu
def test_gpu_allocates_its_output_and_nothing_else(rng):
    import cupy as cp

    a, b = operands(rng, 512, 1024, 512, cp)
    cpgemm.gemm(a, b)
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        out = cpgemm.gemm(a, b)
        assert pool.total_bytes() == out.nbytes == 512 * 1024 * 2
        cpgemm.gemm(a, b, out)
        assert pool.total_bytes() == out.nbytes


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream(rng):
    import cupy as cp

    a, b = operands(rng, 256, 512, 512, cp)
    expected = _bits(cpgemm.gemm(a, b)).get()
    stream = cp.cuda.Stream(non_blocking=True)
    out = cp.full((256, 512), 0xFFFF, cp.uint16).view(BF16)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        cpgemm.gemm(a, b, out)
        graph = stream.end_capture()
    assert bool((_bits(out) == 0xFFFF).all()), "captured, so nothing may have run yet"
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(_bits(out).get(), expected)


@pytest.mark.gpu
def test_gpu_pdl_gives_the_same_bits(rng, monkeypatch):
    import cupy as cp

    a, b = operands(rng, 64, 576, 2048, cp)
    expected = _bits(cpgemm.gemm(a, b)).get()
    monkeypatch.setenv("CPGEMM_PDL", "1")
    for _ in range(3):
        np.testing.assert_array_equal(_bits(cpgemm.gemm(a, b)).get(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.name)
def test_gpu_static_weights_under_pdl_give_the_same_bits(rng, config, monkeypatch):
    """With many launches in a row that wait for each other's output, as layers of a network do."""
    monkeypatch.setattr(settings, "_pdl", None)
    m, n, k = min(config.block_m, 80), 1024, 1024
    import cupy as cp

    a, b = operands(rng, m, n, k, cp)
    problem = GemmProblem(m, n, k, config.out_dtype)
    outs = {}
    for pdl in (False, True):
        settings.set_pdl(pdl)
        plan = GemmPlan(problem, config, H200, static_b=pdl)
        out = cp.zeros((m, n), np.float32).astype(OUT_DTYPES[config.out_dtype])
        for _ in range(20):
            # The second operand of the sum is what the launch before wrote.
            plan.prepare(a, b, out, out, "cupy")()
        outs[pdl] = to_numpy(out)
    assert outs[False].tobytes() == outs[True].tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (7168, 2048), (4096, 2064), (264, 528)])
def test_gpu_batch_invariant_rows_do_not_depend_on_m(rng, n, k):
    """M = 1 to 512: the bits of every row are those that it has in the largest product."""
    import cupy as cp

    a, b = operands(rng, 512, n, k, cp)
    wanted = to_numpy(cpgemm.gemm(a, b, deterministic="batch_invariant"))
    differs = []
    for m in range(1, 513):
        first = int(rng.integers(0, 512 - m + 1)) // 4 * 4  # a view's scales start at 16 bytes
        part = ScaledTensor.from_arrays(
            a.data[first : first + m], a.scales[first : first + m], (1, 128)
        )
        got = to_numpy(cpgemm.gemm(part, b, deterministic="batch_invariant"))
        if got.tobytes() != wanted[first : first + m].tobytes():
            differs.append((m, first))
    assert not differs


@pytest.mark.gpu
def test_gpu_unsplit_kernels_agree_to_the_bit(rng):
    """What batch invariance rests on: one order of sums in every kernel that does not split K."""
    m, n, k = 200, 520, 1040
    import cupy as cp

    a, b = operands(rng, m, n, k, cp)
    for out_dtype in OUT_DTYPES:
        bits = {}
        for config in configurations(out_dtype):
            if not isinstance(config, SplitKernelConfig):
                plan = GemmPlan(GemmProblem(m, n, k, out_dtype), config, H200)
                out = cp.zeros((m, n), np.float32).astype(OUT_DTYPES[out_dtype])
                plan(a, b, out)
                bits[config.name] = to_numpy(out).tobytes()
        assert len(bits) > 10 and len(set(bits.values())) == 1


@pytest.mark.gpu
def test_gpu_rules_leave_out_untouched(rng):
    import cupy as cp

    a, b = operands(rng, 16, 128, 256, cp)
    memory = cp.zeros(16 * 128 * 2 + 64, cp.uint8)
    with pytest.raises(ArgumentError, match="out: must start at a 16-byte aligned address"):
        cpgemm.gemm(a, b, memory[2 : 2 + 16 * 128 * 2].view(BF16).reshape(16, 128))
    with pytest.raises(ArgumentError, match="out: must have a row pitch that is a multiple of 16"):
        cpgemm.gemm(a, b, cp.zeros((16, 132), cp.uint16).view(BF16)[:, :128])
    with pytest.raises(ArgumentTypeError, match="out: must be a CuPy array"):
        cpgemm.gemm(a, b, np.zeros((16, 128), BF16))
    with pytest.raises(ArgumentError, match="b: must be on a's device"):
        cpgemm.gemm(a, to_numpy(b))
    with pytest.raises(ArgumentError, match="a: must start at a 16-byte aligned address"):
        shifted = cp.zeros(16 * 256 + 8, cp.uint8)[8:].reshape(16, 256)
        cpgemm.gemm(cpgemm.ScaledTensor.from_arrays(shifted, a.scales, (1, 128)), b)
    assert not bool(memory.any())


@pytest.mark.gpu
def test_gpu_no_compile_for_new_sizes(rng):
    import cupy as cp

    for m in (1, 64, 128, 512, 4096):
        a, b = operands(rng, m, 512, 256, cp)
        cpgemm.gemm(a, b)
    before = cpgemm.compile_count()
    with cpgemm.freeze():
        chosen = {cpgemm.plan_gemm(m, 512, 256).config for m in (1, 64, 128, 512, 4096)}
        for m in range(2, 600, 37):
            if cpgemm.plan_gemm(m, 512, 256).config in chosen:
                a, b = operands(rng, m, 512, 256, cp)
                cpgemm.gemm(a, b)
    assert cpgemm.compile_count() == before
