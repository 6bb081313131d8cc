"""Runs a block and a coupling on a schedule, as one Optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
)  # fmt: skip
from kfac_optax._types import Block, Bucket, Coupling, Layer, Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import NO_CURVATURE, check_number, resolve
from kfac_optax.coverage import BlockOf, blocks_of, cover
from kfac_optax.linalg.factorize import after
from kfac_optax.statistics import Plan

_MISSING: Any = object()


class CoarseState(NamedTuple):
    """State of the coupling between layers, rows in order of execution."""

    coarse_factors: PyTree
    coarse_held: PyTree
    coarse_sizes: jax.Array  # shape=(L,): number of parameters of each layer
    coarse_index: dict[str, jax.Array]  # rows of each layer, by path


class CurvatureState(NamedTuple):
    """State of `scale_by_curvature`. Buckets of equal layers are stacked on axis 0."""

    kfac_count: Any  # shape=(), dtype=int32: steps
    curvature_count: jax.Array  # shape=(), dtype=int32: statistics accepted
    skipped_statistics: jax.Array  # shape=(), dtype=int32: statistics dropped because they were not finite
    failed_inverses: jax.Array  # shape=(), dtype=int32: factorisations dropped because they were not finite
    inverse_age: Any  # shape=(), dtype=int32: steps since what is held was last factorised
    damping: jax.Array  # shape=(), dtype=float32: of the last step
    coarse_share: jax.Array  # shape=(), dtype=float32: norm of the coarse part over norm of the sum, last step
    factors: PyTree  # statistics of the block, by bucket
    held: PyTree  # factorised inverses, by bucket
    coarse: Any  # CoarseState, or () without a coupling


def scale_by_curvature(
    layers: Layers,
    *,
    block: Block | BlockOf,
    coupling: Coupling | None = None,
    damping: ScalarOrSchedule = 1e-3,
    decay: ScalarOrSchedule = 0.95,
    curvature_every: ScalarOrSchedule = 10,
    inverse_every: ScalarOrSchedule = 100,
    uncovered: str = "pass",
    normalization: str = "unitwise",
    axis_name: Any = None,
    factor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with a per-layer curvature block and, optionally, a coupling between layers.

    Statistics are averaged as `S <- e S + (1 - e) S_new`, `e = min(1 - 1/k, decay)` with `k` counting accepted
    statistics from 1. Where both are due, statistics come first, then inverses, then the step is preconditioned. A
    statistic that is not finite is dropped; a factorisation that fails keeps the last good one; both are counted.

    `update(grads, state, params, *, curvature, refresh=None)`:

    - `curvature`: from `fisher.at(...)` or `fisher.value_and_grad(...)`; `None` takes no statistics in this step.
    - `refresh=None`: the schedule is traced, one compiled step serves all. A Python bool decides now, without any branch
      in the compiled step: statistics are taken if `curvature` is given, inverses are refreshed if `refresh` is true.

    Args:
      layers: from `fisher.layers(params, ...)`.
      block: the approximation of dense layers, convolutions and attention projections, for example `kronecker()`
        (embeddings and normalisation layers get blocks of their own); or a function of the layer that gives every layer
        its block. Layers with equal shapes and the same `Block` object share one batched call.
      coupling: for example `coarse_correction()`; `None` leaves the layers independent.
      damping: Tikhonov damping.
      decay: bound of the averaging weight, in [0, 1].
      curvature_every: period of the statistics, in steps.
      inverse_every: period of the inverses, in steps.
      uncovered: parameters without a block: `"pass"` their gradient on unchanged, precondition with the diagonal of the
        Fisher (`"diagonal"`, one more gradient when statistics are taken, unless labels are drawn), or `"raise"`.
      normalization: scale and shift of normalisation layers: `"unitwise"`, one 2 x 2 block for every channel,
        `"diagonal"`, or `"pass"`.
      axis_name: mapped axis (or axes) of `shard_map`/`pmap` over which the batch is split; statistics are averaged over
        it. Not needed under `jit` with sharded arrays.
      factor_dtype: dtype of factors and inverses; default the widest of float32 and the parameters' dtypes.

    Returns:
      A transformation whose whole state is a `CurvatureState` of arrays.

    Raises:
      ValueError: a hyperparameter out of range; `curvature` missing or made for another model.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = scale_by_curvature(estimator.layers(w, x), block=ko.kronecker(), damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]
    """
    where = "scale_by_curvature"
    _check(where, damping, decay, curvature_every, inverse_every)
    layers = cover(layers, uncovered=uncovered, normalization=normalization, where=where)
    block_of = blocks_of(block, normalization=normalization)

    def init(params: PyTree) -> CurvatureState:
        def zero(dtype: Any = jnp.int32) -> jax.Array:
            return jnp.zeros((), dtype)  # a new array each time: a buffer that occurs twice cannot be donated

        state = CurvatureState(
            zero(), zero(), zero(), zero(), zero(), zero(jnp.float32), zero(jnp.float32), zero(), zero(), zero()
        )
        if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder: factors are one non-parameter
            return state
        leaves = named_leaves(params)
        mine = _own_layers(where, layers, leaves)
        dtype = _dtype(leaves, mine, factor_dtype)
        start = jnp.asarray(resolve(damping, state.kfac_count), dtype)
        # one compiled call instead of an eager one per array
        factors, held, coarse = jax.jit(lambda damping: _initial(mine, block_of, coupling, damping))(start)
        return state._replace(damping=jnp.array(start, jnp.float32), factors=factors, held=held, coarse=coarse)

    def update(updates, state, params=None, *, curvature=_MISSING, refresh=None, **extra):
        del params, extra
        if curvature is _MISSING:
            raise ValueError(NO_CURVATURE.format(where=where))
        if not jax.tree.leaves(updates):
            return updates, state
        leaves = named_leaves(updates)
        mine = _own_layers(where, layers, leaves)
        dtype = _dtype(leaves, mine, factor_dtype)
        step = _Step(
            mine, make_buckets(mine, block_of), coupling, jnp.asarray(resolve(damping, state.kfac_count), dtype)
        )
        if curvature is not None:
            _check_curvature(where, curvature)
            plan = Plan(mine, tuple(map(block_of, mine)), coupling, dtype, axis_name)
            weight = resolve(decay, state.kfac_count)
            due = True if refresh is not None else _due(state.kfac_count, resolve(curvature_every, state.kfac_count))
            state = _when(due, lambda s: _accumulate(step, s, curvature.statistics(plan), weight), state, _STATISTICS)
        due = bool(refresh) if refresh is not None else _due(state.kfac_count, resolve(inverse_every, state.kfac_count))
        state = _when(due, lambda s: _refactorize(step, s), state, _INVERSES)
        new, share = _precondition(step, state, leaves, dtype)
        state = state._replace(
            kfac_count=optax.safe_increment(state.kfac_count),
            inverse_age=optax.safe_increment(state.inverse_age),
            damping=step.damping.astype(jnp.float32),
            coarse_share=share.astype(jnp.float32),
        )
        return replace_leaves(updates, new), state

    return optax.GradientTransformationExtraArgs(init, update)


class _Step(NamedTuple):
    """What the parts of one update share."""

    layers: tuple[Layer, ...]  # in order of execution
    buckets: tuple[Bucket, ...]
    coupling: Coupling | None
    damping: jax.Array

    def rows(self) -> np.ndarray:
        """Row in the coarse matrix (order of execution) of every coupled layer in bucket order."""
        first, start = {}, 0
        for layer in self.layers:
            if layer.coupled:
                first[layer] = start
                start += layer.copies
        return np.concatenate(
            [first[x] + np.arange(x.copies) for bucket in self.buckets for x in bucket.layers if x.coupled]
        )


def _check(where, damping, decay, curvature_every, inverse_every) -> None:
    check_number(where, "damping", damping, at_least=0)
    check_number(where, "decay", decay, at_least=0, at_most=1)
    check_number(where, "curvature_every", curvature_every, at_least=1)
    check_number(where, "inverse_every", inverse_every, at_least=1)


def _check_curvature(where: str, curvature: Any) -> None:
    if not hasattr(curvature, "statistics"):
        raise TypeError(
            f"{where}.update: curvature is a {type(curvature).__name__}; "
            "expected fisher.at(params, *args, key=key) or None."
        )


def _own_layers(where: str, layers: Layers, leaves: dict[str, jax.Array]) -> tuple[Layer, ...]:
    mine = present(layers, leaves)
    if not mine:
        raise ValueError(
            f"{where}: none of the layers {', '.join(x.kernel for x in layers)} is among the parameters {', '.join(leaves)}. "
            "Pass the parameter tree that `layers` was made from."
        )
    for layer in mine:
        got, expected = tuple(leaves[layer.kernel].shape), (*layer.stack, *layer.layout.shape)
        if got != expected:
            raise ValueError(
                f"{where}: layer {layer.path!r} has a weight of shape {got}, but {expected} when "
                "`layers` was made. Make it again: layers = fisher.layers(params, *args)."
            )
    return mine


def _dtype(leaves: dict[str, jax.Array], mine: tuple[Layer, ...], factor_dtype: Any) -> Any:
    if factor_dtype is not None:
        return jnp.dtype(factor_dtype)
    return jnp.result_type(jnp.float32, *(leaves[layer.kernel].dtype for layer in mine))


def _initial(mine: tuple[Layer, ...], block_of: BlockOf, coupling: Coupling | None, damping: jax.Array) -> tuple:
    """Factors, held inverses and coupling before anything was measured."""
    dtype, factors = damping.dtype, {}
    buckets = make_buckets(mine, block_of)
    for bucket in buckets:
        one = _block(bucket).init(*bucket.shape, dtype)
        factors[bucket.name] = jax.tree.map(lambda x, n=bucket.copies: jnp.repeat(x[None], n, 0), one)
    held = _factorize(buckets, factors, damping)
    if coupling is None:
        return factors, held, ()
    rows, index = 0, {}
    mine = tuple(layer for layer in mine if layer.coupled)
    for layer in mine:
        index[layer.path] = jnp.arange(rows, rows + layer.copies, dtype=jnp.int32)
        rows += layer.copies
    sizes = jnp.concatenate([jnp.full(x.copies, x.shape[0] * x.shape[1], dtype) for x in mine])
    statistic = coupling.init(rows, dtype)
    return factors, held, CoarseState(statistic, coupling.factorize(after(statistic, held), sizes), sizes, index)


def _block(bucket: Bucket) -> Block:
    assert bucket.block is not None
    return bucket.block


def _factorize(buckets: tuple[Bucket, ...], factors: PyTree, damping: jax.Array) -> dict[str, PyTree]:
    """What is held for every bucket, one batched factorisation after another."""
    held: dict[str, PyTree] = {}
    previous: PyTree = ()
    for bucket in buckets:
        ready = after(factors[bucket.name], previous)
        previous = held[bucket.name] = jax.vmap(_block(bucket).factorize, (0, None))(ready, damping)
    return held


def _due(count: jax.Array, every: Any) -> jax.Array:
    # hyperparameters injected by Optax are floats, periods included
    return count % jnp.asarray(every).astype(jnp.int32) == 0


_STATISTICS = ("factors", "curvature_count", "skipped_statistics", "coarse")
_INVERSES = ("held", "failed_inverses", "inverse_age", "coarse")


def _when(due: Any, change: Any, state: CurvatureState, fields: tuple[str, ...]) -> CurvatureState:
    """`change(state)` where due; only the fields that can change pass through the branch."""
    if isinstance(due, bool):
        return change(state) if due else state

    def changed(_: None) -> tuple:
        new = change(state)
        return tuple(getattr(new, name) for name in fields)

    def same(_: None) -> tuple:
        return tuple(getattr(state, name) for name in fields)

    return state._replace(**dict(zip(fields, jax.lax.cond(due, changed, same, None), strict=True)))


def _accumulate(step: _Step, state: CurvatureState, measured: tuple[list, PyTree], decay: Any) -> CurvatureState:
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


def _refactorize(step: _Step, state: CurvatureState) -> CurvatureState:
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
            new = step.coupling.factorize(after(coarse.coarse_factors, made), coarse.coarse_sizes)
            good = all_finite(new)
            coarse = coarse._replace(coarse_held=select(good, new, coarse.coarse_held))
            failed = failed + (~good).astype(jnp.int32)
    return state._replace(held=held, failed_inverses=failed, inverse_age=jnp.zeros((), jnp.int32), coarse=coarse)


def _precondition(
    step: _Step, state: CurvatureState, leaves: dict[str, jax.Array], dtype: Any
) -> tuple[dict[str, jax.Array], jax.Array]:
    """New leaves by name, and the coarse share of the update."""
    with jax.named_scope("kfac/precondition"):
        gradients = [gather(bucket, leaves, dtype) for bucket in step.buckets]
        updates = [
            jax.vmap(_block(b).solve, (0, 0, None))(state.held[b.name], v, step.damping)
            for b, v in zip(step.buckets, gradients, strict=True)
        ]
        share = jnp.zeros((), jnp.float32)
        if step.coupling is not None:
            updates, share = _couple(step, state.coarse, gradients, updates)
    new: dict[str, jax.Array] = {}
    for bucket, update in zip(step.buckets, updates, strict=True):
        new |= scatter(bucket, update, leaves)
    return new, share


def _couple(step: _Step, coarse: CoarseState, gradients: list, fine: list) -> tuple[list[jax.Array], jax.Array]:
    """Adds the coarse correction: the same shift on every entry of a layer."""
    coupling = step.coupling
    assert coupling is not None
    rows = step.rows()
    coupled = [i for i, bucket in enumerate(step.buckets) if bucket.layers[0].coupled]
    in_order = np.array_equal(rows, np.arange(len(rows)))
    restricted = jnp.concatenate([jnp.sum(gradients[i], (1, 2)) for i in coupled])
    restricted = restricted if in_order else restricted[np.argsort(rows)]
    correction = coupling.solve(coarse.coarse_held, restricted, step.damping, coarse.coarse_sizes)
    shift = jnp.asarray(coupling.coarse_weight, correction.dtype) * correction
    by_bucket = shift if in_order else shift[rows]
    combined, start = [jnp.asarray(coupling.fine_weight, u.dtype) * u for u in fine], 0
    for i in coupled:
        mine = by_bucket[start : start + fine[i].shape[0]]
        start += fine[i].shape[0]
        combined[i] = combined[i] + mine[:, None, None]
    total = sum(jnp.sum(jnp.square(u)) for u in combined)
    part = jnp.sum(jnp.square(shift) * coarse.coarse_sizes)
    return combined, jnp.sqrt(part / jnp.where(total > 0, total, 1))
