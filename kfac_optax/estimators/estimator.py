"""An estimator of curvature: its layers, its curvature at a batch, and its products."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from kfac_optax._types import Layers, PyTree
from kfac_optax.estimators.curvature import LazyCurvature
from kfac_optax.estimators.forward_product import forward_product
from kfac_optax.estimators.heads import split_outputs
from kfac_optax.estimators.microbatches import check_size
from kfac_optax.estimators.products import vector_product
from kfac_optax.estimators.shared_step import shared_step
from kfac_optax.estimators.spec import Spec, part_of_batch, trace_model
from kfac_optax.likelihoods import check_shapes


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A way to measure curvature; made by `fisher`, `ggn`, `empirical_fisher` or `forward_only`."""

    spec: Spec

    def layers(self, params: PyTree, *args: PyTree) -> Layers:
        """Finds the layers of the model by tracing it. Arrays may be abstract
        (`jax.ShapeDtypeStruct`).

        `print(layers)` is a coverage table: every layer with its kind, shape, uses and what the
        statistics leave out, and every parameter that no block covers, with the reason. `coverage`
        adds blocks and bytes of state.

        Raises:
          ValueError: no layer found, or one runs inside `cond` or `while_loop`.
          TypeError: `predict` does not return likelihoods.
        """
        kind = self.spec.kind
        # the layers that the statistics will see, on their part of the batch
        args = part_of_batch(self.spec, params, args)
        traced = trace_model(self.spec, params, args)
        # shapes of a likelihood of the user's own are checked before anything runs
        if kind.gradients and not kind.losses:
            _, heads = split_outputs(kind, traced.out_shape)
            for head in heads:
                check_shapes(kind.name, head, labels=kind.labels, columns=not kind.labels)
        return traced.layers

    def at(
        self,
        params: PyTree,
        *args: PyTree,
        key: jax.Array | None = None,
        microbatch_size: int | None = None,
    ) -> LazyCurvature:
        """The curvature at these parameters and this batch: lazy, nothing runs until it is due.

        Args:
          params: parameters, a tree like the one `layers` was made from.
          *args: further arguments of `predict`.
          key: PRNG key of the labels that are drawn; without labels it may be left out, and only
            adds to the random signs of `ggn` and `empirical_fisher`, which change with the
            optimizer's step anyhow.
          microbatch_size: measures so many examples at a time, in a compiled loop, in place of the
            whole batch: a divisor of it. Statistics and products are those of the whole batch,
            where its examples do not interact; labels and signs are drawn anew in every microbatch.
            Rows, of the methods that see those of all examples at once, exist together all the
            same.

        Raises:
          ValueError: the key is missing; in an update, the batch has no microbatches of this size.
        """
        # an error here, not when the curvature is due
        self._check_key(key)
        if microbatch_size is not None:
            check_size(self.spec.kind.name, microbatch_size)
        return LazyCurvature(params, args, key, self.spec, microbatch_size)

    def vector_product(self, params: PyTree, vector: PyTree, *args: PyTree) -> PyTree:
        """Product of the curvature matrix with a tree like `params`; the matrix is never formed.

        `fisher` and `ggn`: `(1/N) sum_b J_b^T H_b J_b v`, exact, no labels drawn, with `J_b` about
        its weighted mean where a head has centred scores (`LogAmplitude`).
        `empirical_fisher`: `(1/N) sum_b g_b g_b^T v`. `forward_only`: `(A_i (x) I) v_i` for every
        layer, zero for other parameters. Of complex parameters it is a cotangent, as `jax.grad`
        gives them: `v^T F v` is the real part of the sum of `v * (F v)`.
        """
        args = part_of_batch(self.spec, params, args)
        kind, function = self.spec.kind, self.spec.function
        if not kind.gradients:
            return forward_product(self.spec, params, vector, args)
        return vector_product(kind, function, params, vector, args)

    def value_and_grad(
        self, loss_fn: Callable[[PyTree, PyTree], jax.Array]
    ) -> Callable[..., tuple[Any, PyTree, Any]]:
        """Loss, gradient and curvature from one forward pass, for when curvature is wanted in every
        step.

        Args:
          loss_fn: `(prediction, targets) -> scalar`, with `prediction` what `predict` returns; of
            `empirical_fisher` the losses `[N]`, whose mean is `lambda losses, _: losses.mean()`.

        Returns:
          A function `(params, *args, targets=None, key=None) -> (loss, grads, curvature)`; of an
          estimator with `has_aux=True`, `((loss, aux), grads, curvature)`. The curvature keeps the
          rows of all layers, so it needs more memory than `at`, which measures on the fly. It
          belongs to the trace it was made in: pass it to `tx.update`, not through the boundary of a
          jitted function.

        Raises:
          ValueError: the estimator sees only a part of the batch.

        >>> import jax.numpy as jnp, kfac_optax as ko
        >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
        >>> step = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        >>> loss, grads, curvature = step(jnp.zeros((2, 1)), jnp.ones((4, 2)), targets=jnp.ones((4, 1)))
        >>> print(grads.ravel())
        [-1. -1.]
        """
        # one pass serves both, so that both see the same examples
        if self.spec.subsample is not None:
            raise ValueError(
                "value_and_grad: got subsample; a forward pass on part of the batch cannot be "
                "shared with the loss."
            )

        def step(
            params: PyTree,
            *args: PyTree,
            targets: PyTree = None,
            key: jax.Array | None = None,
        ):
            self._check_key(key)
            return shared_step(self.spec, loss_fn, params, args, targets, key)

        return step

    def _check_key(self, key: Any) -> None:
        if key is None and self.spec.kind.labels:
            raise ValueError(
                f"{self.spec.kind.name}.at: got key=None, but labels are drawn from the model. "
                "Pass key=jax.random.key(...), a new one in every step."
            )
