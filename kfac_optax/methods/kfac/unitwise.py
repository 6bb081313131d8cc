"""Metrics of single units: the unitwise natural gradient and its quasi-diagonal reduction."""

from typing import Any

import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax.blocks.diagonal.per_unit import quasi_diagonal_block, unit_block
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature

# Words of `kfac` that the block decides on.
_SET = (
    "block",
    "sharing",
    "positions",
    "convolution",
    "recurrence",
    "factored_gradient",
    "inverse",
)


@flat_signature(kfac, without=_SET)
def quasi_diagonal(
    layers: Layers,
    *,
    kl_clip: ScalarOrSchedule | None = None,
    curvature_every: ScalarOrSchedule = 1,
    inverse_every: ScalarOrSchedule = 1,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The quasi-diagonal natural gradient: of every unit's metric the diagonal and the row of its
    bias, at the cost of a few sums.

    `w_i = (v_i M_00 - v_0 M_i0) / (M_ii M_00 - M_i0^2)`, `w_0 = v_0 / M_00 - sum_i (M_i0 / M_00)
    w_i` for a unit with the metric `M = E[g^2 a a^T]`, see `quasi_diagonal_block`. Without damping
    it does not depend on how each input is scaled and shifted.

    `curvature=` of `ggn` or `fisher` gives the natural gradient's metric, that of
    `empirical_fisher` the outer-product metric, that of `backpropagated_metric` its own, without
    a backward pass per output. Embeddings and normalisation layers get the blocks of `kfac`.

    Args:
      layers: from `ggn(predict).layers(params, *args)`, or another estimator's.
      kl_clip: as for `kfac`; `None`, as here, for none. Nothing bounds a step then, and a metric
        that is some steps old can make it too long.
      curvature_every: period of the statistics.
      inverse_every: period of the inverses.
      **options: as for `kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = quasi_diagonal(estimator.layers(w, x), damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Ollivier, Riemannian Metrics for Neural Networks I: Feedforward Networks (2015).
    """
    options |= dict(curvature_every=curvature_every, inverse_every=inverse_every)
    # M_ii, M_i0 and M_00 of every unit k, M = E[g_k^2 a a^T]
    return kfac(layers, block=quasi_diagonal_block(), kl_clip=kl_clip, **options)


@flat_signature(kfac, without=_SET)
def unitwise_natural(
    layers: Layers,
    *,
    kl_clip: ScalarOrSchedule | None = None,
    curvature_every: ScalarOrSchedule = 1,
    inverse_every: ScalarOrSchedule = 1,
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The unitwise natural gradient: every unit's weights and bias by their own exact block,
    `U_k = (E[g_k^2 a a^T] + damping I)^{-1} V_k`.

    The whole metric of which `quasi_diagonal` keeps a part, for layers of few inputs: the state has
    `q p^2` numbers, see `unit_block`. Where its output gradients come from is said at
    `quasi_diagonal`.

    Args:
      layers: from `ggn(predict).layers(params, *args)`, or another estimator's.
      kl_clip: as for `kfac`; `None`, as here, for none. Nothing bounds a step then, and a metric
        that is some steps old can make it too long.
      curvature_every: period of the statistics.
      inverse_every: period of the inverses.
      precision: matmul precision of moments and solves.
      **options: as for `kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = unitwise_natural(estimator.layers(w, x), damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Ollivier, Riemannian Metrics for Neural Networks I: Feedforward Networks (2015).
    """
    # U_k = (E[g_k^2 a a^T] + damping I)^{-1} V_k
    block = unit_block(precision=precision)
    options |= dict(curvature_every=curvature_every, inverse_every=inverse_every)
    return kfac(layers, block=block, kl_clip=kl_clip, precision=precision, **options)


def _quasi_diagonal_numbers(sizes: Sizes) -> int:
    """Two numbers for each weight and one for each bias, as measured and as solved with."""
    # M_ii for every input, M_i0 for all but the bias
    p, q = sizes.p, sizes.q
    return 2 * (2 * p - 1) * q if sizes.bias else 2 * p * q


def _unit_numbers(sizes: Sizes) -> int:
    """Metric, eigenvectors and eigenvalues of every unit."""
    # q matrices [p, p], their eigenvectors, and p values each
    return sizes.q * (2 * sizes.p**2 + sizes.p)


RECORDS = (
    Method(
        name="quasi_diagonal",
        kind="preconditioner",
        summary="every unit by the diagonal of its metric and the row of its bias; no matter how "
        "inputs are scaled and shifted",
        paper="Ollivier (2015)",
        equation="U = (diag(M_ii - M_i0²/M_00, 0) + M_00 u uᵀ + λ I)⁻¹ V, u = (M_i0/M_00, 1)",
        needs=frozenset({"gradient", "curvature"}),
        state=_quasi_diagonal_numbers,
        state_text="2 (2 p - 1) q, without a bias 2 p q",
        # no matrix is factorised
        cost=("O(d²)", "O(d²)"),
        test="tests/blocks/test_per_unit.py::test_quasi_diagonal_is_the_formula_of_the_paper",
        build=lambda layers, **options: quasi_diagonal(layers, **(SHORT | options)),
        block_of=lambda layer: quasi_diagonal_block(),
    ),
    Method(
        name="unitwise_natural",
        kind="preconditioner",
        summary="every unit by its own exact Fisher block, for layers of few inputs",
        paper="Ollivier (2015)",
        equation="U_k = (E[g_k² a aᵀ] + λ I)⁻¹ V_k",
        needs=frozenset({"gradient", "curvature"}),
        state=_unit_numbers,
        state_text="q (2 p² + p)",
        # q eigendecompositions of order p
        cost=("O(d⁴)", "O(d³)"),
        test="tests/blocks/test_per_unit.py::test_unit_blocks_are_those_of_the_dense_matrix",
        build=lambda layers, **options: unitwise_natural(layers, **(SHORT | options)),
        block_of=lambda layer: unit_block(),
    ),
)
