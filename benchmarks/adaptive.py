"""Where the time of an adaptive step goes, on the deep autoencoder at batch 1000:
`python -m benchmarks.adaptive`.

Prints every kind of step of `kfac_adaptive` and the parts it is made of, timed in turns within one
run, as ratios to a step of SGD with momentum; then what a step costs on average under several
schedules.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import optax

import kfac_optax as ko
from benchmarks import networks
from benchmarks.ratios import amortised, paired, ratio, table

# Images that statistics and exact products are taken on, as in the race.
PART, MODEL_PART = 250, 125
KINDS = {
    "plain step": (False, False, False),
    "with statistics": (True, False, False),
    "with statistics and inverses": (True, True, False),
    "with a new damping": (False, False, True),
}
SCHEDULES = {
    "statistics every 5, inverses every 15": (5, 15),
    "every 5, every 20": (5, 20),
    "every 2, every 10": (2, 10),
    "every 1, every 5": (1, 5),
}
ADAPT_EVERY = 5


def _pieces(network: networks.Network) -> tuple[dict[str, Any], Callable[..., Any]]:
    params, x = network.variables["params"], network.x

    def predict(params: Any, x: jax.Array) -> Any:
        return network.apply(params, {}, x)[0]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return predict(params, x).mean_nll(x)

    fisher = ko.fisher(predict, subsample=PART)
    layers = fisher.layers(params, x)
    return {"params": params, "x": x, "layers": layers, "fisher": fisher}, loss


def _step(
    known: dict[str, Any], loss: Callable[..., Any], kind: tuple[bool, bool, bool] | None
) -> Callable[[], None]:
    """One step a call, each from where the last one ended; `kind=None`: SGD."""
    params, x, fisher = known["params"], known["x"], known["fisher"]
    if kind is None:
        tx = optax.with_extra_args_support(optax.sgd(1e-3, momentum=0.9))
    else:
        tx = ko.kfac_adaptive(known["layers"], model_subsample=MODEL_PART)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, x)
        extra: dict[str, Any] = {}
        if kind is not None:
            extra = dict(zip(("measure", "refresh", "adapt"), kind, strict=True))
            extra |= {
                "curvature": fisher.at(params, x, key=key),
                "value": value,
                "value_fn": lambda p: loss(p, x),
            }
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    carried = [jax.tree.map(lambda a: a.copy(), params), jax.jit(tx.init)(params)]
    compiled = step.lower(*carried, x, jax.random.key(0)).compile()

    def run() -> None:
        carried[:] = compiled(*carried, x, jax.random.key(0))
        jax.block_until_ready(carried)

    return run


def _parts(known: dict[str, Any], loss: Callable[..., Any]) -> dict[str, Callable[[], None]]:
    params, x, fisher, layers = known["params"], known["x"], known["fisher"], known["layers"]
    kfac = ko.kfac(layers, kl_clip=None, inverse="cholesky")
    state = jax.jit(kfac.init)(params)
    directions = params, jax.tree.map(lambda a: 0.5 * a, params)

    def precondition(state: Any, params: Any) -> Any:
        return kfac.update(params, state, params, curvature=None, refresh=False)[0]

    def products(params: Any, x: jax.Array, *directions: Any) -> Any:
        return fisher.at(params, x, key=jax.random.key(0)).quadratic_form(
            directions, subsample=MODEL_PART
        )

    calls = {
        "loss and gradient": (jax.value_and_grad(loss), params, x),
        "preconditioning": (precondition, state, params),
        "exact products, two directions": (products, params, x, *directions),
        "the loss alone": (loss, params, x),
    }

    def made(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    return {name: made(*call) for name, call in calls.items()}


def measure(network: networks.Network, rounds: int) -> dict[str, dict[str, float]]:
    """Rows of the table: every kind of step and its parts, then what a step costs on average."""
    known, loss = _pieces(network)
    calls = {"SGD": _step(known, loss, None)}
    calls |= {name: _step(known, loss, kind) for name, kind in KINDS.items()}
    calls |= _parts(known, loss)
    times = paired(calls, rounds)
    rows = {name: {"seconds": statistics.median(spent)} for name, spent in times.items()}
    plain, measured, inverted, adapted = (times[name] for name in KINDS)
    kinds = {"plain": plain, "statistics": measured, "inverses": inverted}
    for name, (every, inverse) in SCHEDULES.items():
        steady = amortised(kinds, every, inverse)
        times[name] = [
            x + (a - p) / ADAPT_EVERY for x, a, p in zip(steady, adapted, plain, strict=True)
        ]
    for name, spent in times.items():
        found = ratio(spent, times["SGD"])
        rows[name] = rows.get(name, {}) | {"/ SGD": found.median} | found.quartiles()
    return rows


def report(rounds: int) -> None:
    """Measures and prints the table."""
    print("\n".join(table(measure(networks.autoencoder(), rounds))), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    report(parser.parse_args().rounds)
