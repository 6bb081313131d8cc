"""K-FAC's block-tridiagonal inverse: each layer's gradient regressed on the next layer's, for
chains of dense layers.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Coupling, Fine, Layer, PyTree, System, Vector
from kfac_optax.blocks.kronecker import DenseInverse, Factors
from kfac_optax.linalg.factorize import after
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.kronecker_products import sandwich, trace_ratio
from kfac_optax.linalg.two_term import Pencil, pencil, two_term_solve
from kfac_optax.linalg.weighted_rows import finite_padding, keep_rows

_WHERE = "tridiagonal"


class CrossFactors(NamedTuple):
    """Cross moments of neighbours, links of equal shapes stacked: `A_{i,i+1} = E[a_i a_{i+1}^T]`
    and `G_{i,i+1}`.
    """

    inputs: dict[str, Float[Array, "links p next_p"]]
    outputs: dict[str, Float[Array, "links q next_q"]]


class Link(NamedTuple):
    """How layer i hangs on layer i+1: regressions `Psi = X_{i,i+1} X_{i+1}^{-1}`, and
    `(X_i, Psi X_{i+1} Psi^T)`.
    """

    inputs: Float[Array, "p next_p"]
    outputs: Float[Array, "q next_q"]
    inputs_pencil: Pencil
    outputs_pencil: Pencil


class _Rows(NamedTuple):
    inputs: Float[Array, "1 N p"]
    outputs: Float[Array, "1 N q"]


def tridiagonal(*, precision: jax.lax.PrecisionLike = "highest") -> Coupling:
    """Block-tridiagonal inverse of a chain of layers `1..L`, `F^{-1} = Xi^T diag(Sigma_i^{-1}) Xi`.

    The inverse of the matrix that agrees with the damped Kronecker surrogate on the diagonal and
    the first off-diagonal blocks and whose inverse is block-tridiagonal. With `A_i`, `G_i` the
    damped factors of layer i, `A_{i,i+1} = E[a_i a_{i+1}^T]` and `G_{i,i+1} = E[g_i g_{i+1}^T]`
    (never damped), `Psi_i = A_{i,i+1} A_{i+1}^{-1}`, `Phi_i = G_{i,i+1} G_{i+1}^{-1}`, and
    `V_i [p, q]` the gradients:

    - `U_i = V_i - Psi_i V_{i+1} Phi_i^T`, `U_L = V_L`
    - `Y_i = (A_i (x) G_i - Psi_i A_{i+1} Psi_i^T (x) Phi_i G_{i+1} Phi_i^T)^{-1} U_i`,
      `Y_L = A_L^{-1} V_L G_L^{-1}`
    - `X_i = Y_i - Psi_{i-1}^T Y_{i-1} Phi_{i-1}`, `X_1 = Y_1`

    The chain is that of all layers with weights between units, in order of execution. Each has to
    be dense, run once on one row per example, and have the block `kronecker("cholesky")`. Whatever
    else has a block, such as the scale and shift of normalisation layers, may lie between them and
    stays block-diagonal. Branches are not seen: in a network with some, neighbours in the chain
    need not feed one another. The result is positive definite all the same, for cross moments of
    any two layers are consistent with their own.

    State: the cross factors, and for each link two regressions and two pencils. Refreshing costs
    two more eigendecompositions for each factor.

    Args:
      precision: matmul precision of factor products and solves.

    Returns:
      A `Coupling`.

    Raises:
      ValueError: from whatever uses it, where a layer does not fit; from the statistics, where a
        layer has several rows per example or the estimator measures no output gradients.

    >>> import kfac_optax as ko
    >>> def predict(w, x):
    ...     h = ko.tap_dense(x @ w["a"], x, w["a"])
    ...     return ko.Normal(ko.tap_dense(h @ w["b"], h, w["b"]))
    >>> estimator, w, x = ko.ggn(predict), {"a": jnp.eye(1), "b": jnp.eye(1)}, jnp.ones((2, 1))
    >>> layers = estimator.layers(w, x)
    >>> tx = ko.kfac(layers, learning_rate=1.0, damping=1.0, kl_clip=None, inverse="cholesky", coupling=tridiagonal())
    >>> updates, _ = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(f"{updates['a'][0, 0]:.3f} {updates['b'][0, 0]:.3f}")  # of the matrix [[4, 1], [1, 4]]
    0.200 0.200

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), section 4.3 and appendix B.
    """

    def reduce(measured: Sequence[_Rows], examples: int) -> CrossFactors:
        # links of equal shapes are stacked, so that one batched call serves them
        groups = _groups([(x.inputs.shape[-1], x.outputs.shape[-1]) for x in measured]).items()

        # E[x_i x_{i+1}^T] of every link, on the side of the inputs or outputs
        def cross(side: str, members: list[int]) -> Array:
            pairs = ((getattr(measured[i], side), getattr(measured[i + 1], side)) for i in members)
            return jnp.stack([gram(x, y, precision=precision) / examples for x, y in pairs])

        return CrossFactors(
            {k: cross("inputs", m) for k, m in groups}, {k: cross("outputs", m) for k, m in groups}
        )

    def factorize(statistic: CrossFactors, fine: Fine) -> dict[str, Link]:
        factors = [fine.factors(i) for i in range(len(fine.sizes))]
        inverse: dict[str, Link] = {}
        previous: PyTree = statistic  # comes after the factorisations of the blocks
        # one group after another, see `after`
        for name, members in _groups([(len(f.inputs), len(f.outputs)) for f in factors]).items():
            # undamped factors of layer i, damped inverses of layer i + 1
            own = [factors[i] for i in members]
            following = [fine.inverses(i + 1) for i in members]
            own, following = (
                jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (own, following)
            )
            cross = Factors(statistic.inputs[name], statistic.outputs[name])
            make = jax.vmap(functools.partial(_link, damping=fine.damping, precision=precision))
            previous = inverse[name] = make(after(own, previous), cross, following)
        return inverse

    def apply(inverse: dict[str, Link], system: System) -> list[Vector]:
        # the solve of the last layer is that of its block; the others are replaced
        fine = system.fine(system.gradient)
        update = system.replace(
            fine,
            _solve(inverse, system.matrices(system.gradient), system.matrices(fine)[-1], precision),
        )
        return [fine, [x - y for x, y in zip(update, fine, strict=True)]]

    return Coupling(
        "block-tridiagonal",
        _init,
        _measure,
        reduce,
        factorize,
        apply,
        _check,
        sees="rows",
        late=True,
    )


def _init(layers: Sequence[Layer], dtype: jnp.dtype) -> CrossFactors:
    sizes = [layer.shape for layer in layers]
    groups = _groups(sizes).items()
    inputs = {k: jnp.zeros((len(m), sizes[m[0]][0], sizes[m[0] + 1][0]), dtype) for k, m in groups}
    outputs = {k: jnp.zeros((len(m), sizes[m[0]][1], sizes[m[0] + 1][1]), dtype) for k, m in groups}
    return CrossFactors(inputs, outputs)


def _measure(a: Array, g: Array | None, weights: Array | None) -> _Rows:
    if g is None:
        raise ValueError(
            f"{_WHERE}: this estimator measures no output gradients, which the cross factors need. "
            "Use fisher, ggn or empirical_fisher."
        )
    # a scan of one step leaves an axis
    a, g = (x.reshape(*x.shape[:2], x.shape[-1]) for x in (a, g))
    if weights is None:
        return _Rows(a, g)
    weights = weights.reshape(1, -1)
    # g carries the root of the weight, a gets the other one
    a = keep_rows(a, weights) * jnp.sqrt(weights)[..., None].astype(a.dtype)
    return _Rows(a, finite_padding(g, weights[..., None]))


def _link(
    own: Factors,
    cross: Factors,
    following: DenseInverse,
    *,
    damping: Array,
    precision: jax.lax.PrecisionLike,
) -> Link:
    # the damping of the layer's own block: pi sqrt(damping) and sqrt(damping) / pi
    pi, root = trace_ratio(*own), jnp.sqrt(damping)
    # Psi = A_{i,i+1} A_{i+1}^{-1} and Phi = G_{i,i+1} G_{i+1}^{-1}
    psi, phi = (
        jnp.matmul(c, inverse, precision=precision)
        for c, inverse in zip(cross, following, strict=True)
    )
    # Psi A_{i+1} Psi^T = C A_{i+1}^{-1} C^T, what the next layer explains of this one
    explained = [
        sandwich(c, x, c.T, precision=precision) for c, x in zip(cross, following, strict=True)
    ]
    # both sides of A (x) G - (Psi A Psi^T) (x) (Phi G Phi^T), diagonalised
    inputs = pencil(own.inputs, explained[0], pi * root, precision=precision)
    return Link(
        psi,
        phi,
        inputs,
        pencil(after(own.outputs, inputs), explained[1], root / pi, precision=precision),
    )


def _solve(
    inverse: dict[str, Link],
    v: list[Array],
    last: Array,
    precision,
) -> list[Array]:
    """`X_i` of all layers; the last one's own solve is given."""

    def first_two(link: Link, v: Array, following: Array) -> tuple[Array, Array]:
        # U_i = V_i - Psi_i V_{i+1} Phi_i^T, then Y_i
        u = v - sandwich(link.inputs, following, link.outputs.T, precision=precision)
        y = two_term_solve(
            link.inputs_pencil, link.outputs_pencil, u, minus=True, precision=precision
        )
        # Psi_i^T Y_i Phi_i, to be taken off X_{i+1}
        return y, sandwich(link.inputs.T, y, link.outputs, precision=precision)

    # all links are independent of one another: no recursion along the chain
    y, explained = [*v[:-1], last], [jnp.zeros((), last.dtype)] * len(v)
    for name, members in _groups([x.shape for x in v]).items():
        stacked = (jnp.stack([v[i + step] for i in members]) for step in (0, 1))
        for i, mine, of_next in zip(
            members, *jax.vmap(first_two)(inverse[name], *stacked), strict=True
        ):
            y[i], explained[i + 1] = mine, of_next
    return [x - e for x, e in zip(y, explained, strict=True)]


def _groups(shapes: Sequence[tuple[int, ...]]) -> dict[str, list[int]]:
    """Links `(i, i + 1)` of the chain by their shapes, `i` in order: each group is one batched
    call.
    """
    groups: dict[str, list[int]] = {}
    for i, ((p, q), (next_p, next_q)) in enumerate(itertools.pairwise(shapes)):
        groups.setdefault(f"{p}x{q}_{next_p}x{next_q}", []).append(i)
    return groups


def _check(layers: Sequence[Layer], blocks: Sequence[Block]) -> None:
    expected = (
        "expected dense layers that run once, one after another, in the block "
        "kronecker('cholesky'). Use kfac(..., inverse='cholesky'), or coarse_correction() for "
        "other layers."
    )
    chain = [(layer, block) for layer, block in zip(layers, blocks, strict=True) if layer.coupled]
    if not chain:
        raise ValueError(f"{_WHERE}: no layer with weights between units; {expected}")
    for layer, block in chain:
        if layer.kind != "dense" or layer.copies > 1:
            what = (
                f"is a stack of {layer.copies}"
                if layer.kind == "dense"
                else f"is of kind {layer.kind!r}"
            )
            raise ValueError(f"{_WHERE}: layer {layer.path!r} {what}; {expected}")
        if layer.uses > 1:
            raise ValueError(f"{_WHERE}: layer {layer.path!r} runs {layer.uses} times; {expected}")
        if not _inverts(block, layer):
            raise ValueError(
                f"{_WHERE}: layer {layer.path!r} has the block {block.name!r}; {expected}"
            )


def _inverts(block: Block, layer: Layer) -> bool:
    def inverse() -> PyTree:
        factors = block.init(layer, jnp.float32)
        return (
            factors if not isinstance(factors, Factors) else block.factorize(factors, jnp.ones(()))
        )

    return isinstance(jax.eval_shape(inverse), DenseInverse)
