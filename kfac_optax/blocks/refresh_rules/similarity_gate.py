"""Refreshes of a layer that become rarer as long as its statistics stay similar: SP-NGD's rule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kfac_optax._types import Block, Numeric, PyTree
from kfac_optax._validate import check_number
from kfac_optax.blocks.refresh_rules.own_rules import check_without_rules, uses_of_inverse


class Watched(NamedTuple):
    """What the block holds, and what the gate remembers of the layer."""

    inverse: PyTree
    last: PyTree  # statistic of the last refresh
    before: PyTree  # and of the one before
    refreshes: Int[Array, ""]
    statistics: Int[Array, ""]  # how many there were at the last look
    waited: Int[Array, ""]  # looks with a new statistic since the last refresh
    interval: Int[Array, ""]  # looks from that refresh to the next
    previous: Int[Array, ""]  # interval before it


def similarity_gate(block: Block, *, tolerance: Numeric = 0.1) -> Block:
    """A block that is refreshed after an interval of its own, longer and longer while its statistic
    stays similar.

    The interval counts the refreshes of the schedule that come with a new statistic. With `X` the
    statistic of a refresh and `X_1`, `X_2` those of the two before, similar being
    `|X - Y|_F < tolerance |Y|_F` for each of its arrays, the next interval is

    - `max(1, d_1 // 2)` where `X` is not similar to `X_1`;
    - `d_1` where it is similar to `X_1`, but not to `X_2`;
    - `d_1 + d_2` where it is similar to both,

    with `d_1` and `d_2` the last two intervals: constant statistics give 1, 1, 2, 3, 5, 8, ... The
    two older statistics are kept beside the running one.

    Args:
      block: to be refreshed; it has no rule of its own for it.
      tolerance: of what is similar, not negative; 0 finds nothing similar, so that every look with
        a new statistic refreshes.

    Returns:
      A `Block` with `Watched` as inverse.

    Raises:
      ValueError: a tolerance below zero, or a block with a rule of its own.

    >>> import kfac_optax as ko
    >>> print(similarity_gate(ko.kronecker()).name)
    kronecker (eigh), similarity gate

    Reference: Osawa, Tsuji, Ueno, Naruse, Foo & Yokota, Scalable and Practical Natural Gradient for
      Large-Scale Deep Learning (2020).
    """
    check_number("similarity_gate", "tolerance", tolerance, at_least=0)
    check_without_rules("similarity_gate", block)

    def factorize(statistic: PyTree, damping: Array) -> Watched:
        zeros = jax.tree.map(jnp.zeros_like, statistic)
        none, one = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
        made = block.factorize(statistic, damping)
        return Watched(made, zeros, zeros, none, none, none, one, one)

    def refresh(
        old: Watched,
        statistic: PyTree,
        damping: Array,
        count: Array,
    ) -> Watched:
        # d_1 + d_2 where similar to both, d_1 to the last alone, else half of d_1
        near = _similar(statistic, old.last, tolerance)
        both = near & _similar(statistic, old.before, tolerance)
        longer = old.interval + jnp.where(both, old.previous, 0)
        shorter = jnp.maximum(1, old.interval // 2)
        interval = jnp.where(near, longer, shorter)
        return Watched(
            block.factorize(statistic, damping),
            last=statistic,
            before=old.last,
            refreshes=old.refreshes + 1,
            statistics=count,
            waited=jnp.zeros((), jnp.int32),
            interval=interval,
            previous=old.interval,
        )

    def due(
        old: Watched,
        statistic: PyTree,
        damping: Array,
        count: Array,
    ) -> tuple[Array, Watched]:
        # a look without a new statistic has nothing to compare
        waited = old.waited + (count > old.statistics).astype(jnp.int32)
        worth = (old.refreshes == 0) | (waited >= old.interval)
        return worth, old._replace(statistics=count, waited=waited)

    return block._replace(
        name=f"{block.name}, similarity gate",
        factorize=factorize,
        refresh=refresh,
        due=due,
        solve_rows=None,
        **uses_of_inverse(block, lambda watched: watched.inverse),
    )


def _similar(new: PyTree, old: PyTree, tolerance: Numeric) -> Array:
    """Whether each array is near to what it was; nothing is near to zeros, those before the first."""

    def is_near(x: Array, y: Array) -> Array:
        change = jnp.linalg.norm(jnp.ravel(x - y))
        return change < tolerance * jnp.linalg.norm(jnp.ravel(y))

    near = jax.tree.map(is_near, new, old)
    return jnp.stack(jax.tree.leaves(near)).all()
