"""Independent binary outputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from kfac_optax.likelihoods import _common


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "weights"],
    meta_fields=["event_ndim"],
    drop_fields=["batch_ndim"],  # follows from event_ndim and the shape; stale after vmap
)
@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli outputs, given by their logits.

    `nll = -sum_event [t log y + (1 - t) log(1 - y)]`, `y = sigmoid(f)`. The Fisher and the Hessian
    agree, `H = diag(y (1 - y))`, `S = diag(sqrt(y (1 - y)))`.

    Args:
        logits: Log-odds, `[*batch, *event]`.
        weights: Non-negative term weights or a 0/1 mask, `[*batch]`; None means all ones.
        batch_ndim: Number of leading axes that are the batch; the nll sums over the rest.
        event_ndim: The same from the other end (trailing axes); wins over `batch_ndim` if given.
            This is what `vmap` keeps: inside a per-example function write `batch_ndim=0`.

    Raises:
        ValueError: `weights` has another shape than the batch, or `batch_ndim` does not fit.
        TypeError: complex numbers.

    Reference: Martens (2020), "New Insights and Perspectives on the Natural Gradient Method".

    >>> likelihood = Bernoulli(jnp.zeros([1, 3]))
    >>> print(likelihood.nll(jnp.ones([1, 3])).round(3), likelihood.batch_shape)
    [2.079] (1,)
    """

    logits: jax.Array
    weights: jax.Array | None = None
    batch_ndim: int = 1
    event_ndim: int | None = None

    def __post_init__(self) -> None:
        _common.check_real("Bernoulli", logits=self.logits)
        batch_ndim, event_ndim = _common.split_axes(
            "Bernoulli",
            array=self.logits,
            batch_ndim=self.batch_ndim,
            event_ndim=self.event_ndim,
        )
        # fields of a frozen dataclass, set once
        object.__setattr__(self, "batch_ndim", batch_ndim)
        object.__setattr__(self, "event_ndim", event_ndim)
        if _common.has_shape(self.logits):
            _common.check_weights(
                "Bernoulli",
                weights=self.weights,
                batch_shape=self.batch_shape,
                advice="batch_ndim sets how many leading axes are the batch.",
            )

    @property
    def natural(self) -> tuple[jax.Array]:
        """The arrays that the Fisher differentiates: `(logits,)`."""
        return (self.logits,)

    def with_natural(self, natural: tuple[jax.Array]) -> "Bernoulli":
        """Returns the same likelihood at other logits."""
        (logits,) = natural
        return dataclasses.replace(self, logits=logits)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the terms: the leading `batch_ndim` axes."""
        return self.logits.shape[: self.batch_ndim]

    @property
    def num_columns(self) -> int:
        """Number of columns of `S`: the event size."""
        return math.prod(self.logits.shape[self.batch_ndim :])

    def nll(self, targets: jax.Array) -> jax.Array:
        """Negative log-likelihood per term, summed over the event axes, unweighted.

        Args:
            targets: 0/1, bool, or probabilities in [0, 1], `[*batch, *event]`.

        Returns:
            `[*batch]`, float32 or wider.

        Raises:
            ValueError: `targets` has another shape than the logits.
        """
        _common.check_targets("Bernoulli", targets=targets, shape=self.logits.shape)
        x = _common.widen(self.logits)
        t = jnp.asarray(targets, x.dtype)
        # Both tails through log_sigmoid; softplus(x) - t x would cancel for confident outputs.
        log_one = jax.nn.log_sigmoid(x)
        log_zero = jax.nn.log_sigmoid(-x)
        log_p = t * log_one + (1 - t) * log_zero
        return -_common.event_sum(log_p, batch_ndim=self.batch_ndim)

    def mean_nll(self, targets: jax.Array) -> jax.Array:
        """Weighted mean `sum(w * nll) / sum(w)`, a scalar; 0 where all weights are 0.

        Args:
            targets: `[*batch, *event]`; any value where the weight is 0.
        """
        # masked at the inputs: the value of padding has no gradient, NaN included
        logits = _common.mask_out(self.logits, weights=self.weights, fill=0.0)
        targets = _common.mask_out(targets, weights=self.weights, fill=0.0)
        nll = self.with_natural((logits,)).nll(targets)
        return _common.weighted_mean(nll, weights=self.weights)

    def kl(self, other: "Bernoulli") -> jax.Array:
        """Divergence `KL(self || other)` of every term, summed over the event axes, unweighted.

        `sum_event [y (log y - log y') + (1 - y) (log(1 - y) - log(1 - y'))]`. Its Hessian in the
        logits of either is the Fisher where the two agree. An outcome without probability
        here, to working precision, counts nothing; infinite where one with it is forbidden in
        `other`.

        Args:
            other: A prediction of the same terms.

        Returns:
            `[*batch]`, float32 or wider.

        Raises:
            TypeError: `other` is of another kind.
            ValueError: `other` has another shape.

        >>> print(Bernoulli(jnp.zeros([1, 2])).kl(Bernoulli(jnp.ones([1, 2]))).round(4))
        [0.2402]
        """
        _common.check_other(self, other)
        x = _common.widen(self.logits)
        x_other = _common.widen(other.logits)
        # both outcomes
        one = _gain(x, x_other)
        zero = _gain(-x, -x_other)
        return _common.event_sum(one + zero, batch_ndim=self.batch_ndim)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draws 0/1 targets `[*batch, *event]` in the dtype of the logits."""
        y = jax.nn.sigmoid(_common.widen(self.logits))
        drawn = jax.random.bernoulli(key, y)
        return drawn.astype(self.logits.dtype)

    def fisher_sqrt_column(self, c: int | jax.Array) -> tuple[jax.Array]:
        """Column `c` of `S` for every term, `sqrt(y_c (1 - y_c)) e_c`.

        Args:
            c: Column number in `[0, num_columns)`, row-major over the event; may be traced.

        Returns:
            `([*batch, *event],)` in the dtype of the logits.
        """
        x = _common.widen(self.logits)
        # In log space: y (1 - y) underflows long before its root does.
        log_variance = jax.nn.log_sigmoid(x) + jax.nn.log_sigmoid(-x)
        root = jnp.exp(0.5 * log_variance)
        event = self.logits.shape[self.batch_ndim :]
        hit = _common.unit(c, shape=event)
        column = jnp.where(hit, root, 0)
        return (column.astype(self.logits.dtype),)

    def hessian_product(self, v: tuple[jax.Array]) -> tuple[jax.Array]:
        """Fisher times `v`, term by term and unweighted: `y (1 - y) * v`.

        Args:
            v: `([*batch, *event],)`.

        Returns:
            `([*batch, *event],)` in the dtype of the logits.
        """
        x = _common.widen(self.logits)
        # y (1 - y) without the difference 1 - y
        variance = jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)
        product = variance * _common.widen(v[0])
        return (product.astype(self.logits.dtype),)


def _gain(x: jax.Array, x_other: jax.Array) -> jax.Array:
    """`y (log y - log y')` of one of the two outcomes, given its logits."""
    possible = jnp.exp(jax.nn.log_sigmoid(x)) > 0
    # where nothing is counted no infinity meets another, or a zero, in gradients neither
    log_y = jax.nn.log_sigmoid(jnp.where(possible, x, 0))
    log_other = jax.nn.log_sigmoid(jnp.where(possible, x_other, 0))
    gain = jnp.exp(log_y) * (log_y - log_other)
    return jnp.where(possible, gain, 0)
