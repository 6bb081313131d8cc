"""Two-level K-FAC: blocks and a coarse correction between the layers."""

from typing import Any

import optax

from kfac_optax._types import Layers, Numeric
from kfac_optax._validate import check_choice, check_unused
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.couplings.coarse import coarse_correction
from kfac_optax.couplings.deflated import MODES, deflated
from kfac_optax.methods.kfac.fixed import eigen_numbers, kfac
from kfac_optax.methods.record import SHORT_CLIPPED, Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(kfac, without=("coupling",))
def kfac_two_level(
    layers: Layers,
    *,
    coarse: str = "factored",
    coarse_damping: str = "identity",
    resample: str = "nearest",
    fine_weight: Numeric = 1.0,
    coarse_weight: Numeric = 1.0,
    correction: str = "additive",
    coarse_operator: str = "batch",
    coarse_space: str = "sums",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Two-level K-FAC: K-FAC plus a coarse correction that couples the layers, then a bound on the
    step.

    `U = fine_weight * blockdiag(F_ii + damping I)^{-1} V + coarse_weight * Z^T (F_c + damping
    I)^{-1} Z V`, with `Z` summing all entries of each layer and `F_c = Z F Z^T` an `L x L` matrix.
    This is the additive correction; the others, see `deflated`, take exact products with the
    curvature of the batch, so `curvature` has to be passed in every step.

    Args:
      layers: from `fisher.layers(params, *args)`.
      coarse: `"factored"` (the paper) or `"exact"`, see `coarse_correction`.
      coarse_damping: `"identity"` (the paper) or `"galerkin"`; of the additive correction, the
        others need the latter.
      resample: how maps of unequal size are compared, `"nearest"` (the paper) or `"area"`.
      fine_weight: weight of the block-diagonal level.
      coarse_weight: weight of the correction.
      correction: `"additive"` (the paper), `"a-def1"`, `"a-def2"` or `"bnn"`.
      coarse_operator: of the last three, `"batch"` (exact, one forward-mode pass per layer and
        step) or `"averaged"`.
      coarse_space: of the last three, `"sums"` of each layer (the paper), or `"updates"`,
        `"residual"`, `"krylov"` or `"spectral"`, see `deflated`.
      precision: matmul precision of factor products, solves and the correction.
      **options: as for `kfac`; damping is that of both levels, `inverse` that of the fine one.

    Returns:
      A transformation; its state is made of arrays only.

    Raises:
      ValueError: a hyperparameter out of range, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = kfac_two_level(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print([f"{u:.3f}" for u in updates.ravel()])
    ['2.333', '2.333']

    Reference: Tselepidis, Kohler & Orvieto, Two-Level K-FAC Preconditioning for Deep Learning
      (2020), algorithm 1.
    """
    check_choice("kfac_two_level", "correction", correction, ("additive", *MODES))
    common: dict[str, Any] = dict(
        coarse=coarse,
        resample=resample,
        fine_weight=fine_weight,
        coarse_weight=coarse_weight,
        precision=precision,
    )
    # Z^T (Z F Z^T + damping I)^{-1} Z V
    coupling = coarse_correction(damping=coarse_damping, **common)
    # an average of statistics, in place of products with the curvature of the batch
    if correction == "additive":
        check_unused(
            "kfac_two_level",
            f"correction='additive', which keeps averages; it belongs to {MODES}",
            coarse_operator=(coarse_operator, "batch"),
        )
    # deflated: fine and coarse part one after the other, not side by side
    if correction != "additive":
        coupling = deflated(
            correction, coarse_operator=coarse_operator, space=coarse_space, **common
        )
    elif coarse_space != "sums":
        raise ValueError(
            f"kfac_two_level: got coarse_space={coarse_space!r} with correction='additive', which "
            "sums each layer; expected coarse_space='sums', or correction= one of "
            f"{', '.join(map(repr, MODES))}."
        )
    # V through blocks and coupling, then a bound as for `kfac`
    return kfac(layers, coupling=coupling, precision=precision, **options)


def coarse_numbers(layers: int) -> int:
    """Two factors of the coarse matrix, its eigendecomposition, sizes and index of the layers."""
    return 3 * layers**2 + 3 * layers


RECORDS = (
    Method(
        name="kfac_two_level",
        kind="preconditioner",
        summary="K-FAC plus an L×L coarse correction that couples the layers, then KL-clip; "
        '`balance="model"`: the correction enters as far as an exact model agrees; '
        '`correction="a-def2"`, `"a-def1"`, `"bnn"`: deflated, with exact products',
        paper="Tselepidis, Kohler & Orvieto (2020); Tang, Nabben, Vuik & Erlangga (2009); "
        "Koroko et al. (2023)",
        equation="U = blockdiag(A ⊗ G + λ I)⁻¹ V + Zᵀ (Z F Zᵀ + λ I)⁻¹ Z V",
        needs=frozenset({"gradient", "curvature"}),
        state=eigen_numbers,
        state_text="2 (p² + q²) + p + q, without p + q where p or q is above 128, and 3 L² + 3 L",
        cost=("O(d³ + L³)", "O(d³ + L²)"),
        test="tests/methods/test_two_level_dense.py::test_update_equals_dense_formula",
        build=lambda layers, **options: kfac_two_level(layers, **(SHORT_CLIPPED | options)),
        block_of=lambda layer: kronecker(),
        across=coarse_numbers,
    ),
)
