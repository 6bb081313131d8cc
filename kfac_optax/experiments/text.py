"""Windows of characters from a text."""

import functools
from pathlib import Path

import numpy as np

# Printable ASCII and the line break; anything else becomes UNKNOWN, so that the vocabulary does not
# depend on the text.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(CHARACTERS)
VOCABULARY = len(CHARACTERS) + 1


def encode(text: str) -> np.ndarray:
    """Characters to tokens `[len(text)]` of int32, each below `VOCABULARY`."""
    table = {character: token for token, character in enumerate(CHARACTERS)}
    return np.array([table.get(character, UNKNOWN) for character in text], np.int32)


@functools.lru_cache(maxsize=1)  # every seed cuts the same text
def read(path: str) -> np.ndarray:
    """Tokens of a UTF-8 file, or of Python's help texts where `path` is empty.

    Raises:
        FileNotFoundError: no such file.
    """
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"config.data.file: {path} is missing, expected a UTF-8 text, or '' for Python's "
                "help"
            )
        return encode(Path(path).read_text(encoding="utf-8", errors="replace"))
    from pydoc_data import topics  # half a megabyte, needed by this data set alone

    return encode("\n".join(topics.topics[name] for name in sorted(topics.topics)))


def windows(tokens: np.ndarray, *, count: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` windows side by side: tokens `[count, context]`, and those that follow each
    of them.
    """
    return (
        tokens[: count * context].reshape(count, context),
        tokens[1 : count * context + 1].reshape(count, context),
    )
