"""Vadam: Adam at parameters drawn from the posterior that its squares stand for."""

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax.methods.gradient.posterior import follow_posterior
from kfac_optax.methods.gradient.treewise import Step
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


@flat_signature()
def vadam(
    *,
    weight_decay: ScalarOrSchedule = 1e-4,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    damping: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Vadam: Adam as the fit of a diagonal Gaussian posterior, from gradients at parameters drawn
    from it.

    `U = m / (sqrt(s) + w + damping)`, with `m` the mean of `g + w theta` and `s` that of `g^2`, both
    bias-corrected, `theta` the mean of the posterior and `w` the weight decay:

        drawn = sample_diagonal(opt_state, params, key, size=N, weight_decay=w)
        updates, opt_state = tx.update(grad(loss)(drawn), opt_state, params)

    With the prior `N(0, I / (N w))` the draws are from `N(theta, (diag(s) + w I)^{-1} / N)`. Without
    draws it is Adam with `eps = w` on the loss with an L2 term, whose gradient is not in the squares.
    The squares are those of the mean gradient, smaller than `vogn`'s, which makes draws wide. Chain
    it with what takes the step; no other weight decay belongs to it.

    Args:
      weight_decay: `w`, the prior's precision over the number of examples.
      b1: decay of the mean gradient.
      b2: decay of the squares.
      damping: added in the step, not in the posterior.

    Returns:
      A transformation; its update needs `params`. Its state has two numbers for every parameter.

    Raises:
      TypeError: a leaf is complex or not floating.
      ValueError: a hyperparameter out of range; an update without `params`.

    >>> tx, w = vadam(weight_decay=1.0), jnp.zeros(2)
    >>> updates, state = tx.update(jnp.array([1.0, -3.0]), tx.init(w), w)
    >>> print(updates)
    [ 0.5  -0.75]

    Reference: Khan et al., Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam
      (2018). Here the draw corrects `s` for its start at zero too, as the step does.
    """

    def squares_of(given: Step) -> PyTree:
        return jax.tree.map(jnp.square, given.gradient)

    hyper = dict(weight_decay=weight_decay, b1=b1, b2=b2, damping=damping)
    return follow_posterior("vadam", squares_of, 0.5, **hyper)


RECORDS = (
    Method(
        name="vadam",
        kind="preconditioner",
        summary="Adam as the fit of a diagonal Gaussian posterior, from gradients at parameters "
        "drawn from it (`sample_diagonal`); gradients alone",
        paper="Khan et al. (2018)",
        equation="W ~ N(M, (diag(s) + w I)⁻¹ / N), U = m / (s^(1/2) + w), m the mean of V + w M",
        needs=frozenset({"gradient"}),
        state=lambda sizes: 2 * sizes.p * sizes.q,
        state_text="2 p q",
        cost=("nothing", "O(d²)"),
        test="tests/methods/test_diagonal_posterior.py::test_vadam_without_draws_is_adam",
        build=lambda layers, **options: vadam(**options),
        block_of=None,
    ),
)
