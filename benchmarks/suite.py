"""The benchmarks as parts of one run."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import deep_net, networks, parts, scaling
from benchmarks.accelerator import __main__ as accelerator
from benchmarks.parts import Case
from benchmarks.ratios import KINDS, amortised, paired, ratio

ROUNDS, STEPS = 7, 20
PERIODS = (10, 100)
BATCH = 128  # examples in a step whose memory is measured


def _rounds(small: bool) -> int:
    return 2 if small else ROUNDS


def deep(small: bool) -> Iterable[Case]:
    """The 64-layer net: K-FAC and two-level K-FAC, amortised over the static schedule."""
    depth, repeat = (2, 1) if small else (deep_net.LAYERS, STEPS)
    make = functools.partial(deep_net.make_step, depth=depth)
    sgd = functools.cache(lambda: make("sgd"))

    def measure(name: str) -> dict[str, float]:
        kinds = {label: make(name, measure=m, refresh=r) for label, (m, r) in KINDS.items()}
        steps = {"SGD": sgd()} | kinds
        times = paired(
            {label: functools.partial(deep_net.run, step, repeat) for label, step in steps.items()},
            _rounds(small),
        )
        times["amortised"] = amortised(times, *PERIODS)
        found = {
            f"{label} / SGD": ratio(times[label], times["SGD"]).median
            for label in (*KINDS, "amortised")
        }
        return found | {"compile plain / SGD": kinds["plain"].compile_s / sgd().compile_s}

    for name in ("kfac", "two_level", "two_level_exact"):
        yield Case(name, functools.partial(measure, name))


def adaptive(small: bool) -> Iterable[Case]:
    """Where the time of an adaptive step goes."""
    from benchmarks import adaptive

    network = (networks.SMALL if small else networks.NETWORKS)["autoencoder"]
    return _cases(lambda: adaptive.measure(network(), _rounds(small)))


def of_networks(small: bool) -> Iterable[Case]:
    """Two-level K-FAC on networks of real size."""
    for name, network in (networks.SMALL if small else networks.NETWORKS).items():
        measure = functools.partial(networks.measure, rounds=_rounds(small))
        yield from _cases(lambda make=network, measure=measure: measure(make()), f"{name}: ")


def flops(small: bool) -> Iterable[Case]:
    """Operations of steps in the compiled program; nothing is run."""
    from benchmarks import flops

    return _cases(lambda: flops.measure(small))


def memory(small: bool) -> Iterable[Case]:
    """Temporary memory of a step with statistics beside one of SGD; nothing is run."""
    known: dict[str, Callable[[], networks.Network]] = {
        "resnet20": functools.partial(networks.resnet, 20),
        "transformer": functools.partial(networks.transformer, BATCH),
    }
    for name, make in (networks.SMALL if small else known).items():
        yield Case(name, lambda make=make: _memory(make()))


def _memory(network: networks.Network) -> dict[str, float]:
    sgd, measured = (
        networks.compiled(network, **kind).memory_analysis().temp_size_in_bytes / 1e6
        for kind in ({"sgd": True}, {"measure": True})
    )
    return {"SGD, temporary MB": sgd, "temporary MB": measured, "/ SGD": measured / sgd}


def wide(small: bool) -> Iterable[Case]:
    """Presets of low rank on a wide network, gradients as matrices and from their rows."""
    from benchmarks import wide

    sgd = functools.cache(lambda: wide.calls("sgd", False, small)["plain"])
    for name in ("kfac", "rs_kfac") if small else wide.PRESETS:
        for factored in (False, True):
            label = f"{name}, from the {'rows' if factored else 'matrix'}"
            yield Case(
                label, lambda n=name, f=factored: wide.measure(sgd(), n, f, _rounds(small), small)
            )


def scale(small: bool) -> Iterable[Case]:
    """Refresh and application by width, as ratios to the product with a dense inverse."""
    for width in (8,) if small else (256, 512, 1024, 2048):
        calls = scaling.calls(width, min(128, width // 4), min(128, width // 4))
        product = functools.cache(lambda calls=calls: scaling.time_of(calls["dense inverse"]))
        for name, call in calls.items():

            def measure(call: Any = call, product: Any = product) -> dict[str, float]:
                spent = scaling.time_of(call)
                return {"seconds": spent, "/ product": spent / product()}

            yield Case(f"{width}: {name}", measure)


def plain(small: bool) -> Iterable[Case]:
    """Steps and states beside the same arithmetic leaf by leaf."""
    from benchmarks import family

    for name in ("shampoo", "soap"):
        yield Case(name, functools.partial(family.of_plain, name, _rounds(small), small))


def depth(small: bool) -> Iterable[Case]:
    """Compiling 64 equal layers beside compiling four, of methods that need gradients alone."""
    from benchmarks import family

    for name in family.OF_DEPTH:
        yield Case(name, functools.partial(family.of_depth, name, small))


def gate(small: bool) -> Iterable[Case]:
    """A step of THOR where nothing changes, beside one without its gate."""
    from benchmarks import family

    yield Case("thor", functools.partial(family.of_gate, _rounds(small), small))


def _cases(measure: Callable[[], dict[str, dict[str, Any]]], prefix: str = "") -> Iterable[Case]:
    """The rows of a table that is measured in one go."""
    for name, row in measure().items():
        yield Case(prefix + name, lambda row=row: row)


PARTS: dict[str, parts.Part] = {
    "deep_net": deep,
    "networks": of_networks,
    "adaptive": adaptive,
    "wide": wide,
    "scaling": scale,
    "flops": flops,
    "memory": memory,
    "compile": accelerator.PARTS["compile"],
    "plain": plain,
    "depth": depth,
    "gate": gate,
}
