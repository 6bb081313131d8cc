"""A schedule decided on the host, for steps compiled without branches."""

from typing import NamedTuple

from kfac_optax._validate import check_number


class HostSchedule(NamedTuple):
    """When statistics and inverses are due, as Python bools of the host's step count.

    The traced schedule keeps both branches in one compiled step; on CPU a branch that is not taken still copies the state
    it passes on. With this schedule up to four steps are compiled instead, none with a branch:

        schedule = HostSchedule(curvature_every=10, inverse_every=100)

        @functools.partial(jax.jit, static_argnames=("measure", "refresh"))
        def train_step(params, opt_state, batch, key, *, measure, refresh):
            ...
            curvature = fisher.at(params, x, key=key) if measure else None
            updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature, refresh=refresh)

        for step in range(steps):
            params, opt_state = train_step(params, opt_state, batch, key, **schedule(step))

    Attributes:
      curvature_every: period of the statistics, in steps.
      inverse_every: period of the inverses.

    >>> schedule = HostSchedule(curvature_every=2, inverse_every=4)
    >>> print(schedule(0), schedule(2))
    {'measure': True, 'refresh': True} {'measure': True, 'refresh': False}
    """

    curvature_every: int = 10
    inverse_every: int = 100

    def __call__(self, step: int) -> dict[str, bool]:
        """What is due at a step, as keyword arguments.

        Raises:
          ValueError: a period below one.
        """
        check_number("HostSchedule", "curvature_every", self.curvature_every, at_least=1)
        check_number("HostSchedule", "inverse_every", self.inverse_every, at_least=1)
        return {"measure": step % self.curvature_every == 0, "refresh": step % self.inverse_every == 0}
