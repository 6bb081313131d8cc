"""What changes between steps: factors take in new statistics, inverses are factorised again."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, make_buckets, select
from kfac_optax._types import Bucket, Coupling, Layer, PyTree
from kfac_optax.coverage import BlockOf
from kfac_optax.linalg.factorize import after
from kfac_optax.transforms.state import CoarseState, CurvatureState, Step, block_of_bucket


def initial(mine: tuple[Layer, ...], block_of: BlockOf, coupling: Coupling | None, damping: jax.Array) -> tuple:
    """Factors, held inverses and coupling before anything was measured."""
    dtype, factors = damping.dtype, {}
    buckets = make_buckets(mine, block_of)
    for bucket in buckets:
        one = block_of_bucket(bucket).init(*bucket.shape, dtype)
        factors[bucket.name] = jax.tree.map(lambda x, n=bucket.copies: jnp.repeat(x[None], n, 0), one)
    held = _factorize(buckets, factors, damping)
    if coupling is None:
        return factors, held, ()
    rows, index = 0, {}
    coupled = tuple(layer for layer in mine if layer.coupled)
    for layer in coupled:
        index[layer.path] = jnp.arange(rows, rows + layer.copies, dtype=jnp.int32)
        rows += layer.copies
    sizes = jnp.concatenate([jnp.full(x.copies, x.shape[0] * x.shape[1], dtype) for x in coupled])
    statistic = coupling.init(coupled, dtype)
    fine = Step(mine, buckets, coupling, damping).fine(factors, held, sizes)
    return factors, held, CoarseState(statistic, coupling.factorize(after(statistic, held), fine), sizes, index)


def _factorize(buckets: tuple[Bucket, ...], factors: PyTree, damping: jax.Array) -> dict[str, PyTree]:
    """What is held for every bucket, one batched factorisation after another."""
    held: dict[str, PyTree] = {}
    previous: PyTree = ()
    for bucket in buckets:
        ready = after(factors[bucket.name], previous)
        previous = held[bucket.name] = jax.vmap(block_of_bucket(bucket).factorize, (0, None))(ready, damping)
    return held


def due_at(count: jax.Array, every: Any) -> jax.Array:
    """Whether something with this period is due at a step."""
    # hyperparameters injected by Optax are floats, periods included
    return count % jnp.asarray(every).astype(jnp.int32) == 0


STATISTICS = ("factors", "curvature_count", "skipped_statistics", "coarse")
INVERSES = ("held", "failed_inverses", "inverse_age", "coarse")


def when(due: Any, change: Any, state: CurvatureState, fields: tuple[str, ...]) -> CurvatureState:
    """`change(state)` where due; only the fields that can change pass through the branch."""
    if isinstance(due, bool):
        return change(state) if due else state

    def changed(_: None) -> tuple:
        new = change(state)
        return tuple(getattr(new, name) for name in fields)

    def same(_: None) -> tuple:
        return tuple(getattr(state, name) for name in fields)

    return state._replace(**dict(zip(fields, jax.lax.cond(due, changed, same, None), strict=True)))


def accumulate(step: Step, state: CurvatureState, measured: tuple[list, PyTree], decay: Any) -> CurvatureState:
    """Averages in new statistics, unless they are not finite."""
    per_layer, across = measured
    finite = all_finite(measured)
    count = state.curvature_count + finite.astype(jnp.int32)
    k = jnp.maximum(count, 1).astype(jnp.float32)
    weight = jnp.minimum(1 - 1 / k, jnp.asarray(decay, jnp.float32))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        e = weight.astype(old.dtype)
        return jnp.where(finite, e * old + (1 - e) * new.astype(old.dtype), old)

    measured_of = dict(zip(step.layers, per_layer, strict=True))
    factors = {}
    for bucket in step.buckets:
        stacked = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(measured_of[layer] for layer in bucket.layers))
        factors[bucket.name] = jax.tree.map(average, state.factors[bucket.name], stacked)
    coarse = state.coarse
    if isinstance(coarse, CoarseState):
        coarse = coarse._replace(coarse_factors=jax.tree.map(average, coarse.coarse_factors, across))
    skipped = state.skipped_statistics + (~finite).astype(jnp.int32)
    return state._replace(factors=factors, curvature_count=count, skipped_statistics=skipped, coarse=coarse)


def refactorize(step: Step, state: CurvatureState) -> CurvatureState:
    """New inverses; layer by layer, what is not finite keeps the old one."""
    held, failed = {}, state.failed_inverses
    with jax.named_scope("kfac/factorize"):
        made = _factorize(step.buckets, state.factors, step.damping)
        for name, new in made.items():
            good = jax.vmap(all_finite)(new)
            held[name] = select(good, new, state.held[name])
            failed = failed + jnp.sum(~good, dtype=jnp.int32)
        coarse = state.coarse
        if step.coupling is not None:
            fine = step.fine(state.factors, held, coarse.coarse_sizes)
            new = step.coupling.factorize(after(coarse.coarse_factors, made), fine)
            good = all_finite(new)
            coarse = coarse._replace(coarse_held=select(good, new, coarse.coarse_held))
            failed = failed + (~good).astype(jnp.int32)
    return state._replace(held=held, failed_inverses=failed, inverse_age=jnp.zeros((), jnp.int32), coarse=coarse)
