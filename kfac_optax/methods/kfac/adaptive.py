"""K-FAC that needs no tuning: a whole optimizer with damping, rate and momentum all adapted."""

from typing import Any

import optax

from kfac_optax._types import Block, Layers, Numeric, ScalarOrSchedule
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.engine.schedule import ADAPTIVE_CURVATURE_EVERY, ADAPTIVE_INVERSE_EVERY
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.damping import adapt_damping
from kfac_optax.step_rules.quadratic_model import quadratic_step


# The damping is adapted, and the quadratic model decides on the length of the step.
@flat_signature(
    kfac,
    without=("damping", "kl_clip", "bound"),
    schedules=("learning_rate", "momentum"),
)
def kfac_adaptive(
    layers: Layers,
    *,
    initial_damping: Numeric = 0.03,
    learning_rate: ScalarOrSchedule | None = None,
    momentum: ScalarOrSchedule | None = None,
    weight_decay: Numeric = 0.0,
    adapt_every: int = 5,
    damping_decay: Numeric = 0.95,
    damping_min: Numeric | None = None,
    damping_max: Numeric = 1e8,
    reject_below: Numeric | None = 0.0,
    search_every: int | None = None,
    model_subsample: Any = "auto",
    curvature_every: ScalarOrSchedule = ADAPTIVE_CURVATURE_EVERY,
    inverse_every: ScalarOrSchedule = ADAPTIVE_INVERSE_EVERY,
    inverse: str = "cholesky",
    axis_name: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with learning rate, momentum and damping adapted; a whole optimizer that needs no
    tuning.

    `adapt_damping(optax.chain(kfac(layers, kl_clip=None), quadratic_step()))`. In every step

        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, curvature=fisher.at(params, x, key=key), value=loss,
            value_fn=lambda p: loss_fn(p, batch)
        )
        params = optax.apply_updates(params, updates)

    Args:
      layers: from `fisher.layers(params, *args)`.
      initial_damping: `lambda` at the start.
      learning_rate: fixes the rate; `None` solves for it in every step.
      momentum: fixes the momentum; `None` solves for it.
      weight_decay: coefficient `w` of a penalty `w/2 ||theta||^2` that the loss contains.
      adapt_every: period of the damping's adaptation.
      damping_decay: factor on the damping per step, see `adapt_damping`.
      damping_min: lower bound of the damping; `None`: 0.01, and `1.28 / cases` where the predictions
        of a batch have more than 128 losses (examples, or their positions).
      damping_max: upper bound of the damping.
      reject_below: measured reduction ratios below it reject the step; `None` rejects only what is
        not finite.
      search_every: period of the search for the preconditioner's own damping; `None`: it is
        `lambda + weight_decay`.
      model_subsample: part of the batch on which the quadratic model is taken, as `subsample` in
        `fisher`. `"auto"` has small batches whole, and large ones where a prediction is a few
        numbers (at least 128 predictions, of a text each position is one, 32,768 numbers of them and
        8 examples, in whole microbatches); `None` takes the part that the estimator measures.
      curvature_every: period of the statistics, 5.
      inverse_every: period of the inverses; by default every 5 of the first 20 steps, then every
        15.
      inverse: `"cholesky"` (factored Tikhonov damping), `"eigh"` (exact damping), `"newton"` or
        `"auto"`, see `kfac`.
      axis_name: mapped axis of `shard_map`/`pmap`, if any.
      **options: further arguments of `kfac`.

    Returns:
      An optimizer; its updates go straight into `optax.apply_updates`.

    Raises:
      ValueError: a hyperparameter out of range; `curvature`, `value` or `value_fn` missing in an
        update.
      TypeError: an option that `kfac` does not have.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x, target = jnp.zeros((2, 1)), jnp.eye(2), jnp.array([[1.0], [2.0]])
    >>> loss = lambda w: estimator.spec.function(w, x).mean_nll(target)
    >>> tx = kfac_adaptive(estimator.layers(w, x))
    >>> state = tx.init(w)
    >>> for _ in range(5):
    ...     value, grad = jax.value_and_grad(loss)(w)
    ...     step, state = tx.update(grad, state, w, curvature=estimator.at(w, x), value=value, value_fn=loss)
    ...     w = optax.apply_updates(w, step)
    >>> print(w.ravel().round(2))
    [1. 2.]

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), algorithm 2.
    """
    block = options.get("block")
    if inverse == "cholesky" and block is not None and not isinstance(block, Block):
        inverse = "auto"  # the default has no say where a function gives every layer its block
    # U: the model behind it decides on the length of the step, so there is no KL-clip
    preconditioner = kfac(
        layers,
        kl_clip=None,
        curvature_every=curvature_every,
        inverse_every=inverse_every,
        inverse=inverse,
        axis_name=axis_name,
        **options,
    )
    # (alpha, mu) = argmin of the model over alpha U + mu Delta_-
    step = quadratic_step(
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        subsample=model_subsample,
        axis_name=axis_name,
    )
    # lambda by how well the model foresaw the objective; both take it as an extra argument
    return adapt_damping(
        optax.chain(preconditioner, step),
        initial_damping=initial_damping,
        every=adapt_every,
        decay=damping_decay,
        damping_min=damping_min,
        damping_max=damping_max,
        reject_below=reject_below,
        weight_decay=weight_decay,
        search_every=search_every,
        axis_name=axis_name,
    )


def adaptive_numbers(s: Sizes) -> int:
    """Both factors and their inverses, and the step before this one."""
    return 2 * (s.p**2 + s.q**2) + s.p * s.q


# short periods: few steps see every branch
SHORT_ADAPTED: dict[str, Any] = dict(curvature_every=2, inverse_every=3, adapt_every=2)
# the ratio of reduction takes the objective at two points
NEEDS_VALUE = frozenset({"gradient", "curvature", "value", "value_fn"})

RECORDS = (
    Method(
        name="kfac_adaptive",
        kind="optimizer",
        summary="whole optimizer: rate, momentum and damping adapted",
        paper="Martens & Grosse (2015), algorithm 2",
        equation="Δ = α U + μ Δ₋, (α, μ) = argmin ½ Δᵀ(F + λ I)Δ + VᵀΔ, "
        "U = ((A + π√λ I) ⊗ (G + √λ/π I))⁻¹ V",
        needs=NEEDS_VALUE,
        state=adaptive_numbers,
        state_text="2 (p² + q²) + p q",
        cost=("O(d³)", "O(d³), and two products with the curvature of the batch"),
        test="tests/step_rules/test_damping.py::"
        "test_on_a_quadratic_the_ratio_is_one_and_the_damping_shrinks_by_the_factor",
        build=lambda layers, **options: kfac_adaptive(layers, **(SHORT_ADAPTED | options)),
        # its default inverse, unlike that of `kfac`
        block_of=lambda layer: kronecker("cholesky"),
    ),
)
