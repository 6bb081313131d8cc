"""When statistics and inverses are due."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kfac_optax._validate import check_number
from kfac_optax.engine.stagger import check_parts, phase


def refresh_period(regular: int, *, warmup_steps: int, first: int = 1) -> Callable[[Any], Any]:
    """A period that is short at first: `first` while the count is below `warmup_steps`, `regular`
    from then on.

    Factors change most in the first steps of a training. Give it as `inverse_every` (or
    `curvature_every`), with `first=1` for inverses in every step, or with the period of the
    statistics. A part of a staggered refresh waits at most one regular period after the warm-up.

    Args:
      regular: the period after the warm-up, in steps.
      warmup_steps: how many steps the warm-up takes.
      first: the period during the warm-up.

    Returns:
      A schedule. Of a Python int it makes a Python int, so that `HostSchedule` takes it too.

    Raises:
      ValueError: a period below one, or a negative number of steps.

    >>> period = refresh_period(100, warmup_steps=20, first=5)
    >>> print(period(19), period(20), period(jnp.int32(20)))
    5 100 100
    """
    check_number("refresh_period", "regular", regular, at_least=1)
    check_number("refresh_period", "warmup_steps", warmup_steps, at_least=0)
    check_number("refresh_period", "first", first, at_least=1)

    def period(count: Any) -> Any:
        # on the host, where a program per kind of step is chosen
        if isinstance(count, (int, np.integer)):
            return int(first if count < warmup_steps else regular)
        return jnp.where(count < warmup_steps, first, regular).astype(jnp.int32)

    return period


# Periods of `kfac`. The first inverses know a single batch of a network that changes fast: at first
# they follow the statistics.
CURVATURE_EVERY = 10
INVERSE_EVERY = refresh_period(100, warmup_steps=100, first=CURVATURE_EVERY)
# Periods of `kfac_adaptive`: inverses follow the statistics while everything changes fast, then they
# are so rare that a step costs about twice that of SGD where layers are wide. Statistics of every
# step would be dearer at first, and weigh in the average for long after.
ADAPTIVE_CURVATURE_EVERY = 5
ADAPTIVE_INVERSE_EVERY = refresh_period(15, warmup_steps=20, first=5)


class HostSchedule(NamedTuple):
    """When statistics and inverses are due, as Python values that the host's step count decides.

    The traced schedule keeps both branches in one compiled step; on CPU a branch that is not taken
    still copies the state it passes on. `compile_step` takes this schedule and compiles, without a
    branch, the kinds of step that it asks for: three in general, with `stagger=n` some more, one
    for every part.

    Attributes:
      curvature_every: period of the statistics, in steps; or a schedule such as
        `refresh_period(...)`. By default that of `kfac`, 10, and with `adapt_every` that of
        `kfac_adaptive`, 5.
      inverse_every: period of the inverses, or a schedule of it. By default every 10 of the first
        100 steps, then every 100, and with `adapt_every` every 5 of the first 20, then every 15.
      stagger: parts of the inverses, as the transformation was given; `refresh` then names the
        parts that are due by a tuple, and is `True` where all are (in step 0, for one).
      adapt_every: period of `adapt_damping` (its `every`), or of a whole optimizer that contains
        it, whose default is 5; then `adapt` is among what is returned, and curvature has to be
        passed in every step.

    >>> schedule = HostSchedule(curvature_every=2, inverse_every=4)
    >>> print(schedule(0), schedule(2))
    {'measure': True, 'refresh': True} {'measure': True, 'refresh': False}
    >>> staggered = HostSchedule(curvature_every=2, inverse_every=4, stagger=2)
    >>> print([staggered(step)["refresh"] for step in range(5)])
    [True, False, (1,), False, (0,)]
    >>> print([HostSchedule(adapt_every=3)(step)["adapt"] for step in range(4)])
    [False, False, True, False]
    """

    curvature_every: int | Callable[[int], Any] | None = None
    inverse_every: int | Callable[[int], Any] | None = None
    stagger: int | None = None
    adapt_every: int | None = None

    def __call__(self, step: int) -> dict[str, Any]:
        """What is due at a step, as keyword arguments.

        Raises:
          ValueError: a period or `stagger` below one.
        """
        adaptive = self.adapt_every is not None
        measure_every, every = self.curvature_every, self.inverse_every
        if measure_every is None:
            measure_every = ADAPTIVE_CURVATURE_EVERY if adaptive else CURVATURE_EVERY
        if every is None:
            every = ADAPTIVE_INVERSE_EVERY if adaptive else INVERSE_EVERY
        measure_every = _period("curvature_every", measure_every, step)
        every = _period("inverse_every", every, step)
        parts = check_parts("HostSchedule", self.stagger)
        now = [step == 0 or step % every == phase(j, every, parts) for j in range(parts)]
        due = tuple(j for j, is_due in enumerate(now) if is_due)
        # one kind of step for "all" and one for "none", however many parts there are
        kind = {
            "measure": step % measure_every == 0,
            "refresh": due if 0 < len(due) < parts else bool(due),
        }
        if not adaptive:
            return kind
        adapt = _period("adapt_every", self.adapt_every, step)
        return kind | {"adapt": step % adapt == adapt - 1}


def _period(name: str, value: Any, step: int) -> int:
    value = value(step) if callable(value) else value
    check_number("HostSchedule", name, value, at_least=1)
    return int(value)
