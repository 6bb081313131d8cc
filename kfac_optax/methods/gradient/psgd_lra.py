"""PSGD over all parameters at once: a diagonal and a matrix of low rank, fitted to whiten."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import check_number, check_seed
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.methods.gradient import gate, psgd_lra_fit
from kfac_optax.methods.gradient.psgd_fit import usual_probability
from kfac_optax.methods.gradient.psgd_lra_fit import Bounds, LowRank
from kfac_optax.methods.gradient.treewise import Made, Rule, Step, transformation
from kfac_optax.methods.signature import check_size, flat_signature
from kfac_optax.step_rules._per_layer import norms


class Held(NamedTuple):
    """What `psgd_lra` keeps."""

    q: LowRank
    bounds: Bounds
    mean: jax.Array  # of the gradients, [n]
    key: jax.Array  # raw bits: checkpoints keep them as any array


@flat_signature()
def psgd_lra(
    *,
    rank: int = 10,
    b1: ScalarOrSchedule = 0.9,
    fit_rate: ScalarOrSchedule = 0.1,
    fit_probability: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1e-6,
    initial_scale: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """PSGD in its low-rank form: gradients times `P = Q^T Q`, `Q = (I + U V^T) diag(d)` over all
    parameters together.

    `P` minimises the mean of `h^T P h + v^T P^{-1} v` over `h`, the mean gradient, and random
    vectors `v ~ N(0, I)`: `P = E[h h^T]^{-1/2}` where that has this form. `d` and, by turns of a
    coin, `U` or `V` move by a small step in the group of such matrices, see `psgd_kron`, of which
    this is the form for shapes that are no matrices and for correlations between layers. With
    `U = 0` at first it is a diagonal. The step costs `O(n r + r^3)` for `n` parameters. The update
    has a root mean square of about one, whatever the scale of the loss. A gradient that is not
    finite, or whose squares are not, changes nothing, and its update is zero. Chain it with what
    takes the step.

    Args:
      rank: `r`, columns of `U` and of `V`.
      b1: decay of the gradients' mean, which is bias-corrected; 0 for none.
      fit_rate: step of `Q`, relative to its size, at most 1.
      fit_probability: of a fit in a step; by default 1 in the first 500 steps, then falling to
        0.03 in step 4000.
      damping: `damping rms(h) v` is added to `h` in a fit, which bounds `P` where there is no
        gradient; relative, so that it needs no tuning.
      initial_scale: of `Q`; `None` for the best multiple of the identity on the first gradient.
      seed: of the random vectors.

    Returns:
      A transformation; its state has `(2 r + 2) n` numbers.

    Raises:
      TypeError: a leaf is complex or not floating; the rank is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = psgd_lra(rank=1, b1=0.0, initial_scale=1.0, fit_probability=0.0)
    >>> g = jnp.array([[3.0, 4.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates)
    [[3. 4.]]

    Reference: Li, Preconditioned Stochastic Gradient Descent (2015), for the criterion; Li,
      Preconditioner on Matrix Lie Group for SGD (2018), for steps in a group.
    """
    where = "psgd_lra"
    check_size(where, "rank", rank)
    check_seed(where, seed)
    if initial_scale is not None:
        check_number(where, "initial_scale", initial_scale, above=0)
    probability = usual_probability if fit_probability is None else fit_probability
    hyper = dict(b1=b1, fit_rate=fit_rate, fit_probability=probability, damping=damping)

    def start(params: PyTree, dtype: Any) -> Held:
        n = sum(x.size for x in jax.tree.leaves(params))
        key, own = jax.random.split(jax.random.key(seed))
        # columns of about unit length; U, and the scales that nothing is known of, are zero
        length = jnp.sqrt(jnp.asarray(max(n, 1), dtype))
        v = jax.random.normal(own, (n, rank), dtype) / length
        q = LowRank(jnp.zeros_like(v), v, jnp.zeros(n, dtype))
        bounds = Bounds(*(jnp.zeros((), dtype) for _ in Bounds._fields))
        mean = jnp.zeros(n, dtype)
        return Held(q, bounds, mean, jax.random.key_data(key))

    def step(given: Step) -> Made:
        held, now = given.held, given.now
        _check_length(held, given.gradient)
        b1 = now["b1"]
        # one whose squares overflow is as bad as one that is not finite: `P` can be fitted to none
        fits = jnp.isfinite(jnp.sum(jnp.square(given.gradient)))
        gradient = jnp.where(fits, given.gradient, jnp.nan)
        mean = b1 * held.mean + (1 - b1) * gradient
        h = gate.unbiased(mean, b1, given.count + 1)
        key = jax.random.wrap_key_data(held.key)
        key, coin, own, side = jax.random.split(key, 4)
        first = _started(held.q, h, initial_scale), held.bounds

        def fit(held: tuple[LowRank, Bounds]) -> tuple[LowRank, Bounds]:
            v = jax.random.normal(own, h.shape, h.dtype)
            damped = h + now["damping"] * _size(h) * v
            of_u = jax.random.bernoulli(side)
            # one pair, as a row
            pair = damped[None], v[None]
            return psgd_lra_fit.fitted(*held, *pair, now["fit_rate"], of_u)

        drawn = jax.random.uniform(coin) < now["fit_probability"]
        # nothing is known of a gradient of zeros
        due = jnp.any(h != 0) & drawn
        q, bounds = gate.when_due(due, fit, first)
        held = Held(q, bounds, mean, jax.random.key_data(key))
        update = psgd_lra_fit.preconditioned(q, h)
        return Made(update, held)

    return transformation(Rule(where, hyper, start, step, flat=True))


def _started(q: LowRank, h: jax.Array, scale: float | None) -> LowRank:
    """A `d` that is still zero becomes that of `P = (mean h^2)^{-1/2} I`, or what is given."""
    size = _size(h)
    first = positive_or_one(size) ** -0.5 if scale is None else jnp.asarray(scale, h.dtype)
    unknown = ~jnp.any(q.d != 0)
    begins = unknown & (size > 0)
    return q._replace(d=jnp.where(begins, first, q.d))


def _size(h: jax.Array) -> jax.Array:
    """The root mean square; its squares may be too small or too large for the dtype."""
    return norms(h[None, None], mean=True)[0]


def _check_length(held: Held, vector: jax.Array) -> None:
    """Raises where a gradient is longer or shorter than what is held.

    Raises:
      ValueError: names both lengths.
    """
    if len(vector) != len(held.mean):
        raise ValueError(
            f"psgd_lra.update: the gradient has {len(vector)} entries, but the state is that of "
            f"{len(held.mean)}. Pass a gradient of the parameters that `init` got."
        )
