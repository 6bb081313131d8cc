"""MKOR-H: MKOR until the loss stops falling, then the first-order method that follows it."""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.methods.kfac.mkor import COMMON, SHORT, mkor
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.stall import until_stalled


@flat_signature(mkor)
def mkor_h(
    layers: Layers,
    *,
    least_decrease: float = 0.0,
    decrease_decay: float = 0.99,
    patience: int = 100,
    axis_name: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """MKOR-H: `mkor` until the loss falls by less than `least_decrease` in a step on average, and
    the gradient as it is from then on.

    See `until_stalled`, of which it is made. `update` needs the loss of the batch as well, `value=`.
    After the switch nothing is left but the first-order method that follows.

    Args:
      layers: from `empirical_fisher(...).layers(params, *args)`, or another estimator's.
      least_decrease: `threshold` of `until_stalled`.
      decrease_decay: bound of the weight with which decreases are averaged.
      patience: differences of losses that are seen before.
      axis_name: mapped axis of `shard_map`/`pmap`, if any.
      **options: as for `mkor`.

    Returns:
      A transformation; its state is made of arrays only.

    Raises:
      ValueError: a number out of range, an unknown word; `value` missing in an update.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> loss = lambda w, x: ko.tap_dense(x @ w, x, w)[:, 0]
    >>> estimator, w, x = ko.empirical_fisher(loss), jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
    >>> tx = mkor_h(estimator.layers(w, x), patience=1)
    >>> g, curvature, state = jnp.ones((2, 1)), estimator.at(w, x), tx.init(w)
    >>> for value in (1.0, 1.5):  # it has grown
    ...     updates, state = tx.update(g, state, w, curvature=curvature, value=value)
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Mozaffari, Li, Zhang & Mehri Dehnavi, MKOR: Momentum-Enabled Kronecker-Factor-Based
      Optimizer Using Rank-1 Updates (2023).
    """
    # J_A V J_G while the averaged decrease of the loss is above the threshold, then V
    return until_stalled(
        # losses are averaged over devices as the statistics are
        mkor(layers, axis_name=axis_name, **options),
        threshold=least_decrease,
        decay=decrease_decay,
        patience=patience,
        axis_name=axis_name,
    )


RECORDS = (
    Method(
        name="mkor_h",
        summary="the same until the loss stops falling, then the gradient as it is",
        equation="as mkor, then U = V",
        # the switch reads the value of the loss
        needs=frozenset({"gradient", "curvature", "losses", "value"}),
        test="tests/methods/test_mkor.py::test_after_the_switch_it_is_the_method_that_follows",
        build=lambda layers, **options: mkor_h(layers, **(SHORT | options)),
        **COMMON,
    ),
)
