"""Networks of real size as compiled training steps:
`python -m benchmarks.networks resnet20 autoencoder ...`.

Prints, for each network, one step of SGD and of two-level K-FAC (plain, with statistics, with
inverses as well) timed in turns, the ratio to SGD of a step amortised at the periods 10/100 and
200/2000, compile times and temporary memory.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_optax as ko
from benchmarks.ratios import KINDS, amortised, paired, ratio, table
from kfac_optax.experiments.nets_conv import ResNet
from kfac_optax.experiments.nets_dense import Autoencoder
from kfac_optax.experiments.nets_text import CharTransformer

PERIODS = ((10, 100), (200, 2000))
CLIPPED = "plain, KL-clip alone"  # without the product of the bound on the whole movement


class Network(NamedTuple):
    """A model in training mode with one batch."""

    apply: Callable[..., tuple[Any, Any]]  # (params, model_state, x) -> (likelihood, model_state)
    variables: dict[str, Any]
    x: jax.Array
    y: jax.Array
    options: dict[str, Any]  # of kfac_two_level


def _network(
    model: Any, x: jax.Array, y: jax.Array, likelihood: Callable[..., Any], **options: Any
) -> Network:
    variables = dict(jax.jit(functools.partial(model.init, train=True))(jax.random.key(1), x))
    mutable = [name for name in variables if name != "params"]

    def apply(params, model_state, x):
        out, state = model.apply({"params": params, **model_state}, x, train=True, mutable=mutable)
        return likelihood(out), state

    return Network(apply, variables, x, y, options)


def resnet(depth: int, batch: int = 128) -> Network:
    """ResNet of the two-level paper, with its factored damping and norm layers left alone."""
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    model = ResNet(depth=depth, outputs=10)
    return _network(
        model, x, jnp.arange(batch) % 10, ko.Categorical, inverse="cholesky", normalization="pass"
    )


def autoencoder(
    batch: int = 1000, pixels: int = 784, widths: tuple[int, ...] = (1000, 500, 250, 30)
) -> Network:
    """784-1000-500-250-30-250-500-1000-784."""
    x = jax.random.uniform(jax.random.key(0), (batch, pixels))
    model = Autoencoder(widths=widths, outputs=pixels)
    return _network(model, x, x, ko.Bernoulli, inverse="cholesky")


def transformer(batch: int = 16, context: int = 128) -> Network:
    """Six blocks of width 256."""
    tokens = jax.random.randint(jax.random.key(0), (batch, context), 0, 96)
    model = CharTransformer(depth=6, width=256, heads=8, outputs=96, max_context=context)
    return _network(model, tokens, tokens, ko.Categorical, inverse="cholesky", uncovered="diagonal")


# for dry runs
SMALL: dict[str, Callable[[], Network]] = {
    "resnet8": lambda: resnet(8, batch=4),
    "autoencoder": lambda: autoencoder(16, 12, (8, 3)),
}
NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet20": lambda: resnet(20),
    "resnet110": lambda: resnet(110),
    "autoencoder": autoencoder,
    "transformer": transformer,
}


class Step(NamedTuple):
    """A compiled step with its arguments."""

    call: Callable[..., Any]
    args: tuple
    trace_s: float
    compile_s: float
    bytes: int


def compiled(network: Network, **kind: Any) -> Any:
    """A step as a compiled program, as in `make_step`, that has not been given any arrays."""
    return lowered(network, **kind).compile()


def lowered(network: Network, **kind: Any) -> Any:
    """The same, before the compiler has seen it."""
    step, optimizer = _step(network, **kind)
    params, rest = network.variables["params"], _rest(network)
    opt_state = jax.eval_shape(optimizer.init, params)
    return step.lower(params, rest, opt_state, network.x, network.y, jax.random.key(2))


def make_step(network: Network, **kind: Any) -> Step:
    """`measure=None`: the traced schedule at the long periods; else a static step."""
    step, optimizer = _step(network, **kind)
    params = network.variables["params"]
    opt_state = jax.jit(optimizer.init)(params)
    args = (params, _rest(network), opt_state, network.x, network.y, jax.random.key(2))
    start = time.perf_counter()
    lowered = step.lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory = program.memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), args[:3])  # it will be donated
    return Step(program, (*own, *args[3:]), traced - start, done - traced, size)


def _rest(network: Network) -> dict[str, Any]:
    """The model's variables besides its parameters."""
    return {name: value for name, value in network.variables.items() if name != "params"}


def _step(
    network: Network,
    *,
    measure: bool | None = None,
    refresh: bool | None = None,
    sgd: bool = False,
    bound: str = "auto",
) -> tuple[Any, Any]:
    """The step, jitted, and its optimizer."""
    rate = 1e-2
    params, state = network.variables["params"], _rest(network)
    fisher = ko.fisher(lambda params, state, x: network.apply(params, state, x)[0])
    optimizer = optax.sgd(rate, momentum=0.9)
    if not sgd:
        layers = fisher.layers(params, state, network.x)
        every, inverse = PERIODS[-1]
        preconditioner = ko.kfac_two_level(
            layers,
            learning_rate=rate,
            curvature_every=every,
            inverse_every=inverse,
            bound=bound,
            **network.options,
        )
        optimizer = optax.chain(preconditioner, optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def loss(params, state, x, y):
        likelihood, state = network.apply(params, state, x)
        return likelihood.mean_nll(y), state

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, opt_state, x, y, key):
        (value, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, x, y)
        extra = {}
        if not sgd:
            # the bound takes a product in every step
            at = fisher.at(params, state, x, key=key)
            due = None if measure is None else bool(refresh)
            extra = {"curvature": at, "measure": measure, "refresh": due}
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), new_state, opt_state, value

    return step, optimizer


def runner(step: Step) -> Callable[[], None]:
    """One step a call, each from where the last one ended."""
    carried = list(step.args[:3])

    def run() -> None:
        *carried[:], _ = step.call(*carried, *step.args[3:])
        jax.block_until_ready(carried)

    return run


def measure(network: Network, rounds: int) -> dict[str, dict[str, float]]:
    """Rows of the table of one network: each kind of step, then averages over the periods."""
    steps = {"SGD": make_step(network, sgd=True)}
    steps |= {label: make_step(network, measure=m, refresh=r) for label, (m, r) in KINDS.items()}
    steps[CLIPPED] = make_step(network, measure=False, refresh=False, bound="damped")
    traced = make_step(network)
    times = paired({label: runner(step) for label, step in steps.items()}, rounds)
    rows = {label: costs(step, steps["SGD"]) for label, step in steps.items()}
    for label, spent in times.items():
        share = ratio(spent, times["SGD"])
        rows[label] = {"seconds": statistics.median(spent), "/ SGD": share.median} | rows[label]
    rows["traced schedule"] = costs(traced, steps["SGD"])
    for every, inverse in PERIODS:
        found = ratio(amortised(times, every, inverse), times["SGD"])
        rows[f"amortised {every}/{inverse}"] = {"/ SGD": found.median} | found.quartiles()
    return rows


def costs(step: Step, base: Step) -> dict[str, float]:
    return {
        "trace s": step.trace_s,
        "compile s": step.compile_s,
        "compile / SGD": step.compile_s / base.compile_s,
        "memory MB": step.bytes / 1e6,
    }


def report(name: str, rounds: int) -> None:
    """Measures one network and prints its rows of the table."""
    network = NETWORKS[name]()
    parameters = sum(np.size(x) for x in jax.tree.leaves(network.variables["params"]))
    print(f"\n{name}: {parameters:,} parameters, batch {len(network.x)}")
    print("\n".join(table(measure(network, rounds))), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", choices=[*NETWORKS])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name in arguments.networks:
        report(name, arguments.rounds)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
