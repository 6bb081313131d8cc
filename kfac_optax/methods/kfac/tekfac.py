"""TEKFAC: EKFAC in the eigenbasis of TKFAC."""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.blocks.kronecker.tekfac import tekfac_block
from kfac_optax.engine.choice import beside_blocks
from kfac_optax.methods.kfac.ekfac import OF_THE_BLOCK, corrected_numbers, where_examples
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT_CLIPPED, Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(kfac, without=OF_THE_BLOCK)
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
    # U_Phi, U_Psi of `tkfac`, S of `ekfac`
    block = tekfac_block(sharing=sharing, precision=precision)
    return kfac(
        layers,
        # |g|^2 a a^T needs both of an example
        block=where_examples(block, normalization, precision),
        normalization=beside_blocks(normalization),
        precision=precision,
        **options,
    )


RECORDS = (
    Method(
        name="tekfac",
        kind="preconditioner",
        summary="EKFAC in the eigenbasis of TKFAC",
        paper="Gao et al. (2020)",
        equation="U = U_Φ [(U_Φᵀ V U_Ψ) / (S + λ)] U_Ψᵀ, S = E[(U_Φᵀ a gᵀ U_Ψ)²]",
        needs=frozenset({"gradient", "curvature"}),
        # S [p, q] beside the factors and their bases
        state=corrected_numbers,
        state_text="2 (p² + q²) + p q + p + q + 1",
        cost=("O(d³)", "O(d³)"),
        test="tests/blocks/test_tkfac.py::test_corrected_eigenvalues_are_those_of_ekfac",
        build=lambda layers, **options: tekfac(layers, **(SHORT_CLIPPED | options)),
        block_of=lambda layer: tekfac_block(),
    ),
)
