"""The performance tables that DeepGEMM published in its README, as data.

Source: https://github.com/deepseek-ai/DeepGEMM, README.md, on one H800 with NVCC 12.8.  The tables
came with the first commit, were measured again twice, and were taken out on 14 April 2025:

- first edition: commit a6d97a1c1b48, 25 February 2025
- last edition: commit a9967bc27cdc, 9 April 2025 (H800 SXM5)

Small M and the masked rows are the same in both.  ``speedup`` is over an implementation of
DeepSeek's own with CUTLASS 3.6, which is not public.  GB/s counts both operands and the bfloat16
result, not the scales.
"""

from __future__ import annotations

from typing import NamedTuple

from cpgemm.bench.result import Case

__all__ = ["COMMITS", "TABLE", "Figures", "Published", "bytes_counted"]

COMMITS = {"first": "a6d97a1c1b48a7a9d7994d0e155ee6f11d0a3f07",
           "last": "a9967bc27cdcead54e8d11e1736644eb51d49b33"}  # fmt: skip


class Figures(NamedTuple):
    """What one edition says of a case."""

    tflops: int
    gbs: int
    speedup: float


class Published(NamedTuple):
    """A row of the published tables, in both editions."""

    case: Case
    first: Figures
    last: Figures


def bytes_counted(case: Case) -> float:
    """What the published GB/s counts: A and B in 8 bits, D in 16, of all groups."""
    m, n, k = case.m, case.n, case.k
    return float(max(case.groups, 1) * (m * k + n * k + 2 * m * n))


# groups M N K, then TFLOPS, GB/s and speedup of the first and, where it differs, the last edition
_DENSE = """
0   64  2112  7168   206 1688 2.7
0   64 24576  1536   289 2455 1.7
0   64 32768   512   219 2143 1.8
0   64  7168 16384   336 2668 1.4
0   64  4096  7168   287 2320 1.4
0   64  7168  2048   295 2470 1.7
0  128  2112  7168   352 1509 2.4
0  128 24576  1536   535 2448 1.6
0  128 32768   512   358 2103 1.5
0  128  7168 16384   645 2604 1.4
0  128  4096  7168   533 2221 2.0
0  128  7168  2048   510 2277 1.7
0 4096  2112  7168  1058  527 1.1   1127  562 1.2
0 4096 24576  1536   990  786 1.0   1212  962 1.2
0 4096 32768   512   590 1232 1.0    775 1620 1.2
0 4096  7168 16384  1358  343 1.2   1520  384 1.4
0 4096  4096  7168  1304  500 1.1   1410  541 1.3
0 4096  7168  2048  1025  697 1.1   1168  794 1.2
"""
_CONTIGUOUS = """
4 8192  4096  7168  1297  418 1.2   1346  434 1.3
4 8192  7168  2048  1099  681 1.2   1214  752 1.3
8 4096  4096  7168  1288  494 1.2   1346  516 1.3
8 4096  7168  2048  1093  743 1.1   1214  826 1.2
"""
_MASKED = """
1 1024  4096  7168  1233  924 1.2
1 1024  7168  2048   925  968 1.2
2  512  4096  7168  1040 1288 1.2
2  512  7168  2048   916 1405 1.2
4  256  4096  7168   932 2064 1.1
4  256  7168  2048   815 2047 1.2
"""


def _rows(suite: str, text: str) -> tuple[Published, ...]:
    rows = []
    for line in text.split("\n")[1:-1]:
        groups, m, n, k, *values = line.split()
        editions = [
            Figures(int(values[at]), int(values[at + 1]), float(values[at + 2]))
            for at in range(0, len(values), 3)
        ]
        case = Case(suite, int(m), int(n), int(k), int(groups))
        rows.append(Published(case, editions[0], editions[-1]))
    return tuple(rows)


TABLE = (
    *_rows("dense", _DENSE),
    *_rows("contiguous", _CONTIGUOUS),
    *_rows("masked", _MASKED),
)
"""All 28 rows: 18 dense, 4 contiguous, 6 masked."""
