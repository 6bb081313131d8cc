"""Loss, gradient and curvature from one forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from kfac_optax._types import PyTree
from kfac_optax.capture.evaluate import Zeros, evaluate
from kfac_optax.estimators.heads import split_outputs, with_naturals
from kfac_optax.estimators.linearization import (
    as_returned,
    probes_of,
    rows_measure,
    zeros_of_sites,
)
from kfac_optax.estimators.shared_curvature import SharedCurvature
from kfac_optax.estimators.spec import Spec, pair_of, trace_shared


def shared_step(
    spec: Spec,
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    args: tuple[PyTree, ...],
    targets: PyTree,
    key: jax.Array | None,
) -> tuple[Any, PyTree, SharedCurvature]:
    """`(loss, gradient, curvature)` of `Estimator.value_and_grad`, `((loss, aux), ...)` where the
    function returns more than predictions.
    """
    # rows are kept as they are: what blocks measure is known only when the update asks
    traced, aux_apart = trace_shared(spec, params, args)
    measures = [rows_measure if owner >= 0 else None for owner in traced.owner]
    nothing = [None] * len(measures)
    zeros = zeros_of_sites(traced, measures, None, nothing)
    aux_along = spec.with_aux is not None and not aux_apart

    def forward(params: PyTree, zeros: Sequence[Zeros | None]):
        inputs = jax.tree.leaves((params, args))
        probes = probes_of(zeros, nothing)
        flat = evaluate(traced.jaxpr, inputs, traced.sites, measures, None, probes)
        prediction, aux = as_returned(traced, flat), None
        # what comes with the prediction rides along, unless it runs layers of its own
        if aux_along:
            prediction, aux = pair_of(spec.kind, prediction)
        naturals, _ = split_outputs(spec.kind, prediction)
        return naturals, (prediction, aux)

    # one forward pass for both: the loss is differentiated at its outputs, and the pullback of that
    # gradient is the gradient in the parameters
    naturals, pull, (prediction, aux) = jax.vjp(forward, params, zeros, has_aux=True)

    def loss_of(naturals: Sequence[tuple[jax.Array, ...]]) -> jax.Array:
        return loss_fn(with_naturals(prediction, naturals), targets)

    loss, output_cotangents = jax.value_and_grad(loss_of)(naturals)
    # by a pass of its own, of which XLA shares what it can
    if aux_apart and spec.with_aux is not None:
        _, aux = pair_of(spec.kind, spec.with_aux(params, *args))
    _, heads = split_outputs(spec.kind, prediction)
    # rows come with `g` of the loss, for blocks that precondition rows
    gradient, rows = pull(output_cotangents)
    curvature = SharedCurvature(spec, traced, pull, heads, key, params, args, loss, rows)
    value = loss if spec.with_aux is None else (loss, aux)
    return value, gradient, curvature
