"""Every invariant of the list has a test that names it, and no test names another."""

from pathlib import Path

import pytest

from docs.invariants import ROOT, Invariant, coverage, marked_tests, named, sections

FOUND = coverage(sections(), list(marked_tests(ROOT / "tests")))


def test_every_invariant_has_a_test() -> None:
    assert FOUND.missing == []


def test_no_test_names_an_invariant_that_is_not_listed() -> None:
    assert FOUND.unknown == {}


def test_the_list_is_whole() -> None:
    methods = {str(number) for number in range(1, 18)}
    assert set(sections()) == methods | {"20", "20.7", "21"}
    assert len(sections()["20.7"]["invariants"]) == 12
    assert all(";" not in invariant.text and not invariant.text.endswith(".") for invariant in FOUND.tests)


def test_docstrings_name_several_over_several_lines() -> None:
    text = "What it does.\n\nInvariant §3: this;\n    and that.\nInvariant §20.7: such.\n\nOther words: Invariant, none."
    assert list(named(text)) == [Invariant("3", "this"), Invariant("3", "and that"), Invariant("20.7", "such")]
    assert not list(named("Words without any."))


def test_gaps_and_strangers_are_found(tmp_path: Path) -> None:
    source = 'def test_a():\n    """Invariant §1: one; three."""\n\n\ndef helper():\n    """Invariant §1: two."""\n'
    (tmp_path / "test_it.py").write_text(source, encoding="utf-8")
    marked = list(marked_tests(tmp_path))
    found = coverage({"1": {"invariants": ["one", "two"]}}, marked)
    assert found.tests[Invariant("1", "one")] == ["test_it.py::test_a"]
    assert found.missing == [Invariant("1", "two")]
    assert found.unknown == {Invariant("1", "three"): ["test_it.py::test_a"]}
    with pytest.raises(ValueError, match=r"section 1 of docs/invariants.json lists 'one' twice; keep one of them"):
        coverage({"1": {"invariants": ["one", "one"]}}, [])
