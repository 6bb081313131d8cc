"""VOGN: the natural gradient of a diagonal Gaussian posterior, from squares of examples' gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import named_leaves, present
from kfac_optax._types import Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import check_axis_name
from kfac_optax.estimators.row_squares import mean_squares
from kfac_optax.methods.gradient.posterior import follow_posterior
from kfac_optax.methods.gradient.treewise import Step
from kfac_optax.methods.gradient.window import check_stacked
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


@flat_signature()
def vogn(
    layers: Layers | None = None,
    *,
    weight_decay: ScalarOrSchedule = 1e-4,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    damping: ScalarOrSchedule = 0.0,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """VOGN: the fit of a diagonal Gaussian posterior, from gradients at parameters drawn from it.

    `U = m / (s + w + damping)`, with `m` the mean of `g + w theta` and `s` that of
    `(1/N) sum_b g_b^2`, the mean over the batch of the squares of the examples' gradients, both
    bias-corrected; `theta` is the mean of the posterior and `w` the weight decay. It is used as
    `vadam` is, with the same `sample_diagonal`, and follows
    `N(theta, (t / size) (diag(s) + w I)^{-1})`, `t` the temperature.

    `update(grads, state, params, *, per_example_grads)`: a tree like the gradient whose leaves have
    an axis of examples in front. With `layers`, instead
    `curvature=empirical_fisher(losses).at(drawn, *args)`: the squares are then made of inputs and
    output gradients, without the gradients of examples. Of `ggn` and `fisher` they are the diagonal
    of the Gauss-Newton matrix, that of the model's own labels.

    Args:
      layers: from `estimator.layers(params, *args)`; every parameter has to belong to one.
      weight_decay: `w`, the temperature times the prior's precision over the number of examples.
      b1: decay of the mean gradient; 0 for the gradient of the step alone.
      b2: decay of the squares.
      damping: added in the step, not in the posterior.
      axis_name: mapped axis of `shard_map`/`pmap` over which the batch is split, if any: the
        squares are averaged over it.

    Returns:
      A transformation; its update needs `params`. Its state has two numbers for every parameter.

    Raises:
      TypeError: a leaf is complex or not floating.
      ValueError: a hyperparameter out of range; an update without `params`, or without squares.

    >>> tx, w = vogn(weight_decay=1.0), jnp.zeros(1)
    >>> g = jnp.array([[3.0], [-1.0]])
    >>> updates, state = tx.update(g.mean(0), tx.init(w), w, per_example_grads=g)
    >>> print(updates)  # 1 / (5 + 1)
    [0.16666667]

    Reference: Khan et al., Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam
      (2018); Osawa et al., Practical Deep Learning with Bayesian Principles (2019).
    """
    check_axis_name("vogn", axis_name)

    def squares_of(given: Step) -> PyTree:
        squares = _of_examples(given) if layers is None else _of_layers(layers, given)
        return squares if axis_name is None else jax.lax.pmean(squares, axis_name)

    hyper = dict(weight_decay=weight_decay, b1=b1, b2=b2, damping=damping)
    return follow_posterior("vogn", squares_of, 1.0, **hyper)


def _of_examples(given: Step) -> PyTree:
    """Mean squares of gradients that are given."""
    examples = given.extra.get("per_example_grads")
    if examples is None:
        raise ValueError(
            "vogn.update got no `per_example_grads`. Pass the gradients of the examples,\n\n"
            "    per_example_grads=jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(drawn, x, y)\n\n"
            "or make it with layers, vogn(estimator.layers(params, *args)), and pass "
            "curvature=empirical_fisher(losses).at(drawn, *args)."
        )
    check_stacked("vogn", given.gradient, examples)

    # examples are the first axis of every leaf
    def mean_square(x: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(x.astype(g.dtype)), 0)

    return jax.tree.map(mean_square, examples, given.gradient)


def _of_layers(layers: Layers, given: Step) -> PyTree:
    """Mean squares from the rows of layers."""
    curvature = given.extra.get("curvature")
    if curvature is None:
        raise ValueError(
            "vogn.update got no `curvature`, from which the squares of the examples' gradients "
            "are made in every step. Pass empirical_fisher(losses).at(drawn, *args)."
        )
    leaves = named_leaves(given.gradient)
    rows = curvature.rows(present(layers, leaves))
    # in the precision of the state, whatever that of the rows
    wide = next(iter(leaves.values())).dtype
    squares = {n: x.astype(wide) for n, x in mean_squares(rows, leaves).items()}
    if left := [name for name in leaves if name not in squares]:
        raise ValueError(
            f"vogn.update: {', '.join(left)} belongs to no layer, so its squares are not known; "
            "expected layers for every parameter. Leave layers= out and pass per_example_grads."
        )
    in_order = [squares[name] for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(given.gradient), in_order)


RECORDS = (
    Method(
        name="vogn",
        kind="preconditioner",
        summary="the natural gradient of a diagonal Gaussian posterior, from mean squares of the "
        "examples' gradients at parameters drawn from it (`sample_diagonal`)",
        paper="Khan et al. (2018); Osawa et al. (2019)",
        equation="W ~ N(M, (t/N) (diag(s) + w I)⁻¹), U = m / (s + w), m the mean of V + w M",
        needs=frozenset({"gradient", "curvature", "losses"}),
        state=lambda sizes: 2 * sizes.p * sizes.q,
        state_text="2 p q",
        cost=("nothing", "O(d²)"),
        test="tests/methods/test_diagonal_posterior.py::test_vogn_comes_to_rest_at_the_posterior",
        build=lambda layers, **options: vogn(layers, **options),
        block_of=None,
    ),
)
