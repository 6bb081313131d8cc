"""KFLR: K-FAC with exact output factors, and a step as long as an exact quadratic model wants it."""

from typing import Any

import optax

from kfac_optax._types import Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import NO_CURVATURE
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.quadratic_model import quadratic_step


@flat_signature(
    kfac,
    without=("kl_clip", "bound", "balance", "learning_rate"),
    schedules=("damping", "momentum"),
)
def kflr(
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 1e-2,
    momentum: ScalarOrSchedule | None = 0.0,
    inverse: str = "cholesky",
    curvature_every: ScalarOrSchedule = 1,
    inverse_every: ScalarOrSchedule = 1,
    axis_name: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """KFLR and KFRA: `U = (A + pi sqrt(damping) I)^{-1} V (H + sqrt(damping)/pi I)^{-1}` per layer,
    then the step `-alpha U` that minimises the exact quadratic model of the batch.

    Which of both it is the curvature says:

    - `curvature=ggn(predict).at(...)`: KFLR, `H = (1/N) sum_b C_b C_b^T` with the exact Gauss-Newton
      matrix `C_b C_b^T` of a layer's output, one backward pass for each output of the model;
    - `curvature=recursive_ggn(predict).at(...)`: KFRA, `H` by a recursion through the layers.

    It takes the whole step: its updates go straight into `optax.apply_updates`. Every update needs
    the curvature of its batch; `measure=False` takes no statistics of it.

    Args:
      layers: from `ggn(predict).layers(params, *args)`, or another estimator's.
      damping: Tikhonov damping of factors and model.
      momentum: weight of the last step; `None` solves for it.
      inverse: as for `kfac`; `"cholesky"` is factored damping, as in the paper.
      curvature_every: period of the statistics.
      inverse_every: period of the inverses.
      axis_name: mapped axis of `shard_map`/`pmap`, if any; gradients have to be means over it.
      **options: as for `kfac`.

    Returns:
      An optimizer.

    Raises:
      ValueError: a hyperparameter out of range; `curvature` missing in an update.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x, gradient = jnp.zeros((2, 1)), jnp.eye(2), jnp.array([[-0.5], [-1.0]])
    >>> tx = kflr(estimator.layers(w, x), damping=0.0)
    >>> updates, state = tx.update(gradient, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print([f"{u:.3f}" for u in updates.ravel()])  # Newton's step
    ['1.000', '2.000']

    Reference: Botev, Ritter & Barber, Practical Gauss-Newton Optimisation for Deep Learning (2017).
    """
    # (A + pi sqrt(damping) I)^{-1} V (H + sqrt(damping)/pi I)^{-1}
    preconditioner = kfac(
        layers,
        kl_clip=None,
        damping=damping,
        inverse=inverse,
        curvature_every=curvature_every,
        inverse_every=inverse_every,
        axis_name=axis_name,
        **options,
    )
    # alpha U + mu Delta_-, the minimum of a model with exact products
    chain = optax.chain(
        preconditioner, quadratic_step(momentum=momentum, damping=damping, axis_name=axis_name)
    )

    def update(
        updates: PyTree,
        state: Any,
        params: Any = None,
        *,
        curvature: Any = None,
        **extra: Any,
    ):
        # without a batch there is no product with its curvature
        if curvature is None:
            raise ValueError(
                NO_CURVATURE.format(where="kflr")
                + " Here every update needs it: measure=False takes no statistics of it."
            )
        # the gradient itself says how the objective falls along the step
        more = {"grad": updates} | extra
        return chain.update(updates, state, params, curvature=curvature, **more)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _numbers(sizes: Sizes) -> int:
    """Both factors, their inverses, and the last step."""
    # A, H and their inverses; Delta_- [p, q]
    return 2 * (sizes.p**2 + sizes.q**2) + sizes.p * sizes.q


RECORDS = (
    Method(
        name="kflr",
        kind="optimizer",
        summary="exact output factors and a step from an exact quadratic model; with "
        "`recursive_ggn` it is KFRA, without a backward pass per output",
        paper="Botev, Ritter & Barber (2017)",
        equation="θ ← θ - α (A + π√λ I)⁻¹ V (H + √λ/π I)⁻¹, H = E[C Cᵀ], α = argmin of the model",
        needs=frozenset({"gradient", "curvature"}),
        state=_numbers,
        state_text="2 (p² + q²) + p q",
        cost=("O(d³)", "O(d³), and a product with the Gauss-Newton matrix"),
        test="tests/methods/test_kflr.py::test_factors_are_the_dense_definition",
        build=lambda layers, **options: kflr(layers, **(SHORT | options)),
        block_of=lambda layer: kronecker("cholesky"),
    ),
)
