"""What an update asks of `curvature=`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from kfac_optax._types import Layer, PyTree
from kfac_optax.estimators.layer_rows import LayerRows
from kfac_optax.estimators.plan import Plan
from kfac_optax.estimators.sample_jacobian import SampleJacobian


class Curvature(Protocol):
    """The curvature matrix `F = (1/N) J^T J` of one batch, at the parameters of one step.

    Estimators make it (`fisher(predict).at(params, *args)`), updates take it as `curvature=`. Any
    class will do, no base class is needed, and a method that is never asked for may be missing:
    presets made of blocks ask for `statistics`; `quadratic_step`, `bound_step` and exact metrics
    for `quadratic_form`; deflated couplings for `vector_product`; `smw` and `spring` for
    `linearize`, and for `rows` where they are given layers; `k_bfgs` for `moved`; adaptive presets
    for `cases`, if there is one. Nothing should run before it is asked for, since most steps ask
    for nothing.
    """

    # read by rules that bring masked updates to the whole tree
    params: PyTree  # where it was taken, all of them

    # for rules that ask how noisy a batch is
    def cases(self, *, axis_name: Any = None) -> int:
        """How many predictions of the batch the loss is a mean over, on all devices."""
        ...

    # averages of blocks
    def statistics(self, plan: Plan) -> tuple[list[PyTree], PyTree]:
        """What the plan's blocks measure, `[copies, ...]` for every layer, and its coupling (or
        `None`): means over the examples.
        """
        ...

    # exact products, for step rules and solvers
    def quadratic_form(
        self,
        directions: Sequence[PyTree] | Callable[[jax.Array], PyTree],
        *,
        count: int | None = None,
        subsample: Any = None,
        axis_name: Any = None,
    ) -> jax.Array:
        """`d_i^T F d_j` of all pairs of directions, `[m, m]`."""
        ...

    def vector_product(
        self, vector: PyTree, *, subsample: Any = None, axis_name: Any = None
    ) -> PyTree:
        """`F v`."""
        ...

    def linearize(
        self,
        *,
        sampled: bool = False,
        subsample: Any = None,
        axis_name: Any = None,
    ) -> SampleJacobian:
        """`J` as products in both directions, from one linearisation: of the exact `F`, or of
        scores at drawn labels.
        """
        ...

    def rows(
        self,
        layers: Sequence[Layer],
        *,
        sampled: bool = False,
        axis_name: Any = None,
    ) -> dict[Layer, LayerRows]:
        """Inputs and output gradients of layers, of which `J` is made where examples do not
        interact.
        """
        ...

    def moved(self, params: PyTree) -> "Curvature":
        """The curvature of the same batch at other parameters."""
        ...

    def sampled_gradient(self, *, axis_name: Any = None) -> PyTree:
        """Gradient of the mean negative log-likelihood at labels drawn from the model."""
        ...
