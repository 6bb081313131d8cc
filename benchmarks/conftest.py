"""Collects ratios and prints them as one table at the end."""

import pytest

_rows: list[tuple[str, str, str]] = []


@pytest.fixture
def report(benchmark):
    """`report(name, Ratio or number, aim)`: into the table and into pytest-benchmark's JSON."""

    def add(name, value, aim=""):
        shown = (
            f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"
            if hasattr(value, "median")
            else f"{value:.2f}"
        )
        _rows.append((name, shown, aim))
        benchmark.extra_info[name] = {"value": shown, "aim": aim}

    return add


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    terminalreporter.section("ratios: median (quartiles)")
    terminalreporter.write_line("| ratio | measured | aim |")
    terminalreporter.write_line("| --- | --- | --- |")
    for row in _rows:
        terminalreporter.write_line("| " + " | ".join(row) + " |")
