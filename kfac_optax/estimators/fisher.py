"""Curvature estimators: what is measured, from which labels, on which part of the batch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import gather, make_buckets, named_leaves, replace_leaves, scatter
from kfac_optax._types import Block, Layer, Layers, PyTree
from kfac_optax._validate import check_number
from kfac_optax.blocks.embedding import embedding, tied_embedding
from kfac_optax.blocks.kronecker import kronecker
from kfac_optax.capture.evaluate import Probe, Zeros, evaluate, make_zeros
from kfac_optax.estimators.curvature import LazyCurvature
from kfac_optax.estimators.heads import (
    EMPIRICAL,
    FISHER,
    FORWARD,
    GGN,
    Kind,
    split_outputs,
    with_naturals,
)
from kfac_optax.estimators.plan import Plan
from kfac_optax.estimators.products import vector_product
from kfac_optax.estimators.shared_curvature import SharedCurvature
from kfac_optax.estimators.spec import (
    Spec,
    pair_of,
    part_of_batch,
    trace_model,
    trace_shared,
)
from kfac_optax.estimators.statistics import rows_measure
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
        traced = trace_model(self.spec, params, part_of_batch(self.spec, args))
        # shapes of a likelihood of the user's own are checked before anything runs
        if kind.gradients and not kind.losses:
            for head in split_outputs(kind, traced.out_shape)[1]:
                check_shapes(kind.name, head, labels=kind.labels, columns=not kind.labels)
        return traced.layers

    def at(self, params: PyTree, *args: PyTree, key: jax.Array | None = None) -> LazyCurvature:
        """The curvature at these parameters and this batch: lazy, nothing runs until it is due.

        Args:
          params: parameters, a tree like the one `layers` was made from.
          *args: further arguments of `predict`.
          key: PRNG key of the labels that are drawn; without labels it may be left out, and only
            adds to the random signs of `ggn` and `empirical_fisher`, which change with the
            optimizer's step anyhow.

        Raises:
          ValueError: the key is missing.
        """
        self._check_key(key)
        return LazyCurvature(params, args, key, self.spec)

    def vector_product(self, params: PyTree, vector: PyTree, *args: PyTree) -> PyTree:
        """Product of the curvature matrix with a tree like `params`; the matrix is never formed.

        `fisher` and `ggn`: `(1/N) sum_b J_b^T H_b J_b v`, exact, no labels drawn, with `J_b` about
        its weighted mean where a head has centred scores (`LogAmplitude`).
        `empirical_fisher`: `(1/N) sum_b g_b g_b^T v`. `forward_only`: `(A_i (x) I) v_i` for every
        layer, zero for other parameters. Of complex parameters it is a cotangent, as `jax.grad`
        gives them: `v^T F v` is the real part of the sum of `v * (F v)`.
        """
        args = part_of_batch(self.spec, args)
        if not self.spec.kind.gradients:
            return _forward_product(self.spec, params, vector, args)
        return vector_product(self.spec.kind, self.spec.function, params, vector, args)

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

        >>> import kfac_optax as ko
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
            params: PyTree, *args: PyTree, targets: PyTree = None, key: jax.Array | None = None
        ):
            self._check_key(key)
            return _shared_step(self.spec, loss_fn, params, args, targets, key)

        return step

    def _check_key(self, key: Any) -> None:
        if key is None and self.spec.kind.labels:
            raise ValueError(
                f"{self.spec.kind.name}.at: got key=None, but labels are drawn from the model. "
                "Pass key=jax.random.key(...), a new one in every step."
            )


def _shared_step(spec: Spec, loss_fn, params, args, targets, key):
    # rows are kept as they are: what blocks measure is known only when the update asks
    traced, aux_apart = trace_shared(spec, params, args)
    measures = [rows_measure if owner >= 0 else None for owner in traced.owner]
    zeros = [
        None if m is None else make_zeros(s, m, None, None)
        for s, m in zip(traced.sites, measures, strict=True)
    ]

    def forward(params: PyTree, zeros: Sequence[Zeros | None]):
        inputs = jax.tree.leaves((params, args))
        probes = [None if z is None else Probe(z, None) for z in zeros]
        flat = evaluate(traced.jaxpr, inputs, traced.sites, measures, None, probes)
        out = jax.tree.unflatten(jax.tree.structure(traced.out_shape), flat)
        # what comes with the prediction rides along, unless it runs layers of its own
        prediction, aux = (
            (out, None) if spec.with_aux is None or aux_apart else pair_of(spec.kind, out)
        )
        return split_outputs(spec.kind, prediction)[0], (prediction, aux)

    # one forward pass for both: the loss is differentiated at its outputs, and the pullback of that
    # gradient is the gradient in the parameters
    naturals, pull, (prediction, aux) = jax.vjp(forward, params, zeros, has_aux=True)
    loss, output_cotangents = jax.value_and_grad(
        lambda n: loss_fn(with_naturals(prediction, n), targets)
    )(naturals)
    # by a pass of its own, of which XLA shares what it can
    if aux_apart and spec.with_aux is not None:
        aux = pair_of(spec.kind, spec.with_aux(params, *args))[1]
    heads = split_outputs(spec.kind, prediction)[1]
    # rows come with `g` of the loss, for blocks that precondition rows
    gradient, rows = pull(output_cotangents)
    curvature = SharedCurvature(spec, traced, pull, heads, key, params, args, loss, rows)
    return loss if spec.with_aux is None else (loss, aux), gradient, curvature


def _forward_product(
    spec: Spec,
    params: PyTree,
    vector: PyTree,
    args: Sequence[PyTree],
) -> PyTree:
    # A (x) I of every layer with weights between units: `G := I` of a forward pass
    found = trace_model(spec, params, args).layers.layers
    layers = tuple(layer for layer in found if layer.between_units)
    blocks = tuple(map(_block_of_inputs, layers))
    leaves = named_leaves(vector)
    dtype = jnp.result_type(jnp.float32, *(leaves[layer.kernel] for layer in layers))
    whole = spec._replace(subsample=None)  # the part has been taken
    # the same statistics as an update would get, of one batch
    factors, _ = LazyCurvature(params, tuple(args), None, whole).statistics(
        Plan(layers, blocks, None, dtype)
    )
    out = {name: jnp.zeros_like(x) for name, x in leaves.items()}
    # A (x) I has no output gradients in it
    for layer, block, factor in zip(layers, blocks, factors, strict=True):
        # one layer at a time: matrices [copies, p, q] and back to its leaves
        (bucket,) = make_buckets([layer])
        out |= scatter(
            bucket, jax.vmap(block.multiply)(factor, gather(bucket, leaves, dtype)), leaves
        )
    return replace_leaves(vector, out)


def _block_of_inputs(layer: Layer) -> Block:
    """What knows `A (x) I` of a layer with weights between units."""
    made = {"embedding": embedding, "tied_embedding": tied_embedding}.get(layer.kind, kronecker)
    return made()


def fisher(
    predict: Callable[..., PyTree],
    *,
    samples: int = 1,
    subsample: float | Callable | None = None,
    has_aux: bool = False,
) -> Estimator:
    """The Fisher information of the model's predictive distribution, from labels drawn from the
    model.

    `F = (1/N) sum_b E_{y ~ p(y | x_b)}[g_b g_b^T]`, estimated with `samples` draws per example. One
    extra backward pass per draw; the forward pass is shared between draws.

    Args:
      predict: `(params, *args) -> likelihood`, or a tree of likelihoods (heads), each of which may
        have a batch of its own: every head is a mean over its own examples.
      samples: draws per example.
      subsample: measure on a part of the batch only: a fraction in (0, 1] (evenly spaced examples
        of every argument whose axis 0 is the batch) or a function of the arguments that returns
        them cut down.
      has_aux: `predict` returns a pair, the likelihoods and anything else (new batch statistics,
        logits), which `value_and_grad` hands out next to the loss, as `jax.value_and_grad` does.

    Returns:
      An `Estimator` with `.layers`, `.at`, `.vector_product` and `.value_and_grad`.

    Raises:
      ValueError: `samples < 1` or a fraction outside (0, 1].

    >>> import kfac_optax as ko
    >>> estimator = fisher(lambda w, x: ko.Categorical(ko.tap_dense(x @ w, x, w)))
    >>> print([layer.shape for layer in estimator.layers(jnp.zeros((4, 3)), jnp.ones((8, 4)))])
    [(4, 3)]

    Reference: Martens & Grosse (2015), section 5, on drawing labels from the model.
    """
    check_number("fisher", "samples", samples, at_least=1)
    return _estimator(Spec(FISHER, predict, samples, subsample), has_aux)


def ggn(
    predict: Callable[..., PyTree],
    *,
    subsample: float | Callable | None = None,
    has_aux: bool = False,
) -> Estimator:
    """The exact generalised Gauss-Newton matrix, `(1/N) sum_b J_b^T H_b J_b`, from all output
    columns.

    `H_b = S_b S_b^T` is the output Hessian; every column of `S` is pulled back. For these
    likelihoods it is the Fisher itself, without sampling noise, at the cost of one backward pass
    per output.

    A column of all terms is pulled back at once, each term with a random sign. Where a row of a
    layer sees one term this changes nothing. Where it sees several (batch norm in training mode,
    centred scores, nodes of one graph, attention between positions that each have a label, a table
    of positions that all examples share), or a parameter has no layer (`uncovered="diagonal"`),
    products of different terms cancel in expectation, as they do under `fisher`. The signs change
    with the step of the optimizer, with the key too if one is given. The coverage table names
    layers whose rows all examples share.

    Args:
      predict: `(params, *args) -> likelihood`, or a tree of likelihoods.
      subsample: as in `fisher`.
      has_aux: as in `fisher`.

    >>> import kfac_optax as ko
    >>> estimator = ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> x, v = jnp.ones((5, 2)), jnp.array([[1.0], [0.0]])
    >>> print(estimator.vector_product(jnp.zeros((2, 1)), v, x).ravel())
    [1. 1.]
    """
    return _estimator(Spec(GGN, predict, 1, subsample), has_aux)


def empirical_fisher(
    per_example_loss: Callable[..., jax.Array], *, subsample: float | Callable | None = None
) -> Estimator:
    """Second moment of the training gradients, `(1/N) sum_b g_b g_b^T`, with the labels of the
    data.

    Where examples interact, products of different ones cancel in expectation: each has a random
    sign, see `ggn`. Blocks that average output gradients themselves (`rank_one`) get them without
    signs. `value_and_grad(lambda losses, _: losses.mean())` gives loss, gradient and curvature from
    one forward pass.

    Args:
      per_example_loss: `(params, *args) -> [N]` losses.
      subsample: as in `fisher`.

    >>> import kfac_optax as ko
    >>> loss = lambda w, x, y: jnp.sum((ko.tap_dense(x @ w, x, w) - y) ** 2, -1) / 2
    >>> estimator = empirical_fisher(loss)
    >>> x, y = jnp.ones((4, 2)), jnp.ones((4, 1))
    >>> print(estimator.vector_product(jnp.zeros((2, 1)), jnp.ones((2, 1)), x, y).ravel())
    [2. 2.]
    """
    return _estimator(Spec(EMPIRICAL, per_example_loss, 1, subsample))


def forward_only(
    predict: Callable[..., PyTree],
    *,
    subsample: float | Callable | None = None,
    has_aux: bool = False,
) -> Estimator:
    """Second moments of the layers' inputs only: `F ~ A (x) I`. No labels and, once compiled, no
    backward pass.

    Args:
      predict: `(params, *args) -> likelihood`, or a tree of likelihoods.
      subsample: as in `fisher`.
      has_aux: as in `fisher`.

    >>> import kfac_optax as ko
    >>> estimator = forward_only(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> print(estimator.vector_product(jnp.zeros((2, 1)), jnp.ones((2, 1)), 3 * jnp.ones((4, 2))).ravel())
    [18. 18.]

    Reference: Benzing, Gradient Descent on Neurons and its Link to Approximate Second-Order
      Optimization (2022).
    """
    return _estimator(Spec(FORWARD, predict, 1, subsample), has_aux)


def _estimator(spec: Spec, has_aux: bool = False) -> Estimator:
    where, subsample = spec.kind.name, spec.subsample
    if not callable(spec.function):
        raise TypeError(
            f"{where}: got {type(spec.function).__name__}; expected a function (params, *args) -> "
            "likelihood."
        )
    if subsample is not None and not callable(subsample):
        check_number(where, "subsample", subsample, above=0, at_most=1)
    # everything but `value_and_grad` sees a function of the predictions alone
    if has_aux:
        spec = spec._replace(function=_first_of(spec.kind, spec.function), with_aux=spec.function)
    return Estimator(spec)


def _first_of(kind: Kind, predict: Callable[..., PyTree]) -> Callable[..., PyTree]:
    @functools.wraps(predict)
    def prediction(*args: Any, **kwargs: Any) -> PyTree:
        return pair_of(kind, predict(*args, **kwargs))[0]

    return prediction
