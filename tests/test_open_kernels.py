"""``cpgemm.kernel``: any kernel of the package, by sizes, by configuration or by name."""

from __future__ import annotations

import pytest

import cpgemm
from cpgemm.errors import ArgumentError, ArgumentTypeError
from cpgemm.heuristics import configurations
from cpgemm.kernels import all_sources


def test_by_sizes_by_configuration_by_name() -> None:
    by_sizes = cpgemm.kernel(4096, 7168, 2048, out_dtype="float32")
    assert by_sizes.name == cpgemm.plan_gemm(4096, 7168, 2048, out_dtype="float32").config.name
    config = configurations("bfloat16")[0]
    assert cpgemm.kernel(config).source == cpgemm.kernel(config.name).source


def test_every_kernel_of_the_set_opens() -> None:
    for source in all_sources():
        kernel = cpgemm.kernel(source.name)
        assert kernel.source == source.text and kernel.entry == source.entry


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            ("dense_256",),
            ArgumentError,
            r"what: must be one of the \d+ kernels.*Did you mean dense",
        ),
        ((64,), ArgumentError, "n, k: must follow m"),
        (("moe_route", 64, 64), ArgumentError, "n, k: belong to kernel.m, n, k."),
        ((3.0, 64, 64), ArgumentError, "n, k: belong to"),
        ((3.0,), ArgumentTypeError, "what: must be m with n and k, .*got float"),
        ((True,), ArgumentTypeError, "got bool"),
        ((64, 9, 64), ArgumentError, "n: N must be a multiple of 8"),
    ],
)
def test_what_is_no_kernel(arguments: tuple, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        cpgemm.kernel(*arguments)


@pytest.mark.parametrize("options", [{"out_dtype": "float32"}, {"accumulate": True}])
def test_options_of_sizes_alone(options: dict) -> None:
    with pytest.raises(ArgumentError, match="out_dtype, accumulate: belong to"):
        cpgemm.kernel("dense_64x32_s16_w1_bfloat16", **options)
