"""What a likelihood of one's own has to offer, and whether it does."""

from typing import Any, Protocol

import jax

Natural = tuple[jax.Array, ...]
PROPERTIES = ("natural", "batch_shape", "num_columns", "weights")
METHODS = (
    "nll",
    "mean_nll",
    "sample",
    "fisher_sqrt_column",
    "hessian_product",
    "with_natural",
)


class Likelihood(Protocol):
    """A predictive distribution `p(y | natural)`, independent for every term of a batch.

    Any class with these members will do, no base class is needed; it has to be a pytree
    (`jax.tree_util.register_dataclass`), since it is what `predict` returns under tracing. Where
    log density and samples are at hand, `from_log_density` makes one. `H` is the Fisher information
    of one term in its natural arrays, `H = S S^T`. A class that sets `centred = True` has its
    scores taken about their weighted mean over the batch, as `LogAmplitude` has.
    """

    @property
    def natural(self) -> Natural:
        """The arrays that the Fisher differentiates, each `[*batch, *event]`."""
        ...

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the terms; axis 0 is the examples."""
        ...

    @property
    def num_columns(self) -> int:
        """Columns of `S`."""
        ...

    @property
    def weights(self) -> jax.Array | None:
        """Weights of the terms, `[*batch]`, or `None`."""
        ...

    def with_natural(self, natural: Natural) -> "Likelihood":
        """The same at other natural arrays."""
        ...

    def nll(self, targets: Any) -> jax.Array:
        """Negative log-likelihood of every term, `[*batch]`, unweighted."""
        ...

    def mean_nll(self, targets: Any) -> jax.Array:
        """`sum(w nll) / sum(w)`, a scalar."""
        ...

    def sample(self, key: jax.Array) -> Any:
        """Targets drawn from the model, constant under differentiation."""
        ...

    def fisher_sqrt_column(self, c: int | jax.Array) -> Natural:
        """Column `c` of `S` for every term, like `natural`; `c` may be traced."""
        ...

    def hessian_product(self, v: Natural) -> Natural:
        """`H v` for every term, like `natural`."""
        ...


def is_likelihood(x: Any) -> bool:
    """Tells whether `x` offers the methods of a likelihood (duck typing, no base class).

    Only methods are looked up, so no property is evaluated and placeholders are safe.

    Args:
        x: Any object.

    Returns:
        True for an instance with all likelihood methods; False for anything else, classes included.

    >>> import jax.numpy as jnp
    >>> from kfac_optax.likelihoods import Categorical
    >>> print(is_likelihood(Categorical(jnp.zeros([2, 3]))), is_likelihood(jnp.zeros([2, 3])))
    True False
    """
    # instances only: a class has the methods too
    if isinstance(x, type):
        return False
    return all(callable(getattr(x, name, None)) for name in METHODS)


def check_members(where: str, head: Any) -> None:
    """Raises where something that is read of every likelihood is missing.

    Raises:
        TypeError: a property is missing.
    """
    # of a dataclass a field is an attribute of the instance alone
    owners = (type(head), head)
    missing = []
    for name in PROPERTIES:
        if not any(hasattr(x, name) for x in owners):
            missing.append(name)
    if missing:
        raise TypeError(
            f"{where}: predict returned {type(head).__name__} without {', '.join(missing)}; "
            f"expected the properties {', '.join(PROPERTIES)} and the methods {', '.join(METHODS)} "
            "of kfac_optax.Likelihood. from_log_density makes a likelihood with all of them."
        )


def check_shapes(
    where: str,
    head: Any,
    *,
    labels: bool,
    columns: bool,
) -> None:
    """Checks what the methods of a likelihood return, from shapes alone: nothing is computed.

    Args:
        where: for errors.
        head: a likelihood, of arrays or of abstract ones.
        labels: whether labels are drawn from it.
        columns: whether columns of `S` are taken.

    Raises:
        ValueError: a method returns another shape than the protocol asks for.
    """
    here = f"{where}: {type(head).__name__}"
    # abstract arrays: methods are run for their shapes alone
    natural = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in head.natural]
    batch = tuple(head.batch_shape)
    # a batch axis that is missing would broadcast somewhere
    for i, x in enumerate(natural):
        if x.shape[: len(batch)] != batch:
            raise ValueError(
                f"{here}.natural[{i}] has shape {x.shape}; expected the batch shape {batch} of "
                "batch_shape in front."
            )
    # `fisher` draws labels and differentiates the nll of each term
    if labels:
        key = jax.eval_shape(lambda: jax.random.key(0))
        losses = jax.eval_shape(_sampled_losses, head, key)
        _expect(f"{here}.nll(sample(key))", [losses], [batch])
    # `ggn` and products need S and H in the shapes of the natural arrays
    if columns:
        like = [x.shape for x in natural]
        column = jax.eval_shape(_first_column, head)
        _expect(f"{here}.fisher_sqrt_column(c)", column, like)
        product = jax.eval_shape(_own_product, head)
        _expect(f"{here}.hessian_product(v)", product, like)


def _sampled_losses(head: Any, key: jax.Array) -> jax.Array:
    return head.nll(head.sample(key))


def _first_column(head: Any) -> Natural:
    return tuple(head.fisher_sqrt_column(0))


def _own_product(head: Any) -> Natural:
    return tuple(head.hessian_product(head.natural))


def _expect(
    what: str,
    got: Any,
    expected: list[tuple[int, ...]],
) -> None:
    shapes = [tuple(x.shape) for x in got]
    if shapes != expected:
        raise ValueError(
            f"{what} returned shapes {shapes}; expected {expected}, see kfac_optax.Likelihood."
        )
