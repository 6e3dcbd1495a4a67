"""One tile's way through the ring of stages, played out with the model's times.

The rules are those of ``cuda_src/mainloop.cuh``: the producer loads one k-block after another into
the next stage as soon as all consumers have read what it held; each consumer takes the k-blocks in
order, waits for a stage to be full, and for each of its waves multiplies, then promotes; it frees
the stage behind the last wave's multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpgemm.cost_model import TileTimes

__all__ = ["Span", "Timeline", "play"]


@dataclass(frozen=True)
class Span:
    """From ``start`` to ``end`` (microseconds) something happens for a k-block.

    ``what``: load, full (a stage holds the k-block and is not free yet), multiply, promote, or
    epilogue.  ``lane``: the stage of load and full, the consumer of the others.
    """

    what: str
    lane: int
    k_block: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Spans of one tile; ``landed`` and ``done`` by k-block: when its stage was full, and read."""

    spans: tuple[Span, ...]
    landed: tuple[float, ...]
    done: tuple[float, ...]
    end: float


def play(
    times: TileTimes, *, stages: int, consumers: int, waves: int, ahead: bool = False
) -> Timeline:
    """Play one tile with ``waves`` waves a consumer and k-block.

    Consumers start a part of a wave after one another, so that one multiplies while another
    promotes.  ``ahead``: the producer goes on with the next tile's k-blocks.
    """
    slot = times.multiply_us / waves
    multiply = min(times.tensor_us / (consumers * waves), slot)
    spans: list[Span] = []
    landed: list[float] = []
    done: list[float] = []
    free = [slot / consumers * consumer for consumer in range(consumers)]
    loaded = 0.0
    for k_block in range(times.k_blocks + (stages if ahead else 0)):
        stage = k_block % stages
        start = max(loaded, done[k_block - stages] if k_block >= stages else 0.0)
        loaded = start + times.load_us
        spans.append(Span("load", stage, k_block, start, loaded))
        if k_block >= times.k_blocks:
            continue
        landed.append(loaded)
        read = 0.0
        for consumer in range(consumers):
            # The stagger holds where consumers wait for the first k-block too.
            at = max(free[consumer], loaded + (slot / consumers * consumer if not k_block else 0))
            for _ in range(waves):
                spans.append(Span("multiply", consumer, k_block, at, at + multiply))
                read = max(read, at + multiply)
                spans.append(Span("promote", consumer, k_block, at + multiply, at + slot))
                at += slot
            free[consumer] = at
        done.append(read)
        spans.append(Span("full", stage, k_block, loaded, read))
    for consumer, at in enumerate(free):
        spans.append(Span("epilogue", consumer, times.k_blocks, at, at + times.epilogue_us))
    return Timeline(tuple(spans), tuple(landed), tuple(done), max(free) + times.epilogue_us)
