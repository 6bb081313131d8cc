"""TNT: the natural gradient of a tensor-normal model, from gradients at sampled labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import select
from kfac_optax._types import Numeric, PyTree, ScalarOrSchedule
from kfac_optax._validate import check_number
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import after, psd_inverse
from kfac_optax.methods.gradient.axes import (
    DIAGONAL,
    FULL,
    Group,
    Rules,
    along,
    check_rules,
    statistic,
)
from kfac_optax.methods.gradient.axiswise import Step
from kfac_optax.methods.gradient.momenta import graft_then_momentum
from kfac_optax.methods.gradient.phases import (
    ByAxis,
    Phases,
    Weights,
    by_phases,
    identities,
    zeros_by_axis,
)
from kfac_optax.methods.gradient.sampled import sampled_tensors


def scale_by_tnt(
    *,
    damping: ScalarOrSchedule = 1e-3,
    decay: ScalarOrSchedule = 0.95,
    inverse_every: ScalarOrSchedule = 10,
    examples: Numeric | None = None,
    momentum: ScalarOrSchedule | None = None,
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient with the Fisher matrix of every leaf a Kronecker product over its axes.

    `F_i` averages `mat_i(g) mat_i(g)^T` of gradients `g` at labels drawn from the model, `k` is the
    number of axes `n_1, ..., n_k` and `s = tr F_i`, the same for all axes. If `g` is tensor-normal
    its covariance is `F_1 (x) ... (x) F_k / s^(k-1)`, and with `A_i = F_i / s^((k-1)/k)` the update
    is

    `U = G x_1 (A_1 + l_1 I)^{-1} ... x_k (A_k + l_k I)^{-1}`, `l_i = damping^(1/k) n / n_i`,

    `n` the geometric mean of all `n_i`: for a matrix this is the damping that K-FAC's factors share
    between them, for a vector the damped Fisher matrix itself. `update` needs the extra argument
    `sampled_grads`. Leaves are seen as in `scale_by_shampoo`, and what is not finite is treated
    the same way; sampled gradients that are not finite are left out and counted. A tensor of which a
    refresh knows nothing keeps its inverses, the identity at first.

    Args:
      damping: Tikhonov damping, positive.
      decay: bound of the averaging weight.
      inverse_every: period of the inverses, in steps.
      examples: number of examples that `sampled_grads` is a mean over; `None` where it has an axis
        of examples.
      momentum: `M <- momentum M + U` is the update; `None` keeps no trace.
      max_dim: as in `scale_by_shampoo`.
      merge: as in `scale_by_shampoo`.
      long_axes: as in `scale_by_shampoo`.
      vectors: as in `scale_by_shampoo`.
      stacked: as in `scale_by_shampoo`.

    Returns:
      A transformation with an `AxiswiseState`. Its `update` takes `sampled_grads`, a tree like the
      parameters: gradients of the negative log-likelihood at labels drawn from the model. Either
      with an axis of examples in front of every leaf, or the mean over `examples`, as
      `fisher.at(...).sampled_gradient()` gives it, `examples` times the product of which is
      unbiased.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got;
        `sampled_grads` is missing or has other shapes.

    >>> tx = scale_by_tnt(damping=1.0)
    >>> g = jnp.array([2.0, 1.0])
    >>> updates, state = tx.update(g, tx.init(g), sampled_grads=jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    >>> print(updates.round(3))  # F = diag(1, 0)
    [1. 1.]

    Reference: Ren & Goldfarb, Tensor Normal Training for Deep Learning Models (2021).
    """
    where = "scale_by_tnt"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked)
    check_rules(where, rules, ("split", DIAGONAL), (FULL, DIAGONAL))
    check_number(where, "damping", damping, above=0)
    if examples is not None:
        check_number(where, "examples", examples, above=0)
    hyper: dict[str, Any] = dict(damping=damping, decay=decay, inverse_every=inverse_every)
    if momentum is not None:
        hyper["momentum"] = momentum
    # a natural gradient has a length of its own: nothing is grafted
    finish = graft_then_momentum(None, momentum=momentum is not None)
    return by_phases(where, rules, hyper, _tensor_normal(examples), finish)


def _tensor_normal(examples: Numeric | None) -> Phases:
    """Averages over sampled gradients and their inverses, normalised by the trace."""

    # the identity until something has been measured
    def start(group: Group, dtype: Any) -> tuple[ByAxis, ByAxis]:
        return zeros_by_axis(group, dtype), identities(group, dtype)

    def take_in(
        group: Group,
        tensors: jax.Array,
        factors: ByAxis,
        weights: Weights,
    ) -> ByAxis:
        # examples are one more axis of every tensor, [copies, N, *block], summed over with the rest
        joined = jnp.moveaxis(tensors, 0, 1)
        out = {}
        for i, kind in enumerate(group.kinds):
            # the mean over examples of mat_i(g) mat_i(g)^T, not the product of the mean
            new = statistic(joined, i + 1, kind) / len(tensors)
            out[str(i)] = weights[0] * factors[str(i)] + weights[1] * new
        return out

    def refresh(
        group: Group,
        step: Step,
        factors: ByAxis,
        inverses: ByAxis,
        previous: PyTree,
    ):
        # A_i = F_i / s^((k-1)/k), so that the product over axes needs no scale of its own
        made = {}
        scale, known = _scale(group, factors)
        for axis, old in inverses.items():
            # one batched factorisation after another
            ready = after(scale[:, None, None] * factors[axis], previous)
            # l_i = damping^(1/k) n / n_i
            shift = _share(group, int(axis), step.value("damping"))
            previous = jax.vmap(lambda a, s=shift: psd_inverse(a, s))(ready)
            made[axis] = select(known, previous, old)
        return made, previous

    def apply(
        group: Group,
        step: Step,
        factors: ByAxis,
        inverses: ByAxis,
        weights: Weights,
    ):
        # G x_1 (F_1 + l_1 I)^{-1} ... x_k (F_k + l_k I)^{-1}
        u = step.tensors[group.name]
        scale, known = _scale(group, factors)
        for i, kind in enumerate(group.kinds):
            if kind == FULL:
                u = along(u, i, inverses[str(i)])
            else:  # never stale
                shift = _share(group, i, step.value("damping"))
                # a diagonal axis is divided by
                divisor = scale[:, None] * factors[str(i)] + shift
                u = along(u, i, jnp.where(known[:, None], 1 / divisor, 1))
        return u

    return Phases(start, take_in, apply, refresh, lambda step: sampled_tensors(step, examples))


def _scale(group: Group, factors: ByAxis) -> tuple[jax.Array, jax.Array]:
    """`s^(-(k-1)/k)` of every tensor, `[copies]`, and whether anything of it has been measured."""
    # s = tr F_i is the same for every axis: the sum of all squares
    first = factors["0"]
    s = jnp.trace(first, axis1=1, axis2=2) if first.ndim == 3 else jnp.sum(first, 1)
    k = len(group.block)
    return positive_or_one(s) ** (-(k - 1) / k), s > 0


def _share(group: Group, axis: int, damping: jax.Array) -> jax.Array:
    """The part of the damping that one axis gets, `damping^(1/k) n / n_i`."""
    # n = (n_1 ... n_k)^(1/k), so that the product over axes is the damping
    k, mean = len(group.block), 1.0
    for n in group.block:
        mean *= n ** (1 / k)
    return damping ** (1 / k) * (mean / group.block[axis])
