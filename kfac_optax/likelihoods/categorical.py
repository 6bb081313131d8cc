"""Softmax classification."""

import dataclasses

import jax
import jax.numpy as jnp

from kfac_optax.likelihoods import _common


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """Categorical distribution over C classes, given by its logits.

    `p(t | f) = softmax(f)_t`, so `nll = logsumexp(f) - f_t`. With `y = softmax(f)` the Fisher and
    the Hessian of the nll agree, `H = diag(y) - y y^T = S S^T`, `S = diag(sqrt y) - y sqrt(y)^T`.
    A logit of -inf forbids a class.

    Args:
        logits: Unnormalised log-probabilities, `[*batch, C]`.
        weights: Non-negative term weights or a 0/1 mask, `[*batch]`; None means all ones.

    Raises:
        ValueError: `weights` has another shape than the batch.
        TypeError: complex numbers.

    Reference: Martens (2020), "New Insights and Perspectives on the Natural Gradient Method".

    >>> likelihood = Categorical(jnp.log(jnp.array([[0.5, 0.25, 0.25]])))
    >>> print(likelihood.nll(jnp.array([1])).round(3), likelihood.num_columns)
    [1.386] 3
    """

    logits: jax.Array
    weights: jax.Array | None = None

    def __post_init__(self) -> None:
        _common.check_real("Categorical", logits=self.logits)
        if _common.has_shape(self.logits):
            _common.check_weights(
                "Categorical",
                weights=self.weights,
                batch_shape=self.batch_shape,
                advice="All axes of the logits but the last are the batch.",
            )

    @property
    def natural(self) -> tuple[jax.Array]:
        """The arrays that the Fisher differentiates: `(logits,)`."""
        return (self.logits,)

    def with_natural(self, natural: tuple[jax.Array]) -> "Categorical":
        """Returns the same likelihood at other logits."""
        (logits,) = natural
        return dataclasses.replace(self, logits=logits)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the terms, `logits.shape[:-1]`."""
        return self.logits.shape[:-1]

    @property
    def num_columns(self) -> int:
        """Number of columns of `S`: the number of classes."""
        return self.logits.shape[-1]

    def nll(self, targets: jax.Array) -> jax.Array:
        """Negative log-likelihood per term, `logsumexp(f) - f_t`, unweighted.

        Args:
            targets: Integer classes, `[*batch]`.

        Returns:
            `[*batch]`, float32 or wider; NaN where the class is outside `[0, C)`.

        Raises:
            ValueError: `targets` has another shape than the batch.
            TypeError: `targets` is not of an integer type.
        """
        _common.check_targets("Categorical", targets=targets, shape=self.batch_shape)
        targets = jnp.asarray(targets)
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                f"Categorical: targets have dtype {targets.dtype}, expected integer classes. "
                f"Cast class numbers to int32; use jnp.argmax for one-hot rows."
            )
        # A select, not a gather: it shards along the classes and never wraps a label of -1.
        log_p = _select(self._log_probabilities(), targets)
        # a label that is out of range has no likelihood; NaN shows it
        negative = targets < 0
        valid = ~negative & (targets < self.num_columns)
        return jnp.where(valid, -log_p, jnp.nan)

    def mean_nll(self, targets: jax.Array) -> jax.Array:
        """Weighted mean `sum(w * nll) / sum(w)`, a scalar; 0 where all weights are 0.

        Args:
            targets: Integer classes, `[*batch]`; any value where the weight is 0.
        """
        # masked at the inputs: the value of padding has no gradient, NaN included
        logits = _common.mask_out(self.logits, weights=self.weights, fill=0.0)
        targets = _common.mask_out(targets, weights=self.weights, fill=0)
        nll = self.with_natural((logits,)).nll(targets)
        return _common.weighted_mean(nll, weights=self.weights)

    def kl(self, other: "Categorical") -> jax.Array:
        """Divergence `KL(self || other) = sum_c y_c (log y_c - log y'_c)` of every term, unweighted.

        Its Hessian in the logits of either is the Fisher where the two agree. A class without
        probability here, to working precision, counts nothing; infinite where one with it is
        forbidden in `other`.

        Args:
            other: A prediction of the same terms.

        Returns:
            `[*batch]`, float32 or wider.

        Raises:
            TypeError: `other` is of another kind.
            ValueError: `other` has another shape.

        >>> even, sure = (Categorical(jnp.array([x])) for x in ([0.0, 0.0], [0.0, -jnp.inf]))
        >>> print(sure.kl(even).round(4), even.kl(sure))
        [0.6931] [inf]
        """
        _common.check_other(self, other)
        log_y = self._log_probabilities()
        log_other = other._log_probabilities()
        y = jnp.exp(log_y)
        # where nothing is counted no infinity meets another, or a zero, in gradients neither
        possible = y > 0
        mine = jnp.where(possible, log_y, 0)
        theirs = jnp.where(possible, log_other, 0)
        return jnp.sum(y * (mine - theirs), axis=-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draws integer classes `[*batch]` from the model; a constant under differentiation."""
        return jax.random.categorical(key, _common.widen(self.logits), axis=-1)

    def fisher_sqrt_column(self, c: int | jax.Array) -> tuple[jax.Array]:
        """Column `c` of `S` for every term, `sqrt(y_c) (e_c - y)`.

        Args:
            c: Column number in `[0, num_columns)`; may be traced.

        Returns:
            `([*batch, C],)` in the dtype of the logits.
        """
        log_y = self._log_probabilities()
        y = jnp.exp(log_y)
        hit = _common.unit(c, shape=(self.num_columns,))
        # 1 - y_c as the sum of the others: no cancellation for a confident model.
        others = jnp.sum(jnp.where(hit, 0, y), axis=-1, keepdims=True)
        log_of_c = jnp.sum(jnp.where(hit, log_y, 0), axis=-1, keepdims=True)
        root = jnp.exp(0.5 * log_of_c)
        difference = jnp.where(hit, others, -y)
        column = root * difference
        return (column.astype(self.logits.dtype),)

    def hessian_product(self, v: tuple[jax.Array]) -> tuple[jax.Array]:
        """Fisher times `v`, term by term and unweighted: `y * (v - <y, v>)`.

        Args:
            v: `([*batch, C],)`.

        Returns:
            `([*batch, C],)` in the dtype of the logits.
        """
        logits = _common.widen(self.logits)
        direction = _common.widen(v[0])
        y = jax.nn.softmax(logits)
        # H ignores constant shifts of v. Measured from the likeliest class, <y, v> is a sum of
        # small terms, so the product of a confident model is not rounding noise.
        likeliest = jnp.argmax(logits, axis=-1)
        direction -= _select(direction, likeliest)[..., None]
        mean = jnp.sum(y * direction, axis=-1, keepdims=True)
        product = y * (direction - mean)
        return (product.astype(self.logits.dtype),)

    def _log_probabilities(self) -> jax.Array:
        return jax.nn.log_softmax(_common.widen(self.logits))


def _select(x: jax.Array, index: jax.Array) -> jax.Array:
    """Picks `x[..., index]` from `[*batch, C]` with `[*batch]` indices; 0 if out of range."""
    classes = jnp.arange(x.shape[-1])
    chosen = classes == index[..., None]
    # all others are zero in the sum
    terms = jnp.where(chosen, x, 0)
    return jnp.sum(terms, axis=-1)
