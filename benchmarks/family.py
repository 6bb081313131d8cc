"""What methods of the catalogue cost beside the same arithmetic written plainly, and with depth.

`python -m benchmarks --parts plain,depth,gate`
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfac_optax as ko
from benchmarks import networks
from benchmarks.ratios import paired, ratio
from kfac_optax._tree import tree_bytes

RATE, EVERY, EPS = 1e-3, 10, 1e-8
# gradients alone; windows as short as the test of depth can do with
OF_DEPTH = {
    "adam": optax.adam,
    "muon": optax.contrib.muon,
    **{name: getattr(ko, name) for name in ("shampoo", "distributed_shampoo", "sketchy", "jorge")},
    **{name: getattr(ko, name) for name in ("soap", "eva_s")},
    "ggt": lambda rate: ko.ggt(window=4),
    "mfac": lambda rate: ko.mfac(window=4),
    "tonga": lambda rate: ko.tonga(rank=2, block=2),
    "psgd_kron": lambda rate: ko.psgd_kron(),
    "psgd_lra": lambda rate: ko.psgd_lra(),
}


class Plain(NamedTuple):
    """Of every leaf, as `optax.contrib.muon` has it: what is kept by name, and the count."""

    count: jax.Array
    kept: Any


def _plainly(start: Callable, step: Callable) -> optax.GradientTransformation:
    """One leaf after another; `step(g, kept, due) -> (update, kept)`."""

    def init(params: Any) -> Plain:
        return Plain(jnp.zeros((), jnp.int32), jax.tree.map(start, params))

    def update(updates: Any, state: Plain, params: Any = None) -> tuple[Any, Plain]:
        leaves, treedef = jax.tree.flatten(updates)
        due = state.count % EVERY == 0
        pairs = [step(g, s, due) for g, s in zip(leaves, treedef.flatten_up_to(state.kept))]
        out, kept = zip(*pairs)
        return treedef.unflatten(out), Plain(state.count + 1, treedef.unflatten(kept))

    return optax.GradientTransformation(init, update)


def _squares(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.matmul(*pair, precision="highest") for pair in ((g, g.T), (g.T, g)))


def _between(left: jax.Array, g: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(jnp.matmul(left, g, precision="highest"), right, precision="highest")


def plain_shampoo() -> optax.GradientTransformation:
    """Sums, fourth roots in every tenth step, momentum and the rate; matrices alone."""

    def start(w: jax.Array) -> Any:
        sides = [jnp.zeros((n, n)) for n in w.shape]
        return sides, [jnp.eye(n) for n in w.shape], jnp.zeros_like(w)

    def root(h: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh(h)
        values = jnp.maximum(values, 0) + 1e-6 * values[-1]
        return jnp.matmul(vectors * values**-0.25, vectors.T, precision="highest")

    def step(g: jax.Array, kept: Any, due: jax.Array) -> tuple[jax.Array, Any]:
        sides, roots, trace = kept
        sides = [h + new for h, new in zip(sides, _squares(g))]
        roots = jax.lax.cond(due, lambda: [root(h) for h in sides], lambda: roots)
        trace = 0.9 * trace + _between(roots[0], g, roots[1])
        return -RATE * trace, (sides, roots, trace)

    return _plainly(start, step)


def plain_soap() -> optax.GradientTransformation:
    """Adam between bases that one QR step moves in every tenth step; matrices alone."""

    def start(w: jax.Array) -> Any:
        sides = [jnp.zeros((n, n)) for n in w.shape]
        return sides, [jnp.eye(n) for n in w.shape], jnp.zeros_like(w), jnp.zeros_like(w)

    def moved(h: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.linalg.qr(jnp.matmul(h, q, precision="highest"))[0]

    def step(g: jax.Array, kept: Any, due: jax.Array) -> tuple[jax.Array, Any]:
        sides, bases, mean, squares = kept
        sides = [0.95 * h + 0.05 * new for h, new in zip(sides, _squares(g))]
        left, right = bases
        mean = 0.95 * mean + 0.05 * g
        squares = 0.95 * squares + 0.05 * jnp.square(_between(left.T, g, right))
        turned = _between(left.T, mean, right) / (jnp.sqrt(squares) + EPS)
        update = -RATE * _between(left, turned, right.T)
        new = lambda: [moved(h, q) for h, q in zip(sides, bases)]
        return update, (sides, jax.lax.cond(due, new, lambda: bases), mean, squares)

    return _plainly(start, step)


def stack(depth: int, width: int) -> dict[str, jax.Array]:
    """Matrices of one shape."""
    keys = jax.random.split(jax.random.key(0), depth)
    return {f"layer_{i}": jax.random.normal(key, (width, width)) for i, key in enumerate(keys)}


def of_plain(name: str, rounds: int, small: bool) -> dict[str, float]:
    """Twenty steps of a method, over twenty of the same arithmetic leaf by leaf; what XLA counts
    in a step, factorisations apart; bytes of state.
    """
    params = stack(2, 8) if small else stack(8, 128)
    ours = {"shampoo": ko.shampoo, "soap": ko.soap}[name](RATE)
    plain = {"shampoo": plain_shampoo, "soap": plain_soap}[name]()
    sides, counts, sizes = {}, [], []
    for label, tx in (("ours", ours), ("plain", plain)):
        state = tx.init(params)
        step = jax.jit(tx.update).lower(params, state).compile()
        sides[label] = functools.partial(_run, step, params, state, 2 * EVERY)
        counts.append(step.cost_analysis()["flops"])
        sizes.append(tree_bytes(state))
    times = paired(sides, rounds)
    found = ratio(times["ours"], times["plain"])
    of_program = {"operations / plain": counts[0] / counts[1], "state / plain": sizes[0] / sizes[1]}
    return {"/ plain": found.median, **found.quartiles(), **of_program}


def _run(step: Callable, params: Any, state: Any, count: int) -> None:
    for _ in range(count):
        updates, state = step(params, state)
    jax.block_until_ready((updates, state))


def of_depth(name: str, small: bool) -> dict[str, float]:
    """Compiling the update of many equal layers, over that of a few, in seconds of all cores: what
    else runs on the machine has no part in them.
    """
    found = {}
    for depth in (2, 4) if small else (4, 64):
        params, tx = stack(depth, 16), OF_DEPTH[name](RATE)
        lowered = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)
        began = time.process_time()
        text = lowered.compile().as_text()
        found[depth] = time.process_time() - began, len(text.splitlines())
    few, many = found.values()
    return {"seconds, few": few[0], "/ few": many[0] / few[0], "lines / few": many[1] / few[1]}


def of_gate(rounds: int, small: bool) -> dict[str, float]:
    """THOR's step with a refresh that is due: of layers whose traces stay, and without a gate."""
    network = (networks.SMALL if small else networks.NETWORKS)["autoencoder"]()
    params = network.variables["params"]
    fisher = ko.fisher(lambda params, x: network.apply(params, {}, x)[0])
    layers, key = fisher.layers(params, network.x), jax.random.key(0)
    sides = {}
    for label, bound in (("gated", {}), ("ungated", {"refresh_above": 0.0, "freeze_below": 0.0})):
        tx = ko.thor(layers, **bound)

        def step(given: Any, state: Any, tx: Any = tx) -> tuple[Any, Any]:
            params, x = given
            curvature, due = fisher.at(params, x, key=key), {"measure": True, "refresh": True}
            return tx.update(params, state, params, curvature=curvature, **due)

        step, state = jax.jit(step), tx.init(params)
        for _ in range(2):  # of one batch: its trace stays, and the gate closes
            _, state = step((params, network.x), state)
        sides[label] = functools.partial(_run, step, (params, network.x), state, 1)
    times = paired(sides, rounds)
    return {"ungated / gated": ratio(times["ungated"], times["gated"]).median}
