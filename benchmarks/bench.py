"""What all cases share: the server, the sizes, and the shape of what they return."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import psycopg

from procrastinate_stalled import install
from tests.jobs import pretend_old_server
from tests.server import DURABLE, Server, install_procrastinate

# As DURABLE, and nothing that works in the background at its own time may fall into one measurement and not into
# the next: each begins after a VACUUM and a CHECKPOINT (`settle`).
SETTINGS = DURABLE | {"shared_buffers": "1GB", "max_wal_size": "16GB", "checkpoint_timeout": "1d", "autovacuum": "off"}


@dataclass(frozen=True)
class Ratio:
    """Two things that were measured in turn, one divided by the other in each round."""

    name: str
    """What is divided by what: 'time of the documented task / time of a sweep'."""
    rounds: list[float]
    bar: float | None = None
    """What the median must reach. None: it is told, not judged."""
    better: Literal["more", "less"] = "less"
    """Whether it should be at least the bar, or at most."""

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def is_reached(self) -> bool:
        """Whether the median reaches the bar."""
        if self.bar is None:
            return True
        return self.median >= self.bar if self.better == "more" else self.median <= self.bar


@dataclass(frozen=True)
class Figure:
    """Something that was measured, in each round."""

    name: str
    unit: str
    """s, ms, µs, bytes, jobs/s ..."""
    rounds: list[float]


@dataclass(frozen=True)
class Curve:
    """A line in a plot."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """A plot for the docs, drawn as `<name>.svg`."""

    name: str
    title: str
    x: str
    """The axis, with its unit."""
    y: str
    curves: list[Curve]
    logarithmic: bool = False
    """The x axis."""


@dataclass(frozen=True)
class Result:
    """What came out of a case. The first ratio is the one of the case."""

    ratios: list[Ratio]
    figures: list[Figure]
    plots: list[Plot] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Where and how large the cases are run."""

    server: Server
    """One with SETTINGS, of this run alone."""
    scale: float = 1
    rounds: int = 5

    def size(self, full: int) -> int:
        """Return how many there are to be, of so many in a full run."""
        return max(1, round(full * self.scale))

    @contextmanager
    def database(self) -> Iterator[str]:
        """Lend a database with Procrastinate and this product that knows of no outage; yields its address."""
        with self.server.database() as conninfo:
            install_procrastinate(conninfo)
            install(conninfo)
            with psycopg.connect(conninfo) as connection:
                pretend_old_server(connection)
            yield conninfo


def settle(conninfo: str) -> None:
    """Leave the server nothing to do in the background for what was written, so that each measurement begins alike."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
