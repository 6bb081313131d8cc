"""What a model predicts, seen by an estimator: heads, their weights, and the output cotangents of
each kind.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._layout import zeros_of_type
from kfac_optax._types import PyTree
from kfac_optax.estimators.output_cotangents import (
    Naturals,
    OutputCotangents,
    fisher_columns,
    sampled_scores,
    signed,
)
from kfac_optax.likelihoods import check_members, is_likelihood
from kfac_optax.linalg.division import positive_or_one


class Kind(NamedTuple):
    """One way to estimate curvature.

    Attributes:
      name: the public function that makes it.
      labels: labels are drawn from the model, so a key is needed.
      losses: the function returns per-example losses, not predictions.
      gradients: output gradients are measured (`False`: inputs only).
      output_cotangents: `(heads, root weights, key, samples) -> OutputCotangents`.
      mean_weights: mean weight of every head, where the batch is one of several that are averaged;
        `None` for that of its own terms.
    """

    name: str
    labels: bool
    losses: bool
    gradients: bool
    output_cotangents: Callable[..., OutputCotangents]
    mean_weights: Any = None


def of_losses(losses: Sequence[Any]) -> OutputCotangents:
    """The cotangent of a loss is one: its pullback is the gradient of the example."""

    # ones with the sharding of the losses, and no dependence on them
    def ones(k: Any) -> Naturals:
        return [(zeros_of_type(jax.typeof(x)) + 1,) for x in losses]

    return OutputCotangents(1, ones)


def _signed_columns(
    heads: Sequence[Any],
    roots: Sequence[Any],
    key: jax.Array,
    samples: int,
) -> OutputCotangents:
    # columns of all terms at once, told apart by signs
    terms = [head.batch_shape for head in heads]
    return signed(fisher_columns(heads, roots), terms, key)


def _signed_losses(
    losses: Sequence[Any],
    roots: Sequence[Any],
    key: jax.Array,
    samples: int,
) -> OutputCotangents:
    terms = [x.shape for x in losses]
    return signed(of_losses(losses), terms, key)


def _nothing(
    heads: Sequence[Any],
    roots: Sequence[Any],
    key: jax.Array,
    samples: int,
) -> OutputCotangents:
    def zeros(k: Any) -> Naturals:
        return [tuple(map(jnp.zeros_like, head.natural)) for head in heads]

    return OutputCotangents(1, zeros)


# name, labels drawn, losses, output gradients
FISHER = Kind("fisher", True, False, True, sampled_scores)
GGN = Kind("ggn", False, False, True, _signed_columns)
EMPIRICAL = Kind("empirical_fisher", False, True, True, _signed_losses)
FORWARD = Kind("forward_only", False, False, False, _nothing)


def own_cotangents(
    kind: Kind,
    heads: Sequence[Any],
    blocks: str,
) -> OutputCotangents:
    """Of the examples' own losses, as they are: their pullbacks average to the gradient.

    Raises:
      ValueError: the estimator does not know the losses.
    """
    if not kind.losses:
        raise ValueError(
            f"{kind.name}.at: {blocks} averages output gradients themselves, which the "
            f"cotangents of {kind.name} do not have: their mean over examples says nothing. Use "
            "empirical_fisher(per_example_loss).at(params, *args), or the curvature that "
            f"{kind.name}.value_and_grad(loss_fn) hands out next to the gradient."
        )
    return of_losses(heads)


def split_outputs(kind: Kind, prediction: PyTree) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """The arrays that are differentiated, one tuple per head, and the heads.

    Raises:
      TypeError: the function does not return what this kind of estimator needs.
    """
    if kind.losses:
        # one loss for every example, or terms could not be told apart
        if len(getattr(prediction, "shape", ())) != 1:
            got = (
                f"an array {list(prediction.shape)}"
                if hasattr(prediction, "shape")
                else type(prediction).__name__
            )
            raise TypeError(
                f"{kind.name}: per_example_loss returned {got}; expected an array [N], one loss "
                "per example."
            )
        _check_real(kind, "per_example_loss returned", prediction)
        return [(prediction,)], [prediction]
    # several heads in any tree, in its order
    heads = jax.tree.leaves(prediction, is_leaf=is_likelihood)
    for head in heads or [prediction]:
        if not is_likelihood(head):
            shape = list(head.shape) if hasattr(head, "shape") else ""
            raise TypeError(
                f"{kind.name}: predict returned {type(head).__name__}{shape}; expected a "
                "likelihood or a tree of them. Wrap the output of the model: Categorical(logits), "
                "Bernoulli(logits) or Normal(mean, scale)."
            )
        check_members(kind.name, head)
        for x in head.natural:
            # products of complex numbers would come out with wrong signs
            _check_real(kind, f"predict returned {type(head).__name__} of", x)
    return [head.natural for head in heads], heads


def _check_real(kind: Kind, what: str, x: Any) -> None:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"{kind.name}: {what} {x.dtype}{list(x.shape)}; expected real numbers. Return real and "
            "imaginary part as two real outputs, for example Normal(jnp.stack([z.real, z.imag], "
            "-1)) for a complex output z."
        )


def with_naturals(prediction: PyTree, naturals: Sequence[tuple[Any, ...]]) -> PyTree:
    """The prediction with other natural arrays in its heads; losses are their own."""
    heads, treedef = jax.tree.flatten(prediction, is_leaf=is_likelihood)
    return treedef.unflatten(
        [
            head.with_natural(natural) if is_likelihood(head) else natural[0]
            for head, natural in zip(heads, naturals, strict=True)
        ]
    )


def count_examples(kind: Kind, heads: Sequence[Any]) -> int:
    """N, the length of axis 0 of the predictions."""
    shape = heads[0].shape if kind.losses else heads[0].batch_shape
    return shape[0] if shape else 1


class Weights(NamedTuple):
    """Weights that make every statistic a mean over examples.

    Attributes:
      rows: `[*batch]` with mean one, for the input side of every layer; `None` if all examples
        count the same.
      roots: per head, factor of its cotangents (root of weight and of examples per term); `None`
        for one.
    """

    rows: Any
    roots: list[Any]


def find_weights(
    kind: Kind,
    heads: Sequence[Any],
    axis_name: Any = None,
) -> Weights:
    """Normalised weights of all heads; `axis_name` for a batch split over devices.

    Raises:
      ValueError: heads disagree about weights.
    """
    if kind.losses:
        return Weights(None, [None] * len(heads))
    # inputs of shared layers have one weight, whichever head they serve
    weights = [head.weights for head in heads]
    shapes = {None if x is None else x.shape for x in weights}
    if len(shapes) > 1:
        raise ValueError(
            f"{kind.name}: heads have weights of shapes {sorted(shapes, key=str)}; expected the "
            "same shape, or none, for all heads, since the weights also apply to the inputs of the "
            "layers that heads share. Where heads have batches of their own, multiply each "
            "residual by the root of its weight instead."
        )
    examples = count_examples(kind, heads)
    rows, roots = [], []
    for i, head in enumerate(heads):
        # the terms of an example share its weight, N / terms for each, as roots in the cotangents
        share = examples / max(math.prod(head.batch_shape), 1)
        if head.weights is None:
            roots.append(None if share == 1 else math.sqrt(share))
            continue
        # mean one over all devices, so that dividing by N makes a weighted mean
        wide = jnp.result_type(jnp.float32, head.weights, *head.natural)
        own = head.weights.astype(wide)
        mean = jnp.mean(own) if kind.mean_weights is None else kind.mean_weights[i]
        if axis_name is not None:
            mean = jax.lax.pmean(mean, axis_name)
        normalised = own / positive_or_one(mean)
        rows.append(normalised)
        roots.append(jnp.sqrt(normalised * share))
    of_rows = sum(rows) / len(rows) if rows else None
    return Weights(of_rows, roots)
