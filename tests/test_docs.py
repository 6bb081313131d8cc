"""The documentation: its code runs and prints what it says, every public name has one place, links lead somewhere."""

import importlib.util
import pathlib
import re

import pytest

import kfac_optax as ko

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md")) + sorted(DOCS.glob("*/*.md"))
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
RUNNABLE = [page for page in PAGES if page.parent.name != "api" and CODE.search(page.read_text())]
SETUP = '--8<-- "setup.txt"\n'  # what the site includes in its place
# what a page shows right below its code
OUTPUT = re.compile(r"```python\n[^`]*```\n\n```text\n(.*?)```", re.DOTALL)
PRINTED = re.compile(r"^\s*print\(.*\)  +# (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def setup_names():
    names = {}
    path = DOCS / "includes" / "setup.txt"
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_code_runs_and_prints_what_it_says(page, setup_names, capsys):
    names = {}
    text = page.read_text()
    blocks = CODE.findall(text)
    for block in blocks:
        if block == SETUP:
            names |= setup_names
        else:
            exec(compile(block, str(page), "exec"), names)
    out = capsys.readouterr().out
    printed = out.splitlines()
    expected = PRINTED.findall("\n".join(blocks))
    assert [line for line in printed if line in expected] == expected
    for shown in OUTPUT.findall(text):
        assert shown in out


def test_pages_with_code_are_found():
    assert len(RUNNABLE) >= 15


def test_coverage_tables_are_those_of_the_start_page(capsys):
    (table,) = re.findall(r"```text\n(layer .*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert table in (DOCS / "layers.md").read_text()
    assert table in (ROOT / "README.md").read_text()  # which test_package runs


def test_every_public_name_is_on_one_api_page():
    listed = []
    for page in DOCS.glob("api/*.md"):
        listed += re.findall(r"^::: kfac_optax\.(\S+)$", page.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(ko.__all__)


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and not anchor.startswith("kfac_optax."):
            assert anchor in _anchors(file), f"{page.name}: {target}"


def _anchors(page):
    """Anchors of the headings of a page, as the site makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in words}


def test_the_table_of_methods_is_that_of_the_catalogue():
    spec = importlib.util.spec_from_file_location("make_methods", DOCS / "make_methods.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text()
    assert script.START in text and script.END in text
    assert text == script.updated(text), "run: python docs/make_methods.py"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f": {page.relative_to(DOCS)}" in navigation


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
