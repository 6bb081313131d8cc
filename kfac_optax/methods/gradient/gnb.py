"""The Gauss-Newton-Bartlett estimator of a Hessian's diagonal, for `optax.contrib.sophia`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import named_leaves
from kfac_optax._types import PyTree
from kfac_optax._validate import check_axis_name
from kfac_optax.engine.state import GNBState
from kfac_optax.methods.gradient.treewise import finite_as_one
from kfac_optax.step_rules._per_layer import require_curvature


def gnb_estimator(*, axis_name: Any = None) -> optax.GradientTransformationExtraArgs:
    """The diagonal of the Gauss-Newton matrix, estimated by one gradient at labels drawn from the
    model: Sophia-G.

    `N g * g`, with `g = (1/N) sum_b s_b` the mean over the `N` examples of the scores
    `s_b = grad -log p(y_b)` at drawn labels `y_b`. Scores of different examples are independent and
    have mean zero, so the mean over the labels is the diagonal of `F = (1/N) sum_b E[s_b s_b^T]`,
    in the units of the mean loss. The weight of an example enters `g` by its root, so that masks
    and padding count as in the loss.

        optax.contrib.sophia(learning_rate, gamma=0.05, hessian_diagonal_fn=gnb_estimator())
        tx.update(grads, state, params, curvature=fisher.at(params, x, key=key))

    A new key belongs to every step. Sophia asks for it in every `update_interval`-th step only, and
    nothing runs in the others. An estimate that is not finite is counted and becomes zero: the
    average of Sophia then shrinks a little.

    Args:
      axis_name: mapped axis of `shard_map`/`pmap` over which the batch is split, if any.

    Returns:
      A transformation whose updates are the diagonal, in the dtypes of the gradient.

    Raises:
      ValueError: an update without `curvature`, or with one whose labels are those of the data.

    >>> import kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x, tx = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]]), gnb_estimator()
    >>> curvature = estimator.at(w, x, key=jax.random.key(0))
    >>> diagonal, state = tx.update(w, tx.init(w), w, curvature=curvature)
    >>> print(diagonal.ravel() > 0)  # the square of a standard normal number, and zero
    [ True False]

    Reference: Liu et al., Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
      Pre-training (2023), section 2.3, algorithm 2.
    """
    check_axis_name("gnb_estimator", axis_name)

    def init(params: PyTree) -> GNBState:
        del params
        return GNBState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        curvature: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, GNBState]:
        del params, extra
        curvature = require_curvature("gnb_estimator", "the diagonal", curvature)
        jacobian = curvature.linearize(sampled=True, axis_name=axis_name)
        # one score for every example, the root of its weight inside
        rows = jax.eval_shape(jacobian.jvp, curvature.params)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), rows)
        # N g^2 of the mean gradient g at sampled labels: (sum_b g_b)^2 / N
        total = named_leaves(jacobian.vjp(ones))
        square = {n: jnp.square(x) / jacobian.examples for n, x in total.items()}
        good = finite_as_one(square)
        # of the leaves that are given, which under masks are some of them
        leaves = []
        for name, x in named_leaves(updates).items():
            mine = jnp.where(good, square[name], 0)
            leaves.append(mine.astype(x.dtype))
        diagonal = jax.tree.unflatten(jax.tree.structure(updates), leaves)
        skipped = state.skipped_estimates + (~good).astype(jnp.int32)
        return diagonal, GNBState(optax.safe_increment(state.estimates), skipped)

    return optax.GradientTransformationExtraArgs(init, update)
