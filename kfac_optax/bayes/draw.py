"""Parameters drawn around a mean, with the inverse curvature that blocks hold for a covariance."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import named_leaves, replace_leaves, wide_dtype
from kfac_optax._types import Layers, PyTree
from kfac_optax._validate import check_number
from kfac_optax.engine.block_inverse import (
    BlockInverse,
    covered_names,
    covered_only,
    covered_with,
    of_state,
    root_trees,
)
from kfac_optax.engine.state import CurvatureState, the_state


def draw(
    where: str,
    operator: BlockInverse,
    mean: PyTree,
    key: jax.Array,
    count: int,
    variance: Any,
) -> PyTree:
    """`mean + sqrt(variance) R z`, `R R^T` the operator, `count` times on a new axis 0.

    What no block covers stays at its mean.

    Raises:
      ValueError: a block has no square root.
    """
    # in the dtype of the inverses, which may be wider than the parameters
    leaves, dtype = named_leaves(mean), wide_dtype(operator.inverses)
    names = covered_names(operator)
    # white noise [count, *shape] for what has a block, zeros for the rest
    noise = {name: jnp.zeros((count, *x.shape), dtype) for name, x in leaves.items()}
    keys = jax.random.split(key, len(names))
    for name, own in zip(names, keys, strict=True):
        noise[name] = jax.random.normal(own, noise[name].shape, dtype)
    # R z, with R R^T = (F + damping I)^{-1}
    spread = root_trees(where, operator, noise)
    # boxes that no block has of a leaf that layers share out: zero, as other leaves without one
    spread = jax.vmap(lambda x: covered_only(operator, x))(named_leaves(spread))

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (count, *x.shape))

    stacked = jax.tree.map(repeated, mean)
    scale = jnp.sqrt(variance)
    moved = {name: leaves[name] + scale * spread[name] for name in names}
    return replace_leaves(stacked, moved)


def sample_params(
    layers: Layers,
    opt_state: PyTree,
    params: PyTree,
    key: jax.Array,
    *,
    size: Any,
    weight_decay: Any,
    temperature: Any = 1.0,
    normalization: str = "unitwise",
    uncovered: str = "pass",
) -> PyTree:
    """Parameters from the posterior that `noisy_kfac` follows,
    `N(params, (temperature / size) (F + weight_decay I)^{-1})`.

    `F` are the factors of the last refresh in the state, with exact damping; a table that is also
    the softmax head keeps the damping that the refresh had. The prior is
    `N(0, temperature / (size weight_decay) I)`. What no block covers is not drawn.

    Args:
      layers: what the preconditioner was made from.
      opt_state: any Optax state with exactly one `noisy_kfac` in it (or a `kfac` with
        `inverse="eigh"`).
      params: the mean.
      key: a new one in every step.
      size: number of training examples.
      weight_decay: that of the preconditioner, positive.
      temperature: weight of the divergence from the prior in the objective; 1 is the posterior.
      normalization: as for `noisy_kfac`.
      uncovered: as for `noisy_kfac`, without `"graft"`.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: a number out of range; a state made with other layers or blocks.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> layers, w = estimator.layers(jnp.ones((2, 1)), jnp.eye(2)), jnp.ones((2, 1))
    >>> state = ko.noisy_kfac(layers, learning_rate=0.1).init(w)
    >>> sampled = sample_params(layers, state, w, jax.random.key(0), size=1e9, weight_decay=0.1)
    >>> print(sampled.ravel().round(2))
    [1. 1.]

    Reference: Zhang, Sun, Duvenaud & Grosse, Noisy Natural Gradient as Variational Inference
      (2018).
    """
    where = "sample_params"
    check_number(where, "size", size, above=0)
    check_number(where, "weight_decay", weight_decay, above=0)
    check_number(where, "temperature", temperature, at_least=0)
    layers, block_of = covered_with(where, layers, None, normalization, uncovered, exact=True)
    # the inverses that the optimizer holds, with the weight decay of the posterior as damping
    state = the_state(opt_state, CurvatureState, where)
    operator = of_state(where, state, layers, block_of)
    damping = jnp.asarray(weight_decay, wide_dtype(operator.inverses))
    exact = operator._replace(damping=damping)
    drawn = draw(where, exact, params, key, 1, temperature / size)
    return jax.tree.map(lambda x: x[0], drawn)
