"""Dense references: everything the library never forms, formed here from first principles.

The model is a plain stack `s_i = a_{i-1} W_i (+ b_i)`, `a_i = tanh(s_i)`, evaluated one example at
a time; rows come from derivatives with respect to additive shifts of the pre-activations, not from
probes. Canonical matrices are `[p, q]` and raveled row by row, so a Kronecker block is
`kron(A, G)`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import kfac_optax as ko
from kfac_optax._tree import gather, make_buckets, named_leaves, replace_leaves, scatter
from kfac_optax.engine.choice import blocks_of
from kfac_optax.estimators.plan import Plan


def plan(layers, coupling=None, dtype=jnp.float64, block=None):
    """What to measure: every layer with the block it gets by default, or with `block` where that
    fits.
    """
    block_of = blocks_of(ko.kronecker() if block is None else block)
    return Plan(tuple(layers), tuple(map(block_of, layers)), coupling, dtype)


def make_params(seed, sizes, bias=True):
    """Random parameters; NumPy draws them, so nothing is compiled for it."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, (p, q) in enumerate(itertools.pairwise(sizes)):
        params[f"layer{i}"] = {"kernel": jnp.asarray(rng.normal(size=(p, q)) / np.sqrt(p))}
        if bias:
            params[f"layer{i}"]["bias"] = jnp.asarray(0.3 * rng.normal(size=q))
    return params


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def forward(params, x, shifts=None, activation=jnp.tanh, tapped=True):
    """Works on a batch `[N, d]` and on one example `[d]`; `shifts[i]` is added to pre-activation i."""
    inputs = []
    for i, layer in enumerate(params.values()):
        inputs.append(x)
        s = x @ layer["kernel"] + layer.get("bias", 0.0)
        if tapped:
            s = ko.tap_dense(s, x, layer["kernel"], layer.get("bias"))
        s = s if shifts is None else s + shifts[i]
        x = activation(s) if i < len(params) - 1 else s
    return x, inputs


def classifier(params, x, weights=None):
    """The stack with one logit for each class."""
    return ko.Categorical(forward(params, x)[0], weights=weights)


def regressor(params, x, activation=jnp.tanh):
    """The stack with means of unit variance."""
    return ko.Normal(forward(params, x, activation=activation)[0])


def matrix_of(apply, p, q):
    """Matrix of a linear map of `[p, q]` matrices, row by row."""
    eye = jnp.eye(p * q).reshape(-1, p, q)
    return np.asarray(jax.vmap(apply)(eye)).reshape(p * q, p * q).T


def per_example(params, x, seeds, activation=jnp.tanh):
    """Rows of every layer: `a_i [N, p]` with the trailing one, `g_i [C, N, q]` for output seeds
    `[C, N, out]`.
    """
    bias = "bias" in next(iter(params.values()))

    def one(example, seed):
        shifts = [jnp.zeros(layer["kernel"].shape[1], x.dtype) for layer in params.values()]

        def scalar(shifts):
            return jnp.vdot(forward(params, example, shifts, activation, tapped=False)[0], seed)

        _, inputs = forward(params, example, None, activation, tapped=False)
        return inputs, jax.grad(scalar)(shifts)

    def column(seed):
        return jax.vmap(one)(x, seed)

    inputs, g = jax.jit(jax.vmap(column))(seeds)
    a = [i[0] for i in inputs]
    if bias:
        a = [jnp.concatenate([i, jnp.ones((len(i), 1), i.dtype)], 1) for i in a]
    return [np.asarray(i) for i in a], [np.asarray(i) for i in g]


def cross_factors(a, g):
    """`A_ij = E[a_i a_j^T]`, `G_ij = (1/N) sum_b sum_c g_i g_j^T` for all pairs."""
    n = len(a[0])
    cross_a = [[ai.T @ aj / n for aj in a] for ai in a]
    cross_g = [[np.einsum("cni,cnj->ij", gi, gj) / n for gj in g] for gi in g]
    return cross_a, cross_g


def kronecker_fisher(a, g):
    """The Kronecker surrogate of the whole Fisher, cross blocks included."""
    cross_a, cross_g = cross_factors(a, g)
    n = len(a)
    return np.block([[np.kron(cross_a[i][j], cross_g[i][j]) for j in range(n)] for i in range(n)])


def exact_fisher(a, g):
    """`(1/N) sum_b sum_c vec(D) vec(D)^T` with `D` the gradients of all layers together."""
    rows = [
        np.einsum("np,cnq->cnpq", ai, gi).reshape(g[0].shape[0], len(ai), -1)
        for ai, gi in zip(a, g)
    ]
    stacked = np.concatenate(rows, -1)
    return np.einsum("cni,cnj->ij", stacked, stacked) / len(a[0])


def block_sizes(a, g):
    return [ai.shape[1] * gi.shape[2] for ai, gi in zip(a, g)]


def restriction(sizes):
    """`Z`: one row of ones per layer."""
    z = np.zeros((len(sizes), sum(sizes)))
    start = 0
    for i, n in enumerate(sizes):
        z[i, start : start + n] = 1
        start += n
    return z


def block_diagonal(matrix, sizes):
    out, start = np.zeros_like(matrix), 0
    for n in sizes:
        out[start : start + n, start : start + n] = matrix[start : start + n, start : start + n]
        start += n
    return out


def factored_tikhonov(a, g, damping):
    """Block-diagonal of `(A + pi sqrt(damping) I) (x) (G + sqrt(damping)/pi I)`."""
    blocks = []
    for ai, gi in zip(a, g):
        big_a, big_g = ai.T @ ai / len(ai), np.einsum("cni,cnj->ij", gi, gi) / len(ai)
        pi = np.sqrt((np.trace(big_a) / len(big_a)) / (np.trace(big_g) / len(big_g)))
        root = np.sqrt(damping)
        blocks.append(
            np.kron(big_a + pi * root * np.eye(len(big_a)), big_g + root / pi * np.eye(len(big_g)))
        )
    sizes = [len(b) for b in blocks]
    out, start = np.zeros((sum(sizes), sum(sizes))), 0
    for n, block in zip(sizes, blocks):
        out[start : start + n, start : start + n] = block
        start += n
    return out


def flatten(tree):
    """Canonical matrices of all layers, raveled and joined: kernel rows, then the bias row."""
    parts = []
    for layer in tree.values():
        parts.append(np.ravel(layer["kernel"]))
        if "bias" in layer:
            parts.append(np.ravel(layer["bias"]))
    return np.concatenate(parts)


def two_level(fine, coarse_fisher, z, gradient, damping, coarse_damping=None):
    """`fine^{-1} V + Z^T (F_c + damping)^{-1} Z V`; `coarse_damping` a diagonal, default
    `damping I`.
    """
    diagonal = damping * np.ones(len(z)) if coarse_damping is None else coarse_damping
    correction = z.T @ np.linalg.solve(coarse_fisher + np.diag(diagonal), z @ gradient)
    return np.linalg.solve(fine, gradient) + correction


def clip(update, gradient, sizes, learning_rate, kl_clip):
    total, start = 0.0, 0
    for n in sizes:
        total += abs(update[start : start + n] @ gradient[start : start + n])
        start += n
    return min(1.0, np.sqrt(kl_clip / (learning_rate**2 * total))) * update


def softmax_columns(logits):
    """Columns of `S = diag(sqrt y) - y sqrt(y)^T`, `[C, N, C]`."""
    y = np.asarray(jax.nn.softmax(logits))
    s = np.einsum("nc,cd->ncd", np.sqrt(y), np.eye(y.shape[1])) - np.einsum(
        "nd,nc->ndc", y, np.sqrt(y)
    ).transpose(0, 2, 1)
    return s.transpose(1, 0, 2)


def dense_block(estimator, params, args, layer):
    """The curvature's diagonal block of one layer, in canonical order, column by column."""
    leaves, (bucket,) = named_leaves(params), make_buckets([layer])
    p, q = layer.shape
    zeros = {name: jnp.zeros_like(x) for name, x in leaves.items()}

    @jax.jit
    def column(k):
        v = jnp.zeros((layer.copies * p * q,)).at[k].set(1.0).reshape(layer.copies, p, q)
        vector = replace_leaves(params, zeros | scatter(bucket, v, zeros))
        product = named_leaves(estimator.vector_product(params, vector, *args))
        return gather(bucket, product, jnp.float64).ravel()

    return np.stack([column(k) for k in range(layer.copies * p * q)])


def tree_matrix(apply, params):
    """Matrix of a linear map of trees like the parameters, in the order of `flatten`."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    eye = jax.vmap(unravel)(jnp.eye(len(flat)))
    columns = jax.jit(jax.vmap(apply))(eye)

    def rows(stack):
        return [
            flatten(jax.tree.map(lambda x, i=i: np.asarray(x[i]), stack)) for i in range(len(flat))
        ]

    # column j of the result belongs to the unit vector that `flatten` puts at j
    order = [int(np.argmax(row)) for row in rows(eye)]
    matrix = np.empty((len(flat), len(flat)))
    matrix[:, order] = np.stack(rows(columns), 1)
    return matrix
