"""INGD: natural gradient without inverses, dense."""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.blocks.kronecker.inverse_free import inverse_free
from kfac_optax.methods.kfac.singd import TEST, singd
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature


@flat_signature(singd, without=("structure", "size"))
def ingd(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """INGD: `singd` with dense roots, K-FAC without an inverse.

    Args:
      layers: from `fisher.layers(params, *args)`.
      **options: as for `singd`, but `structure` and `size`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, an unknown word.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> tx = ingd(estimator.layers(jnp.zeros((2, 1)), jnp.eye(2)))
    >>> print(tx.init(jnp.zeros((2, 1))).preconditioner.inverses["dense_2x1"].inputs.root.shape)
    (1, 1, 2, 2)

    Reference: Lin, Duruisseaux, Leok, Nielsen, Khan & Schmidt, Simplifying Momentum-based
      Positive-definite Submanifold Optimization with Applications to Deep Learning (2023).
    """
    # K and C with all their entries
    return singd(layers, structure="dense", **options)


def _dense_numbers(sizes: Sizes) -> int:
    """Roots and momenta of both sides, and the two means."""
    # K, m of inputs [p, p], C, m of outputs [q, q]
    return 2 * (sizes.p**2 + sizes.q**2) + 2


RECORDS = (
    Method(
        name="ingd",
        kind="preconditioner",
        summary="roots of the inverse factors followed by products, never an inverse; "
        "`coupled=False`: IKFAC",
        paper="Lin, Duruisseaux, Leok, Nielsen, Khan & Schmidt (2023)",
        equation="U = K Kᵀ V C Cᵀ, K ← K (I - β m), m from Kᵀ A K",
        needs=frozenset({"gradient", "curvature"}),
        state=_dense_numbers,
        state_text="2 (p² + q²) + 2",
        # a statistic costs what a refresh does elsewhere
        cost=("O(d³) at every statistic", "O(d³)"),
        test=TEST,
        build=lambda layers, **options: ingd(layers, **(SHORT | options)),
        block_of=lambda layer: inverse_free(layer.shape),
    ),
)
