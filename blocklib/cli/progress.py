"""How far long work is: qemu-img's percentages (-p), lines of JSON, or a bar where a person watches a terminal."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from blocklib.cli.getopt import Given, Option, UsageFailure
from blocklib.cli.session import Session

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from blocklib.reports import Progress

AS_JSON = Option(("--progress",), "json", "print progress as lines of JSON on standard error: done, total, rate, eta")
OPTIONS = (Option(("-p",), None, "print how much is done, in per cent"), AS_JSON)

_BAR_AFTER = 0.7
"""Seconds: work that is done sooner shows no bar, and does not pay for loading it."""
_PERCENT_STEP = 1.0
_COMPLETE = 100.0


def reporter(session: Session, given: Given, verb: str) -> Reporter:
    """The way of reporting that the command line asks for.  Raises UsageFailure for an unknown kind."""
    kind = given.last("--progress")
    if kind not in (None, "json"):
        raise UsageFailure("--progress takes only 'json'")
    if kind == "json":
        return _JsonLines(session)
    if given.has("-q"):
        return Reporter(session)
    if given.has("-p"):
        return _Percentages(session)
    # Called by QEMU's name we are what its callers know, and that shows no bar.
    if session.program == "blocklib" and sys.stderr.isatty():
        return _Bar(session, verb)
    return Reporter(session)


class Reporter:
    """Shows nothing, unless SIGUSR1 asks.  Used as a context manager around the work."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def __call__(self, progress: Progress) -> None:
        """Show `progress`.  Raises Interrupted when the user asked to stop, which stops the work that reports."""
        self._session.check()
        if self._session.report_wanted:
            self._session.report_wanted = False
            print(_percentage(progress.fraction), file=sys.stderr, flush=True)
        self.show(progress)

    def begin(self) -> None:
        """The work is about to start."""

    def show(self, progress: Progress) -> None:
        """One step further."""

    def finish(self) -> None:
        """The work succeeded: it counts as done to the last byte."""

    def end(self) -> None:
        """The work is over, well or not."""


def _percentage(fraction: float) -> str:
    return f"    ({100 * fraction:.2f}/100%)"


class _Percentages(Reporter):
    """What ``qemu-img -p`` prints on standard output: each percentage overwrites the one before."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._shown = -_PERCENT_STEP

    def begin(self) -> None:
        self._print(0.0)

    def show(self, progress: Progress) -> None:
        if 100 * progress.fraction >= self._shown + _PERCENT_STEP:
            self._print(progress.fraction)

    def finish(self) -> None:
        if self._shown < _COMPLETE:
            self._print(1.0)

    def end(self) -> None:
        print(flush=True)

    def _print(self, fraction: float) -> None:
        self._shown = 100 * fraction
        print(_percentage(fraction), end="\r", flush=True)


class _JsonLines(Reporter):
    def show(self, progress: Progress) -> None:
        import json

        line = {"done": progress.done, "total": progress.total, "rate": progress.rate, "eta": progress.eta}
        print(json.dumps(line), file=sys.stderr, flush=True)


class _Bar(Reporter):
    """A bar on standard error, drawn only for work that takes long enough to watch, and wiped when it is over."""

    def __init__(self, session: Session, verb: str) -> None:
        super().__init__(session)
        self._verb = verb
        self._started = 0.0
        self._bar: RichProgress | None = None

    def begin(self) -> None:
        self._started = monotonic()

    def show(self, progress: Progress) -> None:
        if self._bar is None:
            if monotonic() - self._started < _BAR_AFTER:
                return
            self._bar = _make_bar()
            self._bar.add_task(self._verb, total=progress.total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=progress.done, total=progress.total, refresh=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _make_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
    )
