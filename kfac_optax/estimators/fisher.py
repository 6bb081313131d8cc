"""Curvature estimators: what is measured, from which labels, on which part of the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from kfac_optax._types import PyTree
from kfac_optax._validate import check_number, check_subsample
from kfac_optax.estimators.estimator import Estimator
from kfac_optax.estimators.heads import EMPIRICAL, FISHER, FORWARD, GGN, Kind
from kfac_optax.estimators.spec import Spec, pair_of


def fisher(
    predict: Callable[..., PyTree],
    *,
    samples: int = 1,
    subsample: float | str | Callable | None = None,
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
      subsample: measure on a part of the batch only: a whole number of examples, some hundreds
        say, of which a smaller batch has all (inside `shard_map` of what each device has); a
        fraction in (0, 1] (both take evenly spaced examples of every argument whose axis 0 is the
        batch); `"auto"`, as many examples as give 65,536 numbers of the predictions and 256
        predictions (of a text each position is one), but at least 16, and all of them unless the
        prediction and every array of the arguments have the batch on axis 0, and the model takes a
        part of it (of a graph it does not); or a function of the arguments that returns them cut
        down.
      has_aux: `predict` returns a pair, the likelihoods and anything else (new batch statistics,
        logits), which `value_and_grad` hands out next to the loss, as `jax.value_and_grad` does.

    Returns:
      An `Estimator` with `.layers`, `.at`, `.vector_product` and `.value_and_grad`.

    Raises:
      ValueError: `samples < 1`, a fraction outside (0, 1], fewer than two examples, or another
        word.

    >>> import jax.numpy as jnp, kfac_optax as ko
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
    subsample: float | str | Callable | None = None,
    has_aux: bool = False,
) -> Estimator:
    """The exact generalised Gauss-Newton matrix, `(1/N) sum_b J_b^T H_b J_b`, from all output
    columns.

    `H_b = S_b S_b^T` is the output Hessian; every column of `S` is pulled back. For these
    likelihoods it is the Fisher itself, without sampling noise, at the cost of one backward pass
    per output. Kronecker factors measured so are those of KFLR (see `kflr`); `recursive_ggn` has
    those of KFRA, without the backward passes.

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

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> x, v = jnp.ones((5, 2)), jnp.array([[1.0], [0.0]])
    >>> print(estimator.vector_product(jnp.zeros((2, 1)), v, x).ravel())
    [1. 1.]
    """
    return _estimator(Spec(GGN, predict, 1, subsample), has_aux)


def empirical_fisher(
    per_example_loss: Callable[..., jax.Array],
    *,
    subsample: float | str | Callable | None = None,
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

    >>> import jax.numpy as jnp, kfac_optax as ko
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
    subsample: float | str | Callable | None = None,
    has_aux: bool = False,
) -> Estimator:
    """Second moments of the layers' inputs only: `F ~ A (x) I`. No labels and, once compiled, no
    backward pass.

    Args:
      predict: `(params, *args) -> likelihood`, or a tree of likelihoods.
      subsample: as in `fisher`.
      has_aux: as in `fisher`.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = forward_only(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> print(estimator.vector_product(jnp.zeros((2, 1)), jnp.ones((2, 1)), 3 * jnp.ones((4, 2))).ravel())
    [18. 18.]

    Reference: Benzing, Gradient Descent on Neurons and its Link to Approximate Second-Order
      Optimization (2022).
    """
    return _estimator(Spec(FORWARD, predict, 1, subsample), has_aux)


def _estimator(spec: Spec, has_aux: bool = False) -> Estimator:
    check_spec(spec)
    # everything but `value_and_grad` sees a function of the predictions alone
    if has_aux:
        first = _first_of(spec.kind, spec.function)
        spec = spec._replace(function=first, with_aux=spec.function)
    return Estimator(spec)


def check_spec(spec: Spec) -> None:
    """Raises where an estimator is given something else than a function and a part of the batch."""
    where, subsample = spec.kind.name, spec.subsample
    if not callable(spec.function):
        raise TypeError(
            f"{where}: got {type(spec.function).__name__}; expected a function (params, *args) -> "
            "likelihood."
        )
    check_subsample(where, "subsample", subsample)


def _first_of(kind: Kind, predict: Callable[..., PyTree]) -> Callable[..., PyTree]:
    @functools.wraps(predict)
    def prediction(*args: Any, **kwargs: Any) -> PyTree:
        # the likelihoods; what comes with them has no part in the curvature
        first, _ = pair_of(kind, predict(*args, **kwargs))
        return first

    return prediction
