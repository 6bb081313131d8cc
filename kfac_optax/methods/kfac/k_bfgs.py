"""The transformation behind K-BFGS and K-BFGS(L): pairs of two passes over one batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import (
    all_finite,
    gather,
    make_buckets,
    named_leaves,
    present,
    replace_leaves,
    scatter,
    select,
    wide_dtype,
)
from kfac_optax._types import Block, Layer, Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import NO_CURVATURE, resolve
from kfac_optax.blocks.rank_one.pairs import (
    LayerPairs,
    Numbers,
    direction,
    moments_block,
    start_pairs,
    with_pairs,
)
from kfac_optax.blocks.rank_one.rank_one import rank_one
from kfac_optax.estimators.plan import Plan
from kfac_optax.linalg.in_order import after


class KBFGSState(NamedTuple):
    """State of `k_bfgs` and `k_bfgs_l`."""

    pairs: dict[str, LayerPairs]  # of every bucket
    step_count: jax.Array  # shape=(), dtype=int32: of schedules
    accepted_steps: jax.Array  # shape=(), dtype=int32: whose pairs are in the averages
    skipped_steps: jax.Array  # shape=(), dtype=int32: left out as something was not finite


class Rule(NamedTuple):
    """Settings of both presets; `memory` is `None` where `H_G` is a matrix."""

    where: str
    layers: Layers
    learning_rate: ScalarOrSchedule
    damping: ScalarOrSchedule
    decay: ScalarOrSchedule
    memory: int | None
    axis_name: Any
    precision: Any


def scale_by_pairs(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """Steps `-learning_rate H_A V H_G`, and what a second pass behind the step makes of both."""
    moments, means = moments_block(rule.precision), rank_one(precision=rule.precision)
    # mapped over the layers of a bucket
    steps_of = jax.vmap(functools.partial(direction, precision=rule.precision), (0, 0, 0, None))
    learn = jax.vmap(functools.partial(with_pairs, precision=rule.precision), (0, 0, 0, 0, None))

    def init(params: PyTree) -> KBFGSState:
        leaves, dtype = named_leaves(params), wide_dtype(params)
        pairs = {}
        for bucket in make_buckets(present(rule.layers, leaves)):
            one = start_pairs(bucket, rule.memory, dtype)
            pairs[bucket.name] = jax.tree.map(
                lambda x, n=bucket.copies: jnp.repeat(x[None], n, 0), one
            )
        return KBFGSState(pairs, *(jnp.zeros((), jnp.int32) for _ in range(3)))

    def update(
        updates: PyTree,
        state: Any,
        params: Any = None,
        *,
        curvature: Any = None,
        **extra: Any,
    ):
        del extra, params
        if not jax.tree.leaves(updates):
            return updates, state
        _check(rule.where, curvature)
        leaves, dtype = named_leaves(updates), wide_dtype(updates)
        mine = present(rule.layers, leaves)
        # buckets by shape alone: there is one kind of block
        buckets, (rate, numbers) = make_buckets(mine), _numbers(rule, state, dtype)

        def measured(curvature: Any, block: Block) -> dict[str, Any]:
            plan = Plan(mine, (block,) * len(mine), None, dtype, rule.axis_name, state.step_count)
            return _by_bucket(mine, curvature.statistics(plan)[0])

        # both passes by the estimator itself: a loss given to `value_and_grad` may be another
        before = measured(curvature.moved(curvature.params), moments)
        held, new = {}, {name: -rate.astype(x.dtype) * x for name, x in leaves.items()}
        previous: PyTree = ()  # batched factorisations run one after another
        for bucket in buckets:
            v, ready = gather(bucket, leaves, dtype), after(before[bucket.name], previous)
            # H_A V H_G, with A of this batch in it
            held[bucket.name], step = steps_of(state.pairs[bucket.name], ready, v, numbers)
            previous = held[bucket.name].inverse_inputs
            new |= scatter(bucket, -rate * step, new)
        # the second pass, over the same batch behind the step
        old = named_leaves(curvature.params)
        moved = old | {name: old[name] + x.astype(old[name].dtype) for name, x in new.items()}
        behind = measured(curvature.moved(replace_leaves(curvature.params, moved)), means)
        for bucket in buckets:
            weights = jnp.stack([gather(bucket, x, dtype) for x in (old, moved)], 1)
            name = bucket.name
            held[name] = learn(held[name], before[name].means, behind[name], weights, numbers)
        good = all_finite((leaves, new, held, behind))
        return _taken(state, updates, new, held, good)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(where: str, curvature: Any) -> None:
    if curvature is None:
        raise ValueError(NO_CURVATURE.format(where=where) + " Here every update needs it.")
    if not hasattr(curvature, "moved"):
        raise TypeError(
            f"{where}.update: curvature is a {type(curvature).__name__}, which cannot be taken at "
            "other parameters; expected empirical_fisher(per_example_loss).at(params, *args), whose "
            "batch the second pass goes over."
        )


def _numbers(
    rule: Rule,
    state: KBFGSState,
    dtype: Any,
) -> tuple[jax.Array, Numbers]:
    """The rate of this step, and what its pairs depend on."""
    # a rate, damping and decay may follow schedules of their own
    given = (rule.learning_rate, rule.damping, rule.decay)
    rate, damping, decay = (jnp.asarray(resolve(x, state.step_count), dtype) for x in given)
    # number k enters with weight 1/k while that is more than 1 - decay
    weight = jnp.minimum(1 - 1 / (state.accepted_steps + 1).astype(dtype), decay)
    # lambda_A = lambda_G = sqrt(damping)
    return rate, Numbers(jnp.sqrt(damping), weight, state.accepted_steps == 0)


def _by_bucket(layers: tuple[Layer, ...], measured: list[PyTree]) -> dict[str, Any]:
    """Statistics of layers as those of buckets, copies in front."""
    found = dict(zip(layers, measured, strict=True))
    of_buckets = {}
    for bucket in make_buckets(layers):
        mine = [found[layer] for layer in bucket.layers]
        of_buckets[bucket.name] = jax.tree.map(lambda *x: jnp.concatenate(x), *mine)
    return of_buckets


def _taken(
    state: KBFGSState,
    updates: PyTree,
    new: dict,
    held: dict,
    good: jax.Array,
) -> tuple[PyTree, KBFGSState]:
    """The step and its pairs, or none of both where anything is not finite."""
    one = good.astype(jnp.int32)
    kept = {name: select(good, held[name], pairs) for name, pairs in state.pairs.items()}
    step = {name: jnp.where(good, x, 0) for name, x in new.items()}
    return replace_leaves(updates, step), KBFGSState(
        kept,
        jnp.asarray(optax.safe_increment(state.step_count)),
        state.accepted_steps + one,
        state.skipped_steps + 1 - one,
    )
