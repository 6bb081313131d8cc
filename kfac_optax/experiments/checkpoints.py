"""The state of an unfinished run in one file, from which it goes on to the same numbers."""

import contextlib
import io
import json
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging


class Position(NamedTuple):
    """How far a run has come.

    Attributes:
        rows: the metrics so far, each row as a list of numbers that begins with the epoch.
        step: mini-batches of the epoch in hand that are done.
        seconds: training time since the last row.
    """

    rows: Sequence[Sequence[float]] = ()
    step: int = 0
    seconds: float = 0.0


class Store:
    """Where a run keeps its checkpoint, and how often it writes one."""

    def __init__(self, path: Path, settings: dict[str, Any], *, epochs: int, seconds: float):
        """Sets up a store; nothing is read or written yet.

        Args:
            path: of the file; the directory exists.
            settings: of the run; a file with other settings is not used.
            epochs: a checkpoint after every so many epochs, 0 for none.
            seconds: a checkpoint once so many seconds have passed since the last, 0 for none.
        """
        self.path, self._settings = path, settings
        self._epochs, self._seconds = epochs, seconds
        self._written = time.monotonic()

    def due(self, position: Position) -> bool:
        """Whether a run that has come to `position` should be kept now."""
        epoch = round(position.rows[-1][0]) if position.rows else 0
        ended = position.step == 0 and self._epochs > 0 and epoch % self._epochs == 0
        return ended or 0 < self._seconds <= time.monotonic() - self._written

    def write(self, position: Position, state: Any) -> None:
        """Writes a checkpoint in one move: a reader finds this one or the one before it.

        Where that fails, on a full disk for example, training goes on with the one before it.
        """
        arrays: dict[str, Any] = {
            f"leaf_{i}": _to_numpy(leaf) for i, leaf in enumerate(jax.tree.leaves(state))
        }
        header = {
            "settings": self._settings,
            "jax": jax.__version__,
            "position": position._asdict(),
        }
        # also where it fails: not again in every step
        self._written = time.monotonic()
        draft = self.path.with_suffix(".tmp")
        try:
            with open(draft, "wb") as file:
                np.savez(file, header=np.array(json.dumps(header)), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        except OSError as error:
            logging.warning(
                "%s: not written (%s), training goes on without it", self.path, error.strerror
            )
            with contextlib.suppress(OSError):
                draft.unlink()

    def read(self, like: Any) -> tuple[Position, Any] | None:
        """Reads the checkpoint of this run.

        Args:
            like: a state of the run, for its structure, shapes and types.

        Returns:
            The position and the state; None if there is no file, or one that this run cannot use.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return self._decode(content, like)
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError) as error:
            logging.warning("%s: not used, the run starts anew: %s", self.path, error)
            return None

    def remove(self) -> None:
        """Removes the file, as a finished run does."""
        for path in (self.path, self.path.with_suffix(".tmp")):
            with contextlib.suppress(OSError):  # the run is finished all the same
                path.unlink(missing_ok=True)

    def _decode(self, content: bytes, like: Any) -> tuple[Position, Any]:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            if header["settings"] != self._settings:
                raise ValueError("it is of a run with other settings")
            if header["jax"] != jax.__version__:
                raise ValueError(f"it is of JAX {header['jax']}, this is {jax.__version__}")
            leaves, structure = jax.tree.flatten(like)
            if len(arrays.files) != len(leaves) + 1:
                raise ValueError(f"it has {len(arrays.files) - 1} arrays, expected {len(leaves)}")
            found = [_from_numpy(arrays[f"leaf_{i}"], leaf) for i, leaf in enumerate(leaves)]
        position = header["position"]
        return Position(
            position["rows"], position["step"], position["seconds"]
        ), structure.unflatten(found)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _from_numpy(array: np.ndarray, leaf: jax.Array) -> jax.Array:
    like = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if array.dtype.kind == "V":  # how NumPy stores types that are not its own, such as bfloat16
        array = array.view(like.dtype)
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(f"it has {array.dtype}{array.shape}, expected {like.dtype}{like.shape}")
    found = jnp.array(array)  # a copy: the first call takes its memory over
    return (
        jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else found
    )
