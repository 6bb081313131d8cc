"""The curvature that comes with loss and gradient, from one forward pass."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from kfac_optax._layout import varying_axes
from kfac_optax._tree import named_leaves
from kfac_optax._types import Layer, PyTree
from kfac_optax.capture.evaluate import Zeros
from kfac_optax.capture.layers import Traced
from kfac_optax.estimators.curvature import LazyCurvature, averages_gradients, collect_statistics
from kfac_optax.estimators.gradient_rows import rows_of_layers
from kfac_optax.estimators.heads import count_examples
from kfac_optax.estimators.layer_rows import LayerRows
from kfac_optax.estimators.linearization import Asked, Pulled, apply_to_rows
from kfac_optax.estimators.output_cotangents import OutputCotangents
from kfac_optax.estimators.plan import Plan
from kfac_optax.estimators.reductions import names_of
from kfac_optax.estimators.sample_jacobian import SampleJacobian
from kfac_optax.estimators.spec import Spec


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
    site_rows: Sequence[Zeros | None]  # of every site, `g` that of the loss

    def gradient_rows(self, plan: Plan) -> dict[Layer, tuple[jax.Array, jax.Array]]:
        """Rows `a [copies, R, p]` and `g [copies, R, q]` of layers whose block takes them.

        `a^T g` is the gradient, of this device's part of the batch: the mean over `plan.axis_name`
        is that of the whole.
        """
        rows = rows_of_layers(plan, self.traced, self.site_rows, self.spec.kind.name)
        own = {}
        for layer, (a, g) in rows.items():
            own[layer] = a, g * self._devices(plan.axis_name, g)
        return own

    def _devices(self, axis_name: Any, g: jax.Array) -> int:
        """What turns rows of a loss that was averaged over devices, where JAX knows of it, into
        those of each device's own.
        """
        # axes over which rows differ and the loss does not: it was averaged over those
        split = varying_axes(jax.typeof(g))
        same = varying_axes(jax.typeof(self.loss))
        averaged = [x for x in names_of(axis_name) if x in split and x not in same]
        return math.prod(jax.lax.axis_size(name) for name in averaged)

    @property
    def _lazy(self) -> LazyCurvature:
        """The same, for what needs a pass of its own."""
        return LazyCurvature(self.params, self.args, self.key, self.spec)

    def quadratic_form(
        self, directions: Sequence[PyTree] | Callable[[jax.Array], PyTree], **options: Any
    ) -> jax.Array:
        """As `Curvature.quadratic_form`."""
        return self._lazy.quadratic_form(directions, **options)

    def cases(self, **options: Any) -> int:
        """As `Curvature.cases`."""
        return self._lazy.cases(**options)

    def vector_product(self, vector: PyTree, **options: Any) -> PyTree:
        """As `Curvature.vector_product`."""
        return self._lazy.vector_product(vector, **options)

    def linearize(self, **options: Any) -> SampleJacobian:
        """As `Curvature.linearize`."""
        return self._lazy.linearize(**options)

    def rows(self, layers: Sequence[Layer], **options: Any) -> dict[Layer, LayerRows]:
        """As `Curvature.rows`."""
        return self._lazy.rows(layers, **options)

    def moved(self, params: PyTree) -> LazyCurvature:
        """As `Curvature.moved`; first moments are then those of the estimator's own losses."""
        return self._lazy.moved(params)

    def sampled_gradient(self, **options: Any) -> PyTree:
        """As `Curvature.sampled_gradient`."""
        return self._lazy.sampled_gradient(**options)

    def statistics(self, plan: Plan) -> tuple[list[PyTree], PyTree]:
        """As `Curvature.statistics`; first moments are those of the loss that was given."""
        # the pullback of the loss has been made with the gradient: no cotangents are needed
        own = None
        if averages_gradients(self.spec.kind, plan):
            own = OutputCotangents(1, lambda k: [])

        # the forward pass has run: what is left of it is its pullback
        def linearize(asked: Asked):
            def pull(cotangents):
                if own is None:
                    gradients, pulled = self.pull(cotangents)
                    leaves = named_leaves(gradients)
                else:  # the gradient's pullback has run already
                    leaves, pulled = {}, self._own_rows(plan.axis_name)
                sites = self._measured(asked, pulled)
                return Pulled(sites, {name: leaves[name] for name in asked.names})

            return pull, self.heads

        return collect_statistics(
            self.spec, plan, self.traced, linearize, self.heads, self.key, own
        )

    def _measured(
        self,
        asked: Asked,
        pulled: Sequence[Zeros | None],
    ) -> list[Zeros | None]:
        """As probes would have measured, from the rows that were kept."""
        sites: list[Zeros | None] = []
        each = zip(self.traced.sites, asked.measures, pulled, asked.inverses, strict=True)
        for site, measure, kept, inverse in each:
            if measure is None or kept is None:
                sites.append(None)
                continue
            sites.append(apply_to_rows(site, measure, kept.rows, asked.extra, inverse))
        return sites

    def _own_rows(self, axis_name: Any) -> list[Zeros | None]:
        """Rows of every site, `g` that of the examples' losses, of which the loss is the mean."""
        # the gradient of a mean over N is 1/N of that of an example
        examples = count_examples(self.spec.kind, self.heads)

        def per_example(kept: Zeros) -> Zeros:
            a, g = kept.rows
            terms = examples * self._devices(axis_name, g)
            return kept._replace(rows=(a, g * terms))

        return [None if kept is None else per_example(kept) for kept in self.site_rows]
