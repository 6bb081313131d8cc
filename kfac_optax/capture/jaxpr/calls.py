"""Equations that contain others: calls that are entered, scans, and rules that are not."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core as jex

# Calls that run their body once with the operands in order.
_CALLS = frozenset(
    ["jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call", "eval_jaxpr"]
)
# Names of a call's body among its parameters.
BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Calls whose derivative is a rule of their own, so what happens inside says nothing about it: they
# are never entered.
RULES = {
    "custom_jvp_call": "custom_jvp",
    "custom_vjp_call": "custom_vjp",
    "custom_vjp_call_jaxpr": "custom_vjp",
    "custom_linear_solve": "custom_linear_solve",
    "call_hi_primitive": "custom_rule",  # from JAX 0.12 on, custom_root for one
}


def bodies(eqn: Any) -> list[Any]:
    """Jaxprs an equation contains."""
    return list(jex.jaxprs_in_params(eqn.params))


def jaxprs_inside(jaxpr: Any) -> Iterator[Any]:
    """Jaxprs that the equations of a jaxpr contain, but not what is inside those."""
    for eqn in jaxpr.eqns:
        for body in bodies(eqn):
            # closed jaxprs bring their constants along
            yield getattr(body, "jaxpr", body)


def has_rule_back_only(jaxpr: Any) -> bool:
    """Whether a linear function, traced, has a part that a rule for the way back alone has made."""
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    return "custom_lin" in names or any(map(has_rule_back_only, jaxprs_inside(jaxpr)))


def own_rule(eqn: Any) -> str | None:
    """Which derivative rule of its own an equation has, by the name of what it was made from; else
    `None`.
    """
    word = RULES.get(eqn.primitive.name)
    if word is not None and "_prim" in eqn.params:
        return f"{word} `{type(eqn.params['_prim']).__name__}`"
    inner = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
    if word is None or inner is None:
        return word
    # closed or not
    jaxpr = getattr(inner, "jaxpr", inner)
    name = getattr(jaxpr.debug_info, "func_name", "")
    return f"{word} `{name}`" if name else word


def is_rule(consumer: str) -> bool:
    """Whether a consumer, as named in an `Analysis`, is a call with its own derivative rule."""
    return consumer.partition(" ")[0] in RULES.values()


def call_body(eqn: Any) -> Any | None:
    """The closed body of an equation that runs it once (`jit`, `remat`), else `None`."""
    if eqn.primitive.name not in _CALLS:
        return None
    # by the kind of call
    name = next(name for name in BODIES if name in eqn.params)
    return _closed(eqn.params[name])


def _closed(body: Any) -> Any:
    return body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, [])


class ScanBody(NamedTuple):
    """A scan's closed body and how its operands divide: `constants`, then `carried`, then scanned
    over.
    """

    body: Any
    constants: int
    carried: int


def scan_body(eqn: Any) -> ScanBody:
    """Layout of a scan equation; JAX 0.11 replaced two counts by one tree of operands."""
    body = _closed(eqn.params["jaxpr"])
    if "num_consts" in eqn.params:
        return ScanBody(body, eqn.params["num_consts"], eqn.params["num_carry"])
    constants, carried, _ = map(len, eqn.params["ft_in"].unpack())
    return ScanBody(body, constants, carried)
