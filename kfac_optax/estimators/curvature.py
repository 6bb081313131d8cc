"""The curvature of one batch, as passed to `tx.update(..., curvature=...)`: lazy, it runs only when
it is due.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from kfac_optax._types import Layer, PyTree
from kfac_optax._validate import NoProductsError
from kfac_optax.capture.layers import Traced
from kfac_optax.estimators import microbatches
from kfac_optax.estimators.centring import centred_cotangents
from kfac_optax.estimators.heads import (
    Kind,
    count_examples,
    find_weights,
    own_cotangents,
    split_outputs,
)
from kfac_optax.estimators.in_turn import in_turn, is_cut
from kfac_optax.estimators.layer_rows import LayerRows, layer_rows
from kfac_optax.estimators.linearization import Linearize, as_returned, linearize_now
from kfac_optax.estimators.near_means import means_of_plan
from kfac_optax.estimators.output_cotangents import OutputCotangents
from kfac_optax.estimators.plan import Plan, of_first_moments
from kfac_optax.estimators.products import quadratic_form, vector_product
from kfac_optax.estimators.reductions import names_of
from kfac_optax.estimators.sample_jacobian import (
    SampleJacobian,
    sample_jacobian,
    sampled_gradient,
)
from kfac_optax.estimators.served_heads import served_of
from kfac_optax.estimators.spec import (
    FEW,
    PRODUCTS,
    Spec,
    count_cases,
    part_of_batch,
    trace_model,
)
from kfac_optax.estimators.statistics import collect


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
    microbatch_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    def moved(self, params: PyTree) -> "LazyCurvature":
        """The curvature of the same batch at other parameters, for a second pass behind a step."""
        return dataclasses.replace(self, params=params)

    def cases(self, *, axis_name: Any = None) -> int:
        """How many predictions of the batch the loss is a mean over, on all devices that a mapped
        axis splits it over.
        """
        devices = math.prod(map(jax.lax.axis_size, names_of(axis_name)))
        return devices * count_cases(self.spec, self.params, self.args)

    def statistics(self, plan: Plan) -> tuple[list[PyTree], PyTree]:
        """Statistics of the plan's layers, `[copies, ...]` each, and of its coupling."""
        args = part_of_batch(self.spec, self.params, self.args)
        if self.microbatch_size is None:
            return self._statistics(plan, args)
        key = jax.random.key(0) if self.key is None else self.key
        # devices are asked once, for the means over all microbatches
        alone = plan._replace(apart=names_of(plan.axis_name))

        def of_microbatch(spec: Spec, args: tuple[PyTree, ...], i: jax.Array) -> Any:
            mine = LazyCurvature(self.params, args, jax.random.fold_in(key, i), spec)
            return microbatches.rows_apart(plan, mine._statistics(alone, args))

        batch = microbatches.divide(self.spec, self.params, args, self.microbatch_size)
        means, rows = microbatches.mean_over(batch, of_microbatch)
        return microbatches.with_rows(means_of_plan(plan, *means), rows)

    def _statistics(self, plan: Plan, args: tuple[PyTree, ...]) -> tuple[list[PyTree], PyTree]:
        traced = trace_model(self.spec, self.params, args)
        inputs = jax.tree.leaves((self.params, args))
        kind = self.spec.kind
        _, heads = split_outputs(kind, traced.out_shape)
        if any(getattr(head, "weights", None) is not None for head in heads):
            # Weights are needed before the forward pass. They come from the inputs: compiled, the
            # rest of this is dead code.
            flat = jex.jaxpr_as_fun(traced.jaxpr)(*inputs)
            _, heads = split_outputs(kind, as_returned(traced, flat))
        # one forward pass with probes; every pullback measures on its way back
        outputs = functools.partial(split_outputs, kind)
        linearize = linearize_now(traced, inputs, outputs)
        # blocks of first moments want the gradients of the losses themselves, without signs
        own = None
        if averages_gradients(kind, plan):
            own = own_cotangents(kind, heads, plan.blocks[0].name)
        return collect_statistics(self.spec, plan, traced, linearize, heads, self.key, own)

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
          subsample: part of the batch, as in `fisher`; `None` for the estimator's own, `"few"` for
            what the length of a step is bounded on: at least 8 predictions (of a text each position
            is one), 32,768 numbers of them and 2 examples, at most 256 examples.
          axis_name: mapped axis over which the batch is split.
        """

        def form(spec: Spec, args: tuple[PyTree, ...]) -> jax.Array:
            return quadratic_form(
                spec.kind, spec.function, self.params, directions, args, axis_name, count
            )

        return self._mean(form, subsample, () if callable(directions) else directions)

    def vector_product(
        self, vector: PyTree, *, subsample: Any = None, axis_name: Any = None
    ) -> PyTree:
        """`F v`, a tree like the parameters; arguments as in `quadratic_form`."""

        def product(spec: Spec, args: tuple[PyTree, ...]) -> PyTree:
            return vector_product(spec.kind, spec.function, self.params, vector, args, axis_name)

        return self._mean(product, subsample, vector)

    def _mean(
        self,
        function: Callable[[Spec, tuple[PyTree, ...]], PyTree],
        subsample: Any,
        behind: PyTree,
    ) -> Any:
        """What is a mean over examples, of one microbatch after another if there are several; a
        pass of its own waits for `behind`.
        """
        # every product is exact on the part of the batch that is asked for
        together = self.microbatch_size or 1
        spec, args = _exact(self.spec, self.params, self.args, subsample, together)
        # a part of its own shares its values with nothing else in the step
        if subsample is not None and is_cut(args, self.args):
            args = in_turn(args, behind)
        if self.microbatch_size is None:
            return function(spec, args)
        batch = microbatches.divide(spec, self.params, args, self.microbatch_size)
        return microbatches.mean_over(batch, lambda spec, args, i: (function(spec, args), ()))[0]

    def linearize(
        self,
        *,
        sampled: bool = False,
        subsample: Any = None,
        axis_name: Any = None,
    ) -> SampleJacobian:
        """`J` with `F = (1/N) J^T J` as products in both directions, from one linearisation.

        Args:
          sampled: scores at labels drawn from the model (`samples` of the estimator for every term)
            in place of all columns of the output Fisher.
          subsample: as in `quadratic_form`.
          axis_name: mapped axis over which the batch is split.
        """
        spec, args = _exact(self.spec, self.params, self.args, subsample)
        # without a key all columns of the output Fisher are taken
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
        self,
        layers: Sequence[Layer],
        *,
        sampled: bool = False,
        axis_name: Any = None,
    ) -> dict[Layer, LayerRows]:
        """Rows `a` and `g` of these layers, of which `J` is made where examples do not interact.

        Args:
          layers: some of those of the estimator.
          sampled: as in `linearize`.
          axis_name: mapped axis over which the batch is split; rows are those of this device.
        """
        spec, args = _exact(self.spec, self.params, self.args, None)
        return layer_rows(
            spec.kind,
            # rows are kept where the probes of these layers see them
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
        spec, args = _exact(self.spec, self.params, self.args, None)
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


def averages_gradients(kind: Kind, plan: Plan) -> bool:
    """Whether the plan's blocks average output gradients themselves."""
    return of_first_moments(plan.layers, plan.blocks, plan.coupling, kind.name)


def _exact(
    spec: Spec,
    params: PyTree,
    args: tuple[PyTree, ...],
    subsample: Any,
    together: int = 1,
) -> tuple[Spec, tuple[PyTree, ...]]:
    """The part of the batch on which products are taken."""
    if not spec.kind.gradients:
        raise NoProductsError(
            f"{spec.kind.name}: measures inputs of layers only, so it is no model of the loss. Use "
            "fisher or ggn where the step is decided by a quadratic model, a trust region in the "
            "exact metric, or a deflated coupling."
        )
    # the estimator's own part, that of statistics and of the layers' rows
    if subsample is None:
        return spec, part_of_batch(spec, params, args)
    if callable(spec.subsample) and not callable(subsample):
        # only the user knows where examples are: of what is left
        args = part_of_batch(spec, params, args)
    least = PRODUCTS
    if subsample == "few":
        least, subsample = FEW, "auto"
    spec = spec._replace(subsample=subsample)
    return spec, part_of_batch(spec, params, args, least, together)


def _label_key(
    kind: Kind,
    key: jax.Array | None,
    axis_name: Any,
) -> jax.Array:
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
    if axis_name is None:
        return key
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def collect_statistics(
    spec: Spec,
    plan: Plan,
    traced: Traced,
    linearize: Linearize,
    heads: Sequence[Any],
    key: Any,
    own: OutputCotangents | None = None,
) -> tuple[list[PyTree], PyTree]:
    """Statistics of a plan; `own` are the cotangents of the losses, for blocks that average output gradients."""
    # the losses of `value_and_grad` have output gradients whatever the estimator measures
    kind = spec.kind if own is None else spec.kind._replace(gradients=True)
    # signs need no key, but others in every step: products of different terms cancel over the steps
    if not kind.labels:
        key = jax.random.key(0) if key is None else key
        key = jax.random.fold_in(key, plan.count)
    if plan.axis_name is not None:  # every device draws its own labels and signs
        device = jax.lax.axis_index(plan.axis_name)
        key = jax.random.fold_in(key, device)
    weights = find_weights(kind, heads, plan.axis_name)

    # the heads that the forward pass returns, since their arrays are needed here
    def output_cotangents(heads: Sequence[Any]) -> OutputCotangents:
        if own is not None:
            return own
        made = kind.output_cotangents(heads, weights.roots, key, spec.samples)
        return made if kind.losses else centred_cotangents(made, heads, weights.roots)

    # N of the first head, to which the others are related by `served`
    examples = count_examples(kind, heads)
    return collect(
        plan,
        traced,
        linearize,
        kind,
        output_cotangents,
        examples,
        weights.rows,
        served_of(kind, traced, heads),
    )
