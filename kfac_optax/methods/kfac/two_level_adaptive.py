"""Two-level K-FAC that needs no tuning."""

from typing import Any

import optax

from kfac_optax._types import Layers, Numeric
from kfac_optax._validate import check_choice
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.couplings.coarse import coarse_correction
from kfac_optax.methods.kfac.adaptive import (
    NEEDS_VALUE,
    SHORT_ADAPTED,
    adaptive_numbers,
    kfac_adaptive,
)
from kfac_optax.methods.kfac.two_level import coarse_numbers
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(kfac_adaptive, without=("coupling",))
def kfac_two_level_adaptive(
    layers: Layers,
    *,
    coarse: str = "factored",
    coarse_damping: str = "identity",
    resample: str = "nearest",
    fine_weight: Numeric = 1.0,
    coarse_weight: Numeric = 1.0,
    balance: str = "sum",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Two-level K-FAC with learning rate, momentum and damping adapted; a whole optimizer that
    needs no tuning.

    As `kfac_adaptive`, with the coarse correction of `kfac_two_level`, whose damping is adapted
    too. Used in the same way.

    Args:
      layers: from `fisher.layers(params, *args)`.
      coarse: `"factored"` or `"exact"`, see `coarse_correction`.
      coarse_damping: `"identity"` or `"galerkin"`.
      resample: how maps of unequal size are compared, `"nearest"` or `"area"`.
      fine_weight: weight of the block-diagonal level.
      coarse_weight: weight of the correction.
      balance: `"sum"` (the paper) adds both levels as they are; `"model"` gives fine part, coarse
        part and previous step each the weight that minimises the exact quadratic model, for one
        more product in every step.
      **options: further arguments of `kfac_adaptive`, and of `kfac`.

    Returns:
      An optimizer; its updates go straight into `optax.apply_updates`.

    Raises:
      ValueError: a hyperparameter out of range; `curvature`, `value` or `value_fn` missing in an
        update.
      TypeError: an option that neither `kfac_adaptive` nor `kfac` has.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x, target = jnp.zeros((2, 1)), jnp.eye(2), jnp.array([[1.0], [2.0]])
    >>> loss = lambda w: estimator.spec.function(w, x).mean_nll(target)
    >>> tx = kfac_two_level_adaptive(estimator.layers(w, x), coarse="exact")
    >>> state = tx.init(w)
    >>> for _ in range(5):
    ...     value, grad = jax.value_and_grad(loss)(w)
    ...     step, state = tx.update(grad, state, w, curvature=estimator.at(w, x), value=value, value_fn=loss)
    ...     w = optax.apply_updates(w, step)
    >>> print(w.ravel().round(2))
    [1. 2.]

    Reference: Tselepidis, Kohler & Orvieto, Two-Level K-FAC Preconditioning for Deep Learning
      (2020), algorithm 1, with the step of Martens & Grosse (2015), algorithm 2.
    """
    # Z^T (Z F Z^T + damping I)^{-1} Z V, at the adapted damping too
    coupling = coarse_correction(
        coarse,
        damping=coarse_damping,
        resample=resample,
        fine_weight=fine_weight,
        coarse_weight=coarse_weight,
        precision=options.get("precision", "highest"),
    )
    check_choice("kfac_two_level_adaptive", "balance", balance, ("model", "sum"))
    # parts that stay apart get a rate each from the model
    apart = "apart" if balance == "model" else "sum"
    return kfac_adaptive(layers, coupling=coupling, balance=apart, **options)


RECORDS = (
    Method(
        name="kfac_two_level_adaptive",
        kind="optimizer",
        summary='the same with two levels; `balance="model"`: each part with a rate of its own',
        paper="Tselepidis, Kohler & Orvieto (2020); Martens & Grosse (2015)",
        equation="as kfac_adaptive, U = blockdiag(…)⁻¹ V + Zᵀ (Z F Zᵀ + λ I)⁻¹ Z V",
        needs=NEEDS_VALUE,
        state=adaptive_numbers,
        state_text="2 (p² + q²) + p q, and 3 L² + 3 L",
        cost=("O(d³ + L³)", "O(d³ + L²), and two products with the curvature of the batch"),
        test="tests/step_rules/test_damping.py::test_both_levels_get_the_adapted_damping",
        build=lambda layers, **options: kfac_two_level_adaptive(
            layers, **(SHORT_ADAPTED | options)
        ),
        block_of=lambda layer: kronecker("cholesky"),
        across=coarse_numbers,
    ),
)
