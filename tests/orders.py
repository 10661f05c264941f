"""Sessions as lists of steps, in all the orders in which these can follow each other."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import LiteralString

import psycopg

from tests.jobs import Connection
from tests.sessions import Point

Step = LiteralString | Point

DEADLOCK = "40P01"


@dataclass(frozen=True)
class Session:
    """What a session does, step by step.

    A step is a statement, the last one of a transaction being COMMIT or ROLLBACK; or the point of a sweep from which it
    goes on to the next point or to its end.
    """

    name: str
    steps: tuple[Step, ...]
    event: str | None = None
    """One that it writes itself, of those that a rescue writes too."""
    deletes: bool = False
    """It may delete a job."""


def all_orders(*lengths: int) -> Iterator[tuple[int, ...]]:
    """All orders of the steps of sessions with so many steps, each as the numbers of the sessions."""
    if not any(lengths):
        yield ()
    for number, length in enumerate(lengths):
        if length > 0:
            rest = [*lengths]
            rest[number] -= 1
            for order in all_orders(*rest):
                yield (number, *order)


class Performer:
    """A connection that goes through the steps of a session, as far as the other sessions let it."""

    def __init__(self, session: Session, connect: Callable[..., Connection], observer: Connection) -> None:
        points = [step for step in session.steps if isinstance(step, Point)]
        self.session = session
        self._connection = connect(autocommit=bool(points), application_name="pauses" if points else "performs")
        self._keepers = {point: connect(autocommit=False) for point in points}
        self._observer = observer
        self._executor = ThreadPoolExecutor(max_workers=1)

    def begin(self, steps: Sequence[Step], parameters: dict[str, int]) -> None:
        """Begin anew. It will be given these steps."""
        self.error: str | None = None
        """The SQLSTATE of the error that ended it."""
        self.has_waited = False
        """Whether it had to wait for another session."""
        self._parameters = parameters
        self._steps = deque[Step]()
        self._future: Future[None] | None = None
        self._is_under_way = False
        for step in steps:
            if isinstance(step, Point):
                self._keepers[step].execute(step.value)

    def give(self, step: Step) -> None:
        """Let it do a step as soon as it can."""
        self._steps.append(step)

    def gets_on(self) -> bool:
        """Do a step, if there is one, and return whether that is done now. If not, it waits for another session."""
        if not self._is_under_way:
            if not self._steps:
                return False
            self._start(self._steps.popleft())
        self._is_under_way = self._waits_for_another_session()
        self.has_waited |= self._is_under_way
        return not self._is_under_way

    def is_done(self) -> bool:
        """Whether it has done all that it was given."""
        return not self._is_under_way and not self._steps

    def end(self) -> None:
        """Free what waits for it, and end its connections' work."""
        for keeper in self._keepers.values():
            keeper.rollback()
        self._connection.cancel_safe()
        self._executor.shutdown()
        self._connection.rollback()

    def _start(self, step: Step) -> None:
        if isinstance(step, Point):
            self._keepers[step].rollback()
        elif self.error is None:
            self._future = self._executor.submit(self._execute, step)

    def _execute(self, statement: LiteralString) -> None:
        try:
            self._connection.execute(statement, self._parameters)
        except psycopg.Error as error:
            self.error = error.sqlstate
            self._connection.rollback()

    def _waits_for_another_session(self) -> bool:
        if self._future is None:
            return False
        keepers = {keeper.info.backend_pid for keeper in self._keepers.values()}
        deadline = time.monotonic() + 30
        while not wait([self._future], timeout=0.003).done:
            query = "SELECT unnest(pg_blocking_pids(%s))"
            blocking = {pid for (pid,) in self._observer.execute(query, [self._connection.info.backend_pid])}
            if blocking:
                return not blocking <= keepers
            assert time.monotonic() < deadline, f"{self.session.name} neither ends nor waits"
        self._future.result()
        return False


@contextmanager
def performing(
    sessions: Sequence[Session], connect: Callable[..., Connection], observer: Connection
) -> Iterator[list[Performer]]:
    """Lend a performer for each session."""
    with ExitStack() as stack:
        performers = []
        for session in sessions:
            performers.append(Performer(session, connect, observer))
            stack.callback(performers[-1].end)
        yield performers


def perform(
    performers: Sequence[Performer], moves: Sequence[tuple[int, Step]], parameters: dict[str, int]
) -> list[str | None]:
    """Let the sessions do steps in this order, and return the SQLSTATEs of their errors.

    A session that has to wait for another one does its further steps when it can; the others go on meanwhile.

    Parameters
    ----------
    moves :
        Each is the number of a session, and a step of it.
    """
    for number, performer in enumerate(performers):
        performer.begin([step for whose, step in moves if whose == number], parameters)
    for number, step in moves:
        performers[number].give(step)
        _let_them_go(performers)
    deadline = time.monotonic() + 30
    while not all(performer.is_done() for performer in performers):
        _let_them_go(performers)
        assert time.monotonic() < deadline, "They wait for each other."
    errors = [performer.error for performer in performers]
    assert DEADLOCK not in errors
    return errors


def _let_them_go(performers: Sequence[Performer]) -> None:
    # Who gets on may free another one.
    while [performer for performer in performers if performer.gets_on()]:
        pass
