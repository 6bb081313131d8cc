"""How long a sweep will take, from the part of it that is done."""

import math
from typing import NamedTuple


class Pace(NamedTuple):
    """What was seen of a sweep so far.

    Attributes:
        epochs: trained.
        seconds: that these took, added up over the processes.
        prepared: optimizers that have been compiled, in how many processes.
        preparation: seconds that this took, added up in the same way.
    """

    epochs: float = 0.0
    seconds: float = 0.0
    prepared: int = 0
    preparation: float = 0.0


def observe(pace: Pace, *, epochs: float, seconds: float, preparation: float) -> Pace:
    """The pace with one more event; one without seconds of its own (a run that ended early) tells
    nothing.
    """
    if seconds > 0:
        pace = pace._replace(epochs=pace.epochs + epochs, seconds=pace.seconds + seconds)
    if preparation > 0:
        pace = pace._replace(prepared=pace.prepared + 1, preparation=pace.preparation + preparation)
    return pace


def left(
    pace: Pace,
    *,
    epochs: float,
    optimizers: int,
    workers: int,
    at_most: float = math.inf,
) -> float | None:
    """Seconds until so many more epochs are trained, None before any was.

    `(min(epochs * s, at_most) + unprepared * c) / processes`, with the mean seconds `s` of an epoch
    and `c` of compiling.

    Args:
        pace: what was seen.
        epochs: still to train.
        optimizers: in all, each of them compiled once, by one process; one that several processes
            share counts as often.
        workers: processes at the most.
        at_most: seconds that training takes together where the clock ends every run.

    >>> pace = observe(Pace(), epochs=2.0, seconds=1.0, preparation=4.0)
    >>> left(pace, epochs=10.0, optimizers=3, workers=2)
    6.5
    >>> left(pace, epochs=10.0, optimizers=3, workers=2, at_most=1.0)
    4.5
    """
    if not pace.epochs:
        return None
    mean = pace.preparation / pace.prepared if pace.prepared else 0.0
    unprepared = max(optimizers - pace.prepared, 0)
    training = min(epochs * pace.seconds / pace.epochs, at_most)
    total = training + unprepared * mean
    return total / min(workers, optimizers)


def words(seconds: float) -> str:
    """A time as one says it.

    >>> words(7.2), words(272.0), words(7300.0)
    ('8 s', '4 min 40 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{int(seconds) + 1} s"
    if seconds < 3600:
        tens = -int(-seconds // 10)
        return f"{tens // 6} min {10 * (tens % 6)} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
