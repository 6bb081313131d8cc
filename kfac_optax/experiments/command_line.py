"""What the command lines of the experiments share: the flag `--config=FILE`, and a console that
fits a log.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kfac_optax.experiments.folder import Stopped

LOG_WIDTH = 240  # columns; the widest tables have seven numbers with intervals
_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment file", lock_config=True)


def runs_bar(console: Console) -> Progress:
    """A bar that counts finished runs; nothing without a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def ends_in_words(console: Console, what: str) -> Iterator[None]:
    """Says in a sentence why a sweep or suite of them has not come to its end."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted: finished runs are kept, the same command continues the {what}")
        raise SystemExit(130) from None
    except Stopped as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def run(experiment: Callable[[ml_collections.ConfigDict, Path, Console], None]) -> None:
    """Calls `experiment(config, out, console)` with what `--config=FILE` and the flags that
    override its entries say; where it cannot go on it ends in a sentence.
    """

    def main(argv: Sequence[str]) -> None:
        del argv
        logging.set_verbosity(logging.WARNING)  # JAX reports every backend that is not there
        config = _CONFIG.value
        console = Console()
        if not console.is_terminal:
            # a log has no width of its own, and 80 would break the cells of any table
            console = Console(width=LOG_WIDTH)
        try:
            experiment(config, Path(config.out or f"results/{config.name}"), console)
        except Stopped as error:
            raise SystemExit(str(error)) from None

    flags.mark_flag_as_required("config")
    app.run(main)
