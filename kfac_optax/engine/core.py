"""Runs a block and a coupling on a schedule, as one Optax transformation."""

from typing import Any

import jax
import optax

from kfac_optax._types import Block, Coupling, Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import NO_CURVATURE, check_axis_name
from kfac_optax.engine.arguments import (
    check_factor_dtype,
    check_factored,
    check_numbers,
    check_owned,
    checked_placement,
)
from kfac_optax.engine.choice import BlockOf, blocks_of, check_coupled, cover
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.schedule import INVERSE_EVERY
from kfac_optax.engine.stagger import check_parts
from kfac_optax.engine.state import CurvatureState
from kfac_optax.engine.step import Rule, start_state, take_step
from kfac_optax.estimators.plan import of_first_moments

_MISSING: Any = object()


def scale_by_curvature(
    layers: Layers,
    *,
    block: Block | BlockOf,
    coupling: Coupling | None = None,
    damping: ScalarOrSchedule = 1e-3,
    decay: ScalarOrSchedule = 0.95,
    curvature_every: ScalarOrSchedule = 10,
    inverse_every: ScalarOrSchedule = INVERSE_EVERY,
    stagger: int | None = None,
    uncovered: str = "pass",
    normalization: str = "unitwise",
    factored_gradient: bool = False,
    separate: bool = False,
    sloped: bool = False,
    axis_name: Any = None,
    factor_dtype: Any = None,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with a per-layer curvature block and, optionally, a coupling between
    layers.

    Statistics are averaged as `S <- e S + (1 - e) S_new`, `e = min(1 - 1/k, decay)` with `k`
    counting accepted statistics from 1. Where both are due, statistics come first, then inverses,
    then the step is preconditioned. A statistic that is not finite is dropped; a factorisation that
    fails keeps the last good one; an update that is not finite becomes zero, as a whole; where a
    schedule or an injected hyperparameter gives a value that makes no sense, the last good one is
    used. All are counted, and `problems` names them.

    `update(grads, state, params, *, curvature, measure=None, refresh=None, damping=None)`:

    - `curvature`: from `fisher.at(...)` or `fisher.value_and_grad(...)`; `None` takes no statistics
      in this step.
    - `refresh=None`: the schedule is traced, one compiled step serves all. A Python bool decides
      now, without any branch in the compiled step: statistics are taken if `curvature` is given,
      inverses are refreshed if `refresh` is true. With `stagger=n` a tuple of part numbers, as
      `HostSchedule` gives it, refreshes these parts only.
    - `measure=False`: takes no statistics although `curvature` is given, for a transformation
      behind that needs its products in every step.
    - `damping`: replaces this transformation's own in this step, at all levels; `adapt_damping`
      passes it.

    Args:
      layers: from `fisher.layers(params, ...)`.
      block: the approximation of dense layers, convolutions and attention projections, for example
        `kronecker()` (embeddings and normalisation layers get blocks of their own); or a function
        of the layer that gives every layer its block. Layers with equal shapes and the same `Block`
        object share one batched call.
      coupling: `coarse_correction()`, `deflated()` or `tridiagonal()`; `None` leaves the layers
        independent.
      damping: Tikhonov damping.
      decay: bound of the averaging weight, in [0, 1].
      curvature_every: period of the statistics, in steps.
      inverse_every: period of the inverses, in steps; `refresh_period(...)` makes a shorter one at
        first.
      stagger: `n > 1` spreads a refresh evenly over its period, so that no step takes much longer
        than the others: the matrices are divided into `n` parts of about equal cost, and part `j`
        is refreshed when `count % inverse_every == j * inverse_every // n`, the coupling with part
        0. In step 0 all are. `None` or 1: all in one step.
      uncovered: parameters without a block: `"pass"` their gradient on unchanged; `"graft"`: pass
        it on with the size of the others' updates, so that the root mean square of its entries is
        that of the preconditioned updates of all parameters with a block; precondition with the
        diagonal of the Fisher (`"diagonal"`, right on average over statistics, see `ggn` for the
        random signs); or `"raise"`. What the model does not use passes on unchanged.
      normalization: scale and shift of normalisation layers: `"unitwise"`, one 2 x 2 block for
        every channel, `"diagonal"`, or `"pass"`: treated as parameters without a block (never by
        the diagonal).
      factored_gradient: precondition the gradient of dense layers as the product of rows that it
        is, wherever the block knows how (`solve_rows`) and saves work by it. Needs `curvature` from
        `fisher.value_and_grad` in every step, of the very gradient that is passed: nothing may be
        added to it before, so weight decay has to follow (decoupled).
      separate: hand on the parts of the update one by one, as `Directions`, to a step rule that
        weighs them: the block-diagonal level, then what the coupling adds. Without a coupling there
        is one part. Parameters without a block are in the first part, grafted to the size of that.
      sloped: hand on the update as `Sloped`, with its products `<U_i, V_i>` with the gradient of
        every layer, to a step rule that bounds it by them (`clip_by_kl`). With
        `factored_gradient=True` they come from the rows, and the gradient of a layer whose block
        takes rows is never formed. Not with a coupling.
      axis_name: mapped axis (or axes) of `shard_map`/`pmap` over which the batch is split;
        statistics are averaged over it. Not needed under `jit` with sharded arrays.
      factor_dtype: dtype of factors and inverses; default the widest of float32 and the parameters'
        dtypes.
      placement: divides the refresh, and the state if it says so, over the devices of a mesh axis;
        `None`: all devices do the same.

    Returns:
      A transformation whose whole state is a `CurvatureState` of arrays.

    Raises:
      ValueError: a hyperparameter out of range; `factored_gradient` of blocks that cannot; `sloped`
        with a coupling; `curvature` missing or made for another model.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = scale_by_curvature(estimator.layers(w, x), block=ko.kronecker(), damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]
    """
    where = "scale_by_curvature"
    check_numbers(where, damping, decay, curvature_every, inverse_every)
    check_axis_name(where, axis_name)
    check_factor_dtype(where, factor_dtype)
    parts = check_parts(where, stagger)
    layers = cover(layers, uncovered=uncovered, normalization=normalization, where=where)
    block_of = blocks_of(block, normalization=normalization)
    blocks = tuple(map(block_of, layers))
    # one pass measures first moments or products: all that want either have to agree
    of_first_moments(layers.layers, blocks, coupling, where)  # for its check
    if coupling is not None:
        coupling.check(layers.layers, blocks)
        check_coupled(layers, where)
    given = placement
    placement = checked_placement(where, placement, parts, factored_gradient, axis_name)
    check_owned(where, placement, layers, blocks, coupling, axis_name)
    if factored_gradient:
        check_factored(where, blocks)
    if sloped and coupling is not None:
        raise ValueError(
            f"{where}: got sloped=True with the coupling {coupling.name}, whose part of the update "
            "takes the gradient itself; expected no coupling. Leave sloped= out."
        )
    rule = Rule(
        where,
        layers,
        block_of,
        coupling,
        dict(
            damping=damping,
            decay=decay,
            curvature_every=curvature_every,
            inverse_every=inverse_every,
        ),
        parts,
        factored_gradient,
        separate,
        sloped,
        axis_name,
        factor_dtype,
        placement,
        # of one device too
        None if given is None else given.memory,
    )

    def init(params: PyTree) -> CurvatureState:
        return start_state(rule, params)

    def update(
        updates,
        state,
        params=None,
        *,
        curvature=_MISSING,
        measure=None,
        refresh=None,
        damping=None,
        **extra,
    ):
        del params, extra
        if curvature is _MISSING:
            raise ValueError(NO_CURVATURE.format(where=where))
        # optax.partition may leave a group empty
        if not jax.tree.leaves(updates):
            return updates, state
        return take_step(rule, updates, state, curvature, measure, refresh, damping)

    return optax.GradientTransformationExtraArgs(init, update)
