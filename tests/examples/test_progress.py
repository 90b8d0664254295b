"""Progress with a terminal and without one."""

import sys

from examples.minbert_multitask import progress


def test_bar_on_a_terminal_shows_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = progress.Progress(10, 4)
    shown.bar.mininterval = 0
    for _ in range(3):
        shown.step({"sst": 1.25})
    shown.say("dev scores")
    shown.close()
    out, err = capsys.readouterr()
    assert "7/10" in err
    assert "step/s" in err or "s/step" in err
    assert "dev scores" in out


def test_lines_without_a_terminal_are_sparse(monkeypatch, capsys):
    shown = progress.Progress(10, 4)
    clock = iter([100.0, 101.0, 125.0, 125.0, 125.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown.line_time = 85.0
    shown.step()  # after 15 s: too soon
    shown.step()  # after 16 s
    shown.step()  # after 40 s: three steps
    assert capsys.readouterr().out == "step 7/10, 0.1 steps/s, 0.7 min left\n"
    shown.say("dev scores")
    assert capsys.readouterr().out == "dev scores\n"


def test_quiet(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    shown = progress.Progress(2, 0, quiet=True)
    shown.step()
    shown.say("nothing")
    shown.close()
    assert capsys.readouterr() == ("", "")
