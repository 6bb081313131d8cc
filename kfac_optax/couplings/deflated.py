"""Two-level couplings that know what the other level has done already: deflation and balancing.

Written for one right-hand side `g`, with `fine` a block-diagonal preconditioner `M^{-1}`, `product`
the damped curvature `F_lambda v`, and `coarse` the correction `Q v = Z^T E^{-1} Z v`. Vectors are
trees.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kfac_optax._types import Block, Coupling, Fine, Layer, Numeric, PyTree, System, Vector
from kfac_optax._validate import check_choice
from kfac_optax.couplings.coarse import coarse_correction, coarse_factorize, coarse_matrix
from kfac_optax.couplings.spaces import (
    SPACES,
    check_eigenvectors,
    factorize_space,
    make_space,
    solve_space,
)
from kfac_optax.linalg.in_order import after

Operator = Callable[[PyTree], PyTree]
COARSE_OPERATOR = ("batch", "averaged")


def a_def1(
    g: PyTree,
    fine: Operator,
    product: Operator,
    coarse: Operator,
) -> PyTree:
    """`x = M^{-1}(g - F Q g) + Q g`: the coarse level first, the fine one on what is left. One
    product.

    >>> print(a_def1(jnp.array(6.0), lambda v: v / 2, lambda v: 3 * v, lambda v: v / 3))
    2.0
    """
    # Q g
    first = coarse(g)
    return _add(fine(_subtract(g, product(first))), first)


def a_def2(
    g: PyTree,
    fine: Operator,
    product: Operator,
    coarse: Operator,
) -> PyTree:
    """`x = x0 + Q (g - F x0)`, `x0 = M^{-1} g`: the fine level first, the coarse one on what is
    left. One product.

    Of all `x0 + Z^T b` the one with the smallest `x^T F x / 2 - g^T x`, so never a worse model than
    the fine level alone.

    >>> print(a_def2(jnp.array(6.0), lambda v: v / 2, lambda v: 3 * v, lambda v: v / 3))
    2.0
    """
    # x0 = M^{-1} g
    first = fine(g)
    return _add(first, coarse(_subtract(g, product(first))))


def balanced(
    g: PyTree,
    fine: Operator,
    product: Operator,
    coarse: Operator,
) -> PyTree:
    """`x = Q g + P^T M^{-1} P g`, `P = I - F Q`: symmetric balancing (BNN). Two products.

    >>> print(balanced(jnp.array(6.0), lambda v: v / 2, lambda v: 3 * v, lambda v: v / 3))
    2.0
    """
    # P g = g - F Q g, then P^T y = y - Q F y
    first = coarse(g)
    second = fine(_subtract(g, product(first)))
    return _add(first, _subtract(second, coarse(product(second))))


MODES: dict[str, Callable[..., PyTree]] = {
    "a-def1": a_def1,
    "a-def2": a_def2,
    "bnn": balanced,
}


def deflated(
    mode: str = "a-def2",
    *,
    coarse_operator: str = "batch",
    space: str = "sums",
    coarse: str = "factored",
    resample: str = "nearest",
    fine_weight: Numeric = 1.0,
    coarse_weight: Numeric = 1.0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Coupling:
    """Two-level coupling that does not count twice what both levels see, with `Q = Z^T E^{-1} Z`,
    `P = I - F_lambda Q`.

    - `"a-def1"`: `M^{-1} P g + Q g`, coarse level first;
    - `"a-def2"`: `x0 + Q (g - F_lambda x0)` with `x0 = M^{-1} g`, fine level first;
    - `"bnn"`: `Q g + P^T M^{-1} P g`, symmetric, two products instead of one.

    `M` is the block-diagonal level, `Z [m, n]` holds the vectors that the coarse level combines,
    and `F_lambda` is the exact curvature of this step's batch (not of running averages) plus
    `lambda I`, on all parameters with a block. What no block covers passes through and is left out
    of `F_lambda`. The damping of the coarse level is therefore always the Galerkin one,
    `lambda Z Z^T`: `lambda n_i` for sums. `E` comes from

    - `"batch"`: the same batch, `E = Z F_lambda Z^T`, so that the coarse residual
      `Z (F_lambda x - g)` of the last two vanishes and `"a-def2"` is never a worse quadratic model
      than block-diagonal K-FAC. Every step costs one forward-mode pass for every vector of `Z`,
      besides the products (a forward and a backward pass each).
    - `"averaged"`: the running coarse Fisher. Products only, and these identities hold only as far
      as the running average is the batch's.

    With `"batch"`, `space` says what `Z` is made of. `z_i` are the vectors of row i of `L`, zero
    outside of it:

    - `"sums"`: `z_i = 1`, all entries of a layer, as in `coarse_correction`; `m = L`.
    - `"updates"`: `z_i = [M^{-1} g]_i`. With `"a-def2"` every layer gets its own step size from the
      exact model, `x_i = (1 + b_i) [M^{-1} g]_i`; `m = L`.
    - `"residual"`: `z_i = [M^{-1} (g - F_lambda M^{-1} g)]_i`, what a second step of the
      block-diagonal level would add; `m = L`. One product more, but for `"a-def2"`, which takes it
      anyway.
    - `"krylov"`: both `1` and `[M^{-1} g]_i`; `m = 2 L`. With `"a-def2"` never a worse model than
      `"sums"` or `"updates"`.
    - `"spectral"`: `z_i = u_A (x) u_G`, eigenvectors of the factors `A_i`, `G_i` of the block with
      the largest eigenvalues, as of the last refresh; `m = L`. The blocks have to hold them:
      `kronecker("eigh")`, `embedding("eigh")`. Which eigenpair the paper means is not certain from
      its text. The largest is a choice made here: where the curvature of the layer by itself is
      most.

    All but sums are made orthonormal within their row. That leaves `Q` as it is, and `E` becomes
    `Z F Z^T + lambda I` also where two vectors share a row, whose Gram matrix is not diagonal.
    Dropped are vectors of zeros, vectors that are within `sqrt(eps)` of what the one before them
    spans, and eigenvalues of `E` of at most `eps` times the largest (`eps` of the dtype). For
    `"updates"`, `"residual"` and `"krylov"` `Z` depends on `g`: all of the above holds for every
    `g`, but `x` is not linear in `g`.

    The curvature has to be passed in every step; statistics are still taken every `curvature_every`
    steps (with `refresh=` given as a Python bool, in every step). It has to be an estimator of the
    loss's curvature: not `forward_only`.

    Args:
      mode: `"a-def1"`, `"a-def2"` or `"bnn"`.
      coarse_operator: `"batch"` or `"averaged"`.
      space: `"sums"`, `"updates"`, `"residual"`, `"krylov"` or `"spectral"`; the last four with
        `"batch"` only.
      coarse: running coarse Fisher, `"factored"` or `"exact"`, see `coarse_correction`. With
        `"batch"` it is measured only for `coarse_fisher`.
      resample: as for `coarse_correction`.
      fine_weight: factor of `M^{-1}`.
      coarse_weight: factor of `Q`. Zero leaves block-diagonal K-FAC; the identities above are those
        of one.
      precision: matmul precision of the coarse level.

    Returns:
      A `Coupling`.

    Raises:
      ValueError: unknown word, negative weight, another space than sums without `"batch"`; from
        whatever uses it, `"spectral"` where a block holds no eigenvectors; from the update, without
        curvature.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = ko.kfac(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None, coupling=deflated())
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())  # one layer: both levels see it, and it is solved once
    [1. 1.]

    Reference: Tang, Nabben, Vuik & Erlangga, Comparison of Two-Level Preconditioners Derived from
      Deflation, Domain Decomposition and Multigrid Methods (2009); Koroko et al., Analysis and
      Comparison of Two-Level KFAC Methods for Training Deep Neural Networks (2023), for the coarse
      residual and the spaces.
    """
    where = "deflated"
    check_choice(where, "mode", mode, MODES)
    check_choice(where, "coarse_operator", coarse_operator, COARSE_OPERATOR)
    check_choice(where, "space", space, SPACES)
    if space != "sums" and coarse_operator != "batch":
        raise ValueError(
            f"{where}: space={space!r} with coarse_operator={coarse_operator!r}, which is measured "
            "for sums of layers only; expected coarse_operator='batch', or space='sums'."
        )
    # measures the averaged coarse Fisher, and knows how it is factorised
    level = coarse_correction(
        coarse,
        damping="galerkin",
        resample=resample,
        fine_weight=fine_weight,
        coarse_weight=coarse_weight,
        precision=precision,
    )

    def factorize(statistic: PyTree, fine: Fine) -> PyTree:
        if coarse_operator == "batch":
            return ()
        return coarse_factorize(coarse_matrix(statistic), fine.sizes, galerkin=True)

    def apply(inverse: PyTree, system: System) -> list[Vector]:
        # M^{-1} g is needed several times, and solved for once
        gradient = system.gradient
        solved = system.fine(gradient)
        system = system._replace(fine=_known(system.fine, gradient, solved))

        def weighted(v: Vector) -> Vector:
            return [jnp.asarray(fine_weight, x.dtype) * x for x in system.fine(v)]

        # F_lambda v = F v + lambda v, one exact product on the batch
        def product(v: Vector) -> Vector:
            pairs = zip(system.product(v), v, strict=True)
            return [fx + system.damping * x for fx, x in pairs]

        alone = weighted(gradient)
        fine, damped = _known(weighted, gradient, alone), product
        if space == "residual":  # the space takes this product, and so may the correction
            damped = _known(product, alone, product(alone))
        chosen = make_space(space, system, lambda: _subtract(gradient, damped(alone)))
        # one factorisation after another: those of the blocks come first
        if coarse_operator == "batch":
            form = system.coarse(chosen.prolong, len(chosen.squares))
            inverse = factorize_space(chosen, after(form, alone))

        # Q v = Z^T E^{-1} Z v
        def correct(v: Vector) -> Vector:
            restricted = chosen.restrict(v)
            solved = solve_space(inverse, chosen, restricted, system.damping, precision=precision)
            weight = jnp.asarray(coarse_weight, solved.dtype)
            return chosen.prolong(weight * solved)

        update = MODES[mode](gradient, fine, damped, correct)
        return [alone, _subtract(update, alone)]

    def check(layers: Sequence[Layer], blocks: Sequence[Block]) -> None:
        level.check(layers, blocks)
        if space == "spectral":
            check_eigenvectors(layers, blocks)

    words = (coarse_operator, coarse) if space == "sums" else (coarse_operator, coarse, space)
    return level._replace(
        name=f"{mode} ({', '.join(words)})", factorize=factorize, apply=apply, check=check
    )


def _known(function: Operator, argument: PyTree, value: PyTree) -> Operator:
    """`function`, with its value at this very argument, compared as an object, already computed."""
    return lambda v: value if v is argument else function(v)


def _add(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, y)


def _subtract(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, x, y)
