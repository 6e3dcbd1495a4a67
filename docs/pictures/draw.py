"""Draws the pictures of this folder: python docs/pictures/draw.py

Plain SVG with the system's fonts.  Colours follow the reader's light or dark scheme, which an SVG
in an <img> takes from the page around it.  tests/test_docs.py compares the files with this.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

STYLE = """
text { font: 14px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: #1f2328 }
.small { font-size: 12.5px; fill: #57606a }
.title { font-weight: 600; fill: #57606a }
.mid { text-anchor: middle }
.band { fill: #f4f6fa; stroke: #d0d7de }
.box { fill: #ffffff; stroke: #8c959f }
.data { fill: #dde7fb; stroke: #4f6fbf }
.work { fill: #dff3e4; stroke: #3f8f5a }
.ask { fill: #fdf1d3; stroke: #b08a2e }
.thin { fill: none; stroke: #8c959f; stroke-width: .6 }
.mark { fill: #4f6fbf }
.wire { fill: none; stroke: #57606a; stroke-width: 1.5 }
.tip { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small, .title { fill: #a9b4c0 }
  .band { fill: #262b36; stroke: #454d5b }
  .box { fill: #1b1f27; stroke: #768190 }
  .data { fill: #24365f; stroke: #7f9ce6 }
  .work { fill: #1d4230; stroke: #5fb27f }
  .ask { fill: #4a3c16; stroke: #d0aa4c }
  .thin { stroke: #768190 }
  .mark { fill: #7f9ce6 }
  .wire { stroke: #a9b4c0 }
  .tip { fill: #a9b4c0 }
}
"""


class Picture:
    """Shapes in the order in which they are drawn."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
        ]

    def text(self, x: float, y: float, line: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(line)}</text>')

    def rect(self, x: float, y: float, w: float, h: float, kind: str, corner: float = 6) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{corner:g}" '
            f'class="{kind}"/>'
        )

    def box(self, x: float, y: float, w: float, h: float, kind: str, *lines: str) -> None:
        """A box with its first line in normal, the others in small type, all centred."""
        self.rect(x, y, w, h, kind)
        top = y + h / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 18 * number, line, "mid small" if number else "mid")

    def band(self, x: float, y: float, w: float, h: float, title: str, inset: float = 14) -> None:
        self.rect(x, y, w, h, "band", 10)
        self.text(x + inset, y + 22, title, "title")

    def wire(self, *points: tuple[float, float], tip: bool = True) -> None:
        way = "L".join(f"{x:g} {y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(f'<path class="wire" d="M{way}"{end}/>')

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def dataflow() -> Picture:
    """From float matrices to D: what lies in memory, and what a thread block does with it."""
    p = Picture(760, 752, "From float matrices to the product")
    p.band(8, 8, 744, 186, "GPU memory")
    p.box(28, 42, 150, 56, "data", "x  (M, K)", "float, activations")
    p.box(28, 122, 150, 56, "data", "w  (N, K)", "float, weights")
    p.box(222, 42, 168, 56, "work", "quantize, (1, 128)", "one launch per call")
    p.box(222, 122, 168, 56, "work", "quantize, (128, 128)", "once")
    p.box(434, 42, 140, 56, "data", "A  (M, K)", "e4m3 codes")
    p.box(592, 42, 144, 56, "data", "sA  (M, K/128)", "float32, rows fastest")
    p.box(434, 122, 140, 56, "data", "B  (N, K)", "e4m3 codes")
    p.box(592, 122, 144, 56, "data", "sB  (N/128, K/128)", "float32")
    for y in (70, 150):
        p.wire((178, y), (220, y))
        p.wire((390, y), (432, y))
    p.band(
        8, 250, 744, 406, "One thread block: up to one per multiprocessor, all tiles in turn", 80
    )
    p.wire((583, 178), (583, 226), (60, 226), (60, 298))
    p.text(72, 218, "TMA: boxes of 128 along K (scales of B: 4-byte asynchronous copies)", "small")
    p.box(
        28,
        300,
        164,
        96,
        "work",
        "producer warp",
        "waits for empty[s]",
        "arms full[s]",
        "loads ahead",
    )
    p.text(236, 293, "ring of stages in shared memory", "small")
    for number, name in enumerate(("stage 0", "stage 1", "stage 2", "...")):
        p.box(236 + 126 * number, 300, 112, 96, "data", name, "tile of A,", "tile of B,", "sA, sB")
    p.wire((192, 348), (234, 348))
    p.wire((670, 396), (670, 416), (136, 416), (136, 438))
    p.box(
        28,
        440,
        216,
        84,
        "work",
        "4 x wgmma, k = 32 each",
        "P = sum of A * B",
        "over 128 of K, from zero",
    )
    p.box(
        282,
        440,
        216,
        84,
        "work",
        "promotion",
        "total = total + (sA * sB) * P",
        "in float32 registers",
    )
    p.box(536, 440, 196, 84, "work", "epilogue", "+ C, rounded once", "after the last k-block")
    p.wire((244, 482), (280, 482))
    p.wire((498, 482), (534, 482))
    p.wire((390, 524), (390, 556), (136, 556), (136, 526))
    p.text(263, 574, "next k-block", "small mid")
    p.text(28, 616, "one to three consumer warpgroups do this,", "small")
    p.text(28, 634, "64 rows at a time, each by itself", "small")
    p.box(536, 572, 196, 64, "work", "staged, TMA store", "bfloat16; float32 directly")
    p.wire((634, 524), (634, 570))
    p.band(8, 680, 744, 64, "GPU memory")
    p.box(536, 690, 196, 44, "data", "D  (M, N)")
    p.wire((634, 636), (634, 688))
    p.box(282, 690, 216, 44, "data", "C  (M, N), optional")
    p.wire((498, 712), (517, 712), (517, 506), (534, 506))
    return p


def call() -> Picture:
    """The way of a call through the modules."""
    p = Picture(760, 706, "The way of a call")
    p.box(30, 16, 250, 44, "data", "gemm(a, b, out, c)")
    p.wire((155, 60), (155, 92))
    p.box(30, 94, 250, 52, "ask", "same operands before?", "types, addresses, shapes, strides")
    p.wire((155, 146), (155, 190))
    p.text(164, 172, "no", "small")
    p.wire((280, 120), (720, 120), (720, 588), (492, 588))
    p.text(290, 112, "yes: 5 to 6 us of the host's time, nearly all of it the driver's", "small")
    p.box(30, 192, 250, 52, "work", "as_native", "views of out and c, no copy")
    p.wire((155, 244), (155, 276))
    p.box(30, 278, 250, 52, "work", "GemmProblem.of", "every rule, before anything happens")
    p.wire((280, 304), (398, 304))
    p.text(302, 296, "on the CPU", "small")
    p.box(400, 278, 200, 52, "work", "gemm_reference", "the same formula, NumPy")
    p.wire((155, 330), (155, 374))
    p.text(164, 356, "on a GPU", "small")
    p.box(30, 376, 250, 52, "ask", "plan cached?", "by sizes and dtype")
    p.wire((280, 402), (398, 402))
    p.text(318, 394, "no", "small")
    p.box(400, 376, 200, 52, "work", "tuned.choose", "else heuristics.choose")
    p.wire((155, 428), (155, 472))
    p.text(164, 454, "yes", "small")
    p.wire((400, 420), (340, 420), (340, 484), (282, 484))
    p.box(30, 474, 250, 52, "ask", "kernel loaded?", "on this device")
    p.wire((280, 508), (398, 508))
    p.text(318, 524, "no", "small")
    p.box(
        400,
        466,
        250,
        78,
        "work",
        "render, compile_kernel",
        "KernelSource; disk cache,",
        "else NVRTC; cupy.RawModule",
    )
    p.wire((155, 526), (155, 562))
    p.text(164, 548, "yes", "small")
    p.wire((440, 544), (440, 552), (240, 552), (240, 562))
    p.box(30, 564, 250, 52, "work", "tensor maps, PreparedLaunch", "kept for the next call")
    p.wire((280, 590), (318, 590))
    p.box(320, 564, 170, 52, "work", "cuLaunchKernelEx", "no synchronisation")
    p.wire((405, 616), (405, 650))
    p.box(320, 652, 170, 40, "data", "out")
    p.wire((600, 304), (690, 304), (690, 672), (492, 672))
    return p


def granularity() -> Picture:
    """Which values share a scale."""
    p = Picture(760, 330, "Which values share a scale")
    for left, title, rows, note in (
        (20, "A: granularity (1, 128)", 16, "a scale for 128 values of a row"),
        (400, "B: granularity (128, 128)", 2, "a scale for a block of 128 x 128"),
    ):
        p.text(left, 24, title, "title")
        p.rect(left, 62, 256, 192, "data", 0)
        for number in range(1, rows):
            y = 62 + 192 * number / rows
            p.wire((left, y), (left + 256, y), tip=False)
            p.parts[-1] = p.parts[-1].replace('class="wire"', 'class="thin"')
        for number in (1, 2, 3):
            x = left + 64 * number
            p.wire((x, 62), (x, 254), tip=False)
            p.parts[-1] = p.parts[-1].replace('class="wire"', 'class="thin"')
        p.rect(left + 64, 62 + 96, 64, 192 / rows, "mark", 0)
        p.text(left + 128, 50, "K, 128 to a column", "small mid")
        p.text(left, 276, note, "small")
        for row in range(rows):
            for column in range(4):
                y = 62 + 192 * (row + 0.5) / rows
                kind = "mark" if (row, column) == (rows // 2, 1) else "box"
                p.rect(left + 278 + 15 * column, y - 4.5, 11, 9, kind, 2)
        p.text(left + 306, 50, "scales", "small mid")
    p.text(
        20,
        312,
        "Value = code * scale of its block. Both granularities have ceil(K/128) scales along K.",
        "small",
    )
    return p


PICTURES = {"dataflow": dataflow, "call": call, "granularity": granularity}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(str(draw()), encoding="utf-8")
