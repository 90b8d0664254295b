"""The tables of the suites `memory`, `peers` and `kernels`, made of small result files."""

from typing import Any

import pytest

from docs import suite_tables
from docs.generate import rst_table

FACTS = {"cpu": "C", "threads": 1, "python": "3", "torch": "2", "peft": "0.21", "commit": "0123456789ab", "dirty": False}


def lines(render, cells: dict[str, Any]) -> list[str]:
    found = {"cells": {key: {"machine": FACTS, "settings": {}, **cell} for key, cell in cells.items()}}
    return [line.strip() for line in render(found, rst_table).splitlines()]


def estimate(error: float, grown: float | None) -> dict[str, Any]:
    keys = ("estimate_mib", "measured_mib", "added_error", "estimate_growth_mib", "seconds")
    return {"figures": dict.fromkeys(keys, 2.0) | {"added_error": 0.0, "error": error, "rss_growth_mib": grown}}


def test_an_estimate_that_is_off_is_marked():
    shown = lines(suite_tables.memory, {"good": estimate(0.05, 3.0), "bad": estimate(-0.2, None)})
    assert shown[0] == "C, 1 thread(s), Python 3, torch 2; commit 0123456789."
    good, bad = shown.index("* - good"), shown.index("* - bad")
    assert shown[good + 3 : bad] == ["- +5.00%", "- +0.00%", "- 2.0 / 3.0", "- 2.0", "- yes"]
    assert shown[bad + 3 :] == ["- -20.00%", "- +0.00%", "- 2.0 / –", "- 2.0", "- **no**"]


@pytest.mark.parametrize(
    ("limit", "worst", "last"),
    [(1e-4, 2e-7, "- yes (≤ 1e-04)"), (1e-4, 2e-3, "- **no** (≤ 1e-04)"), (None, 2e-3, "- not judged")],
)
def test_curves_that_part_are_marked_where_they_are_judged(limit, worst, last):
    figures = {"curves": {"ours": [2.0, 1.0]}, "worst": worst, "worst_all": worst, "update_deviation": 0.5, "limit": limit}
    shown = lines(suite_tables.parity, {"cell": {"figures": figures}})
    assert shown[0].endswith("; PEFT 0.21.")
    assert shown[-1] == last
    assert "- 2.0000 → 1.0000" in shown


def test_operations_have_a_table_each_and_what_is_missing_is_named():
    def cell(operation: str, times: dict[str, Any]) -> dict[str, Any]:
        sizes = {"model": "M", "in_features": 2, "out_features": 3, "rows": 4, "rank": 1, "dtype": "fp32"}
        counts = {"gflop": 1.0, "saved_mib": 2.0, "forward_peak_mib": 3.0}
        rows = {"torch": {"ms": times, "relative": times, **counts}, "compiled": {"ms": times, "relative": times}}
        figures = {"baseline": "torch", "candidates": rows, "absent": {"triton": "there is no GPU"}}
        return {"settings": {"operation": operation, **sizes}, "figures": figures}

    three = [1.0, 0.5, 2.0]
    shown = lines(
        suite_tables.kernels,
        {
            "a": cell("dora", {"forward": three, "both": [4.0, 3.0, 5.0]}),
            "b": cell("row_norm", {"forward": three}),
            "c": {"settings": {"operation": "dora"}, "figures": {"left_out": "asks for too much"}},
        },
    )
    dora = shown.index("* - M: 2 → 3, 4 rows, r = 1, fp32")
    assert shown[dora + 1 : dora + 4] == ["- 1.000", "- 4.000", "- 4.00 (3.00..5.00)"]
    counts = shown.index("* - M: 2 → 3, 4 rows, r = 1, fp32", dora + 1)
    assert shown[counts - 1 : counts + 2 : 2] == ["- torch", "- 1.00 / 2.00 / 3.00"]
    norm = shown.index("* - M: 2 → 3, r = 1, fp32")
    assert shown[norm + 1 : norm + 4] == ["- 1.000", "- –", "- 1.00 (0.50..2.00)"]
    assert "* c: asks for too much." in shown
    assert "* triton of dora: there is no GPU." in shown
