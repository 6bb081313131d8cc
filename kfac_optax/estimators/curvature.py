"""The curvature of one batch, as passed to `tx.update(..., curvature=...)`: lazy, it runs only when
it is due.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex

from kfac_optax._tree import named_leaves, varying_axes
from kfac_optax._types import Layer, PyTree
from kfac_optax.capture.evaluate import Zeros
from kfac_optax.capture.layers import Traced, serve_all, trace, with_examples
from kfac_optax.estimators.gradient_rows import rows_of_layers
from kfac_optax.estimators.heads import (
    Kind,
    count_examples,
    find_weights,
    own_cotangents,
    split_outputs,
)
from kfac_optax.estimators.layer_rows import LayerRows, layer_rows
from kfac_optax.estimators.output_cotangents import OutputCotangents
from kfac_optax.estimators.plan import Plan, of_first_moments
from kfac_optax.estimators.products import quadratic_form, vector_product
from kfac_optax.estimators.sample_jacobian import (
    SampleJacobian,
    sample_jacobian,
    sampled_gradient,
)
from kfac_optax.estimators.statistics import (
    Asked,
    Linearize,
    Pulled,
    apply_to_rows,
    collect,
    linearize_now,
)


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
    subsample: float | Callable[..., Sequence[PyTree]] | None = None
    with_aux: Callable[..., tuple[PyTree, PyTree]] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyCurvature:
    """A `Curvature` at these parameters and this batch, measured when an optimizer asks for it. Made
    by `fisher.at`.
    """

    params: PyTree
    args: tuple[PyTree, ...]
    key: jax.Array | None
    spec: Spec = dataclasses.field(metadata={"static": True})

    def statistics(self, plan: Plan) -> tuple[list[PyTree], PyTree]:
        """Statistics of the plan's layers, `[copies, ...]` each, and of its coupling."""
        args = part_of_batch(self.spec, self.args)
        traced = trace_model(self.spec, self.params, args)
        inputs = jax.tree.leaves((self.params, args))
        kind = self.spec.kind
        _, heads = split_outputs(kind, traced.out_shape)
        if any(getattr(head, "weights", None) is not None for head in heads):
            # Weights are needed before the forward pass. They come from the inputs: compiled, the
            # rest of this is dead code.
            flat = jex.jaxpr_as_fun(traced.jaxpr)(*inputs)
            _, heads = split_outputs(
                kind, jax.tree.unflatten(jax.tree.structure(traced.out_shape), flat)
            )
        linearize = linearize_now(
            traced, inputs, lambda prediction: split_outputs(kind, prediction)
        )
        own = None
        if _first_moments(kind, plan):
            own = own_cotangents(kind, heads, plan.blocks[0].name)
        return _collect(self.spec, plan, traced, linearize, heads, self.key, own)

    def quadratic_form(
        self,
        directions: Sequence[PyTree] | Callable[[jax.Array], PyTree],
        *,
        count: int | None = None,
        subsample: Any = None,
        axis_name: Any = None,
    ) -> jax.Array:
        """Matrix `[m, m]` of `d_i^T F d_j` for directions like the parameters, exact on the batch,
        labels not needed.

        Args:
          directions: trees like the parameters, or a function from an index to one, of which a few
            exist at a time.
          count: how many, of a function.
          subsample: part of the batch, as in `fisher`; `None` for the estimator's own.
          axis_name: mapped axis over which the batch is split.
        """
        return _quadratic_form(
            self.spec, self.params, self.args, directions, count, subsample, axis_name
        )

    def vector_product(
        self, vector: PyTree, *, subsample: Any = None, axis_name: Any = None
    ) -> PyTree:
        """`F v`, a tree like the parameters; arguments as in `quadratic_form`."""
        spec, args = _exact(self.spec, self.args, subsample)
        return vector_product(spec.kind, spec.function, self.params, vector, args, axis_name)

    def linearize(
        self, *, sampled: bool = False, subsample: Any = None, axis_name: Any = None
    ) -> SampleJacobian:
        """`J` with `F = (1/N) J^T J` as products in both directions, from one linearisation.

        Args:
          sampled: scores at labels drawn from the model (`samples` of the estimator for every term)
            in place of all columns of the output Fisher.
          subsample: as in `quadratic_form`.
          axis_name: mapped axis over which the batch is split.
        """
        spec, args = _exact(self.spec, self.args, subsample)
        key = _label_key(spec.kind, self.key, axis_name) if sampled else None
        return sample_jacobian(
            spec.kind,
            spec.function,
            self.params,
            args,
            key=key,
            samples=spec.samples,
            axis_name=axis_name,
        )

    def rows(
        self, layers: Sequence[Layer], *, sampled: bool = False, axis_name: Any = None
    ) -> dict[Layer, LayerRows]:
        """Rows `a` and `g` of these layers, of which `J` is made where examples do not interact.

        Args:
          layers: some of those of the estimator.
          sampled: as in `linearize`.
          axis_name: mapped axis over which the batch is split; rows are those of this device.
        """
        spec, args = _exact(self.spec, self.args, None)
        return layer_rows(
            spec.kind,
            trace_model(spec, self.params, args),
            jax.tree.leaves((self.params, args)),
            tuple(layers),
            key=_label_key(spec.kind, self.key, axis_name) if sampled else None,
            samples=spec.samples,
            axis_name=axis_name,
        )

    def sampled_gradient(self, *, axis_name: Any = None) -> PyTree:
        """Gradient of the mean negative log-likelihood at labels drawn from the model, a tree like
        the parameters.
        """
        spec, args = _exact(self.spec, self.args, None)
        key = _label_key(spec.kind, self.key, axis_name)
        return sampled_gradient(
            spec.kind,
            spec.function,
            self.params,
            args,
            key,
            samples=spec.samples,
            axis_name=axis_name,
        )


class SharedCurvature(NamedTuple):
    """A `Curvature` whose forward pass has run already, together with the loss. Made by
    `fisher.value_and_grad`.
    """

    spec: Spec
    traced: Traced
    pull: Callable[[Any], tuple[PyTree, Sequence[Zeros | None]]]
    heads: Sequence[Any]
    key: jax.Array | None
    params: PyTree
    args: tuple[PyTree, ...]
    loss: jax.Array
    rows: Sequence[Zeros | None]  # of every site, `g` that of the loss

    def gradient_rows(self, plan: Plan) -> dict[Layer, tuple[jax.Array, jax.Array]]:
        """Rows `a [copies, R, p]` and `g [copies, R, q]` of layers whose block takes them.

        `a^T g` is the gradient, of this device's part of the batch: the mean over `plan.axis_name`
        is that of the whole.
        """
        rows = rows_of_layers(plan, self.traced, self.rows, self.spec.kind.name)
        return {layer: (a, g * self._devices(plan.axis_name, g)) for layer, (a, g) in rows.items()}

    def _devices(self, axis_name: Any, g: jax.Array) -> int:
        """What turns rows of a loss that was averaged over devices, where JAX knows of it, into
        those of each device's own.
        """
        names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
        split, same = varying_axes(jax.typeof(g)), varying_axes(jax.typeof(self.loss))
        return math.prod(
            jax.lax.axis_size(name) for name in names if name in split and name not in same
        )

    @property
    def _lazy(self) -> LazyCurvature:
        """The same, for what needs a pass of its own."""
        return LazyCurvature(self.params, self.args, self.key, self.spec)

    def quadratic_form(
        self, directions: Sequence[PyTree] | Callable[[jax.Array], PyTree], **options: Any
    ) -> jax.Array:
        """As `Curvature.quadratic_form`."""
        return self._lazy.quadratic_form(directions, **options)

    def vector_product(self, vector: PyTree, **options: Any) -> PyTree:
        """As `Curvature.vector_product`."""
        return self._lazy.vector_product(vector, **options)

    def linearize(self, **options: Any) -> SampleJacobian:
        """As `Curvature.linearize`."""
        return self._lazy.linearize(**options)

    def rows(self, layers: Sequence[Layer], **options: Any) -> dict[Layer, LayerRows]:
        """As `Curvature.rows`."""
        return self._lazy.rows(layers, **options)

    def sampled_gradient(self, **options: Any) -> PyTree:
        """As `Curvature.sampled_gradient`."""
        return self._lazy.sampled_gradient(**options)

    def statistics(self, plan: Plan) -> tuple[list[PyTree], PyTree]:
        """As `Curvature.statistics`; first moments are those of the loss that was given."""
        own = OutputCotangents(1, lambda k: []) if _first_moments(self.spec.kind, plan) else None

        def linearize(asked: Asked):
            def pull(cotangents):
                if own is None:
                    gradients, pulled = self.pull(cotangents)
                    leaves = named_leaves(gradients)
                else:  # the gradient's pullback has run already
                    leaves, pulled = {}, self._own_rows(plan.axis_name)
                each = zip(self.traced.sites, asked.measures, pulled, asked.inverses, strict=True)
                sites = [
                    None
                    if measure is None or rows is None
                    else apply_to_rows(site, measure, rows.rows, asked.extra, inverse)
                    for site, measure, rows, inverse in each
                ]
                return Pulled(sites, {name: leaves[name] for name in asked.names})

            return pull, self.heads

        return _collect(self.spec, plan, self.traced, linearize, self.heads, self.key, own)

    def _own_rows(self, axis_name: Any) -> list[Zeros | None]:
        """Rows of every site, `g` that of the examples' losses, of which the loss is the mean."""
        examples = count_examples(self.spec.kind, self.heads)

        def per_example(kept: Zeros) -> Zeros:
            a, g = kept.rows
            return kept._replace(rows=(a, g * (examples * self._devices(axis_name, g))))

        return [None if kept is None else per_example(kept) for kept in self.rows]


def _first_moments(kind: Kind, plan: Plan) -> bool:
    return of_first_moments(plan.layers, plan.blocks, plan.coupling, kind.name)


def _exact(spec: Spec, args: tuple[PyTree, ...], subsample: Any) -> tuple[Spec, tuple[PyTree, ...]]:
    """The part of the batch on which products are taken."""
    if not spec.kind.gradients:
        raise ValueError(
            f"{spec.kind.name}: measures inputs of layers only, so it is no model of the loss. Use "
            "fisher or ggn where the step is decided by a quadratic model, a trust region in the "
            "exact metric, or a deflated coupling."
        )
    if subsample is not None:
        if callable(spec.subsample) and not callable(subsample):
            # only the user knows where examples are: of what is left
            args = part_of_batch(spec, args)
        spec = spec._replace(subsample=subsample)
    return spec, part_of_batch(spec, args)


def _label_key(kind: Kind, key: jax.Array | None, axis_name: Any) -> jax.Array:
    """The key by which labels are drawn, another one on every device.

    Raises:
      ValueError: there is none, or the labels are those of the data.
    """
    if kind.losses or key is None:
        got = "losses at the labels of the data" if kind.losses else "key=None"
        raise ValueError(
            f"{kind.name}: labels are to be drawn from the model, but got {got}; expected "
            "fisher(predict).at(params, *args, key=jax.random.key(...)), a new key in every step."
        )
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _quadratic_form(spec, params, args, directions, count, subsample, axis_name) -> jax.Array:
    spec, args = _exact(spec, args, subsample)
    return quadratic_form(spec.kind, spec.function, params, directions, args, axis_name, count)


def trace_model(spec: Spec, params: PyTree, args: Sequence[PyTree]) -> Traced:
    """Traces the user's function and checks what it returns."""
    traced = trace(
        spec.function, params, args, spec.kind.name, lambda out: split_outputs(spec.kind, out)
    )
    return _with_examples(spec.kind, traced, traced.out_shape)


def trace_shared(spec: Spec, params: PyTree, args: Sequence[PyTree]) -> tuple[Traced, bool]:
    """The model with what it returns besides predictions, and whether that has to be computed
    apart.

    So it has where it runs layers of its own, whose rows are none of the predictions'.
    """
    if spec.with_aux is None:
        return trace_model(spec, params, args), False

    def check(out_shape: PyTree) -> None:
        split_outputs(spec.kind, pair_of(spec.kind, out_shape)[0])

    traced = trace(spec.with_aux, params, args, spec.kind.name, check)
    if serve_all(traced, lambda out: out[0]):
        return _with_examples(spec.kind, traced, traced.out_shape[0]), False
    return trace_model(spec, params, args), True


def _with_examples(kind: Kind, traced: Traced, prediction: PyTree) -> Traced:
    """The traced model with what the number of examples says about its layers."""
    _, heads = split_outputs(kind, prediction)
    return with_examples(traced, count_examples(kind, heads), kind.gradients and not kind.labels)


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


def part_of_batch(spec: Spec, args: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """The arguments restricted to the examples that `subsample` keeps.

    A fraction keeps evenly spaced examples (so that a batch sharded over devices stays balanced),
    in every array whose axis 0 has the length of the first array's. A whole number above one keeps
    so many, or all where there are fewer.
    """
    if spec.subsample is None:
        return args
    if callable(spec.subsample):
        return tuple(spec.subsample(*args))
    arrays = [x for x in jax.tree.leaves(args) if getattr(x, "ndim", 0) > 0]
    if not arrays:
        return args
    size = arrays[0].shape[0]
    keep = (
        spec.subsample if isinstance(spec.subsample, int) else max(1, round(size * spec.subsample))
    )
    if keep >= size:
        return args
    index = np.arange(keep) * size // keep

    def take(x: Any) -> Any:
        if getattr(x, "ndim", 0) == 0 or x.shape[0] != size:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((keep, *x.shape[1:]), x.dtype)
        # on explicit mesh axes a gather has to name its result's sharding: that of the batch
        sharding = jax.typeof(x).sharding
        return (
            x[index]
            if all(part is None for part in sharding.spec)
            else x.at[index].get(out_sharding=sharding)
        )

    return jax.tree.map(take, args)


def _collect(
    spec: Spec,
    plan: Plan,
    traced: Traced,
    linearize: Linearize,
    heads: Sequence[Any],
    key: Any,
    own: OutputCotangents | None = None,
) -> tuple[list[PyTree], PyTree]:
    """`own` are the cotangents of the losses, for blocks that average output gradients."""
    kind = spec.kind if own is None else spec.kind._replace(gradients=True)
    # signs need no key, but others in every step: products of different terms cancel over the steps
    if not kind.labels:
        key = jax.random.fold_in(jax.random.key(0) if key is None else key, plan.count)
    if plan.axis_name is not None:  # every device draws its own labels and signs
        key = jax.random.fold_in(key, jax.lax.axis_index(plan.axis_name))
    weights = find_weights(kind, heads, plan.axis_name)

    def output_cotangents(heads: Sequence[Any]) -> OutputCotangents:
        if own is not None:
            return own
        return kind.output_cotangents(heads, weights.roots, key, spec.samples)

    examples = count_examples(kind, heads)
    return collect(plan, traced, linearize, kind, output_cotangents, examples, weights.rows)
