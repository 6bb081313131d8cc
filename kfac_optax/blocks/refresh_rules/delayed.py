"""Inverses that are used some steps after their statistics: those of asynchronous workers."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from kfac_optax._tree import select
from kfac_optax._types import Block, PyTree
from kfac_optax._validate import check_number
from kfac_optax.blocks.refresh_rules.own_rules import check_without_rules, uses_of_inverse


class Delayed(NamedTuple):
    """The inverse in use, and the one that takes its place."""

    active: PyTree
    pending: PyTree
    looks: Int[Array, ""]  # refreshes of the schedule so far


def delayed(block: Block, *, every: int, steps: int) -> Block:
    """A block whose inverses are made every so many refreshes of the schedule, and used later.

    With `inverse_every=1`, so that the schedule looks at the block in every step, an inverse is
    made in step `n every` and takes the place of the one in use in step `n every + steps`: what
    asynchronous workers would publish that late. The first inverse is used at once. `steps=0` is
    the schedule with `inverse_every=every`. In between nothing is factorised.

    Args:
      block: to be refreshed; it has no rule of its own for it.
      every: refreshes of the schedule from one inverse to the next.
      steps: how many of them later it is used, less than `every`.

    Returns:
      A `Block` with `Delayed` as inverse.

    Raises:
      ValueError: a number out of range, or a block with a rule of its own.

    >>> import kfac_optax as ko
    >>> print(delayed(ko.kronecker(), every=10, steps=2).name)
    kronecker (eigh), 2 steps late

    Reference: Ba, Grosse & Martens, Distributed Second-Order Optimization using Kronecker-Factored
      Approximations (2017).
    """
    check_number("delayed", "every", every, at_least=1)
    check_number("delayed", "steps", steps, at_least=0, at_most=every - 1)
    check_without_rules("delayed", block)

    def factorize(statistic: PyTree, damping: Array) -> Delayed:
        made = block.factorize(statistic, damping)
        return Delayed(made, made, jnp.zeros((), jnp.int32))

    def refresh(
        old: Delayed,
        statistic: PyTree,
        damping: Array,
        count: Array,
    ) -> Delayed:
        made = block.factorize(statistic, damping)
        # the first inverse is used at once: before it there is none worth keeping
        at_once = (old.looks == 0) | (steps == 0)
        active = select(at_once, made, old.active)
        return Delayed(active, made, old.looks + 1)

    def due(
        old: Delayed,
        statistic: PyTree,
        damping: Array,
        count: Array,
    ) -> tuple[Array, Delayed]:
        # looks since the last inverse was made
        phase = old.looks % every
        active = select(phase == steps, old.pending, old.active)
        return phase == 0, Delayed(active, old.pending, old.looks + 1)

    return block._replace(
        name=f"{block.name}, {steps} steps late",
        factorize=factorize,
        refresh=refresh,
        due=due,
        solve_rows=None,
        **uses_of_inverse(block, lambda held: held.active),
    )
