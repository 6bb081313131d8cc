"""A preconditioner's state as a matrix: products with its inverse and a root of that, determinant,
factors of every layer.
"""

import operator

import jax
import jax.numpy as jnp

from kfac_optax._tree import named_leaves, present, replace_leaves, wide_dtype
from kfac_optax._types import Block, Coupling, Layers, PyTree
from kfac_optax.engine.block_inverse import (
    check_buckets,
    covered_with,
    logdet,
    of_state,
    root_trees,
)
from kfac_optax.engine.choice import BlockOf
from kfac_optax.engine.grouping import group_layers
from kfac_optax.engine.precondition import precondition
from kfac_optax.engine.state import CoarseState, CurvatureState, Step, the_state


def inverse_product(
    layers: Layers,
    opt_state: PyTree,
    vector: PyTree,
    *,
    block: Block | BlockOf | None = None,
    coupling: Coupling | None = None,
    curvature: PyTree = None,
    normalization: str = "unitwise",
    uncovered: str = "pass",
) -> PyTree:
    """`(F + damping I)^{-1} v` with the inverses and the damping that a state holds.

    What a preconditioner does to a gradient, before any rule bounds its length and without a step.
    What no block covers passes on unchanged. A product that is not finite is NaN as a whole.

    Args:
      layers: what the preconditioner was made from.
      opt_state: any Optax state with exactly one K-FAC transformation in it.
      vector: a tree like the parameters.
      block: as given to `scale_by_curvature`; default the Kronecker block of `kfac`. One made anew
        with the same settings serves.
      coupling: as given to `scale_by_curvature`, if any.
      curvature: of a batch, `fisher.at(...)`, for couplings that take exact products with it.
      normalization: as for `kfac`.
      uncovered: as for `kfac`, without `"graft"`, which is no linear map.

    Returns:
      A tree like `vector`.

    Raises:
      ValueError: no such transformation in the state, or several; one made with other layers,
        blocks or coupling.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.ones((2, 1)), jnp.eye(2)
    >>> layers = estimator.layers(w, x)
    >>> tx = ko.kfac(layers, learning_rate=0.1, damping=0.5)
    >>> _, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(inverse_product(layers, state, w).ravel())
    [1. 1.]
    """
    where = "inverse_product"
    layers, block_of = covered_with(where, layers, block, normalization, uncovered)
    # the state and the vector may cover a part of the parameters only, under masks
    state, leaves = the_state(opt_state, CurvatureState, where), named_leaves(vector)
    mine = present(layers, leaves)
    grouping = group_layers(mine, block_of)
    check_buckets(where, grouping.buckets, state)
    _check_coupling(where, state, coupling)
    # the damping of the last update, in the dtype of what is solved with
    dtype = wide_dtype(state.inverses)
    # what an update does, without a statistic and without a refresh
    step = Step(grouping, coupling, state.damping.astype(dtype))
    solved = precondition(step, state, leaves, dtype, curvature, None, None, jnp.bool_(True), False)
    (named,) = solved.parts
    # an update would become zero; a product that is asked for must not look like one
    named = {name: jnp.where(solved.finite, x, jnp.nan) for name, x in named.items()}
    return replace_leaves(vector, named)


def square_root_product(
    layers: Layers,
    opt_state: PyTree,
    vector: PyTree,
    *,
    block: Block | BlockOf | None = None,
    normalization: str = "unitwise",
    uncovered: str = "pass",
) -> PyTree:
    """`R z` with `R R^T = (F + damping I)^{-1}`, the matrix of `inverse_product`.

    White noise `z` becomes a sample of `N(0, (F + damping I)^{-1})`. What no block covers passes on
    unchanged, as under `inverse_product`.

    Args:
      layers: what the preconditioner was made from.
      opt_state: any Optax state with exactly one K-FAC transformation in it.
      vector: white noise, a tree like the parameters.
      block: as for `inverse_product`.
      normalization: as for `kfac`.
      uncovered: as for `inverse_product`.

    Returns:
      A tree like `vector`.

    Raises:
      ValueError: as `inverse_product`; a block without a square root, a state with a coupling.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.ones((2, 1)), jnp.sqrt(7.0) * jnp.eye(2)
    >>> layers = estimator.layers(w, x)
    >>> tx = ko.kfac(layers, learning_rate=0.1, damping=0.5)
    >>> _, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(square_root_product(layers, state, w).ravel().round(3))
    [0.5 0.5]
    """
    where = "square_root_product"
    layers, block_of = covered_with(where, layers, block, normalization, uncovered)
    # R from the inverses that the state holds, block by block
    state = the_state(opt_state, CurvatureState, where)
    # one vector on the axis of samples
    stack = jax.tree.map(lambda x: x[None], vector)
    rooted = root_trees(where, of_state(where, state, layers, block_of), stack)
    return jax.tree.map(lambda x: x[0], rooted)


def log_determinant(
    layers: Layers,
    opt_state: PyTree,
    *,
    block: Block | BlockOf | None = None,
    normalization: str = "unitwise",
    uncovered: str = "pass",
) -> jax.Array:
    """`log det(F + damping I)` over all parameters with a block, the matrix that
    `inverse_product` inverts.

    Args:
      layers: what the preconditioner was made from.
      opt_state: any Optax state with exactly one K-FAC transformation in it.
      block: as for `inverse_product`.
      normalization: as for `kfac`.
      uncovered: as for `inverse_product`.

    Raises:
      ValueError: as `inverse_product`; a block without a determinant, a state with a coupling.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.ones((2, 1)), jnp.eye(2)
    >>> layers = estimator.layers(w, x)
    >>> tx = ko.kfac(layers, learning_rate=0.1, damping=0.5)
    >>> _, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(log_determinant(layers, state))  # of the identity
    0.0
    """
    where = "log_determinant"
    layers, block_of = covered_with(where, layers, block, normalization, uncovered)
    state = the_state(opt_state, CurvatureState, where)
    return logdet(where, of_state(where, state, layers, block_of))


def factors(
    layers: Layers,
    opt_state: PyTree,
    *,
    block: Block | BlockOf | None = None,
    normalization: str = "unitwise",
    uncovered: str = "pass",
) -> dict[str, PyTree]:
    """The averaged statistics of every layer by its path, for plots and for methods of one's own.

    Those of a Kronecker block are `Factors(inputs, outputs)`, `A [p, p]` and `G [q, q]`; others
    hold what their block says. Copies of a layer (a stack, groups) are on axis 0.

    Args:
      layers: what the preconditioner was made from.
      opt_state: any Optax state with exactly one K-FAC transformation in it.
      block: as for `inverse_product`.
      normalization: as for `kfac`.
      uncovered: as for `inverse_product`.

    Raises:
      ValueError: as `inverse_product`.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda p, x: ko.Normal(ko.tap_dense(x @ p["a"]["w"], x, p["a"]["w"])))
    >>> params, x = {"a": {"w": jnp.ones((2, 1))}}, jnp.eye(2)
    >>> layers = estimator.layers(params, x)
    >>> tx = ko.kfac(layers, learning_rate=0.1)
    >>> _, state = tx.update(params, tx.init(params), params, curvature=estimator.at(params, x))
    >>> print(factors(layers, state)["a"].inputs)
    [[0.5 0. ]
     [0.  0.5]]
    """
    where = "factors"
    layers, block_of = covered_with(where, layers, block, normalization, uncovered)
    state = the_state(opt_state, CurvatureState, where)
    grouping = group_layers(layers.layers, block_of)
    check_buckets(where, grouping.buckets, state)
    found: dict[str, PyTree] = {}
    for layer, mine in zip(layers, grouping.by_layer(state.factors), strict=True):
        # without the axis of copies where there is one alone
        if layer.copies == 1:
            mine = jax.tree.map(operator.itemgetter(0), mine)
        found[layer.path] = mine
    return found


def _check_coupling(
    where: str,
    state: CurvatureState,
    coupling: Coupling | None,
) -> None:
    # a product with half of the preconditioner would be silently another one
    has = isinstance(state.coarse, CoarseState)
    if has != (coupling is not None):
        got, expected = ("a", "coupling=") if has else ("no", "no coupling=")
        raise ValueError(
            f"{where}: the state has {got} coupling between layers; expected {expected}, as the "
            "preconditioner was made with (coarse_correction() for kfac_two_level)."
        )
