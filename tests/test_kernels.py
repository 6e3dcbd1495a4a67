"""The rendered kernels: a golden text, the discipline of the templates, one source per kernel."""

import os
import re
from pathlib import Path

import pytest

from cpgemm import env
from cpgemm.config import KernelConfig
from cpgemm.headers import find_headers
from cpgemm.heuristics import configurations
from cpgemm.kernels import all_sources, gemm_source

GOLDEN = Path(__file__).parent / "golden" / "dense_256x128_s3_w2_bfloat16.cu"


def test_golden_render():
    """An edit of the template shows as a diff; CPGEMM_UPDATE_GOLDEN=1 rewrites the file."""
    text = gemm_source(KernelConfig(256, 128, 3)).text
    if os.environ.get("CPGEMM_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_one_source_per_configuration():
    config = configurations("bfloat16")[0]
    source = gemm_source(config)
    assert source is gemm_source(config)
    assert (source.name, source.entry) == (config.name, "cpgemm_dense")
    assert source.shared_bytes == config.shared_bytes


def test_the_whole_set_renders_without_a_gpu():
    sources = all_sources()
    assert len(sources) <= 64 and len({s.digest for s in sources}) == len(sources)


def test_hot_kernels_include_only_our_own_headers():
    for source in all_sources():
        assert "<" not in "".join(re.findall(r"#include\s*(\S)", source.text))
        found = {header.name for header in find_headers(source.text, (env.header_dir(),))}
        assert found <= {p.name for p in env.header_dir().glob("*.cuh")}


@pytest.mark.parametrize("template", sorted(p.name for p in env.template_dir().glob("*.cu.j2")))
def test_templates_decide_in_one_block(template):
    """Below the constants no ``{{ }}`` but named macros: the body is plain CUDA."""
    text = (env.template_dir() / template).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 300
    last_constant = max(
        i for i, line in enumerate(lines) if re.match(r"(constexpr|using|static constexpr)\b", line)
        and "{{" in line
    )  # fmt: skip
    for number, line in enumerate(lines[last_constant + 1 :], last_constant + 2):
        for expression in re.findall(r"\{\{(.*?)\}\}", line):
            assert re.match(r"\s*\w+\(", expression), f"{template}:{number}: {line}"
