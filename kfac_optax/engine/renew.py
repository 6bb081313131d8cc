"""What is held for blocks, made anew or with new statistics in it: the same wherever it is kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, select
from kfac_optax._types import Average, Block, Bucket, PyTree
from kfac_optax.engine.state import CurvatureState, Step, block_of_bucket
from kfac_optax.linalg.in_order import after


def renewed(
    block: Block,
    old: PyTree,
    statistic: PyTree,
    damping: jax.Array,
    count: jax.Array,
    previous: PyTree,
) -> PyTree:
    """New inverses of matrices of a bucket, `[k, ...]` as all arguments, where its layers' own rule
    finds them due.

    `count` is that of statistics, `previous` what has to be computed first.
    """

    def renew() -> PyTree:
        ready = after(statistic, previous)
        if block.refresh is None:
            return jax.vmap(block.factorize, (0, None))(ready, damping)
        return jax.vmap(block.refresh, (0, 0, None, None))(old, ready, damping, count)

    if block.due is None:
        return renew()
    due, kept = jax.vmap(block.due, (0, 0, None, None))(old, statistic, damping, count)
    # one branch for the whole bucket: mapped over layers both of its sides would be computed
    return jax.lax.cond(jnp.any(due), lambda: select(due, renew(), kept), lambda: kept)


def kept_finite(
    made: Mapping[str, PyTree], state: CurvatureState
) -> tuple[dict[str, PyTree], jax.Array]:
    """New inverses by bucket, with the old one in place of each that is not finite, and how many
    factorisations have failed by now.
    """
    inverses, good = {}, {}
    for name, new in made.items():
        good[name] = jax.vmap(all_finite)(new)
        inverses[name] = select(good[name], new, state.inverses[name])
    return inverses, failed_by_now(state, good)


def failed_by_now(state: CurvatureState, good: Mapping[str, jax.Array]) -> jax.Array:
    """How many factorisations have failed, with those of `[copies]` in every bucket not good."""
    failed = state.failed_inverses
    for finite in good.values():
        failed = failed + jnp.sum(~finite, dtype=jnp.int32)
    return failed


def absorbed(
    step: Step,
    held: Mapping[str, PyTree],
    factors: Mapping[str, PyTree],
    news: Mapping[str, PyTree],
    average: Average,
    finite: jax.Array,
    rows: Callable[[str, PyTree], PyTree] = lambda name, tree: tree,
) -> tuple[dict[str, PyTree], dict[str, jax.Array]]:
    """What is held with the news in it, by bucket, and which matrices came out finite, `[k]`.

    The others keep the old one, and all do where the news are not finite.

    Args:
      step: with all buckets; those that absorb have news.
      held: by bucket, `[k, ...]`.
      factors: with the new statistics averaged in, of all matrices.
      news: that blocks measured, of all matrices.
      average: how they were averaged in.
      finite: whether all that was measured is finite, and something not zero.
      rows: `(name of a bucket, [copies, ...]) -> [k, ...]`, the matrices that are held.
    """
    made, good, previous = {}, {}, ()
    for bucket in step.buckets:
        name, absorb = bucket.name, block_of_bucket(bucket).absorb
        if absorb is None:
            continue
        # rows that are not finite would only keep the factorisation busy
        usable = jax.tree.map(lambda x: jnp.where(finite, x, 0), rows(name, news[name]))
        new = jax.vmap(absorb, (0, 0, 0, None, None))(
            held[name], after(usable, previous), rows(name, factors[name]), step.damping, average
        )
        # a copy may fail by itself
        good[name] = jax.vmap(all_finite)(new)
        made[name] = previous = select(good[name] & finite, new, held[name])
    return made, good


def online(buckets: Sequence[Bucket], inverses: Mapping[str, PyTree]) -> dict[str, Any]:
    """What is held for blocks that absorb: it has changed with the statistics of this step."""
    return {b.name: inverses[b.name] for b in buckets if block_of_bucket(b).absorb is not None}
