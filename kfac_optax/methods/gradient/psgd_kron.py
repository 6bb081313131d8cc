"""PSGD with a Kronecker product of triangular factors, fitted to whiten the gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite
from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import Checked, check_number, check_seed
from kfac_optax.engine.state import GradientCounts
from kfac_optax.methods.gradient import gate, psgd_fit
from kfac_optax.methods.gradient.axes import DIAGONAL, FULL, Rules, check_rules
from kfac_optax.methods.gradient.axiswise import Advanced, Axiswise, Start, Step, transformation
from kfac_optax.methods.gradient.momenta import zeros
from kfac_optax.methods.gradient.phases import zeros_by_axis
from kfac_optax.methods.signature import flat_signature


class PSGDState(NamedTuple):
    """State of `psgd_kron`. Tensors of equal shape are stacked on axis 0."""

    counts: GradientCounts
    factors: Any  # by group and axis: [copies, n, n] upper triangular, or [copies, n]
    mean: Any  # of the gradients, by group: [copies, *block]
    key: jax.Array  # raw bits: checkpoints keep them as any array
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


@flat_signature()
def psgd_kron(
    *,
    b1: ScalarOrSchedule = 0.9,
    fit_rate: ScalarOrSchedule = 0.1,
    fit_probability: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1e-6,
    initial_scale: float | None = None,
    max_dim: int = 8192,
    merge: int = 1,
    vectors: str = "diagonal",
    stacked: Callable[[str], int] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """PSGD: gradients times `P = Q^T Q`, with `Q` a Kronecker product that learns to whiten them.

    `P` minimises the mean of `h^T P h + v^T P^{-1} v` over `h`, the mean gradient, and random
    vectors `v ~ N(0, I)`: `P = E[h h^T]^{-1/2}` if that is a Kronecker product. `Q` has one upper
    triangular factor for every axis, a diagonal one for long axes, and moves by a small step in the
    group of these matrices, `Q_i <- Q_i - fit_rate / |S + T| triu(S - T) Q_i`, see the reference.
    No root and no inverse is computed. The update has a root mean square of about one, whatever the
    scale of the loss. A gradient that is not finite, or whose squares are not, changes nothing, and
    its update is zero. Chain it with what takes the step.

    Args:
      b1: decay of the gradients' mean, which is bias-corrected; 0 for none.
      fit_rate: step of `Q`, relative to its size, at most 1.
      fit_probability: of a fit in a step; by default 1 in the first 500 steps, then falling to
        0.03 in step 4000.
      damping: `damping rms(h) v` is added to `h` in a fit, which bounds `P` where there is no
        gradient; relative, so that it needs no tuning.
      initial_scale: of `Q`; `None` for the best multiple of the identity on the first gradient.
      max_dim: longer axes have a diagonal factor.
      merge: as in `scale_by_shampoo`.
      vectors: `"diagonal"` or `"full"`, for leaves with one axis.
      stacked: as in `scale_by_shampoo`.
      seed: of the random vectors.

    Returns:
      A transformation whose state is a `PSGDState` of arrays in float32 or wider.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = psgd_kron(b1=0.0, initial_scale=1.0, fit_probability=0.0)
    >>> g = jnp.array([[3.0, 4.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates)
    [[3. 4.]]

    Reference: Li, Preconditioned Stochastic Gradient Descent (2015), for the criterion; Li,
      Preconditioner on Matrix Lie Group for SGD (2018), for the triangular factors.
    """
    where = "psgd_kron"
    rules = Rules(max_dim, merge, DIAGONAL, vectors, stacked)
    check_rules(where, rules, (DIAGONAL,), (FULL, DIAGONAL))
    check_seed(where, seed)
    if fit_probability is None:
        fit_probability = psgd_fit.usual_probability
    hyper: dict[str, Any] = dict(
        b1=b1, fit_rate=fit_rate, fit_probability=fit_probability, damping=damping
    )
    if initial_scale is not None:
        check_number(where, "initial_scale", initial_scale, above=0)
    scale = None if initial_scale is None else jnp.asarray(initial_scale)

    def start(begin: Start) -> tuple:
        # of zeros: the scale of a tensor's factors is that of its first gradient
        factors = {g.name: zeros_by_axis(g, begin.dtype) for g in begin.groups}
        return factors, zeros(begin), jax.random.key_data(jax.random.key(seed))

    def advance(step: Step, state: Any) -> Advanced:
        b1, key = step.value("b1"), jax.random.wrap_key_data(state.key)
        # one whose squares overflow fits no factors, and would stay in the mean for hundreds of steps
        squares = [jnp.sum(jnp.square(x)) for x in step.tensors.values()]
        fits = step.finite & all_finite(squares)
        mean, h = {}, {}
        for name, old in state.mean.items():
            mean[name] = jnp.where(fits, b1 * old + (1 - b1) * step.tensors[name], old)
            # also with b1 of 0
            h[name] = gate.unbiased(mean[name], b1, step.count + 1)
        next_key, coin, own = jax.random.split(key, 3)
        first = {}
        for name, held in state.factors.items():
            first[name] = psgd_fit.started(held, h[name], scale)

        def fit(factors: Any) -> Any:
            return psgd_fit.fitted_groups(step, factors, h, own)

        with jax.named_scope("psgd/fit"):
            due = fits & (jax.random.uniform(coin) < step.value("fit_probability"))
            factors = gate.when_due(due, fit, first)
        new = {name: psgd_fit.preconditioned(factors[name], h[name]) for name in h}
        key = jnp.where(fits, jax.random.key_data(next_key), state.key)
        return Advanced(new, (factors, mean, key), fits)

    return transformation(Axiswise(where, rules, hyper, PSGDState, "factors", start, advance))
