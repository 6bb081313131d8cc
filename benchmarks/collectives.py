"""Number and bytes of the collectives in a compiled step of K-FAC on eight simulated devices, for
every strategy: `python -m benchmarks.collectives`.

Bytes are those that one device sends if rings carry them, as `kfac_optax.planner` predicts.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from kfac_optax.planner import Shape, costs

DEVICES, EXAMPLES = 8, 16
SHAPES = (Shape(6, 24, 24), Shape(1, 25, 8))
BYTES = {"f32": 4, "s32": 4, "f64": 8, "bf16": 2, "pred": 1, "u32": 4}
KINDS = ("plain", "statistics", "refresh")
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)"
    r"(?:-start)?\((?P<rest>.*)$",
    re.MULTILINE,
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Count(NamedTuple):
    """Collectives of a program, and the bytes that one device sends in them."""

    number: int
    sent: float


def count(text: str) -> Count:
    """Counts the collectives in the text of a compiled program."""
    number, sent = 0, 0.0
    for match in _COLLECTIVE.finditer(text):
        size, devices = _bytes(match["result"]), _group_size(match["rest"])
        ring = (devices - 1) / devices
        factor = {"all-reduce": 2 * ring, "reduce-scatter": devices - 1, "collective-permute": 1}
        number, sent = number + 1, sent + factor.get(match["kind"], ring) * size
    return Count(number, sent)


def always(text: str) -> str:
    """The part of a program that runs in every step; branches stand before it."""
    return text[text.index("\nENTRY") :]


def _bytes(result: str) -> int:
    total = 0
    for dtype, dims in _ARRAY.findall(result):
        size = BYTES[dtype]
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def _group_size(rest: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return int(counted[1]) if counted else DEVICES


def predict(params, x):
    """Layers of the shapes above, one after another; the last has a bias."""
    for w in params["w"]:
        x = jnp.tanh(ko.tap_dense(x @ w, x, w))
    w, b = params["last"]
    return ko.Normal(ko.tap_dense(x @ w + b, x, w, b))


def problem():
    deep, wide = SHAPES[0].copies, SHAPES[0].p
    keys = jax.random.split(jax.random.key(0), deep + 2)
    params = {
        "w": [jax.random.normal(key, (wide, wide)) / 5 for key in keys[:deep]],
        "last": (jax.random.normal(keys[-2], (wide, SHAPES[1].q)), jnp.zeros(SHAPES[1].q)),
    }
    return params, jax.random.normal(keys[-1], (EXAMPLES, wide))


def compiled(fraction: float | None, kind: str, **words: Any) -> str:
    """The text of `traced`, compiled."""
    return traced(fraction, kind, **words).lower().compile().as_text()


def traced(fraction: float | None, kind: str, **words: Any) -> Any:
    """The program of one kind of step inside `shard_map`, on gradients that are averaged already."""
    params, x = problem()
    estimator = ko.ggn(predict)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    placement = None if fraction is None else ko.Placement("data", fraction, mesh, **words)
    layers = estimator.layers(params, x)
    tx = ko.kfac(layers, kl_clip=None, axis_name="data", placement=placement)

    def step(state, grads, x):
        curvature = estimator.at(grads, x) if kind == "statistics" else None
        return tx.update(grads, state, grads, curvature=curvature, refresh=kind == "refresh")

    specs = jax.tree.map(
        lambda s: s.spec, ko.state_shardings(tx, params, mesh=mesh, placement=placement)
    )
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, P(), P("data")), out_specs=(P(), specs), check_vma=False
    )
    state = jax.eval_shape(tx.init, params)
    return jax.jit(mapped).trace(state, params, x)


def predicted(fraction: float | None, kind: str, **words: Any) -> float:
    """What the planner's formulas say of one kind of step."""
    found = costs(SHAPES, DEVICES, fraction, **words)
    refresh = found.refresh + found.step
    return {"plain": found.step, "statistics": found.statistics + found.step}.get(kind, refresh)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    row = "{:>21} {:>10} {:>11} {:>10} {:>15}"
    print(row.format("worker fraction", "step", "collectives", "sent/byte", "predicted/byte"))
    for fraction in (None, 1.0, 0.5, 0.25, 0.0):
        for kind in KINDS:
            number, sent = count(compiled(fraction, kind))
            said = predicted(fraction, kind)
            print(row.format(str(fraction), kind, number, f"{sent:.0f}", f"{said:.0f}"))
    number, sent = count(compiled(1.0, "statistics", packed=True))
    said = predicted(1.0, "statistics", packed=True)
    print(row.format("1.0, packed", "statistics", number, f"{sent:.0f}", f"{said:.0f}"))
    for bits in (16, 8):
        # where the bits suffice, and where they do not
        text = compiled(1.0, "statistics", statistics_bits=bits)
        said = predicted(1.0, "statistics", statistics_bits=bits)
        more = predicted(1.0, "statistics", packed=True)
        for name, part, bytes_said in (
            (f"{bits} bits", always(text), said),
            (f"{bits} and all", text, said + more),
        ):
            number, sent = count(part)
            row_of = (f"1.0, {name}", "statistics", number, f"{sent:.0f}", f"{bytes_said:.0f}")
            print(row.format(*row_of))
    for words in ({"statistics": "scattered"}, {"statistics": "scattered", "packed": True}):
        number, sent = count(compiled(0.0, "statistics", **words))
        said = predicted(0.0, "statistics", **words)
        name = "0.0, scattered" + (" packed" if "packed" in words else "")
        print(row.format(name, "statistics", number, f"{sent:.0f}", f"{said:.0f}"))
    number, sent = count(compiled(0.0, "statistics", statistics="local"))
    said = predicted(0.0, "statistics", statistics="local")
    print(row.format("0.0, local", "statistics", number, f"{sent:.0f}", f"{said:.0f}"))


if __name__ == "__main__":
    main()
