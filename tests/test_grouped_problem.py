"""Every rule of the grouped products: one test each, and what is left alone when it breaks."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from grouped_checks import CONTIGUOUS, LAYOUTS, experts, index_of, tokens

import cpgemm
from cpgemm import group_index, grouped_problem, problem
from cpgemm.errors import ArgumentError, ArgumentTypeError, DeviceError
from cpgemm.group_index import check_contents
from cpgemm.grouped_problem import MAX_GROUPS, GroupedProblem, contiguous_alignment
from cpgemm.scaled import ScaledTensor, empty_scales

BF16 = ml_dtypes.bfloat16
SIZES = [100, 0, 156]  # 256 rows packed, and 384 with aligned starts


@pytest.fixture
def flat(rng):
    return tokens(rng, 256, 256), experts(rng, 3, 16, 256)


@pytest.fixture
def slabs(rng):
    a = cpgemm.quantize(rng.standard_normal((3, 8, 256), dtype=np.float32), (1, 128))
    return a, experts(rng, 3, 16, 256)


def int32(*values):
    return np.array(values, np.int32)


def contiguous(flat, out=None, **options):
    if not set(options) & set(CONTIGUOUS):
        options["offsets"] = int32(0, 100, 100, 256)
    return lambda: GroupedProblem.of_contiguous(*flat, out, **options)


def masked(slabs, out=None, **options):
    return lambda: GroupedProblem.of_masked(*slabs, out, **{"masked_m": int32(8, 0, 3), **options})


def rejected(match, call, kind=ArgumentError):
    with pytest.raises(kind, match=match) as caught:
        call()
    message = str(caught.value)
    assert "; got " in message and message.rstrip().endswith("."), message


def test_alignment():
    assert contiguous_alignment() == 128


# ------------------------------------------------------------------------------- the frozen class


@pytest.mark.parametrize("layout", CONTIGUOUS)
def test_contiguous_problem(rng, layout):
    index, rows = index_of(layout, SIZES)
    a, b = tokens(rng, rows, 256), experts(rng, 3, 16, 256)
    p = GroupedProblem.of_contiguous(a, b, **{layout: index}, fill_padding=True)
    assert p == GroupedProblem(layout, 3, rows, 16, 256, "bfloat16", True)
    assert (p.rows, p.shape, p.index_length) == (rows, (rows, 16), index.size)


def test_masked_problem(slabs):
    p = masked(slabs, out_dtype=np.float32, expected_m=2)()
    assert p == GroupedProblem("masked", 3, 8, 16, 256, "float32")
    assert (p.rows, p.shape, p.index_length, p.k_blocks) == (24, (3, 8, 16), 3, 2)


def test_bytes_and_flops():
    p = GroupedProblem("masked", 32, 64, 4096, 7168)
    assert p.flops(640) == 2 * 640 * 4096 * 7168
    row = 7168 + 4 * 56 + 2 * 4096
    assert p.bytes(640, 32) == 640 * row + 32 * (4096 * 7168 + 4 * 56 * 32)
    assert p.bytes(0, 0) == 0


def test_layout_name():
    rejected("^layout: must be one of offsets", lambda: GroupedProblem("ragged", 1, 1, 8, 16))


@pytest.mark.parametrize("groups", [0, -1, MAX_GROUPS + 1])
def test_groups_in_range(groups):
    rejected(
        f"^groups: must be between 1 and {MAX_GROUPS}",
        lambda: GroupedProblem("ends", groups, 1, 8, 16),
    )


@pytest.mark.parametrize("groups", [2.0, True, "4"])
def test_groups_is_an_integer(groups):
    rejected("^groups: must be an integer", lambda: GroupedProblem("ends", groups, 1, 8, 16),
             ArgumentTypeError)  # fmt: skip


@pytest.mark.parametrize("size", [-1, 2**31])
def test_sizes_in_range(size):
    rejected("^m: must be between 0", lambda: GroupedProblem("offsets", 1, size, 8, 16))


def test_n_multiple_of_8():
    rejected("^n: N must be a multiple of 8", lambda: GroupedProblem("offsets", 1, 4, 12, 16))


def test_k_multiple_of_16():
    rejected("^k: K must be a multiple of 16", lambda: GroupedProblem("offsets", 1, 4, 8, 24))


def test_k_not_zero():
    rejected("^k: must not be 0", lambda: GroupedProblem("offsets", 1, 4, 8, 0))


def test_rows_of_all_slabs_in_range():
    rejected("^m: all groups together", lambda: GroupedProblem("masked", 2, 2**30, 8, 16))
    GroupedProblem("offsets", 2, 2**30, 8, 16)


def test_rows_of_all_matrices_in_range():
    rejected("^n: all groups together", lambda: GroupedProblem("offsets", 512, 1, 2**22, 16))


@pytest.mark.parametrize("fill_padding", [None, 1, np.array(True)])
def test_fill_padding_is_a_bool(flat, fill_padding):
    rejected("^fill_padding: must be True or False", contiguous(flat, fill_padding=fill_padding),
             ArgumentTypeError)  # fmt: skip


def test_fill_padding_is_not_for_slabs():
    rejected("^fill_padding: must be False for the masked layout",
             lambda: GroupedProblem("masked", 1, 4, 8, 16, fill_padding=True))  # fmt: skip


# --------------------------------------------------------------------------------------- operands


def test_operand_must_be_scaled(flat, slabs):
    rejected("^a: must be a ScaledTensor", contiguous((np.ones((2, 16)), flat[1])),
             ArgumentTypeError)  # fmt: skip
    rejected("^b: must be a ScaledTensor", masked((slabs[0], np.ones((3, 2, 16)))),
             ArgumentTypeError)  # fmt: skip


def test_granularity_of_a(flat, slabs, rng):
    wrong = cpgemm.quantize(rng.standard_normal((256, 256), dtype=np.float32), (128, 128))
    rejected(r"^a: must have granularity \(1, 128\)", contiguous((wrong, flat[1])))
    rejected(r"^a: must have granularity \(1, 128\)", masked((slabs[1], slabs[1])))


def test_granularity_of_b(flat, slabs):
    rejected(r"^b: must have granularity \(128, 128\)", contiguous((flat[0], slabs[0])))


def test_axes(flat, slabs):
    rejected("^a: must have 2 axes", contiguous((slabs[0], flat[1])))
    rejected("^a: must have 3 axes", masked((flat[0], slabs[1])))
    one = ScaledTensor.from_arrays(flat[1].data[0], flat[1].scales[0], (128, 128))
    rejected("^b: must have 3 axes", contiguous((flat[0], one)))


def test_k_of_operands_must_agree(flat, rng):
    rejected(r"^b: must have as many columns \(K\) as a, 256",
             contiguous((flat[0], experts(rng, 3, 16, 128))))  # fmt: skip


def test_groups_of_operands_must_agree(slabs, rng):
    rejected("^a: must have as many groups as b, 4",
             masked((slabs[0], experts(rng, 4, 16, 256))))  # fmt: skip


def test_b_contiguous_along_k(flat, rng):
    square = experts(rng, 3, 256, 256)
    rejected(r"^b: must be contiguous along K .*k_major", contiguous((flat[0], square.T)))


def test_operands_on_two_devices(flat, monkeypatch):
    a, _ = flat
    monkeypatch.setattr(ScaledTensor, "device", property(lambda s: "cpu" if s is a else "cuda:1"))
    rejected("^b: must be on a's device, cpu; got cuda:1", contiguous(flat))


def test_groups_of_b_are_adjacent(flat):
    a, b = flat
    codes = np.zeros((3, 24, 256), np.uint8)[:, :16]
    gap = ScaledTensor.from_arrays(codes, b.scales, (128, 128))
    rejected("^b: must hold its groups one after another without gaps", contiguous((a, gap)))


def test_groups_of_a_are_adjacent(slabs):
    a, b = slabs
    codes = np.zeros((3, 12, 256), np.uint8)[:, :8]
    gap = ScaledTensor.from_arrays(codes, a.scales, (1, 128))
    rejected("^a: must hold its groups one after another without gaps", masked((gap, b)))


def test_groups_of_scales_are_adjacent(slabs):
    a, b = slabs
    scales = np.ones((3, 4, 8), np.float32)[:, :2].swapaxes(1, 2)
    gap = ScaledTensor.from_arrays(a.data, scales, (1, 128))
    assert np.shares_memory(gap.scales, scales)
    rejected("^a.scales: must hold its groups one after another", masked((gap, b)))


def test_row_pitch_is_allowed(slabs):
    a, b = slabs
    wide_a, wide_b = np.zeros((3, 8, 512), np.uint8), np.zeros((3, 16, 512), np.uint8)
    a = ScaledTensor.from_arrays(wide_a[..., :256], a.scales, (1, 128))
    b = ScaledTensor.from_arrays(wide_b[..., :256], b.scales, (128, 128))
    masked((a, b), np.zeros((3, 8, 32), BF16)[..., :16])()


@pytest.mark.parametrize("m_max", [0, 1, 5])
def test_slabs_as_quantize_makes_them(rng, m_max):
    for k in (16, 128, 272):
        a = cpgemm.quantize(rng.standard_normal((3, m_max, k), dtype=np.float32), (1, 128))
        masked((a, experts(rng, 3, 8, k)), np.zeros((3, m_max, 8), BF16), masked_m=int32(0, 0, 0))()


def test_gpu_that_is_not_hopper(flat, monkeypatch):
    def refuse(a):
        problem.reject("a", "must be on a Hopper GPU", "another", "Move it.", kind=DeviceError)

    monkeypatch.setattr(grouped_problem, "check_device", refuse)
    rejected("must be on a Hopper GPU", contiguous(flat), DeviceError)


# -------------------------------------------------------------------------------------------- out


def out_dtypes(call, operands):
    rejected("^out_dtype: must be 'bfloat16' or 'float32'", call(operands, out_dtype="float16"),
             ArgumentTypeError)  # fmt: skip


def test_out_dtype_name(flat, slabs):
    out_dtypes(contiguous, flat)
    out_dtypes(masked, slabs)


@pytest.mark.parametrize("call", [contiguous, masked])
class TestOut:
    """``out`` obeys the same rules in both calls."""

    @pytest.fixture
    def operands(self, call, flat, slabs):
        return flat if call is contiguous else slabs

    @staticmethod
    def shape(call):
        return (256, 16) if call is contiguous else (3, 8, 16)

    def test_kind(self, call, operands):
        rejected("^out: must be a NumPy array", call(operands, [[0.0]]), ArgumentTypeError)

    def test_dtype(self, call, operands):
        rejected("^out: must have dtype bfloat16",
                 call(operands, np.zeros(self.shape(call), np.float32)),
                 ArgumentTypeError)  # fmt: skip

    def test_shape(self, call, operands):
        wrong = np.zeros((*self.shape(call)[:-1], 8), BF16)
        rejected(r"^out: must have shape \(.*, 16\)", call(operands, wrong))
        rejected("^out: must have shape", call(operands, np.zeros((8, 16), BF16)))
        rejected("^out: must have shape", call(operands, np.zeros((), BF16)))

    def test_rows_contiguous(self, call, operands):
        *outer, rows, columns = self.shape(call)
        wrong = np.zeros((*outer, columns, rows), BF16).swapaxes(-1, -2)
        rejected("^out: must be contiguous along its rows", call(operands, wrong))

    def test_overlaps_operand(self, call, operands):
        a, b = operands
        memory = np.zeros(a.data.nbytes + 64, np.uint8)
        codes = memory[: a.data.nbytes].reshape(a.shape)
        a = ScaledTensor.from_arrays(codes, a.scales, (1, 128))
        size = 2 * int(np.prod(self.shape(call)))
        out = memory[64 : 64 + size].view(BF16).reshape(self.shape(call))
        rejected("^out: must not overlap a;", call((a, b), out))

    def test_overlaps_scales(self, call, operands):
        a, b = operands
        storage = np.zeros(1 << 16, np.uint8)
        scales = storage[: b.scales.nbytes].view(np.float32).reshape(b.scales.shape)
        b = ScaledTensor.from_arrays(b.data, scales, (128, 128))
        size = 2 * int(np.prod(self.shape(call)))
        out = storage[:size].view(BF16).reshape(self.shape(call))
        rejected("^out: must not overlap b.scales", call((a, b), out))

    def test_broken_rules_leave_it_untouched(self, call, operands):
        out = np.full(self.shape(call), 7, BF16)
        name = "offsets" if call is contiguous else "masked_m"
        rejected(f"^{name}: must have shape", call(operands, out, **{name: int32(0)}))
        bad = int32(0, 1, 2, 10**6) if call is contiguous else int32(0, 1, 10**6)
        rejected(f"^{name}: must", call(operands, out, **{name: bad}))
        assert (out == 7).all()


def test_out_overlaps_the_index(flat):
    storage = np.zeros(256 * 16, BF16)
    rejected("^out: must not overlap offsets",
             contiguous(flat, storage.reshape(256, 16),
                        offsets=storage[:8].view(np.int32)))  # fmt: skip


def test_slabs_of_out_are_adjacent(slabs):
    gap = np.zeros((3, 12, 16), BF16)[:, :8]
    rejected("^out: must hold its groups one after another", masked(slabs, gap))


def test_slabs_of_one_row_do_not_overlap(rng):
    a = cpgemm.quantize(rng.standard_normal((3, 1, 256), dtype=np.float32), (1, 128))
    out = np.lib.stride_tricks.as_strided(np.zeros(64, BF16), (3, 1, 16), (16, 32, 2))
    rejected("^out: must hold its groups one after another",
             masked((a, experts(rng, 3, 16, 256)), out, masked_m=int32(1, 1, 1)))  # fmt: skip


# ----------------------------------------------------------------------------------- index arrays


def test_exactly_one_index(flat):
    offsets, ends = int32(0, 100, 100, 256), int32(100, 128, 256)
    rejected("^m_indices, offsets, ends: exactly one .*got none", contiguous(flat, offsets=None))
    rejected("exactly one .*got offsets and ends", contiguous(flat, offsets=offsets, ends=ends))


@pytest.fixture(params=LAYOUTS)
def index_call(request, flat, slabs):
    """(name, a good index array, a function of the index array that checks it)."""
    if request.param == "masked":
        return "masked_m", int32(8, 0, 3), lambda index: masked(slabs, masked_m=index)
    good = {
        "offsets": int32(0, 100, 100, 256),
        "ends": int32(100, 128, 256),
        "m_indices": np.repeat(int32(2, 0), 128),
    }[request.param]
    name = request.param
    return name, good, lambda index: contiguous(flat, **{name: index})


def test_good_index(index_call):
    _, good, check = index_call
    assert check(good)().groups == 3


def test_index_kind(index_call):
    name, good, check = index_call
    rejected(f"^{name}: must be a NumPy array, as a is; got builtins.list", check(good.tolist()),
             ArgumentTypeError)  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float32, ">i4"])
def test_index_dtype(index_call, dtype):
    name, good, check = index_call
    rejected(f"^{name}: must have dtype int32", check(good.astype(dtype)), ArgumentTypeError)


def test_index_shape(index_call):
    name, good, check = index_call
    for wrong in (good[1:], np.append(good, good[-1:]), good[None], good.reshape(-1, 1)):
        rejected(rf"^{name}: must have shape \({good.size},\)", check(wrong))


def test_index_contiguous(index_call):
    name, good, check = index_call
    rejected(f"^{name}: must be contiguous and 4-byte aligned", check(np.repeat(good, 2)[::2]))


def test_index_alignment(index_call):
    name, good, check = index_call
    memory = np.zeros(good.nbytes + 4, np.uint8)
    shifted = memory[2 : 2 + good.nbytes].view(np.int32)
    shifted[...] = good
    rejected(f"^{name}: must be contiguous and 4-byte aligned", check(shifted))


def test_index_on_another_device(index_call, monkeypatch):
    name, good, check = index_call
    monkeypatch.setattr(group_index, "device_of", lambda x: "cuda:1")
    rejected(f"^{name}: must be on a's device, cpu; got cuda:1", check(good))


@pytest.mark.parametrize("expected_m", [2.5, True, "8", np.ones((), np.int32)])
def test_expected_m_is_an_integer_of_the_host(slabs, expected_m):
    rejected("^expected_m: must be an integer of the host", masked(slabs, expected_m=expected_m),
             ArgumentTypeError)  # fmt: skip


def test_expected_m_is_not_negative(slabs):
    rejected("^expected_m: must not be negative", masked(slabs, expected_m=-1))
    for hint in (0, np.int64(3), 10**6):
        masked(slabs, expected_m=hint)()


# --------------------------------------------------------------------- contents of the index array


def contents(layout, index, groups=3, m=256):
    return lambda: check_contents(layout, groups, m, np.asarray(index, np.int32))


def test_offsets_not_negative():
    rejected(r"^offsets: must not be negative; got offsets\[0\] = -1\.",
             contents("offsets", [-1, 2, 3, 4]))  # fmt: skip


def test_offsets_monotone():
    rejected(r"^offsets: must not decrease; got offsets\[2\] = 4 after offsets\[1\] = 5\.",
             contents("offsets", [0, 5, 4, 9]))  # fmt: skip


def test_offsets_within_a():
    rejected(r"^offsets: must not exceed the rows of a, 256; got offsets\[3\] = 257\.",
             contents("offsets", [0, 5, 6, 257]))  # fmt: skip


@pytest.mark.parametrize("index", [[0, 0, 0, 0], [256] * 4, [3, 3, 200, 201], [0, 256, 256, 256]])
def test_good_offsets(index):
    contents("offsets", index)()


def test_ends_before_their_start():
    rejected(r"^ends: must not be before.*rounded up to 128; got ends\[1\] = 120 with a start of",
             contents("ends", [100, 120, 256]))  # fmt: skip
    rejected(r"^ends: .*got ends\[2\] = 100 with a start of 128", contents("ends", [100, 128, 100]))
    rejected(r"^ends: .*got ends\[0\] = -1 with a start of 0", contents("ends", [-1, 0, 0]))


def test_ends_within_a():
    rejected(r"^ends: must not exceed the rows of a, 256; got ends\[1\] = 257",
             contents("ends", [100, 257, 384]))  # fmt: skip


@pytest.mark.parametrize(
    "index", [[0, 0, 0], [100, 100, 256], [100, 128, 129], [256, 256, 256], [0, 1, 200]]
)
def test_good_ends(index):
    contents("ends", index)()


def test_an_empty_last_group_may_start_behind_a():
    contents("ends", [100, 200, 256], m=200)()
    contents("ends", [100, 200, 200], m=200)()


@pytest.mark.parametrize("wrong", [-2, 3, 2**31 - 1, -(2**31)])
def test_m_indices_name_groups(wrong):
    rejected(rf"^m_indices: must be a group, 0 to 2, or -1.*got m_indices\[130\] = {wrong}\.",
             contents("m_indices", np.repeat([0, wrong, 1], [130, 6, 120])))  # fmt: skip


@pytest.mark.parametrize(
    ("values", "lengths", "at"),
    [
        ([0, 1], [100, 156], r"\[100\] = 1 after 0"),
        ([0, 1, 2], [128, 127, 1], r"\[255\] = 2 after 1"),
        ([-1, 0], [5, 251], r"\[5\] = 0 after -1"),
        ([0, -1, 0, 1], [100, 10, 18, 128], r"\[110\] = 0 after -1"),
    ],
)
def test_m_indices_constant_within_blocks(values, lengths, at):
    rejected(f"^m_indices: must be constant within each aligned block.*got m_indices{at}",
             contents("m_indices", np.repeat(values, lengths)))  # fmt: skip


@pytest.mark.parametrize(
    ("values", "lengths"),
    [
        ([2, 0], [128, 128]),
        ([2, -1, 0, -1], [1, 127, 127, 1]),
        ([-1], [256]),
        ([1, -1, 1, -1, 1], [100, 28, 100, 28, 7]),
        ([], []),
    ],
)
def test_good_m_indices(values, lengths):
    index = np.repeat(np.array(values, np.int32), lengths)
    check_contents("m_indices", 3, index.size, index)


@pytest.mark.parametrize("wrong", [-1, 257, -(2**31), 2**31 - 1])
def test_masked_m_within_m_max(wrong):
    rejected(rf"^masked_m: must be between 0 and M_max, 256; got masked_m\[1\] = {wrong}\.",
             contents("masked", [0, wrong, 256]))  # fmt: skip


class OnGpu:
    """The little of a CuPy array that checking its contents needs."""

    device = nullcontext()

    def __init__(self, *values):
        self.values, self.reads = int32(*values), 0

    def get(self):
        self.reads += 1
        return self.values


@pytest.fixture
def capturing(monkeypatch):
    """A stand-in for CuPy whose stream says whether it is being captured."""
    state = SimpleNamespace(now=False)
    stream = SimpleNamespace(is_capturing=lambda: state.now)
    cuda = SimpleNamespace(get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(group_index, "is_cupy", lambda x: isinstance(x, OnGpu))
    return state


def test_contents_on_a_gpu_are_not_read(capturing, monkeypatch):
    monkeypatch.delenv("CPGEMM_CHECK", raising=False)
    index = OnGpu(5, 4, 3, 2)
    check_contents("offsets", 3, 256, index)
    assert index.reads == 0


def test_contents_on_a_gpu_are_checked_on_request(capturing, monkeypatch):
    monkeypatch.setenv("CPGEMM_CHECK", "1")
    rejected(r"^offsets: must not decrease; got offsets\[1\] = 4",
             lambda: check_contents("offsets", 3, 256, OnGpu(5, 4, 3, 2)))  # fmt: skip
    good = OnGpu(0, 4, 5, 6)
    check_contents("offsets", 3, 256, good)
    assert good.reads == 1


def test_contents_cannot_be_checked_during_capture(capturing, monkeypatch):
    monkeypatch.setenv("CPGEMM_CHECK", "1")
    capturing.now = True
    index = OnGpu(0, 4, 5, 6)
    rejected("^CPGEMM_CHECK: must be 0 while a graph is captured",
             lambda: check_contents("offsets", 3, 256, index))  # fmt: skip
    assert index.reads == 0


def test_scales_pitch_of_one_k_block(rng):
    """Slabs of one k-block lie apart by the rows rounded up to 4, as ``quantize`` lays them."""
    a = cpgemm.quantize(rng.standard_normal((3, 5, 128), dtype=np.float32), (1, 128))
    b = experts(rng, 3, 16, 128)
    masked((a, b), masked_m=int32(5, 0, 1))()
    wide = empty_scales(12, 1, (1, 128), groups=3)[:, :5]
    gap = ScaledTensor.from_arrays(a.data, wide, (1, 128))
    rejected(r"^a.scales: must hold its groups .*\(32 bytes apart\); got 48 bytes",
             masked((gap, b), masked_m=int32(5, 0, 1)))  # fmt: skip
