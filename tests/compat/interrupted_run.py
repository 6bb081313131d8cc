"""A run that dies while it saves, and one that goes on with it on two devices.

`test_checkpoints.py` runs it in a process of its own:
`python -m tests.compat.interrupted_run DIRECTORY`.
"""

import os
import pathlib
import signal
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from tests import helpers as h

KEPT, LOST = 3, 5  # steps with a checkpoint: a whole one, and one that the process dies in


def transformation() -> Any:
    return h.make_tx("kfac_two_level", h.plain_problem())


def compiled_step() -> Any:
    return jax.jit(h.make_step(transformation(), h.plain_problem()))


def start() -> tuple[Any, Any]:
    params = h.plain_params()
    return params, jax.jit(transformation().init)(params)


def arguments(params: Any, state: Any) -> Any:
    """What a checkpoint consists of: parameters and state, and their description."""
    return ocp.args.Composite(
        run=ocp.args.StandardSave({"params": params, "opt_state": state}),
        description=ocp.args.JsonSave(
            ko.describe_state(state, params, layers=h.plain_problem().layers)
        ),
    )


def restore(manager: Any, step: int, shapes: Any) -> Any:
    """Parameters and state, laid out as `shapes` say, after the description was found to fit."""
    found = manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
    ko.check_state(
        found.description, transformation(), shapes["params"], layers=h.plain_problem().layers
    )
    run = ocp.args.Composite(run=ocp.args.StandardRestore(shapes))
    return manager.restore(step, args=run).run


def shapes_of_a_run() -> Any:
    tx = transformation()
    return jax.eval_shape(lambda p: {"params": p, "opt_state": tx.init(p)}, h.plain_params())


def die_in_the_rename(target: pathlib.Path) -> None:
    """Ends this process, as `kill -9` does, when all files are written but not yet named."""
    rename = os.rename

    def hooked(source: Any, destination: Any) -> None:
        if pathlib.Path(destination) == target:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, destination)

    os.rename = hooked


def on_two_devices(directory: pathlib.Path, manager: Any) -> None:
    """Restores onto two devices, with matrices split over them where that is possible."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def sharded(leaf: Any) -> Any:
        split = leaf.ndim > 1 and leaf.shape[0] % 2 == 0
        sharding = NamedSharding(mesh, P("data") if split else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.tree.map(sharded, shapes_of_a_run())
    found = restore(manager, KEPT, shapes)
    for leaf, shape in zip(jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert not found["params"]["first"]["w"].sharding.is_fully_replicated
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "of_two_devices", found)


def main(directory: pathlib.Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    step, (params, state) = compiled_step(), start()
    manager = ocp.CheckpointManager(directory / "steps")  # saves in the background
    for i in range(1, LOST + 1):
        params, state, _ = step(params, state)
        if i == KEPT:
            manager.save(i, args=arguments(params, state))
            manager.wait_until_finished()
            on_two_devices(directory, manager)
        if i == LOST:
            die_in_the_rename(directory / "steps" / str(LOST))
            manager.save(i, args=arguments(params, state))
    manager.wait_until_finished()
    print("still alive")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
