"""A likelihood from a log density: for outputs that have none of their own here."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._validate import NoProductsError
from kfac_optax.likelihoods import _common
from kfac_optax.linalg import lapack

LogDensity = Callable[..., jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["natural", "weights"],
    meta_fields=["log_density", "draw", "fisher", "event_ndims", "name"],
)
@dataclasses.dataclass(frozen=True)
class FromLogDensity:
    """A likelihood that knows its log density; made by `from_log_density`."""

    natural: tuple[jax.Array, ...]
    weights: jax.Array | None
    log_density: LogDensity
    draw: Callable[..., Any]
    fisher: Callable[..., jax.Array] | None
    event_ndims: tuple[int, ...]
    name: str

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the terms."""
        # event axes are counted from the end, since `vmap` takes others away
        first = self.natural[0].shape
        return first[: len(first) - self.event_ndims[0]]

    @property
    def num_columns(self) -> int:
        """Numbers that describe one term: columns of the root of its Fisher information."""
        pairs = zip(self.natural, self.event_ndims, strict=True)
        events = [x.shape[x.ndim - n :] for x, n in pairs]
        return sum(map(math.prod, events))

    def with_natural(self, natural: tuple[jax.Array, ...]) -> "FromLogDensity":
        """The same likelihood at other natural arrays."""
        return dataclasses.replace(self, natural=tuple(natural))

    def nll(self, targets: Any) -> jax.Array:
        """`-log p(target | natural)` of every term, `[*batch]`.

        Args:
            targets: a tree of arrays `[*batch, ...]`.

        Raises:
            ValueError: `targets` has other leading axes than the batch, or the log density is no
                scalar for one term.
        """
        batch = self.batch_shape
        # targets are a tree; each of its arrays has the batch in front
        for x in jax.tree.leaves(targets):
            if jnp.shape(x)[: len(batch)] != batch:
                raise ValueError(
                    f"{self.name}: targets have shape {jnp.shape(x)}, expected the batch shape "
                    f"{batch} in front. Reshape the targets; they are never broadcast."
                )
        return -self._of_terms(self._log_density_of_one)(self._wide(), targets)

    def mean_nll(self, targets: Any) -> jax.Array:
        """`sum(w nll) / sum(w)`, a scalar; 0 where all weights are 0.

        What a term of weight zero holds is not read: ones stand for its natural arrays and targets.
        """
        fill = functools.partial(_common.mask_out, weights=self.weights, fill=1)
        # masked at the inputs, with ones: a scale of zero would be no distribution
        natural, targets = jax.tree.map(fill, (self.natural, targets))
        nll = self.with_natural(natural).nll(targets)
        return _common.weighted_mean(nll, weights=self.weights)

    def kl(self, other: Any) -> jax.Array:
        """Refuses: there is no closed form.

        Raises:
            TypeError: always; the message says how to estimate it.
        """
        raise _common.no_closed_form(self)

    def sample(self, key: jax.Array) -> Any:
        """Targets drawn from the model, a key of its own for every term."""
        # one for every term, [*batch]
        keys = jax.random.split(key, self.batch_shape)

        def draw(natural: tuple[jax.Array, ...], key: jax.Array) -> Any:
            return self.draw(key, *natural)

        drawn = self._of_terms(draw)(self._wide(), keys)
        return jax.lax.stop_gradient(drawn)

    def fisher_sqrt_column(self, c: int | jax.Array) -> tuple[jax.Array, ...]:
        """Column `c` of the symmetric root of every term's Fisher information."""

        def one(natural: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            flat, unravel = jax.flatten_util.ravel_pytree(natural)
            # column c of the symmetric root U diag(sqrt(d)) U^T
            matrix = self._matrix(natural, flat.size)
            values, vectors = lapack.eigh(matrix)
            root = jnp.sqrt(jnp.maximum(values, 0))
            column = jnp.matmul(vectors, root * vectors[c], precision="highest")
            return unravel(column)

        return self._like_natural(self._of_terms(one)(self._wide()))

    def hessian_product(self, v: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Fisher information times `v`, term by term and unweighted."""

        def one(natural: tuple[jax.Array, ...], v: tuple[jax.Array, ...]) -> tuple:
            # natural arrays of a term one after another, as `fisher` has its rows
            flat, unravel = jax.flatten_util.ravel_pytree(v)
            matrix = self._matrix(natural, flat.size)
            return unravel(jnp.matmul(matrix, flat, precision="highest"))

        wide = tuple(map(_common.widen, v))
        products = self._of_terms(one)(self._wide(), wide)
        return self._like_natural(products)

    def _of_terms(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # functions of one term, mapped over every axis of the batch
        for _ in self.batch_shape:
            function = jax.vmap(function)
        return function

    def _log_density_of_one(
        self,
        natural: tuple[jax.Array, ...],
        target: Any,
    ) -> jax.Array:
        value = self.log_density(target, *natural)
        # entries that are not added up would count as terms
        if jnp.shape(value) != ():
            raise ValueError(
                f"{self.name}: log_density returned shape {jnp.shape(value)} for one term; "
                "expected a scalar. Add up the event's entries."
            )
        return value

    def _matrix(
        self,
        natural: tuple[jax.Array, ...],
        size: int,
    ) -> jax.Array:
        # only what is exact needs it, so it is missed where it is used
        if self.fisher is None:
            raise NoProductsError(
                f"{self.name}: the exact Fisher information of a term is needed (by ggn, products, "
                "or a bound in the exact metric), but from_log_density got none. Pass "
                f"fisher=, a function of the natural arrays of one term to a matrix "
                f"[{size}, {size}], or use the estimator fisher without exact products."
            )
        matrix = self.fisher(*natural)
        # one row and column for every entry of the natural arrays
        if jnp.shape(matrix) != (size, size):
            raise ValueError(
                f"{self.name}: fisher returned shape {jnp.shape(matrix)} for one term; expected "
                f"({size}, {size}), the natural arrays' entries one after another."
            )
        return matrix

    def _wide(self) -> tuple[jax.Array, ...]:
        return tuple(map(_common.widen, self.natural))

    def _like_natural(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        pairs = zip(arrays, self.natural, strict=True)
        return tuple(a.astype(x.dtype) for a, x in pairs)


def from_log_density(
    log_density: LogDensity,
    sample: Callable[..., Any],
    *natural: jax.Array,
    fisher: Callable[..., jax.Array] | None = None,
    weights: jax.Array | None = None,
    batch_ndim: int = 1,
    name: str = "from_log_density",
) -> FromLogDensity:
    """A likelihood of one's own, given by what one term of a batch does.

    The Fisher information of a term is `H = E_{y ~ p}[s s^T]` with the score
    `s = -d log p(y | natural) / d natural`. The estimator `fisher` draws `y` and needs no more than
    log density and samples; what is exact (`ggn`, products, a bound in the exact metric) needs
    `H` itself.

    Args:
        log_density: `(target, *natural) -> scalar`, of one term.
        sample: `(key, *natural) -> target`, of one term.
        *natural: outputs of the model that describe the distribution, each `[*batch, *event]`.
        fisher: `(*natural) -> H`, of one term: a symmetric matrix over the entries of the natural
            arrays, one array after another, rows first.
        weights: Non-negative term weights or a 0/1 mask, `[*batch]`; None means all ones.
        batch_ndim: Number of leading axes that are the batch.
        name: for errors.

    Returns:
        A likelihood, see `Likelihood`.

    Raises:
        ValueError: no natural array, batches of different shapes, weights of another shape.
        TypeError: complex numbers.

    >>> def poisson(log_rate, weights=None):
    ...     return from_log_density(
    ...         lambda y, u: y * u - jnp.exp(u) - jax.scipy.special.gammaln(y + 1),
    ...         lambda key, u: jax.random.poisson(key, jnp.exp(u)).astype(u.dtype),
    ...         log_rate,
    ...         fisher=lambda u: jnp.exp(u)[None, None],
    ...         weights=weights,
    ...     )
    >>> likelihood = poisson(jnp.log(jnp.array([1.0, 4.0])))
    >>> print(likelihood.nll(jnp.zeros(2)).round(4), likelihood.hessian_product((jnp.ones(2),))[0])
    [1. 4.] [1. 4.]

    Reference: Martens, New Insights and Perspectives on the Natural Gradient Method (2020), on the
      Fisher information of a predictive distribution.
    """
    if not natural:
        raise ValueError(f"{name}: got no natural arrays; expected the outputs of the model.")
    named = {f"natural[{i}]": x for i, x in enumerate(natural)}
    _common.check_real(name, **named)
    # all natural arrays describe the same terms
    batch = jnp.shape(natural[0])[:batch_ndim]
    for i, x in enumerate(natural):
        leading = jnp.shape(x)[:batch_ndim]
        if jnp.ndim(x) < batch_ndim or leading != batch:
            raise ValueError(
                f"{name}: natural[{i}] has shape {jnp.shape(x)}; expected {batch_ndim} leading "
                f"axes {batch}, as natural[0]. Pass batch_ndim= for batches of more axes."
            )
    advice = "batch_ndim sets how many leading axes are the batch."
    _common.check_weights(name, weights=weights, batch_shape=batch, advice=advice)
    ndims = tuple(jnp.ndim(x) - batch_ndim for x in natural)
    return FromLogDensity(natural, weights, log_density, sample, fisher, ndims, name)
