"""Settings of an estimator, the part of the batch it sees, and its model, traced."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.capture.layers import Traced, serve_all, trace, with_examples
from kfac_optax.estimators.centring import with_remark
from kfac_optax.estimators.heads import Kind, count_examples, split_outputs
from kfac_optax.estimators.served_heads import rows_of_own_heads, served_of
from kfac_optax.linalg.batch_parts import shards


class Enough(NamedTuple):
    """What `subsample="auto"` keeps at least: predictions with a loss of their own (positions of an
    example are several), numbers of them, and examples, which may be alike in all positions; and
    how many examples are enough whatever they predict.

    Curvature is an average over all three: with some hundred numbers it is underestimated along a
    step.
    """

    cases: int
    outputs: int
    examples: int = 1
    most: int | None = None


# statistics draw labels, exact products do not
STATISTICS = Enough(256, 2**16, 16)
PRODUCTS = Enough(128, 2**15, 8)
# what bounds the length of a step need not know it to a per cent
FEW = Enough(8, 2**15, 2, most=256)


class Spec(NamedTuple):
    """Settings of an estimator.

    Attributes:
      kind: of estimator.
      function: what is differentiated: parameters and arguments to predictions, or to losses.
      samples: label draws.
      subsample: part of the batch.
      with_aux: the user's function where it returns more, `(prediction, aux)`; then `function` is
        its first part.
    """

    kind: Kind
    function: Callable[..., PyTree]
    samples: int = 1
    subsample: float | str | Callable[..., Sequence[PyTree]] | None = None
    with_aux: Callable[..., tuple[PyTree, PyTree]] | None = None


def trace_model(
    spec: Spec,
    params: PyTree,
    args: Sequence[PyTree],
) -> Traced:
    """Traces the user's function and checks what it returns."""
    # checks run on shapes, while the function is traced
    count = functools.partial(_examples, spec.kind)
    traced = trace(spec.function, params, args, spec.kind.name, count)
    return _with_examples(spec.kind, traced, traced.out_shape)


def trace_shared(
    spec: Spec,
    params: PyTree,
    args: Sequence[PyTree],
) -> tuple[Traced, bool]:
    """The model with what it returns besides predictions, and whether that has to be computed
    apart.

    So it has where it runs layers of its own, whose rows are none of the predictions'.
    """
    if spec.with_aux is None:
        return trace_model(spec, params, args), False

    def check(out_shape: PyTree) -> int:
        prediction, _ = pair_of(spec.kind, out_shape)
        return _examples(spec.kind, prediction)

    prediction_of = lambda out: out[0]
    traced = trace(spec.with_aux, params, args, spec.kind.name, check, prediction_of)
    # the prediction depends on all layers: one trace serves both
    if serve_all(traced, prediction_of):
        return _with_examples(spec.kind, traced, traced.out_shape[0]), False
    return trace_model(spec, params, args), True


def _with_examples(kind: Kind, traced: Traced, prediction: PyTree) -> Traced:
    """The traced model with what the number of examples says about its layers."""
    # random signs tell examples apart that share rows; labels do so by themselves
    _, heads = split_outputs(kind, prediction)
    signs = kind.gradients and not kind.labels
    traced = with_examples(traced, count_examples(kind, heads), signs)
    traced = rows_of_own_heads(traced, served_of(kind, traced, heads))
    if kind.losses or not kind.gradients:
        return traced
    return traced._replace(layers=with_remark(traced.layers, heads))


def _examples(kind: Kind, prediction: PyTree) -> int:
    _, heads = split_outputs(kind, prediction)
    return count_examples(kind, heads)


def count_cases(spec: Spec, params: PyTree, args: tuple[PyTree, ...]) -> int:
    """How many predictions the loss is a mean over: examples, each with its positions; of several
    heads the fewest.
    """
    return _cases(spec.kind, jax.eval_shape(spec.function, params, *args))


def _cases(kind: Kind, predicted: PyTree) -> int:
    _, heads = split_outputs(kind, predicted)
    shapes = [head.shape if kind.losses else head.batch_shape for head in heads]
    return min(map(math.prod, shapes))


def pair_of(kind: Kind, out: PyTree) -> tuple[PyTree, PyTree]:
    """A prediction and what comes with it.

    Raises:
      TypeError: there are not two.
    """
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            f"{kind.name}: has_aux=True, but predict returned {type(out).__name__}; expected a "
            "pair (prediction, aux)."
        )
    return out


def part_of_batch(
    spec: Spec,
    params: PyTree,
    args: tuple[PyTree, ...],
    least: Enough = STATISTICS,
    together: int = 1,
) -> tuple[PyTree, ...]:
    """The arguments restricted to the examples that `subsample` keeps.

    A fraction keeps evenly spaced examples (so that a batch sharded over devices stays balanced),
    in every array whose axis 0 has the length of the first array's. A whole number keeps so many,
    or all where there are fewer. `"auto"` keeps as many as `least` asks for, a multiple of
    `together`.
    """
    if spec.subsample is None:
        return args
    # only the user knows where examples are
    if callable(spec.subsample):
        return tuple(spec.subsample(*args))
    arrays = [x for x in jax.tree.leaves(args) if getattr(x, "ndim", 0) > 0]
    if not arrays:
        return args
    size = arrays[0].shape[0]
    if spec.subsample == "auto":
        return _enough(spec, params, args, least, together)
    some = spec.subsample
    keep = int(some) if isinstance(some, numbers.Integral) else max(1, round(size * some))
    return args if keep >= size else _evenly(spec, args, size, keep)


def _evenly(spec: Spec, args: tuple[PyTree, ...], size: int, keep: int) -> tuple[PyTree, ...]:
    """Evenly spaced examples of arrays that have all of them on axis 0."""
    index = np.arange(keep) * size // keep

    def take(x: Any) -> Any:
        # no examples on axis 0
        if getattr(x, "ndim", 0) == 0 or x.shape[0] != size:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((keep, *x.shape[1:]), x.dtype)
        # on explicit mesh axes a gather has to name its result's sharding: that of the batch
        sharding = jax.typeof(x).sharding
        if all(part is None for part in sharding.spec):
            return x[index]
        _check_even(spec, keep, shards(x))
        return x.at[index].get(out_sharding=sharding)

    return jax.tree.map(take, args)


def _enough(
    spec: Spec,
    params: PyTree,
    args: tuple[PyTree, ...],
    least: Enough,
    together: int,
) -> tuple[PyTree, ...]:
    """What `"auto"` keeps of a batch: all, unless axis 0 has the examples everywhere, and the model
    takes fewer.

    Nodes of a graph go with edges, and steps in time with one prediction: none is to be left out.
    """
    arrays = [x for x in jax.tree.leaves(args) if getattr(x, "ndim", 0) > 0]
    size = arrays[0].shape[0]
    # no need to look at the model
    if size <= least.examples or any(x.shape[0] != size for x in arrays):
        return args
    predicted = jax.eval_shape(spec.function, params, *args)
    if _examples(spec.kind, predicted) != size:
        return args
    # one example has `outputs / size` numbers, and `cases / size` predictions
    outputs = sum(x.size for x in jax.tree.leaves(predicted))
    cases = _cases(spec.kind, predicted)
    of_outputs = -(-least.outputs * size // max(outputs, 1))
    of_cases = -(-least.cases * size // max(cases, 1))
    examples = max(least.examples, of_outputs, of_cases)
    if least.most is not None:
        examples = min(least.most, examples)
    # explicit mesh axes divide them
    unit = math.lcm(together, *map(shards, arrays))
    keep = -(-examples // unit) * unit
    if keep >= size:
        return args
    part = _evenly(spec, args, size, keep)
    return part if _predicts(spec, params, part, predicted, size, keep) else args


def _predicts(
    spec: Spec,
    params: PyTree,
    part: tuple[PyTree, ...],
    whole: PyTree,
    size: int,
    keep: int,
) -> bool:
    """Whether the model makes of a part of the batch that part of its prediction.

    Not so where an adjacency matrix has lost some of its rows, or has all of them in the model.
    """
    try:
        predicted = jax.eval_shape(spec.function, params, *part)
    # whatever a model raises that other shapes do not fit
    except Exception:
        return False

    def cut(x: Any) -> tuple[int, ...]:
        return (keep, *x.shape[1:]) if x.shape[:1] == (size,) else x.shape

    expected = list(map(cut, jax.tree.leaves(whole)))
    return [x.shape for x in jax.tree.leaves(predicted)] == expected


def _check_even(spec: Spec, keep: int, devices: int) -> None:
    """Raises where explicit mesh axes cannot divide the examples that are kept.

    Raises:
      ValueError: they are no multiple of the devices.
    """
    if keep % devices:
        raise ValueError(
            f"{spec.kind.name}: subsample={spec.subsample!r} keeps {keep} examples of a batch that "
            f"explicit mesh axes divide over {devices} devices; expected a multiple of {devices}."
        )
