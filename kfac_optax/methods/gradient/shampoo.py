"""Shampoo: every axis of a tensor preconditioned by the root of its own second moment."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import named_leaves, select
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked, check_choice, check_legal, start_checked
from kfac_optax.engine.refresh import due_at
from kfac_optax.engine.state import GradientCounts
from kfac_optax.linalg.factorize import after
from kfac_optax.linalg.roots import METHODS, inverse_root, inverse_root_of_values
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import (
    DIAGONAL,
    FULL,
    Group,
    Rules,
    along,
    check_rules,
    gather,
    make_groups,
    statistic,
)
from kfac_optax.methods.gradient.length import no_longer_than_fresh
from kfac_optax.step_rules.graft import exchange_norms

_GRAFTS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "adam": optax.scale_by_adam,
    "rms": optax.scale_by_rms,
}


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`. Tensors of equal shape are stacked on axis 0."""

    counts: GradientCounts
    factors: Any  # by group and axis: [copies, n, n], or [copies, n] of a diagonal axis
    inverses: Any  # roots by group and axis, [copies, n, n]
    trace: Any  # momentum by group, [copies, *shape], or ()
    graft: PyTree  # state of the transformation that gives the norm, or ()
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def scale_by_shampoo(
    *,
    decay: ScalarOrSchedule = 1.0,
    ridge: ScalarOrSchedule = 1e-6,
    inverse_every: ScalarOrSchedule = 10,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    graft: str | optax.GradientTransformation | None = None,
    root: int | None = None,
    inverse: str = "eigh",
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions every axis of a gradient with the root of its second moment.

    For a leaf seen as a tensor `G [n_1, ..., n_k]`, and `mat_i(G) [n_i, rest]` its unfolding:

    `H_i <- H_i + mat_i(G) mat_i(G)^T`,
    `U = G x_1 H_1^(-1/2k) x_2 ... x_k H_k^(-1/2k)`.

    A matrix gives `L^(-1/4) G R^(-1/4)`, a vector full-matrix AdaGrad, a scalar AdaGrad. What leaves
    are is read from their shapes: axes of length one vanish, short neighbouring axes are merged
    (a 3x3 kernel has one axis of length 9 for both), long ones split. No layers and no curvature
    are needed. Leaves without entries pass on; leaves of one shape share batched calls.

    Statistics come first, then roots where they are due, then the step is preconditioned. A gradient
    that is not finite changes nothing and gives a zero update; a root that fails, or of a statistic
    that is still zero, keeps the last good one, the identity at first; both are counted, and
    `problems` names them. Periods and schedules count accepted gradients. Roots that are not of this
    step know nothing of new directions and would blow them up, so no tensor's update is longer than
    roots of this step could make it: `||U||^2 <= (r_1 ... r_k)^(1/k) / w`, with `r_i` the largest
    rank of `mat_i(G)` and `w` the weight of this step in the statistics (not with a `root` of your
    own, where such a bound depends on the scale).

    Args:
      decay: 1 sums the statistics (the paper); less averages them,
        `H <- e H + (1 - e) mat mat^T` with `e = min(1 - 1/t, decay)`.
      ridge: added to every statistic before its root, relative to its largest eigenvalue.
      inverse_every: period of the roots, in steps.
      momentum: `M <- momentum M + U` is the update; `None` keeps no trace.
      nesterov: the update is `momentum M + U`.
      graft: every leaf's update gets the norm of that of `"sgd"`, `"adam"`, `"rms"` or a
        transformation; `None` leaves it. It gets the gradient in the dtype of the state.
      root: `p` of `H^(-1/p)`; default twice the number of axes. 2 gives `L^(-1/2) G R^(-1/2)`.
      inverse: `"eigh"` or `"newton"`, see `inverse_root`.
      max_dim: axes longer than this are long.
      merge: neighbouring axes are merged, from the left, while their product is at most this and
        two axes are left; 1 merges none.
      long_axes: `"split"` cuts a long axis into equal pieces, each a problem of its own;
        `"diagonal"` keeps the diagonal of its statistic, which is never stale.
      vectors: `"full"` or `"diagonal"` (AdaGrad), for leaves with one axis.
      stacked: `name -> number` of leading axes that only count equal parameters, as those of
        scanned layers; default none. Names are paths, `"block/kernel"`.

    Returns:
      A transformation whose state is a `ShampooState` of arrays in float32 or wider; updates have
      the dtypes of the gradient.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = scale_by_shampoo(ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)
    [[ 1.  0.]
     [ 0. -1.]]

    References: Gupta, Koren & Singer, Shampoo: Preconditioned Stochastic Tensor Optimization
      (2018), algorithm 2; Anil, Gupta, Koren, Regan & Singer, Scalable Second Order Optimization
      for Deep Learning (2020), for averages, splitting, Newton's iteration and grafting.
    """
    where = "scale_by_shampoo"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked)
    check_rules(where, rules, ("split", DIAGONAL), (FULL, DIAGONAL))
    check_choice(where, "inverse", inverse, METHODS)
    if root is not None and (not isinstance(root, int) or root < 1):
        raise ValueError(f"{where}: root={root!r}; expected a positive Python int or None.")
    hyper: dict[str, Any] = dict(decay=decay, ridge=ridge, inverse_every=inverse_every)
    if momentum is not None:
        hyper["momentum"] = momentum
    for name, value in hyper.items():
        check_legal(where, name, value)
    lengths = _graft_of(where, graft)

    def init(params: PyTree) -> ShampooState:
        given = start_checked(**hyper)
        if not jax.tree.leaves(params):  # factors are one non-parameter to optax.tree.map_params
            return ShampooState(gate.no_counts(), *gate.placeholders(), given=given)
        leaves = named_leaves(params)
        groups = make_groups(where, leaves, rules)
        dtype = gate.state_dtype(leaves)
        trace: Any = ()
        if momentum is not None:
            trace = {g.name: jnp.zeros((g.copies, *g.block), dtype) for g in groups}
        state_of_graft: PyTree = ()
        if lengths is not None:
            wide = {n: x.astype(dtype) for n, x in leaves.items()}
            state_of_graft = lengths.init(gate.replace_all(params, wide))
        factors = {group.name: _no_factors(group, dtype) for group in groups}
        inverses = {group.name: _identities(group, dtype) for group in groups}
        return ShampooState(gate.no_counts(), factors, inverses, trace, state_of_graft, given)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
        leaves = named_leaves(updates)
        if not leaves:
            return updates, state
        groups = make_groups(where, leaves, rules)
        gate.check_groups(where, groups, state.factors)
        dtype = gate.dtype_of(state.factors)
        tensors, finite = gate.cleaned_tensors(groups, leaves, dtype)
        count = state.counts.gradient_count
        now, given = gate.checked_all(state.given, count, **hyper)
        with jax.named_scope("shampoo/statistics"):
            weights = gate.averaged(now["decay"], count + 1, dtype)
            new = {
                group.name: _taken_in(group, tensors, state.factors, weights) for group in groups
            }
            factors, skipped = gate.accepted(new, state.factors, finite)
        due = finite & due_at(count, now["inverse_every"])

        def refresh(inverses: gate.Held) -> tuple[gate.Held, jax.Array]:
            made = _roots(groups, factors, inverses, now["ridge"], root, inverse)
            return gate.accepted(made, inverses, jnp.bool_(True))

        with jax.named_scope("shampoo/roots"):
            none = jnp.zeros((), jnp.int32)
            inverses, failed = gate.when_due(
                due, lambda held: refresh(held[0]), (state.inverses, none)
            )
        with jax.named_scope("shampoo/precondition"):
            new_tensors = {}
            for group in groups:
                u = _preconditioned(
                    group, tensors, factors, inverses, jnp.asarray(now["ridge"], dtype), root
                )
                if root is None:
                    u = no_longer_than_fresh(group, u, weights[1])
                new_tensors[group.name] = u
        state_of_graft = state.graft
        if lengths is not None:
            # of leaves without entries there is nothing to clean
            clean = {n: x.astype(dtype) for n, x in leaves.items()}
            clean |= gate.scattered(groups, tensors)
            wanted, after_it = lengths.update(
                gate.replace_all(updates, clean), state.graft, params, **extra
            )
            direction = gate.scattered(groups, new_tensors)
            grafted = named_leaves(exchange_norms(direction, named_leaves(wanted)))
            new_tensors = {group.name: gather(group, grafted) for group in groups}
            state_of_graft = select(finite, after_it, state.graft)
        trace = state.trace
        if momentum is not None:
            m = jnp.asarray(now["momentum"], dtype)
            trace = {n: m * x + new_tensors[n] for n, x in state.trace.items()}
            moved = {n: m * x + new_tensors[n] for n, x in trace.items()}
            new_tensors = moved if nesterov else trace
        out, good = gate.passed_on(updates, groups, new_tensors, finite)
        counts = gate.counted(state.counts, finite, good, skipped, failed)
        trace = select(good, trace, state.trace)
        return out, ShampooState(counts, factors, inverses, trace, state_of_graft, given)

    return optax.GradientTransformationExtraArgs(init, update)


def _graft_of(where: str, graft: Any) -> optax.GradientTransformationExtraArgs | None:
    if graft is None:
        return None
    if isinstance(graft, str):
        check_choice(where, "graft", graft, _GRAFTS)
        graft = _GRAFTS[graft]()
    return optax.with_extra_args_support(graft)


def _no_factors(group: Group, dtype: Any) -> dict[str, jax.Array]:
    def zeros(n: int, kind: str) -> jax.Array:
        return jnp.zeros((group.copies, n, n) if kind == FULL else (group.copies, n), dtype)

    return {str(i): zeros(n, group.kinds[i]) for i, n in enumerate(group.block)}


def _identities(group: Group, dtype: Any) -> dict[str, jax.Array]:
    def identity(n: int) -> jax.Array:
        return jnp.tile(jnp.eye(n, dtype=dtype), (group.copies, 1, 1))

    return {str(i): identity(group.block[i]) for i in group.axes_of(FULL)}


def _taken_in(
    group: Group,
    tensors: dict[str, jax.Array],
    factors: gate.Held,
    weights: tuple[jax.Array, jax.Array],
) -> dict[str, jax.Array]:
    """Statistics of a group with those of a step in them."""
    held, new = weights
    out = {}
    for i, kind in enumerate(group.kinds):
        measured = statistic(tensors[group.name], i, kind)
        out[str(i)] = held * factors[group.name][str(i)] + new * measured
    return out


def _power_of(group: Group, root: int | None) -> int:
    return 2 * len(group.block) if root is None else root


def _roots(
    groups: tuple[Group, ...],
    factors: gate.Held,
    inverses: gate.Held,
    ridge: Any,
    root: int | None,
    method: str,
) -> gate.Held:
    """Roots of all statistics that are matrices, one batched call after another."""
    made: gate.Held = {}
    previous: PyTree = ()
    for group in groups:
        p, axes = _power_of(group, root), {}
        for i in group.axes_of(FULL):
            ready = after(factors[group.name][str(i)], previous)
            batched = jax.vmap(lambda h, p=p: inverse_root(h, p, ridge=ridge, method=method))
            previous = batched(ready)
            known = jnp.any(factors[group.name][str(i)] != 0, axis=(1, 2))
            axes[str(i)] = select(known, previous, inverses[group.name][str(i)])
        made[group.name] = axes
    return made


def _preconditioned(
    group: Group,
    tensors: dict[str, jax.Array],
    factors: gate.Held,
    inverses: gate.Held,
    ridge: jax.Array,
    root: int | None,
) -> jax.Array:
    p, u = _power_of(group, root), tensors[group.name]
    for i, kind in enumerate(group.kinds):
        if kind == FULL:
            matrices = inverses[group.name][str(i)]
        else:
            values = factors[group.name][str(i)]
            matrices = jax.vmap(lambda d: inverse_root_of_values(d, p, ridge=ridge))(values)
        u = along(u, i, matrices)
    return u
