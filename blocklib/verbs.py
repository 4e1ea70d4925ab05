"""The long verbs, waited for: each starts the job of the same name in `blocklib.jobs` and returns its result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import ParamSpec, TypeVar

from blocklib import jobs
from blocklib.errors import JobStateError
from blocklib.jobs import Job

P = ParamSpec("P")
R = TypeVar("R")


def _waited_for(start: Callable[P, Job[R]]) -> Callable[P, R]:
    """`start` as a function that returns when the job has ended.

    A job that becomes ready is completed, since nobody else can say so.  What ends the wait early (Ctrl-C) cancels the job
    and goes up once its requests in flight have ended.  The job is held before it begins, so that there is no moment at which
    nobody would cancel it.
    """
    make: Callable[P, Job[R]] = vars(start)["__wrapped__"]

    @wraps(start)
    def verb(*args: P.args, **kwargs: P.kwargs) -> R:
        with make(*args, **kwargs) as job:
            job.start().wait(until="ready")
            if job.status == "ready":
                with suppress(JobStateError):  # it has failed since
                    job.complete()
            return job.wait()

    return verb


amend = _waited_for(jobs.amend)
check = _waited_for(jobs.check)
commit = _waited_for(jobs.commit)
compare = _waited_for(jobs.compare)
convert = _waited_for(jobs.convert)
measure = _waited_for(jobs.measure)
rebase = _waited_for(jobs.rebase)
repair = _waited_for(jobs.repair)
