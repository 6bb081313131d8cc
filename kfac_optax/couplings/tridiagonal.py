"""K-FAC's block-tridiagonal inverse: each layer's gradient regressed on the next layer's, for
chains of dense layers.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Coupling, Fine, Layer, PyTree, System, Vector
from kfac_optax.blocks.kronecker.kronecker import DenseInverse, Factors
from kfac_optax.couplings.links import Link, link_of, links_by_shape, solve_chain, stacked
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.weighted_rows import finite_padding, keep_rows

_WHERE = "tridiagonal"


class CrossFactors(NamedTuple):
    """Cross moments of neighbours, links of equal shapes stacked: `A_{i,i+1} = E[a_i a_{i+1}^T]`
    and `G_{i,i+1}`.
    """

    inputs: dict[str, Float[Array, "links p next_p"]]
    outputs: dict[str, Float[Array, "links q next_q"]]


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
        shapes = [(x.inputs.shape[-1], x.outputs.shape[-1]) for x in measured]
        groups = links_by_shape(shapes).items()

        # E[x_i x_{i+1}^T] of every link, on the side of the inputs or outputs
        def cross(rows: Sequence[Array], members: list[int]) -> Array:
            moments = []
            for i in members:
                total = gram(rows[i], rows[i + 1], precision=precision)
                moments.append(total / examples)
            return jnp.stack(moments)

        of_inputs = [x.inputs for x in measured]
        of_outputs = [x.outputs for x in measured]
        inputs = {name: cross(of_inputs, members) for name, members in groups}
        outputs = {name: cross(of_outputs, members) for name, members in groups}
        return CrossFactors(inputs, outputs)

    def factorize(statistic: CrossFactors, fine: Fine) -> dict[str, Link]:
        factors = [fine.factors(i) for i in range(len(fine.sizes))]
        shapes = [(len(factor.inputs), len(factor.outputs)) for factor in factors]
        link = functools.partial(link_of, damping=fine.damping, precision=precision)
        make = jax.vmap(link)
        inverse: dict[str, Link] = {}
        previous: PyTree = statistic  # comes after the factorisations of the blocks
        # one group after another, see `after`
        for name, members in links_by_shape(shapes).items():
            # undamped factors of layer i, damped inverses of layer i + 1
            own = stacked([factors[i] for i in members])
            following = stacked([fine.inverses(i + 1) for i in members])
            cross = Factors(statistic.inputs[name], statistic.outputs[name])
            previous = inverse[name] = make(after(own, previous), cross, following)
        return inverse

    def apply(inverse: dict[str, Link], system: System) -> list[Vector]:
        # the solve of the last layer is that of its block; the others are replaced
        fine = system.fine(system.gradient)
        gradients = system.matrices(system.gradient)
        last = system.matrices(fine)[-1]
        solved = solve_chain(inverse, gradients, last, precision)
        update = system.replace(fine, solved)
        added = [x - y for x, y in zip(update, fine, strict=True)]
        return [fine, added]

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
    inputs, outputs = {}, {}
    for name, members in links_by_shape(sizes).items():
        first, links = members[0], len(members)
        (p, q), (next_p, next_q) = sizes[first], sizes[first + 1]
        inputs[name] = jnp.zeros((links, p, next_p), dtype)
        outputs[name] = jnp.zeros((links, q, next_q), dtype)
    return CrossFactors(inputs, outputs)


def _measure(
    a: Array,
    g: Array | None,
    weights: Array | None,
) -> _Rows:
    if g is None:
        raise ValueError(
            f"{_WHERE}: this estimator measures no output gradients, which the cross factors need. "
            "Use fisher, ggn or empirical_fisher."
        )
    # a scan of one step leaves an axis
    a = a.reshape(*a.shape[:2], a.shape[-1])
    g = g.reshape(*g.shape[:2], g.shape[-1])
    if weights is None:
        return _Rows(a, g)
    weights = weights.reshape(1, -1)
    # g carries the root of the weight, a gets the other one
    root = jnp.sqrt(weights)[..., None].astype(a.dtype)
    a = keep_rows(a, weights) * root
    return _Rows(a, finite_padding(g, weights[..., None]))


def _check(layers: Sequence[Layer], blocks: Sequence[Block]) -> None:
    expected = (
        "expected dense layers that run once, one after another, in the block "
        "kronecker('cholesky'). Use kfac(..., inverse='cholesky'), or coarse_correction() for "
        "other layers."
    )
    pairs = zip(layers, blocks, strict=True)
    chain = [(layer, block) for layer, block in pairs if layer.coupled]
    if not chain:
        raise ValueError(f"{_WHERE}: no layer with weights between units; {expected}")
    for layer, block in chain:
        if layer.kind != "dense" or layer.copies > 1:
            what = f"is of kind {layer.kind!r}"
            if layer.kind == "dense":
                what = f"is a stack of {layer.copies}"
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
        if not isinstance(factors, Factors):
            return factors
        return block.factorize(factors, jnp.ones(()))

    return isinstance(jax.eval_shape(inverse), DenseInverse)
