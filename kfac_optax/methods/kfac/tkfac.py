"""TKFAC and TEKFAC: Kronecker factors with the partial traces of the Fisher block."""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.blocks.tkfac import tekfac_block, tkfac_block
from kfac_optax.engine.choice import beside_blocks
from kfac_optax.methods.kfac.ekfac import where_examples
from kfac_optax.methods.kfac.fixed import eigen_numbers, kfac
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.signature import flat_signature

# Words of `kfac` that the block decides on.
_SET = (
    "block",
    "inverse",
    "sharing",
    "positions",
    "convolution",
    "recurrence",
    "factored_gradient",
)


@flat_signature(kfac, without=_SET)
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
    block = tkfac_block(
        inverse, sharing=sharing, positions=positions, split=split, precision=precision
    )
    return kfac(
        layers,
        block=where_examples(block, normalization, precision, inverse),
        normalization=beside_blocks(normalization),
        precision=precision,
        **options,
    )


@flat_signature(kfac, without=_SET)
def tekfac(
    layers: Layers,
    *,
    sharing: str = "expand",
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """TEKFAC: `ekfac` in the eigenbasis of `tkfac`.

    `U = U_Phi [(U_Phi^T V U_Psi) / (S + damping)] U_Psi^T` per layer, with `S` the mean over
    examples of the squared gradient in that basis, see `tekfac_block`. As for `ekfac`, statistics
    have to be more frequent than refreshes.

    Args:
      layers: from `fisher.layers(params, *args)`.
      sharing: `"expand"` or `"exact"`, as for `tkfac`.
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of moments and solves.
      **options: as for `kfac`. The damping is exact, `decay` bounds the averaging weights of
        factors and moments, `inverse_every` is the period of the eigenbases.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, an unknown word, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = tekfac(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Gao et al., Eigenvalue-corrected Natural Gradient Based on a New Approximation (2020).
    """
    block = tekfac_block(sharing=sharing, precision=precision)
    return kfac(
        layers,
        block=where_examples(block, normalization, precision),
        normalization=beside_blocks(normalization),
        precision=precision,
        **options,
    )


def _corrected_numbers(s: Sizes) -> int:
    return eigen_numbers(s) + s.p * s.q + 1


_SHORT: dict[str, Any] = dict(learning_rate=0.1, damping=0.05, curvature_every=2, inverse_every=3)
_COMMON: dict[str, Any] = dict(
    kind="preconditioner",
    needs=frozenset({"gradient", "curvature"}),
    cost=("O(d³)", "O(d³)"),
)

RECORDS = (
    Method(
        name="tkfac",
        summary="K-FAC with factors that have the partial traces of the Fisher block",
        paper="Gao et al. (2021)",
        equation="U = (δ Φ ⊗ Ψ + λ I)⁻¹ V, δ Φ = E[|g|² a aᵀ], δ Ψ = E[|a|² g gᵀ]",
        state=eigen_numbers,
        state_text="2 (p² + q²) + p + q",
        test="tests/blocks/test_tkfac.py::test_both_partial_traces_are_those_of_the_exact_block",
        build=lambda layers, **options: tkfac(layers, **(_SHORT | options)),
        block_of=lambda layer: tkfac_block(),
        **_COMMON,
    ),
    Method(
        name="tekfac",
        summary="EKFAC in the eigenbasis of TKFAC",
        paper="Gao et al. (2020)",
        equation="U = U_Φ [(U_Φᵀ V U_Ψ) / (S + λ)] U_Ψᵀ, S = E[(U_Φᵀ a gᵀ U_Ψ)²]",
        state=_corrected_numbers,
        state_text="2 (p² + q²) + p q + p + q + 1",
        test="tests/blocks/test_tkfac.py::test_corrected_eigenvalues_are_those_of_ekfac",
        build=lambda layers, **options: tekfac(layers, **(_SHORT | options)),
        block_of=lambda layer: tekfac_block(),
        **_COMMON,
    ),
)
