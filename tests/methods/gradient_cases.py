"""What the tests of Shampoo and its relatives share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_optax as ko


def scale_by_eva_s(inverse_every=1, **words):
    """Nothing is factorised, so there is no period."""
    del inverse_every
    return ko.scale_by_eva_s(**words)


def scale_by_sketchy(inverse_every=1, **words):
    """A sketch is made of every gradient."""
    del inverse_every
    return ko.scale_by_sketchy(rank=2, **words)


def scale_by_tnt(**words):
    """The gradient itself stands for one example at a sampled label."""
    tx = ko.scale_by_tnt(damping=0.1, **words)

    def update(updates, state, params=None, **extra):
        return tx.update(updates, state, params, sampled_grads=jax.tree.map(one, updates), **extra)

    def one(leaf):
        return leaf[None]

    return optax.GradientTransformationExtraArgs(tx.init, update)


SCALE_BY = {
    "shampoo": ko.scale_by_shampoo,
    "distributed_shampoo": functools.partial(
        ko.scale_by_distributed_shampoo, start_step=1, inverse="eigh"
    ),
    "sketchy": scale_by_sketchy,
    "jorge": ko.scale_by_jorge,
    "tnt": scale_by_tnt,
    "soap": ko.scale_by_soap,
    "eva_s": scale_by_eva_s,
}


def draws(seed, *shape, steps=5):
    return np.random.default_rng(seed).normal(size=(steps, *shape))


def run(tx, gradients, params=None):
    """Updates for a list of gradient trees, and the last state; one compiled step."""
    return _run(tx, jax.jit(tx.update), gradients, params)


def run_of_two(name, gradients):
    """`run` of the relative with this name and a period of two, whose step is compiled once for
    all tests with leaves of the same shapes.
    """
    return _run(*_of_two(name), gradients, None)


@functools.cache
def _of_two(name):
    tx = SCALE_BY[name](inverse_every=2)
    return tx, jax.jit(tx.update)


def _run(tx, step, gradients, params):
    first = jax.tree.map(jnp.asarray, gradients[0])
    params = first if params is None else params
    state = tx.init(params)
    out = []
    for gradient in gradients:
        update, state = step(jax.tree.map(jnp.asarray, gradient), state, params)
        out.append(update)
    return out, state


def tree_of_all_kinds(seed=0, dtype=jnp.float32):
    """A scalar, a vector, a dense kernel, a convolution, an embedding and an empty leaf."""
    shapes = {
        "conv": (2, 2, 3, 4),
        "dense": (3, 4),
        "embedding": (11, 4),
        "empty": (0, 4),
        "scalar": (),
        "vector": (5,),
    }
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}


@functools.cache
def small_problem():
    """A regression by a net of two layers, with badly scaled inputs."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 6)) * np.logspace(0, -1.5, 6), jnp.float32)
    target = jnp.tanh(x @ jnp.asarray(rng.normal(size=(6, 3)) * 3, jnp.float32))
    params = {
        "first": jnp.asarray(rng.normal(size=(6, 8)) / 3, jnp.float32),
        "last": jnp.asarray(rng.normal(size=(8, 3)) / 3, jnp.float32),
        "shift": jnp.zeros(3),
    }

    def loss(params):
        hidden = jnp.tanh(x @ params["first"])
        return jnp.mean(jnp.square(hidden @ params["last"] + params["shift"] - target))

    return loss, params


def final_loss(tx, steps=150):
    """Loss after some steps, in one scan."""
    loss, params = small_problem()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return loss(jax.lax.scan(step, (params, tx.init(params)), None, steps)[0][0])

    return float(train(params))
