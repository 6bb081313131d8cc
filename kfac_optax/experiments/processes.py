"""One run in several processes, each with its share of every batch.

    python -m kfac_optax.experiments.processes --processes=4 --steps=40 --out=results/processes

starts four processes on this machine and watches them: where one dies the others are ended, and the
same command goes on with the last checkpoint. On several machines give each process its own command,
with `--coordinator=HOST:PORT --processes=4 --process_id=0` up to 3.
"""

import argparse
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_optax as ko
from kfac_optax.experiments import data, folder, results
from kfac_optax.experiments.nets_dense import LinearMLP

EXAMPLES, FEATURES, OUTPUTS = 48, 6, 4
_SILENT = 20  # seconds without a sign of life after which a process counts as dead
_KILLED = 10.0  # seconds that processes have to end after SIGTERM


class Training(NamedTuple):
    """What training consists of; `step(params, state, x, y) -> (params, state, loss)`."""

    init: Callable[[], tuple[Any, Any]]
    step: Callable[..., tuple[Any, Any, jax.Array]]
    tx: Any
    layers: ko.Layers
    batch: data.Dataset


@functools.cache  # what goes on in the same process compiles nothing anew
def training() -> Training:
    """A deep linear network with batch normalization, trained by two-level K-FAC: all processes
    have the same.
    """
    model = LinearMLP(depth=3, width=6, outputs=OUTPUTS)
    batch = data.planted_linear(
        jax.random.key(0), train=EXAMPLES, test=0, features=FEATURES, target_dim=OUTPUTS
    )
    # compiled once, the same in every process
    variables = jax.jit(lambda: model.init(jax.random.key(1), batch.train_x, train=False))()
    statistics = variables["batch_stats"]

    # batch statistics of the batch, over all processes
    def predict(params: Any, x: jax.Array) -> ko.Bernoulli:
        variables = {"params": params, "batch_stats": statistics}
        logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return ko.Bernoulli(logits)

    estimator = ko.ggn(predict)
    layers = estimator.layers(variables["params"], batch.train_x)
    tx = optax.chain(
        ko.kfac_two_level(
            layers, learning_rate=0.05, damping=0.1, curvature_every=2, inverse_every=4
        ),
        optax.sgd(0.05, momentum=0.9),
    )

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        # XLA sums over processes, as the batch is sharded
        loss, grads = jax.value_and_grad(lambda p: predict(p, x).mean_nll(y))(params)
        updates, state = tx.update(grads, state, params, curvature=estimator.at(params, x))
        return optax.apply_updates(params, updates), state, loss

    def init() -> tuple[Any, Any]:
        return variables["params"], tx.init(variables["params"])

    return Training(init, step, tx, layers, batch)


def train(out: Path, *, steps: int, save_every: int, die_at: int | None = None) -> list[float]:
    """Trains on all devices of all processes, from the last checkpoint on.

    Args:
        out: directory of the checkpoints and of `losses.json`, seen by all processes.
        steps: of the whole run.
        save_every: steps from one checkpoint to the next.
        die_at: the last process kills itself before this step.

    Returns:
        The losses of the steps that were made here.
    """
    # every device of every process on one axis
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    parts = training()
    x, y = (_split(array, mesh) for array in (parts.batch.train_x, parts.batch.train_y))
    # results that every process has whole
    step = jax.jit(parts.step, out_shardings=replicated)
    manager = ocp.CheckpointManager(
        out.absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=save_every),
    )
    # from the last checkpoint, or from the start
    first, params, state = _start(parts, manager, replicated)
    losses: list[float] = []
    for i in range(first, steps):
        # an exercise: one process dies without a word
        if i == die_at and jax.process_index() == jax.process_count() - 1:
            manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
        # most steps are not saved: nothing is described for them
        if manager.should_save(i + 1):
            manager.save(i + 1, args=_saved(parts, params, state))
    manager.close()
    if jax.process_index() == 0:
        results.write_json(out / "losses.json", {"first": first, "losses": losses})
    return losses


def _split(array: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """An array over all devices, of which every process makes its own rows."""
    host = np.asarray(array)
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    # from host memory only rows of this process are taken
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _saved(parts: Training, params: Any, state: Any) -> Any:
    description = ko.describe_state(state, params, parts.layers)
    return ocp.args.Composite(
        run=ocp.args.StandardSave({"params": params, "opt_state": state}),
        description=ocp.args.JsonSave(description),
    )


def _start(parts: Training, manager: Any, replicated: Any) -> tuple[int, Any, Any]:
    """The step to begin with, parameters and state: those of the last checkpoint, if any."""
    last = manager.latest_step()
    if last is None:
        params, state = jax.jit(parts.init, out_shardings=replicated)()
        return 0, params, state
    # types and shardings to read into, without making any values
    params, state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(parts.init),
    )
    words = ocp.args.Composite(description=ocp.args.JsonRestore())
    found = manager.restore(last, args=words).description
    # refused before arrays are read that would not fit
    ko.check_state(found, parts.tx, params, parts.layers)
    target = ocp.args.StandardRestore({"params": params, "opt_state": state})
    run = manager.restore(last, args=ocp.args.Composite(run=target)).run
    return last, run["params"], run["opt_state"]


def launch(commands: Sequence[Sequence[str]], say: Callable[[str], None]) -> int:
    """Runs one process for every command until all have ended, or one has died.

    Args:
        commands: with their arguments.
        say: is told which process died, and how.

    Returns:
        0, or 1 where a process died; the others are ended then.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        # until all have ended, or one has failed
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break
            time.sleep(0.1)
        # read before the others are ended: these have not died by themselves
        codes = [process.poll() for process in running]
    finally:
        _end(running)
    # minus the signal
    killed = {i: code for i, code in enumerate(codes) if code and code < 0}
    # an exit code beside a signal is a process that has lost its partner
    dead = killed or {i: code for i, code in enumerate(codes) if code}
    for i, code in dead.items():
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        say(f"process {i} of {len(running)} {how}; the others were ended")
    if dead:
        say("the same command goes on with the last checkpoint")
    return 1 if dead else 0


def _end(running: Sequence[subprocess.Popen]) -> None:
    # all are asked before one is waited for
    for process in running:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _KILLED
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # it waits for the dead one inside a collective
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        # a port that was free a moment ago
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AsWritten)
    add = parser.add_argument
    add("--processes", type=int, default=4, help="that share every batch")
    # words and their defaults
    add("--steps", type=int, default=40, help="of the whole run")
    add("--save_every", type=int, default=10, help="steps from one checkpoint to the next")
    add("--out", default="results/processes", help="directory that all processes see")
    add("--coordinator", help="HOST:PORT of process 0; none starts the processes on this machine")
    add("--process_id", type=int, help="number of this process, with --coordinator; default 0")
    add("--die_at", type=int, help="the last process kills itself before this step: an exercise")
    options = parser.parse_args(words)
    for name in ("processes", "steps", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}; expected at least 1")
    number = options.process_id
    if number is not None and options.coordinator is None:
        parser.error(
            f"--process_id={number} without --coordinator, which starts all processes on this "
            "machine; leave it out, or say where process 0 is"
        )
    if number is not None and not 0 <= number < options.processes:
        parser.error(
            f"--process_id={number} of --processes={options.processes}; expected one from 0 to "
            f"{options.processes - 1}"
        )
    return options


_AsWritten = argparse.RawDescriptionHelpFormatter


def main(words: Sequence[str] | None = None) -> int:
    """Starts the processes, or is one of them; returns the exit code."""
    logging.set_verbosity(logging.ERROR)
    options = _options(words)
    if options.coordinator is not None:
        return _one_of_them(options)
    with folder.writing(Path(options.out)):
        Path(options.out).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kfac_optax.experiments.processes"]
    given = vars(options) | {"coordinator": f"localhost:{_free_port()}"}
    command += [f"--{name}={value}" for name, value in given.items() if value is not None]
    commands = [[*command, f"--process_id={i}"] for i in range(options.processes)]
    return launch(commands, lambda line: print(line, file=sys.stderr))


def _one_of_them(options: argparse.Namespace) -> int:
    number = options.process_id or 0
    # blocks until all processes are there
    jax.distributed.initialize(
        options.coordinator,
        num_processes=options.processes,
        process_id=number,
        heartbeat_timeout_seconds=_SILENT,
        shutdown_timeout_seconds=_SILENT,
    )
    out = Path(options.out)
    try:
        train(out, steps=options.steps, save_every=options.save_every, die_at=options.die_at)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(
            f"process {number}: a computation of all processes failed ({reason}). If "
            "another process has died, start all of them again: they go on with the last "
            "checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an ordinary end would wait for the dead one
    # one process speaks for all
    if number == 0:
        print((out / "losses.json").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
