"""Checkpoints: files made by hand are read, files that are written are read by others, lazily."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cpgemm
from cpgemm import checkpoint_layers
from cpgemm.checkpoint import load_array, load_safetensors, save_safetensors
from cpgemm.errors import ArgumentError, ArgumentTypeError, DeviceError, MissingDependencyError
from cpgemm.scaled import ScaledTensor

INDEX = "model.safetensors.index.json"
Tensor = tuple[str, tuple[int, ...], bytes]


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    if request.function is not test_missing_library:
        pytest.importorskip("safetensors", reason="safetensors is not installed")


# ------------------------------------------------------------------------------ a writer by hand


def write(path: Path, tensors: Mapping[str, Tensor], *, spaces: int = 0) -> Path:
    """A file as the format's description says, tensors in the given order, header padded."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, content) in tensors.items():
        offsets = [start, start + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        start += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + spaces)
    body = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def blocks(extent: int) -> int:
    return -(-extent // 128)


def fp8_layer(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of every kind (NaN and negative zero too) and scales, as bytes and float32."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = rng.uniform(1e-4, 2e-2, (*shape[:-2], *map(blocks, shape[-2:]))).astype(np.float32)
    return codes, scales


def stored(name: str, layer: tuple[np.ndarray, np.ndarray]) -> dict[str, Tensor]:
    codes, scales = layer
    return {
        f"{name}.weight": ("F8_E4M3", codes.shape, codes.tobytes()),
        f"{name}.weight_scale_inv": ("F32", scales.shape, scales.tobytes()),
    }


def assert_is(tensor: ScaledTensor, codes: np.ndarray, scales: np.ndarray) -> None:
    assert isinstance(tensor, ScaledTensor) and tensor.granularity == (128, 128)
    for array in (tensor.data, tensor.scales):
        assert isinstance(array, np.ndarray)
    assert tensor.shape == codes.shape
    np.testing.assert_array_equal(tensor.data.view(np.uint8), codes)
    assert tensor.scales.shape == scales.shape
    np.testing.assert_array_equal(bits(tensor.scales), bits(scales))


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.itemsize}"))


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and body of a file, read by hand."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "shape", [(256, 384), (200, 144), (8, 16), (1, 1), (576, 1040), (0, 128), (128, 0)]
)
def test_reads_a_file_made_by_hand(
    shape: tuple[int, int], tmp_path: Path, rng: np.random.Generator
) -> None:
    codes, scales = fp8_layer(rng, *shape)
    other = {"other": ("BF16", (3,), bytes(6))}
    path = write(tmp_path / "a.safetensors", {**other, **stored("model.x", (codes, scales))})
    assert_is(load_safetensors(path, "model.x"), codes, scales)
    assert_is(load_safetensors(str(path), "model.x.weight"), codes, scales)


def test_scale_inv_multiplies(tmp_path: Path) -> None:
    """Values by hand: 0x38 is 1, 0xC0 is -2, 0x7E is 448, 0x01 is 2**-9."""
    codes = np.zeros((130, 256), np.uint8)
    codes[0, 0], codes[0, 128], codes[129, 0], codes[129, 255] = 0x38, 0xC0, 0x7E, 0x01
    scales = np.array([[0.5, 3.0], [0.25, 8.0]], np.float32)
    path = write(tmp_path / "a.safetensors", stored("w", (codes, scales)))
    values = load_safetensors(path, "w").dequantize()
    assert values[0, 0] == 0.5 and values[0, 128] == -6.0
    assert values[129, 0] == 112.0 and values[129, 255] == 2.0**-6
    assert np.count_nonzero(values) == 4


@pytest.mark.parametrize("spaces", range(4))
def test_any_alignment(spaces: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """Scales that the file puts at odd addresses are copied, codes never are."""
    layer = fp8_layer(rng, 136, 144)
    path = write(tmp_path / "a.safetensors", stored("w", layer), spaces=spaces)
    loaded = load_safetensors(path, "w")
    assert_is(loaded, *layer)
    assert not loaded.data.flags.writeable
    assert loaded.scales.ctypes.data % 4 == 0
    assert loaded.scales.flags.writeable == (spaces != 0)


def test_views_of_the_mapped_file(tmp_path: Path, rng: np.random.Generator) -> None:
    layer = fp8_layer(rng, 256, 256)
    path = write(tmp_path / "a.safetensors", stored("w", layer))
    loaded = load_safetensors(path, "w")
    for array in (loaded.data, loaded.scales):
        assert not array.flags.writeable and not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
        assert str(path) in mapping_at(array.ctypes.data)


def mapping_at(address: int) -> str:
    """The line of the process's memory map that holds an address."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc/self/maps")
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return line
    return ""


def test_reads_only_what_is_touched(tmp_path: Path) -> None:
    """A 64 GiB file of holes: a read of its tensors would take minutes and fill the memory."""
    shape = (1 << 18, 1 << 16)
    tensors = {"w.weight": ("F8_E4M3", shape), "w.weight_scale_inv": ("F32", (1 << 11, 1 << 9))}
    tensors["other.weight"] = ("BF16", (24, 1 << 30))
    header, start = {}, 0
    for name, (dtype, extents) in tensors.items():
        size = int(np.prod(extents)) * {"F8_E4M3": 1, "F32": 4, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": extents, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + start)
        except OSError as error:
            pytest.skip(f"no sparse file of {start >> 30} GiB here ({error})")
    assert path.stat().st_size > 1 << 35
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system fills holes")

    before = resident_bytes()
    loaded = load_safetensors(path, "w")
    part = load_safetensors(path, "w", rows=slice(1 << 17, 1 << 18))
    assert loaded.shape == shape and part.shape == (1 << 17, 1 << 16)
    assert resident_bytes() - before < 32 << 20
    assert not loaded.data.view(np.uint8)[-1].any() and loaded.scales[-1, -1] == 0
    assert load_array(path, "other")[-1, -1] == 0
    assert resident_bytes() - before < 32 << 20
    assert path.stat().st_blocks * 512 <= 1 << 20


def resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        pytest.skip("no /proc/self/statm")
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_one_map_for_a_file_as_long_as_arrays_live(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors: dict[str, Tensor] = {}
    for i in range(20):
        tensors.update(stored(f"layers.{i}", fp8_layer(rng, 128, 128)))
    path = write(tmp_path / "a.safetensors", tensors)

    def maps() -> int:
        mapping_at(0)  # skips where there is no /proc
        return Path("/proc/self/maps").read_text().count(str(path))

    loaded = [load_safetensors(path, f"layers.{i}") for i in range(20)]
    assert maps() == 1
    last = loaded.pop()
    loaded.clear()
    assert maps() == 1
    np.testing.assert_array_equal(
        last.data.view(np.uint8).tobytes(), tensors["layers.19.weight"][2]
    )
    del last
    assert maps() == 0


def test_a_replaced_file_is_read_anew(tmp_path: Path, rng: np.random.Generator) -> None:
    old, new = fp8_layer(rng, 128, 256), fp8_layer(rng, 256, 128)
    path = write(tmp_path / "a.safetensors", stored("w", old))
    first = load_safetensors(path, "w")
    os.replace(write(tmp_path / "b.safetensors", stored("w", new)), path)
    assert_is(load_safetensors(path, "w"), *new)
    assert_is(first, *old)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("BF16", ml_dtypes.bfloat16),
        ("F16", np.float16),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
    ],
)
def test_shorter_scales_are_widened(
    code: str, dtype: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    codes, _ = fp8_layer(rng, 200, 300)
    scales = 2.0 ** rng.integers(-14, 3, (2, 3))
    if code != "F8_E8M0":
        scales *= 1.5
    narrow = scales.astype(dtype)
    tensors = stored("w", (codes, scales))
    tensors["w.weight_scale_inv"] = (code, scales.shape, narrow.tobytes())
    path = write(tmp_path / "a.safetensors", tensors)
    if code == "F8_E8M0":
        skip_unless_known(path)
    assert_is(load_safetensors(path, "w"), codes, scales.astype(np.float32))


def skip_unless_known(path: Path) -> None:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            return
    except safetensors.SafetensorError as error:
        pytest.skip(f"this safetensors knows the dtype not ({error})")


def test_scale_format(tmp_path: Path, rng: np.random.Generator) -> None:
    path = write(tmp_path / "a.safetensors", stored("w", fp8_layer(rng, 128, 128)))
    assert load_safetensors(path, "w").scale_format == "float32"
    assert load_safetensors(path, "w", scale_format="pow2").scale_format == "pow2"
    with pytest.raises(ArgumentError, match="scale_format"):
        load_safetensors(path, "w", scale_format="ue8m0")  # type: ignore[arg-type]


def test_a_gemm_from_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    w = cpgemm.quantize(rng.standard_normal((136, 272), np.float32), (128, 128))
    x = cpgemm.quantize(rng.standard_normal((5, 272), np.float32))
    path = write(tmp_path / "a.safetensors", stored("w", (w.data.view(np.uint8), w.scales)))
    got = cpgemm.gemm(x, load_safetensors(path, "w"))
    np.testing.assert_array_equal(bits(got), bits(cpgemm.gemm(x, w)))


# --------------------------------------------------------------------------- folders and indices


@pytest.fixture
def sharded(tmp_path: Path, rng: np.random.Generator) -> SimpleNamespace:
    """Two layers in three files; the scales of the second are in another file than its codes."""
    layers = {"m.up": fp8_layer(rng, 256, 128), "m.down": fp8_layer(rng, 128, 256)}
    up, down = (stored(name, layer) for name, layer in layers.items())
    code, scale = (dict([item]) for item in down.items())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, tensors in zip(names, (up, code, scale), strict=True):
        write(tmp_path / name, tensors)
    weight_map = {name: names[0] for name in up}
    weight_map |= {name: names[1] for name in code} | {name: names[2] for name in scale}
    index = tmp_path / INDEX
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return SimpleNamespace(
        folder=tmp_path,
        index=index,
        files=[tmp_path / name for name in names],
        weight_map=weight_map,
        layers=layers,
    )


def test_every_kind_of_path(sharded: SimpleNamespace) -> None:
    for path in (sharded.folder, str(sharded.folder), sharded.index, sharded.files):
        for name, layer in sharded.layers.items():
            assert_is(load_safetensors(path, name), *layer)
    sharded.index.unlink()  # all files of the folder then
    for name, layer in sharded.layers.items():
        assert_is(load_safetensors(sharded.folder, name), *layer)


def test_the_home_folder(
    sharded: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setenv("HOME", str(sharded.folder))
    assert_is(load_safetensors("~", "m.up"), *sharded.layers["m.up"])
    w = cpgemm.quantize(rng.standard_normal((128, 128), np.float32), (128, 128))
    save_safetensors({"w": w}, "~/own.safetensors")
    assert_is(load_safetensors("~/own.safetensors", "w"), w.data.view(np.uint8), w.scales)


def test_links_to_files(sharded: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the cache of a hub lays out a snapshot."""
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in (*sharded.files, sharded.index):
        (snapshot / file.name).symlink_to(file)
    assert_is(load_safetensors(snapshot, "m.down"), *sharded.layers["m.down"])


def test_an_index_may_omit_scales(sharded: SimpleNamespace) -> None:
    del sharded.weight_map["m.up.weight_scale_inv"]
    sharded.index.write_text(json.dumps({"weight_map": sharded.weight_map}))
    assert_is(load_safetensors(sharded.folder, "m.up"), *sharded.layers["m.up"])


def test_an_index_must_stay_in_its_folder(sharded: SimpleNamespace) -> None:
    outside = sharded.folder / "sub"
    outside.mkdir()
    for escape in (f"../{sharded.files[0].name}", str(sharded.files[0])):
        weight_map = {name: escape for name in sharded.weight_map}
        (outside / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ArgumentError, match="outside its folder"):
            load_safetensors(outside, "m.up")


def test_an_index_that_lies(sharded: SimpleNamespace) -> None:
    sharded.weight_map["m.up.weight"] = sharded.files[1].name
    sharded.index.write_text(json.dumps({"weight_map": sharded.weight_map}))
    with pytest.raises(ArgumentError, match=r"m\.up\.weight, which is not in model-00002"):
        load_safetensors(sharded.folder, "m.up")
    sharded.files[0].unlink()
    sharded.weight_map["m.up.weight"] = sharded.files[0].name
    sharded.index.write_text(json.dumps({"weight_map": sharded.weight_map}))
    with pytest.raises(ArgumentError, match=r"model-00001.*No such file"):
        load_safetensors(sharded.folder, "m.up")
    assert_is(load_safetensors(sharded.folder, "m.down"), *sharded.layers["m.down"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ArgumentError, match="path: must have an index with"):
        load_safetensors(tmp_path, "w")


# ------------------------------------------------------------------------- stacks, parts, slices


@pytest.fixture
def experts(tmp_path: Path, rng: np.random.Generator) -> SimpleNamespace:
    """Four experts as DeepSeek names them: gate and up (128, 272), down (272, 128)."""
    layers = {}
    for e in range(4):
        for part, shape in (("gate_proj", (128, 272)), ("up_proj", (128, 272))):
            layers[f"mlp.experts.{e}.{part}"] = fp8_layer(rng, *shape)
        layers[f"mlp.experts.{e}.down_proj"] = fp8_layer(rng, 272, 128)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors.update(stored(name, layer))
    return SimpleNamespace(path=write(tmp_path / "moe.safetensors", tensors), layers=layers)


def test_stacked_experts(experts: SimpleNamespace) -> None:
    order = [2, 0, 3, 1]
    names = [f"mlp.experts.{e}.down_proj" for e in order]
    wanted = [experts.layers[name] for name in names]
    codes, scales = (np.stack(arrays) for arrays in zip(*wanted, strict=True))
    loaded = load_safetensors(experts.path, names)
    assert_is(loaded, codes, scales)
    assert loaded.is_k_major
    one = load_safetensors(experts.path, names[:1])
    assert_is(one, codes[:1], scales[:1])


def test_parts_join_rows(experts: SimpleNamespace) -> None:
    names = [f"mlp.experts.{e}" for e in range(4)]
    parts = ["gate_proj", "up_proj"]
    joined = [
        [
            np.concatenate(arrays)
            for arrays in zip(*(experts.layers[f"{name}.{part}"] for part in parts), strict=True)
        ]
        for name in names
    ]
    codes, scales = (np.stack(arrays) for arrays in zip(*joined, strict=True))
    assert_is(load_safetensors(experts.path, names, parts=parts), codes, scales)
    assert_is(load_safetensors(experts.path, names[1], parts=parts), codes[1], scales[1])


def test_parts_of_other_heights(tmp_path: Path, rng: np.random.Generator) -> None:
    """The last part may be ragged; before the last, a block would hold rows of two layers."""
    layers = {"a.q": fp8_layer(rng, 256, 128), "a.kv": fp8_layer(rng, 72, 128)}
    tensors = {**stored("a.q", layers["a.q"]), **stored("a.kv", layers["a.kv"])}
    path = write(tmp_path / "a.safetensors", tensors)
    codes, scales = (np.concatenate(pair) for pair in zip(*layers.values(), strict=True))
    assert_is(load_safetensors(path, "a", parts=("q", "kv")), codes, scales)
    with pytest.raises(ArgumentError, match=r"parts: all but the last .* a\.kv of shape \(72, 128"):
        load_safetensors(path, "a", parts=("kv", "q"))


def test_a_grouped_product_from_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    w = cpgemm.quantize(rng.standard_normal((3, 64, 256), np.float32), (128, 128))
    x = cpgemm.quantize(rng.standard_normal((20, 256), np.float32))
    tensors = {
        f"experts.{e}.up_proj": ScaledTensor(w.data[e], w.scales[e], (128, 128)) for e in range(3)
    }
    save_safetensors(tensors, tmp_path / "a.safetensors")
    loaded = load_safetensors(tmp_path, list(tensors))
    offsets = np.array([0, 5, 5, 20], np.int32)
    got = cpgemm.grouped_gemm_contiguous(x, loaded, offsets=offsets)
    wanted = cpgemm.grouped_gemm_contiguous(x, w, offsets=offsets)
    np.testing.assert_array_equal(bits(got), bits(wanted))


def test_a_layer_stored_as_a_stack(tmp_path: Path, rng: np.random.Generator) -> None:
    layer = fp8_layer(rng, 3, 136, 144)
    path = write(tmp_path / "a.safetensors", stored("w", layer))
    loaded = load_safetensors(path, "w")
    assert_is(loaded, *layer)
    assert not loaded.data.flags.writeable
    half = load_safetensors(path, "w", rows=slice(128, None))
    assert_is(half, layer[0][:, 128:], layer[1][:, 1:])
    for wrong in ({"name": ["w"]}, {"name": ["w", "w"]}):
        with pytest.raises(ArgumentError, match="must have 2 axes"):
            load_safetensors(path, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [None, slice(None), slice(128, 256), slice(256, 300), slice(0, 0)])
@pytest.mark.parametrize("columns", [None, slice(128, 256), slice(128, None)])
def test_slices(
    rows: slice | None, columns: slice | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    layer = fp8_layer(rng, 300, 400)
    path = write(tmp_path / "a.safetensors", stored("w", layer))
    r, c = (slice(0, None) if chosen is None else chosen for chosen in (rows, columns))
    codes = layer[0][r, c]
    whole = ScaledTensor.from_arrays(layer[0], layer[1], (128, 128)).dequantize()
    loaded = load_safetensors(path, "w", rows=rows, columns=columns)
    np.testing.assert_array_equal(loaded.data.view(np.uint8), codes)
    np.testing.assert_array_equal(bits(loaded.dequantize()), bits(whole[r, c]))
    assert not loaded.data.flags.owndata
    stack = load_safetensors(path, ["w", "w"], rows=rows, columns=columns)
    for group in stack.dequantize():
        np.testing.assert_array_equal(bits(group), bits(whole[r, c]))


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (slice(64, 128), ArgumentError),
        (slice(0, 100), ArgumentError),
        (slice(0, 512), ArgumentError),
        (slice(-128, None), ArgumentError),
        (slice(256, 128), ArgumentError),
        (slice(0, 256, 2), ArgumentTypeError),
        ((0, 128), ArgumentTypeError),
        (3, ArgumentTypeError),
    ],
)
def test_slices_that_cut_blocks(
    rows: Any, kind: type[Exception], tmp_path: Path, rng: np.random.Generator
) -> None:
    path = write(tmp_path / "a.safetensors", stored("w", fp8_layer(rng, 300, 300)))
    for argument in ("rows", "columns"):
        with pytest.raises(kind, match=f"^{argument}: "):
            load_safetensors(path, "w", **{argument: rows})


def test_tensor_parallel_slices_make_the_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    """Two ranks: the first layer split by rows, the second by columns, their products added."""
    w = cpgemm.quantize(rng.standard_normal((256, 512), np.float32), (128, 128))
    x = rng.standard_normal((3, 512), np.float32)
    path = tmp_path / "a.safetensors"
    save_safetensors({"w": w}, path)
    whole = cpgemm.gemm(cpgemm.quantize(x), w, out_dtype="float32")
    halves = (slice(0, 256), slice(256, 512))
    by_columns = sum(
        cpgemm.gemm(
            cpgemm.quantize(np.ascontiguousarray(x[:, half])),
            load_safetensors(path, "w", columns=half),
            out_dtype="float32",
        )
        for half in halves
    )
    np.testing.assert_allclose(by_columns, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    by_rows = [
        cpgemm.gemm(cpgemm.quantize(x), load_safetensors(path, "w", rows=half), out_dtype="float32")
        for half in (slice(0, 128), slice(128, None))
    ]
    np.testing.assert_array_equal(np.concatenate(by_rows, axis=1), whole)


# --------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("BF16", ml_dtypes.bfloat16),
        ("F32", np.float32),
        ("F16", np.float16),
        ("F64", np.float64),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("I32", np.int32),
        ("U8", np.uint8),
        ("BOOL", np.bool_),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
def test_load_array(
    code: str, dtype: Any, shape: tuple[int, ...], tmp_path: Path, rng: np.random.Generator
) -> None:
    array = np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    tensors = {"a": ("U8", (1,), b"x"), "norm.weight": (code, shape, array.tobytes())}
    path = write(tmp_path / "a.safetensors", tensors)
    for name in ("norm", "norm.weight"):
        got = load_array(path, name)
        assert got.dtype == array.dtype and got.shape == shape and not got.flags.writeable
        assert got.tobytes() == array.tobytes()


def test_load_array_of_an_unknown_dtype(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": ("F4", (2,), b"x")})
    skip_unless_known(path)
    with pytest.raises(ArgumentTypeError, match="a of dtype F4"):
        load_array(path, "a")


def test_the_mend_for_a_layer_that_is_not_quantised(tmp_path: Path) -> None:
    """The message names a way that works."""
    w = np.linspace(-1, 1, 128 * 256).astype(ml_dtypes.bfloat16).reshape(128, 256)
    path = tmp_path / "a.safetensors"
    save_safetensors({"lm_head.weight": w}, path)
    with pytest.raises(ArgumentTypeError, match=r"dtype BF16\. It is not quantised: .*load_array"):
        load_safetensors(path, "lm_head")
    quantized = cpgemm.quantize(cpgemm.checkpoint.load_array(path, "lm_head"), (128, 128))
    assert quantized.shape == w.shape


# --------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("shape", [(256, 384), (200, 144), (1, 1), (3, 136, 144), (0, 128)])
def test_round_trip(shape: tuple[int, ...], tmp_path: Path, rng: np.random.Generator) -> None:
    codes, scales = fp8_layer(rng, *shape)
    special = np.array([0x7FC00001, 0x7F800000, 0x80000000, 1], np.uint32).view(np.float32)
    scales.reshape(-1)[:4] = special[: scales.size]
    tensor = ScaledTensor.from_arrays(codes, scales, (128, 128))
    norm = rng.standard_normal(7).astype(ml_dtypes.bfloat16)
    path = tmp_path / "a.safetensors"
    step = np.array(3, np.int64)
    save_safetensors({"m.w": tensor, "m.norm.weight": norm, "step": step}, path)
    assert_is(load_safetensors(path, "m.w"), codes, scales)
    np.testing.assert_array_equal(bits(load_array(path, "m.norm")), bits(norm))
    assert load_array(path, "step").shape == () and load_array(path, "step") == 3


def test_what_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    """Read by hand: names, dtypes, shapes, bytes, metadata."""
    codes, scales = fp8_layer(rng, 200, 144)
    tensor = ScaledTensor.from_arrays(codes, scales, (128, 128))
    norm = rng.standard_normal(5, np.float32)
    path = tmp_path / "a.safetensors"
    save_safetensors({"m.a": tensor, "m.b.weight": tensor, "norm": norm}, path)
    header, body = parts_of(path)
    assert header.pop("__metadata__") == {"format": "pt"}
    wanted = {"norm": ("F32", norm)}
    for name in ("m.a", "m.b"):
        wanted[f"{name}.weight"] = ("F8_E4M3", codes)
        wanted[f"{name}.weight_scale_inv"] = ("F32", scales)
    assert header.keys() == wanted.keys()
    for name, (dtype, array) in wanted.items():
        start, stop = header[name]["data_offsets"]
        assert (header[name]["dtype"], tuple(header[name]["shape"])) == (dtype, array.shape)
        assert body[start:stop] == array.tobytes()
    save_safetensors({"norm": norm}, path, {"made by": "a test"})
    header, body = parts_of(path)
    assert header["__metadata__"] == {"made by": "a test"} and body == norm.tobytes()


def test_written_for_torch(tmp_path: Path, rng: np.random.Generator) -> None:
    """As those who read such checkpoints do it: codes to float, times the scale of the block."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    w = rng.standard_normal((200, 272), np.float32)
    tensor = cpgemm.quantize(w, (128, 128))
    path = tmp_path / "a.safetensors"
    save_safetensors({"w": tensor}, path)
    found = load_file(path)
    assert found["w.weight"].dtype == torch.float8_e4m3fn
    scale = found["w.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    values = found["w.weight"].float() * scale[:200, :272]
    np.testing.assert_array_equal(bits(values.numpy()), bits(tensor.dequantize()))


def test_written_by_torch(tmp_path: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    w = torch.from_numpy(rng.standard_normal((256, 144), np.float32)).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(rng.uniform(0.1, 1, (2, 2)).astype(np.float32))
    path = tmp_path / "a.safetensors"
    save_file({"w.weight": w, "w.weight_scale_inv": scales}, path)
    assert_is(load_safetensors(path, "w"), w.view(torch.uint8).numpy(), scales.numpy())


def test_views_are_written_as_they_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """Turned and strided memory, which the library would write as it lies."""
    tensor = cpgemm.quantize(rng.standard_normal((128, 384), np.float32), (128, 128))
    plain = rng.standard_normal((6, 8), np.float32)
    path = tmp_path / "a.safetensors"
    save_safetensors({"w": tensor.T, "plain": plain[::2, 1::3].T}, path)
    turned = tensor.data.view(np.uint8).T
    assert_is(load_safetensors(path, "w"), turned, tensor.scales.T)
    np.testing.assert_array_equal(load_array(path, "plain"), plain[::2, 1::3].T)


def test_a_mapped_file_can_be_replaced(tmp_path: Path, rng: np.random.Generator) -> None:
    layer = fp8_layer(rng, 256, 256)
    path = write(tmp_path / "a.safetensors", stored("w", layer))
    loaded = load_safetensors(path, "w")
    half = load_safetensors(path, "w", rows=slice(0, 128))
    save_safetensors({"w": half}, path)
    assert_is(loaded, *layer)
    assert_is(load_safetensors(path, "w"), layer[0][:128], layer[1][:1])


def test_nothing_is_left_of_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    import safetensors.numpy

    layer = fp8_layer(rng, 128, 128)
    path = write(tmp_path / "a.safetensors", stored("w", layer))

    def half(_tensors: object, filename: str, metadata: object = None) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors({"w": load_safetensors(path, "w")}, path)
    assert os.listdir(tmp_path) == [path.name]
    assert_is(load_safetensors(path, "w"), *layer)


def test_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    save_safetensors({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    plain, made = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in
                   ("plain", "a.safetensors"))  # fmt: skip
    assert plain == made


# ---------------------------------------------------------------------------------------- errors


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: load_safetensors(tmp_path, "w"),
        lambda: load_array(tmp_path, "w"),
        lambda: save_safetensors({}, tmp_path / "a.safetensors"),
    ):
        with pytest.raises(MissingDependencyError, match="pip install safetensors"):
            call()
    assert not os.listdir(tmp_path)


def test_missing_cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingDependencyError, match=r"cupy: loading to 'cuda' needs it.*cuda12"):
        load_safetensors(tmp_path, "w", device="cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:-1", None, 0])
def test_bad_device(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^device: must be 'cpu', 'cuda' or"):
        load_safetensors(tmp_path, "w", device=device)


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    with pytest.raises(DeviceError, match=r"^device: must be a GPU that is there; there are \d"):
        load_safetensors(tmp_path, "w", device="cuda:64")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("nowhere", ArgumentError),
        ("nowhere/model.safetensors", ArgumentError),
        ("nowhere.json", ArgumentError),
        ("no\0where", ArgumentError),
        ("empty", ArgumentError),
        ([], ArgumentError),
        (["nowhere"], ArgumentError),
        (["empty"], ArgumentError),
        (None, ArgumentTypeError),
        (3, ArgumentTypeError),
        ([3], ArgumentTypeError),
        ({"a": 1}, ArgumentTypeError),
    ],
)
def test_bad_path(
    path: Any, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind, match=r"^path: must "):
        load_safetensors(path, "w")


@pytest.mark.parametrize("name", [[], (), 3, None, [3], ["a", None], {"a"}])
def test_bad_name(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^name: must be a string or a list of strings"):
        load_safetensors(tmp_path, name)


def test_bad_parts(experts: SimpleNamespace) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^parts: must be a list of strings"):
        load_safetensors(experts.path, "mlp.experts.0", parts="gate_proj")
    with pytest.raises(ArgumentError, match=r"parts: must have as many columns .*down_proj"):
        load_safetensors(experts.path, "mlp.experts.0", parts=["gate_proj", "down_proj"])
    with pytest.raises(ArgumentError, match=r"name: layers that are stacked must have one shape"):
        load_safetensors(experts.path, ["mlp.experts.0.up_proj", "mlp.experts.0.down_proj"])


def test_names_that_come_close(experts: SimpleNamespace) -> None:
    with pytest.raises(ArgumentError, match=r"Did you mean .*'mlp\.experts\.2\.gate_proj'"):
        load_safetensors(experts.path, "mlp.expert.2.gate_prj.weight")
    with pytest.raises(
        ArgumentError, match=r"'0'\. It has 'mlp.experts.0.down_proj', .* and others\.$"
    ):
        load_safetensors(experts.path, "0")


def test_a_layer_without_scales(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = stored("m.w", fp8_layer(rng, 128, 128))
    del tensors["m.w.weight_scale_inv"]
    tensors["m.w.weight_scale"] = ("F32", (), bytes(4))
    tensors["m.w2.weight_scale_inv"] = ("F32", (1, 1), bytes(4))
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(
        ArgumentError,
        match=r"here m\.w\.weight_scale_inv; got no such tensor, but m\.w\.weight_scale beside",
    ):
        load_safetensors(path, "m.w")


@pytest.mark.parametrize(
    ("weight", "scale", "match"),
    [
        (("F8_E5M2", (128, 128)), ("F32", (1, 1)), r"dtype F8_E5M2\. The kernels multiply e4m3"),
        (("U8", (128, 128)), ("F32", (1, 1)), r"w\.weight of dtype U8\. The kernels"),
        (("F32", (128, 32)), ("F32", (1, 1)), r"dtype F32\. It is not quantised"),
        (("F8_E4M3", (128, 128)), ("F64", (1, 1)), r"weight_scale_inv of dtype F64"),
        (("F8_E4M3", (128, 128)), ("F32", ()), r"shape \(1, 1\); got .* scales of shape \(\)"),
        (("F8_E4M3", (128, 128)), ("F32", (1, 128)), r"scales of shape \(1, 128\)"),
        (("F8_E4M3", (136, 128)), ("F32", (1, 1)), r"here of shape \(2, 1\)"),
        (("F8_E4M3", (128,)), ("F32", (1,)), r"must name a layer of shape \(N, K\)"),
        (("F8_E4M3", (0, 128, 128)), ("F32", (0, 1, 1)), r"must name a layer of shape \(N, K\)"),
    ],
)
def test_layers_of_other_formats(
    weight: tuple[str, tuple[int, ...]],
    scale: tuple[str, tuple[int, ...]],
    match: str,
    tmp_path: Path,
) -> None:
    size = {"F32": 4, "F64": 8}
    tensors = {
        name: (dtype, shape, bytes(int(np.prod(shape)) * size.get(dtype, 1)))
        for name, (dtype, shape) in {"w.weight": weight, "w.weight_scale_inv": scale}.items()
    }
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^name: .*{match}"):
        load_safetensors(path, "w")


def file_of(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def edited(old: bytes, new: bytes) -> Callable[[bytes, bytes], bytes]:
    """Another text in the header, whose length stays right."""

    def edit(header: bytes, body: bytes) -> bytes:
        assert header.count(old) == 1
        return file_of(header.replace(old, new), body)

    return edit


# Of a layer (128, 128) whose scale follows its codes.
DAMAGE: dict[str, Callable[[bytes, bytes], bytes]] = {
    "empty": lambda header, body: b"",
    "seven bytes": lambda header, body: file_of(header, body)[:7],
    "no header": lambda header, body: file_of(header, body)[:8],
    "half a header": lambda header, body: file_of(header, body)[: 8 + len(header) // 2],
    "half the tensors": lambda header, body: file_of(header, body[: len(body) // 2]),
    "one byte short": lambda header, body: file_of(header, body[:-1]),
    "one byte long": lambda header, body: file_of(header, body + b"x"),
    "an enormous header": lambda header, body: (2**62).to_bytes(8, "little") + header + body,
    "a Git LFS pointer": lambda header, body: b"version https://git-lfs.github.com/spec/v1\noid",
    "no JSON": lambda header, body: file_of(b"x" * len(header), body),
    "overlap": edited(b"[16384, 16388]", b"[16380, 16384]"),
    "beyond the end": edited(b"[16384, 16388]", b"[16384, 99999]"),
    "a shape that does not fit": edited(b"[128, 128]", b"[128, 129]"),
    "negative extents": edited(b"[128, 128]", b"[-128, -128]"),
    "an unknown dtype": edited(b"F8_E4M3", b"F8_E9M9"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage: str, tmp_path: Path, rng: np.random.Generator) -> None:
    path = write(tmp_path / "a.safetensors", stored("w", fp8_layer(rng, 128, 128)))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(DAMAGE[damage](content[8 : 8 + length], content[8 + length :]))
    for load in (load_safetensors, load_array):
        with pytest.raises(ArgumentError, match=r"^path: must be a whole safetensors file; got"):
            load(path, "w")


def test_damaged_headers_never_crash(tmp_path: Path, rng: np.random.Generator) -> None:
    """Random bytes of the header changed: the layer is read or refused, nothing else."""
    path = write(tmp_path / "a.safetensors", stored("w", fp8_layer(rng, 128, 128)))
    content = np.frombuffer(path.read_bytes(), np.uint8)
    length = int.from_bytes(content[:8].tobytes(), "little")
    refused = 0
    for i in range(300):
        changed = content.copy()
        where = rng.integers(0, 8 + length, rng.integers(1, 4))
        changed[where] = rng.choice(np.frombuffer(b'0123456789{}[]",: \xffx\x00', np.uint8))
        other = tmp_path / f"{i}.safetensors"
        changed.tofile(other)
        try:
            assert load_safetensors(other, "w").shape == (128, 128)
        except (ArgumentError, ArgumentTypeError):
            refused += 1
        other.unlink()
    assert refused > 100


def test_a_map_is_not_taken_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Replaced between the look at its size and the map: offsets would be those of the old one."""
    from cpgemm import checkpoint_files

    path = write(tmp_path / "a.safetensors", stored("w", fp8_layer(rng, 128, 128)))
    file = checkpoint_files.File(path, checkpoint_files._stamp_of(path))
    os.replace(write(tmp_path / "b", stored("w", fp8_layer(rng, 128, 128))), path)
    with pytest.raises(ArgumentError, match="replaced while it was read"):
        file.array("w.weight")


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_arrays_of_other_libraries(
    framework: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip(framework)
    values = rng.standard_normal((3, 5), np.float32)
    narrow = rng.standard_normal(7).astype(ml_dtypes.bfloat16)
    if framework == "torch":
        import torch

        wide = torch.from_numpy(values)
        tensors = {"wide": wide, "turned": wide.T}
        tensors["narrow"] = torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16)
    else:
        import jax.numpy as jnp

        wide = jnp.asarray(values)
        tensors = {"wide": wide, "turned": wide.T, "narrow": jnp.asarray(narrow)}
    path = tmp_path / "a.safetensors"
    save_safetensors(tensors, path)
    for name, wanted in (("wide", values), ("turned", values.T), ("narrow", narrow)):
        got = load_array(path, name)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(bits(got), bits(wanted))


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ([("a", np.zeros(3))], "^tensors: must be a mapping"),
        ({3: np.zeros(3)}, "^tensors: names must be strings"),
        ({"__metadata__": np.zeros(3)}, "^tensors: names must be strings, and not"),
        ({"a": [1.0]}, r"^tensors\['a'\]: .*got list"),
        ({"a": np.float32(3)}, r"^tensors\['a'\]: .*got float32"),
        ({"a": np.zeros(3, np.complex128)}, r"^tensors\['a'\]: .*got complex128"),
        ({"a": np.array(["x"])}, r"^tensors\['a'\]: .*got <U1"),
    ],
)
def test_tensors_that_cannot_be_saved(tensors: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=match):
        save_safetensors(tensors, tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)


def test_scaled_tensors_that_cannot_be_saved(tmp_path: Path) -> None:
    rows = cpgemm.quantize(np.ones((128, 128), np.float32))
    with pytest.raises(ArgumentError, match=r"granularity \(128, 128\); got a with \(1, 128\)"):
        save_safetensors({"a": rows}, tmp_path / "a.safetensors")
    w = cpgemm.quantize(np.ones((128, 128), np.float32), (128, 128))
    for names in (("a", "a.weight"), ("a.weight", "a")):
        with pytest.raises(ArgumentError, match=r"'a\.weight' twice"):
            save_safetensors({name: w for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ArgumentError, match="twice"):
        save_safetensors({"a": w, "a.weight_scale_inv": np.ones(1)}, tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)


def test_bad_places_and_metadata(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "a.safetensors"):
        with pytest.raises(ArgumentError, match=r"^path: must be a file in a folder that exists"):
            save_safetensors({}, path)
    with pytest.raises(ArgumentTypeError, match="Tensors come first"):
        save_safetensors({}, {"a": 1})  # type: ignore[arg-type]
    for metadata in ({"a": 1}, {1: "a"}, "pt"):
        with pytest.raises(ArgumentTypeError, match=r"^metadata: must be a mapping from strings"):
            save_safetensors({}, tmp_path / "a", metadata)  # type: ignore[arg-type]
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------ on a GPU


def test_copies_by_address(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """The calls for a GPU, with a runtime that copies on the host: sizes, pitches, their order."""
    calls = []

    def memcpy(dst: int, src: int, size: int, kind: int, stream: int) -> None:
        calls.append(("1D", kind, stream))
        ctypes.memmove(dst, src, size)

    def memcpy_2d(
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: int,
        stream: int,
    ) -> None:
        calls.append(("2D", kind, stream))
        for row in range(height):
            ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

    runtime = SimpleNamespace(memcpyAsync=memcpy, memcpy2DAsync=memcpy_2d, memcpyHostToDevice=1)
    stream = SimpleNamespace(ptr=77)
    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, get_current_stream=lambda: stream))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(checkpoint_layers, "is_cupy", lambda array: True)
    source = rng.integers(0, 256, (40, 300), dtype=np.uint8)
    for rows, columns, pitch, kind in (
        (slice(0, 40), slice(0, 300), 300, "1D"),
        (slice(8, 40), slice(0, 300), 300, "1D"),
        (slice(0, 40), slice(0, 300), 304, "2D"),
        (slice(8, 39), slice(128, 256), 128, "2D"),
        (slice(8, 39), slice(128, 300), 176, "2D"),
    ):
        part = source[rows, columns]
        memory = np.full((part.shape[0] + 1, pitch), 170, np.uint8)
        checkpoint_layers.copy_to(memory[:-1, : part.shape[1]], part)
        assert calls.pop() == (kind, 1, 77) and not calls
        np.testing.assert_array_equal(memory[:-1, : part.shape[1]], part)
        assert (memory[:-1, part.shape[1] :] == 170).all() and (memory[-1] == 170).all()
    checkpoint_layers.copy_to(memory[:0], source[:0, :176])
    assert not calls


def on_host(tensor: ScaledTensor) -> ScaledTensor:
    return ScaledTensor(
        tensor.data.view(np.uint8).get().view(ml_dtypes.float8_e4m3fn),
        tensor.scales.get(),
        tensor.granularity,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"name": "mlp.experts.1.up_proj"},
        {"name": "mlp.experts.1.down_proj"},
        {"name": "mlp.experts.1.up_proj", "columns": slice(128, None)},
        {"name": "mlp.experts.1.down_proj", "rows": slice(128, 256)},
        {"name": [f"mlp.experts.{e}.down_proj" for e in range(4)]},
        {"name": [f"mlp.experts.{e}" for e in range(4)], "parts": ["gate_proj", "up_proj"]},
        {"name": ["mlp.experts.3.down_proj"], "rows": slice(256, None)},
    ],
    ids=str,
)
def test_gpu_load_equals_host_load(options: dict[str, Any], experts: SimpleNamespace) -> None:
    import cupy

    wanted = load_safetensors(experts.path, **options)
    streams = [contextlib.nullcontext(), cupy.cuda.Stream(non_blocking=True)]
    for device in ("cuda", f"cuda:{cupy.cuda.Device().id}"):
        for stream in streams:
            with stream:
                loaded = load_safetensors(experts.path, device=device, **options)
            assert isinstance(loaded.data, cupy.ndarray) and loaded.is_k_major
            assert loaded.device == f"cuda:{cupy.cuda.Device().id}"
            assert_is(on_host(loaded), wanted.data.view(np.uint8), wanted.scales)


@pytest.mark.gpu
def test_gpu_load_of_a_stored_stack(tmp_path: Path, rng: np.random.Generator) -> None:
    layer = fp8_layer(rng, 3, 136, 152)  # rows of 152 bytes get a pitch of 160
    path = write(tmp_path / "a.safetensors", stored("w", layer))
    loaded = load_safetensors(path, "w", device="cuda")
    assert loaded.is_k_major and loaded.data.strides[-2] == 160
    assert_is(on_host(loaded), *layer)


@pytest.mark.gpu
def test_gpu_product_from_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    import cupy

    w = cpgemm.quantize(cupy.asarray(rng.standard_normal((256, 512), np.float32)), (128, 128))
    x = cpgemm.quantize(cupy.asarray(rng.standard_normal((33, 512), np.float32)))
    path = tmp_path / "a.safetensors"
    save_safetensors({"w": w, "norm": cupy.arange(5, dtype=np.float32)}, path)
    loaded = load_safetensors(path, "w", device="cuda")
    np.testing.assert_array_equal(loaded.data.view(np.uint8).get(), w.data.view(np.uint8).get())
    got, wanted = (cpgemm.gemm(x, b).view(np.uint16).get() for b in (loaded, w))
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(load_array(path, "norm"), np.arange(5, dtype=np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_gpu_arrays_there_and_back(dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.full(shape, 1.5, dtype)
    path = tmp_path / "a.safetensors"
    save_safetensors({"a": array}, path)
    loaded = load_array(path, "a", device="cuda")
    assert loaded.dtype == array.dtype and loaded.shape == shape
    save_safetensors({"a": loaded}, path)
    assert load_array(path, "a").tobytes() == array.tobytes()
