"""What is known about a method, in one place: for tests, for the documentation, for comparisons."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kfac_optax._types import Block, Layer, Layers

# "losses": curvature that knows the gradient of each example's own loss; "sampled": gradients at
# labels drawn from the model
NEEDS = ("gradient", "curvature", "losses", "rows", "value", "value_fn", "sampled")
# what `build` gives presets: periods so short that few steps see every branch; with KL-clip a rate
SHORT: dict[str, Any] = dict(damping=0.05, curvature_every=2, inverse_every=3)
SHORT_CLIPPED = SHORT | {"learning_rate": 0.1}


class Sizes(NamedTuple):
    """What the state of one matrix of a layer depends on."""

    p: int  # inputs, the bias row counted
    q: int  # outputs
    r: int = 0  # eigenpairs that are kept of a factor, where a method has a rank
    n: int = 0  # rows of the batch that the layers were traced on
    bias: bool = False  # whether one of the inputs is that of a bias


@dataclasses.dataclass(frozen=True)
class Method:
    """Record of one method.

    Attributes:
      name: of its public preset, `getattr(kfac_optax, name)`.
      kind: `"preconditioner"`, to be chained with an optimizer, or `"optimizer"`.
      summary: what it is, in one line of Markdown.
      paper: who and when.
      equation: what it does to a gradient `V`.
      needs: of every update, some of `NEEDS`; without `"curvature"` layers have no part in it, and
        `build` takes no notice of them.
      state: `Sizes -> numbers` kept for one dense layer: statistic, inverse, momentum.
      state_text: the same as a formula.
      block_of: `layer -> Block` that such a build gives a dense layer; `None` where layers have no
        blocks.
      across: `L -> numbers` kept for all `L` layers together.
      cost: `(refresh, step)` of a layer of width `d`, as text.
      test: node id of the test that proves the equation, from the repository's root.
      build: `(layers, **options) -> transformation` with short periods, and a small rank where
        there is one, so that few steps of a small problem see every branch.
    """

    name: str
    kind: str
    summary: str
    paper: str
    equation: str
    needs: frozenset[str]
    state: Callable[[Sizes], int]
    state_text: str
    cost: tuple[str, str]
    test: str
    build: Callable[..., Any]
    block_of: Callable[[Layer], Block] | None
    across: Callable[[int], int] = lambda layers: 0

    def numbers(self, layers: Layers, *, rank: int = 0) -> int:
        """Arrays' entries in the state for dense layers, scalars of the whole state not counted.

        >>> import jax.numpy as jnp, kfac_optax as ko
        >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
        >>> layers = estimator.layers(jnp.zeros((3, 2)), jnp.ones((5, 3)))
        >>> ko.CATALOGUE["kfac"].numbers(layers)  # 2 (p^2 + q^2) + p + q
        31
        """
        sizes = [(layer.copies, sizes_of(layer, rank)) for layer in layers]
        # of a stack every layer counts
        copies = sum(layer.copies for layer in layers)
        return sum(number * self.state(size) for number, size in sizes) + self.across(copies)


def sizes_of(layer: Layer, rank: int = 0) -> Sizes:
    """The sizes of a layer that runs with a rank."""
    # p counts the row of the bias
    p, q = layer.shape
    return Sizes(p, q, rank, layer.rows, layer.bias is not None)


def collect(*records: Iterable[Method]) -> dict[str, Method]:
    """Records of several files by name, in their order.

    Raises:
      ValueError: a name occurs twice, or a record needs something that there is not.
    """
    found: dict[str, Method] = {}
    # in the order of the files, which is that of the page of methods
    for record in itertools.chain.from_iterable(records):
        if record.name in found:
            raise ValueError(f"catalogue: two records are named {record.name!r}; expected one.")
        if unknown := record.needs - frozenset(NEEDS):
            raise ValueError(
                f"catalogue: {record.name!r} needs {sorted(unknown)}; expected some of {NEEDS}."
            )
        found[record.name] = record
    return found
