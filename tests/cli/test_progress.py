"""Progress: qemu-img's percentages, JSON lines, what a signal asks for, and how an interrupt gets in."""

from __future__ import annotations

import json

import pytest

from blocklib.cli.getopt import Given, UsageFailure
from blocklib.cli.progress import reporter
from blocklib.cli.session import Interrupted, Session
from blocklib.reports import Progress


def _given(**values: str) -> Given:
    return Given({name.replace("_", "-"): [value] for name, value in values.items()}, [])


def _steps(session: Session, given: Given, *done: int) -> None:
    with reporter(session, given, "convert") as report:
        for count in done:
            report(Progress(count, 1000, 100.0, 2.5))
        report.finish()


def test_percentages_overwrite_each_other_and_end_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    _steps(Session("blocklib"), _given(_p=""), 0, 123, 125, 500)
    printed = capsys.readouterr()
    assert printed.out == "    (0.00/100%)\r    (12.30/100%)\r    (50.00/100%)\r    (100.00/100%)\r\n"
    assert printed.err == ""


def test_percentages_of_failed_work_only_end_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        with reporter(Session("blocklib"), _given(_p=""), "convert") as report:
            report(Progress(250, 1000))
            raise ZeroDivisionError
    assert capsys.readouterr().out == "    (0.00/100%)\r    (25.00/100%)\r\n"


def test_quiet_overrides_percentages(capsys: pytest.CaptureFixture[str]) -> None:
    _steps(Session("blocklib"), _given(_p="", _q=""), 500)
    assert capsys.readouterr() == ("", "")


def test_json_progress_is_one_object_a_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    _steps(Session("blocklib"), _given(__progress="json"), 250, 500)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [json.loads(line) for line in printed.err.splitlines()] == [
        {"done": 250, "total": 1000, "rate": 100.0, "eta": 2.5},
        {"done": 500, "total": 1000, "rate": 100.0, "eta": 2.5},
    ]


def test_an_unknown_kind_of_progress_is_refused() -> None:
    with pytest.raises(UsageFailure):
        reporter(Session("blocklib"), _given(__progress="xml"), "convert")


def test_a_signal_asks_once_how_far_the_work_is(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("blocklib")
    session.report_wanted = True
    _steps(session, _given(), 123, 500)
    printed = capsys.readouterr()
    assert printed.err == "    (12.30/100%)\n"
    assert printed.out == ""


def test_work_that_reports_is_stopped_by_an_interrupt() -> None:
    session = Session("blocklib")
    session.interrupt()
    with pytest.raises(Interrupted):
        _steps(session, _given(), 123)


class _Terminal:
    """Standard error as a terminal that takes down what is drawn."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.drawn = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.drawn += text
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def _drawn_by_work_of(seconds: float, session: Session, monkeypatch: pytest.MonkeyPatch) -> str:
    terminal = _Terminal()
    clock = iter([0.0, seconds])
    monkeypatch.setattr("blocklib.cli.progress.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    _steps(session, _given(), 500)
    return terminal.drawn


def test_long_work_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "convert" in _drawn_by_work_of(5.0, Session("blocklib"), monkeypatch)


def test_short_work_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _drawn_by_work_of(0.2, Session("blocklib"), monkeypatch) == ""


def test_called_as_qemu_img_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _drawn_by_work_of(5.0, Session("qemu-img"), monkeypatch) == ""
