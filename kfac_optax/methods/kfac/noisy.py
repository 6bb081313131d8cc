"""Noisy K-FAC: natural gradient of a Gaussian over the parameters."""

from typing import Any

import jax
import optax

from kfac_optax._types import Layers, Numeric, ScalarOrSchedule
from kfac_optax._validate import check_legal, resolve
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.methods.kfac.fixed import eigen_numbers, kfac
from kfac_optax.methods.record import SHORT_CLIPPED, Method
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.weight_decay import add_weight_decay

# Words of `kfac` that the posterior decides on: exact damping, layers independent of each other.
_SET = (
    "damping",
    "inverse",
    "block",
    "convolution",
    "recurrence",
    "factored_gradient",
    "coupling",
    "balance",
)


@flat_signature(kfac, without=_SET)
def noisy_kfac(
    layers: Layers,
    *,
    weight_decay: ScalarOrSchedule = 1e-4,
    damping: ScalarOrSchedule = 1e-3,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Noisy K-FAC: K-FAC as the fit of a Gaussian posterior `N(M, (t/N) (F + w I)^{-1})`, from
    gradients at parameters drawn from it.

    `U_i = (A_i (x) G_i + (w + damping) I)^{-1} (V_i + w M_i)`, with `w` the weight decay. In every
    step draw parameters around the mean `M`, take gradient and curvature there, and update `M`:

        drawn = sample_params(layers, opt_state, params, key, size=N, weight_decay=w)
        grads, curvature = grad(loss)(drawn), fisher.at(drawn, *args, key=...)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)

    That is a natural gradient of `E[loss] + (t/N) KL(posterior | prior)` with the prior
    `N(0, t / (N w) I)`, `t` the temperature. The decay is that of the mean, where the paper has the
    drawn parameters: the same on average, with less noise. The damping serves the step only, not
    the posterior. Chain it with the optimizer that takes the step, as `kfac`.

    Args:
      layers: from `fisher.layers(params, *args)`.
      weight_decay: `w`, the temperature times the prior's precision over the number of examples.
      damping: what is added to it in the step.
      **options: as for `kfac`; the damping is exact, of layers with a mask factored.

    Returns:
      A transformation; its update needs `params`.

    Raises:
      ValueError: a hyperparameter out of range, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.ones((2, 1)), jnp.eye(2)
    >>> tx = noisy_kfac(estimator.layers(w, x), weight_decay=0.5, damping=0.0, kl_clip=None)
    >>> updates, state = tx.update(0 * w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [0.5 0.5]

    Reference: Zhang, Sun, Duvenaud & Grosse, Noisy Natural Gradient as Variational Inference
      (2018).
    """
    check_legal("noisy_kfac", "weight_decay", weight_decay)
    check_legal("noisy_kfac", "damping", damping)
    # (F + (w + lambda) I)^{-1}: the precision of the prior damps too
    block = kronecker("eigh", precision=options.get("precision", "highest"), **_rows(options))
    total = _total(weight_decay, damping)
    inner = kfac(layers, damping=total, inverse="eigh", block=block, **options)
    # V + w M, the gradient of the negative log posterior
    return add_weight_decay(inner, weight_decay, mode="loss")


def _rows(options: dict[str, Any]) -> dict[str, Any]:
    """Takes out what a block is told of positions that share a weight."""
    return {name: options.pop(name) for name in ("sharing", "positions") if name in options}


def _total(first: ScalarOrSchedule, second: ScalarOrSchedule) -> ScalarOrSchedule:
    def total(count: jax.Array) -> Numeric:
        return resolve(first, count) + resolve(second, count)

    # a schedule only where one of them is, so that numbers are checked at construction
    if callable(first) or callable(second):
        return total
    return first + second


RECORDS = (
    Method(
        name="noisy_kfac",
        kind="preconditioner",
        summary="K-FAC as the fit of a Gaussian posterior, from gradients at parameters drawn from "
        "it (`sample_params`)",
        paper="Zhang, Sun, Duvenaud & Grosse (2018)",
        equation="W ~ N(M, (t/N) (F + w I)⁻¹), U = (F + (w + λ) I)⁻¹ (V + w M)",
        needs=frozenset({"gradient", "curvature"}),
        state=eigen_numbers,
        state_text="2 (p² + q²) + p + q",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_noisy.py::test_it_finds_the_posterior_of_a_linear_model",
        build=lambda layers, **options: noisy_kfac(layers, **(SHORT_CLIPPED | options)),
        block_of=lambda layer: kronecker(),
    ),
)
