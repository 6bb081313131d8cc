"""Writes the table of methods into `docs/methods.md`, from the catalogue.

python docs/make_methods.py
"""

import pathlib

import kfac_optax as ko

PAGE = pathlib.Path(__file__).parent / "methods.md"
START = "<!-- from the catalogue: python docs/make_methods.py -->\n"
END = "<!-- end of the catalogue -->\n"
HEADER = (
    "| preset | what it is | state of a layer | refresh, step | paper |\n"
    "| --- | --- | --- | --- | --- |\n"
)
ALONE = (
    "\nFrom gradients alone, on any parameter tree, without layers and without curvature; a bias is "
    "a leaf of its own:\n\n"
)


def row(method: ko.Method) -> str:
    """One method as a line of the table."""
    room = getattr(ko, method.name).__module__.split(".")[2]
    page = "gradient" if room == "gradient" else "presets"
    name = f"[`{method.name}`](api/{page}.md#kfac_optax.{method.name})"
    cells = (name, method.summary, method.state_text, "; ".join(method.cost), method.paper)
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """All methods in the order of the catalogue, those that need gradients alone in a table of
    their own.
    """
    methods = ko.CATALOGUE.values()
    of_layers = [row(x) for x in methods if "curvature" in x.needs]
    alone = [row(x) for x in methods if "curvature" not in x.needs]
    return "".join((HEADER, *of_layers, ALONE, HEADER, *alone))


def updated(text: str) -> str:
    """A page with the table between its two marks made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
