"""A ``KernelConfig`` in a notebook: its numbers, and its tile drawn over the warpgroups."""

from __future__ import annotations

from cpgemm.config import (
    SHARED_LIMIT,
    AdaptiveKernelConfig,
    KernelConfig,
    SplitKernelConfig,
)
from cpgemm.displays.html import BLUE, GREEN, ORANGE, PURPLE, Markup, card, element, facts, svg

__all__ = ["CONSUMERS", "config_facts", "config_html", "tile_drawing", "wave_consumers"]

CONSUMERS = (BLUE, GREEN, PURPLE)
"""Colours of the consumer warpgroups."""


def config_html(config: KernelConfig) -> str:
    """The display of a configuration."""
    return card(
        type(config).__name__, config.name, facts(config_facts(config)), tile_drawing(config)
    )


def config_facts(config: KernelConfig) -> list[tuple[str, object]]:
    """Names and values of what was decided and of what follows from it."""
    shared = config.shared_bytes
    cluster = "none" if config.cluster == 1 else f"{config.cluster} blocks"
    if config.cluster_n > 1:
        cluster += ", A is multicast"
    elif config.cluster_m > 1:
        cluster += ", B is multicast"
    elif isinstance(config, SplitKernelConfig):
        cluster += " share K of a tile"
    by = ", by columns" if config.column_parts > 1 else ""
    pairs: list[tuple[str, object]] = [
        ("tile of D", f"{config.block_m} x {config.block_n}"),
        ("stages", f"{config.stages} of 128 k"),
        ("consumer warpgroups", f"{config.consumers}{by}"),
        ("cluster", cluster),
        (
            "shared memory",
            f"{shared / 1024:g} KiB, {shared / SHARED_LIMIT:.0%} of what a block may have",
        ),
        ("threads", str(config.threads)),
        ("output", config.out_dtype),
    ]
    if not isinstance(config, SplitKernelConfig):
        pairs.append(
            (
                "registers a thread",
                f"{config.consumer_registers} consumer, {config.producer_registers} producer",
            )
        )
    if isinstance(config, AdaptiveKernelConfig):
        pairs.append(("flat tile", f"64 x {config.flat_n}, {config.flat_stages} stages"))
    return pairs


def wave_consumers(config: KernelConfig) -> list[list[tuple[int, int, int, int, int]]]:
    """For each consumer the rectangles of its waves: (wave, row, column, rows, columns).

    Waves of 64 rows go to the consumers that share rows in turn; consumers that share columns have
    ``wave_n`` of them each.
    """
    found = []
    for consumer in range(config.consumers):
        part, row_part = divmod(consumer, config.row_parts)
        found.append(
            [
                (wave, 64 * (wave * config.row_parts + row_part), part * config.wave_n, 64,
                 config.wave_n)
                for wave in range(config.waves)
            ]
        )  # fmt: skip
    return found


_SCALE = 0.5  # pixels for an element of D
_LEFT, _TOP = 1, 18
_LEGEND = 160  # pixels, that what stands beside the tile begins at least


def tile_drawing(config: KernelConfig) -> Markup:
    """The tile with each consumer's waves in its colour, the ring of stages beside it."""
    wide, high = config.block_n * _SCALE, config.block_m * _SCALE
    parts: list[Markup] = [
        _text(f"{config.block_m} rows x {config.block_n} columns", _LEFT, _TOP - 6)
    ]
    for consumer, waves in enumerate(wave_consumers(config)):
        for wave, row, column, rows, columns in waves:
            x, y = _LEFT + column * _SCALE, _TOP + row * _SCALE
            what = (
                f"consumer warpgroup {consumer}, wave {wave}: rows {row} to {row + rows - 1}, "
                f"columns {column} to {column + columns - 1}"
            )
            parts.append(
                element(
                    "g",
                    element("title", what),
                    _box(x, y, columns * _SCALE, rows * _SCALE, CONSUMERS[consumer]),
                    *_number(consumer, x, y, columns, rows),
                )
            )  # fmt: skip
    right = max(_LEFT + wide + 26, _LEGEND)
    parts.append(_text("ring of stages", right, _TOP - 6))
    per_row = 8
    for stage in range(config.stages):
        down, across = divmod(stage, per_row)
        parts.append(_box(right + across * 19, _TOP + down * 19, 15, 15, ORANGE))
    below = _TOP + 19 * -(-config.stages // per_row) + 14
    for consumer in range(config.consumers):
        parts.append(_box(right, below + 17 * consumer - 9, 10, 10, CONSUMERS[consumer]))
        parts.append(_text(f"warpgroup {consumer}: wgmma", right + 16, below + 17 * consumer))
    last = below + 17 * config.consumers
    parts.append(_box(right, last - 9, 10, 10, ORANGE))
    producer = "warp" if isinstance(config, SplitKernelConfig) else "warpgroup"
    parts.append(_text(f"producer {producer}: TMA", right + 16, last))
    height = max(_TOP + high, last) + 6
    width = max(right + 19 * min(config.stages, per_row), right + 140)
    return svg(width, height, f"Tile of {config.name}", *parts)


def _box(x: float, y: float, width: float, height: float, color: str) -> Markup:
    return element(
        "rect", x=f"{x:g}", y=f"{y:g}", width=f"{width:g}", height=f"{height:g}",
        fill=color, fill_opacity=".3", stroke=color, rx=1.5,
    )  # fmt: skip


def _number(consumer: int, x: float, y: float, columns: int, rows: int) -> list[Markup]:
    """The consumer's number amid its wave, unless the wave is too narrow for it."""
    if columns * _SCALE < 10:
        return []
    return [_text(str(consumer), x + columns * _SCALE / 2, y + rows * _SCALE / 2 + 4, "middle")]


def _text(text: str, x: float, y: float, anchor: str = "start") -> Markup:
    return element("text", text, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor)
