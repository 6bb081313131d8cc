"""TKFAC: Kronecker factors with the partial traces of the Fisher block."""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.blocks.kronecker.tkfac import tkfac_block
from kfac_optax.engine.choice import beside_blocks
from kfac_optax.methods.kfac.ekfac import OF_THE_BLOCK, where_examples
from kfac_optax.methods.kfac.fixed import eigen_numbers, kfac
from kfac_optax.methods.record import SHORT_CLIPPED, Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(kfac, without=OF_THE_BLOCK)
def tkfac(
    layers: Layers,
    *,
    inverse: str = "eigh",
    sharing: str = "expand",
    positions: int | None = None,
    split: str = "even",
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """TKFAC: K-FAC with factors that keep the trace of the Fisher block, `F ~ delta Phi (x) Psi`.

    Per layer `U = (delta Phi (x) Psi + damping I)^{-1} V` with `delta = E[|a|^2 |g|^2]`,
    `delta Phi = E[|g|^2 a a^T]` and `delta Psi = E[|a|^2 g g^T]`, see `tkfac_block`: examples with
    large gradients weigh more in the moment of the inputs, where K-FAC takes both moments alone. A
    layer without rows of examples (see the coverage table) gets the block of `kfac`, as do
    embeddings and normalisation layers.

    Args:
      layers: from `fisher.layers(params, *args)`.
      inverse: `"eigh"` (exact damping) or `"cholesky"` (factored damping).
      sharing: positions that share a weight: `"expand"` (a row each, as for convolutions in
        `kfac`) or `"exact"` (traces of the exact block, from whole examples).
      positions: at most about this many positions of an example are measured; `None` for all.
      split: of the damping, with `inverse="cholesky"`: `"even"` or `"trace"`, see `tkfac_block`.
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of moments and solves.
      **options: as for `kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, an unknown word, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = tkfac(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Gao et al., A Trace-restricted Kronecker-Factored Approximation to Natural Gradient
      (2021).
    """
    # delta Phi = E[|g|^2 a a^T], delta Psi = E[|a|^2 g g^T]
    block = tkfac_block(
        inverse, sharing=sharing, positions=positions, split=split, precision=precision
    )
    # layers without rows of examples have A and G of `kfac`
    return kfac(
        layers,
        block=where_examples(block, normalization, precision, inverse),
        normalization=beside_blocks(normalization),
        precision=precision,
        **options,
    )


RECORDS = (
    Method(
        name="tkfac",
        kind="preconditioner",
        summary="K-FAC with factors that have the partial traces of the Fisher block",
        paper="Gao et al. (2021)",
        equation="U = (δ Φ ⊗ Ψ + λ I)⁻¹ V, δ Φ = E[|g|² a aᵀ], δ Ψ = E[|a|² g gᵀ]",
        needs=frozenset({"gradient", "curvature"}),
        state=eigen_numbers,
        # factors, eigenvectors, and eigenvalues on both sides
        state_text="2 (p² + q²) + p + q",
        cost=("O(d³)", "O(d³)"),
        test="tests/blocks/test_tkfac.py::test_both_partial_traces_are_those_of_the_exact_block",
        build=lambda layers, **options: tkfac(layers, **(SHORT_CLIPPED | options)),
        block_of=lambda layer: tkfac_block(),
    ),
)
