"""Ratios between candidates, the better of several, marks for a peer that is ahead, and the claims judged by them."""

import pytest

from benchmarks.candidates import default_candidates
from benchmarks.claims import BASE, CLAIMS, LAYER, Claim, judge
from benchmarks.contests import Contest, best, contests, hold, verdict
from benchmarks.harness import Spread
from benchmarks.tables import layer_table, steps_table
from docs import step_tables
from docs.generate import markdown_table

# Two rounds each; peft is quicker with its model in bf16, and leaner without.
STEP = {"lora": [10, 20], "lora-grouped": [8, 16], "peft-lora": [12, 24], "peft-lora@bf16-model": [9, 24]}
STEP["peft-dora"] = [20, 30]
SAVED = {"lora": 6.0, "lora-grouped": 7.0, "peft-lora": 9.0, "peft-lora@bf16-model": 10.0, "peft-dora": 18.0}
SAMPLES = {name: [{"step": ms, "cpu": 2 * ms} for ms in taken] for name, taken in STEP.items()}
PHASES = {"step": 1, "cpu": 2, "forward": 0.3, "backward": 0.6, "optimizer": 0.1}


def figures() -> dict:
    return {
        name: {
            "ms": {phase: [factor * sum(taken) / 2] * 3 for phase, factor in PHASES.items()},
            "saved_mib": SAVED[name],
            "gflop": 5.0,
            "forward_peak_mib": SAVED[name],
            "operations": {"forward": 1, "backward": 2, "optimizer": 3},
            "trained": 1234,
        }
        for name, taken in STEP.items()
    }


def test_the_better_is_chosen_measure_by_measure():
    names = ["peft-lora", "peft-lora@bf16-model"]
    assert best(names, figures(), "step") == best(names, figures(), "cpu") == "peft-lora@bf16-model"
    assert best(names, figures(), "saved_mib") == "peft-lora"
    assert best(names, figures(), "gflop") == "peft-lora"  # equal: the first


def test_a_contest_pairs_the_best_of_each_side_in_each_round():
    found = {contest.title: contest for contest in contests(list(STEP), autocast=True)}
    assert list(found) == ["peft LoRA / ours", "peft DoRA / peft LoRA", "grouped LoRA / one by one"]
    row = hold(found["peft LoRA / ours"], figures(), SAMPLES)
    assert row["sides"]["step"] == ["peft-lora@bf16-model", "lora-grouped"]
    assert row["sides"]["saved_mib"] == ["peft-lora", "lora"]
    # Round by round 9 / 8 and 24 / 16, and not the ratio of the medians, 16.5 / 12.
    assert row["step"] == pytest.approx((1.3125, 1.2, 1.425))
    assert row["saved_mib"] == 9 / 6
    assert row["gflop"] == 1
    grouped = hold(found["grouped LoRA / one by one"], figures(), SAMPLES)
    assert grouped["step"] == pytest.approx((0.8, 0.8, 0.8))
    assert grouped["saved_mib"] == 7 / 6
    untimed = hold(found["peft LoRA / ours"], figures(), {})
    assert "step" not in untimed
    assert untimed["saved_mib"] == 9 / 6


def test_all_contests_of_a_full_cell():
    titles = [contest.title for contest in contests(default_candidates("bf16"), autocast=True)]
    assert {"loralib LoRA / ours", "ours DoRA / ours LoRA", "ours LoRA / full", "ours DoRA / full fp32"} <= set(titles)
    assert {"full / full fp32", "grouped DoRA / one by one"} <= set(titles)
    fp32 = [contest.title for contest in contests(default_candidates("off"), autocast=False)]
    more = [title for title in titles if title not in fp32]
    mixed = ["peft mixed-precision LoRA / ours", "peft mixed-precision DoRA / ours"]
    beside_full = [f"ours {method} / full fp32{rest}" for method in ("LoRA", "DoRA") for rest in ("", " with embeddings")]
    assert more == [*mixed, *beside_full, "full / full fp32"]
    sides = {contest.title: contest.over for contest in contests(default_candidates("bf16"), autocast=True)}
    assert set(sides["peft DoRA / ours"]) - set(sides[mixed[1]]) == {"peft-dora@bf16-all"}
    assert {claim.contest for claim in CLAIMS} <= set(titles)


@pytest.mark.parametrize(
    ("peer", "step", "mark"),
    [
        ("peft", Spread(1.1, 0.9, 1.2), ""),
        ("peft", Spread(0.9, 0.8, 0.95), "peft is ahead"),
        ("peft", Spread(0.98, 0.9, 1.02), "peft is ahead, within noise"),
        (None, Spread(0.5, 0.4, 0.6), ""),
    ],
)
def test_a_peer_that_is_ahead_is_marked(peer, step, mark):
    assert verdict({"peer": peer, "step": step, "saved_mib": 0.99}, "step") == mark
    assert verdict({"peer": peer, "saved_mib": 0.99}, "saved_mib") == ("peft is ahead" if peer else "")
    assert verdict({"peer": peer}, "gflop") == ""


def cell(**settings: object) -> dict:
    contest = Contest("peft LoRA / ours", ("peft-lora",), ("lora", "lora-grouped"), "peft")
    row = hold(contest, figures(), SAMPLES) | {"step": [0.9, 0.8, 0.95]}
    facts = {"cpu": "A processor", "threads": 2, "python": "3.11", "torch": "2.13.0", "commit": "0123456789ab", "dirty": False}
    return {
        "machine": facts | {"date": "today", "load_average": 0.1, "peft": "0.21.2"},
        "settings": {**BASE, "amp": "off", "dropout": 0.0, **settings},
        "figures": {"checks": 3, "baseline": "full", "candidates": figures(), "ratios": {contest.title: row}},
    }


def test_tables_name_the_sides_and_mark_the_row():
    text = steps_table(cell())
    assert "peft LoRA / ours: time 0.900 (0.800..0.950), CPU time" in text
    assert "time of peft-lora / lora-grouped, bytes of peft-lora / lora [!! time: peft is ahead]" in text
    table = step_tables.cells({"cpu, 8x64": cell()}, markdown_table, "`")
    assert "cpu, 8x64. A processor, 2 threads, Python 3.11, torch 2.13.0, peft 0.21.2; commit `0123456789`. Medians" in table
    assert "| lora | 15.0 |  | 6.0 | 5.00 | 1,234 |" in table
    assert "| 0.90 (0.80..0.95) | 1.50 | 1.50 | 1.00 |" in table
    assert "| peft-lora / lora-grouped | peft-lora / lora | time: **peft is ahead** |" in table
    assert step_tables.cells({}, markdown_table, "`") == "This cell is not measured yet."
    assert step_tables.headline({"cells": {"x": cell(rank=1)}}, markdown_table, "`") == "This cell is not measured yet."
    assert "x. A processor" in step_tables.headline({"cells": {"x": cell()}}, markdown_table, "`")


def test_tables_of_a_layer():
    found = cell()
    for row in [*found["figures"]["candidates"].values(), *found["figures"]["ratios"].values()]:
        row["step_peak_mib"] = 0.5
    assert "with backward 0.500 [!! peft is ahead], saved 1.500" in layer_table(found)
    assert "with backward: **peft is ahead**" in step_tables.layers({"x": found}, markdown_table, "`")


def test_claims_are_judged_by_their_cell_and_direction():
    results = {"steps": {"cells": {"other": cell(rank=1), "this": cell()}}}
    where = {"amp": "off", "dropout": 0.0}
    time = judge(Claim(where, "peft LoRA / ours", "step", 0.89, at_least=True), results)
    assert time == ("fp32", "peft LoRA / ours LoRA: time", "≥ 0.89", "0.900 (0.800..0.950)", "peft-lora / lora-grouped", True)
    assert judge(Claim(where, "peft LoRA / ours", "step", 0.89), results).met is False
    saved = judge(Claim(where, "peft LoRA / ours", "saved_mib", 0.7, inverse=True), results)
    assert saved[1:] == ("ours LoRA / peft LoRA: bytes saved for backward", "≤ 0.7", "0.667", "lora / peft-lora", True)
    inverse = judge(Claim(where, "peft LoRA / ours", "step", 1.0, inverse=True), results)
    assert inverse.figure == "1.111 (1.053..1.250)"
    assert judge(Claim({"amp": "bf16", "dropout": 0.0}, "peft LoRA / ours", "step", 1.0), results).met is None
    assert judge(Claim(where, "peft DoRA / ours", "step", 1.0), results).figure == "–"
    layer = Claim({"amp": True}, "peft LoRA / ours", "saved_mib", 1.2, suite="layer")
    assert judge(layer, results).met is None
    there = {"layer": {"cells": {"x": cell() | {"settings": LAYER | {"amp": True}}}}}
    assert judge(layer, there)[0::5] == ("one 4096 x 4096 layer, bf16, autocast", False)
    table = step_tables.claims(results, markdown_table)
    assert "| fp32 | peft LoRA / ours LoRA: time | ≥ 1.05 | 0.900 (0.800..0.950) |" in table
