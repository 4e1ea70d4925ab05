"""The long verbs as jobs: each function starts the work and returns a `Job`; `blocklib` has the same verbs, waited for."""

from __future__ import annotations

from blocklib.jobs.amend import amend
from blocklib.jobs.backup import backup
from blocklib.jobs.check import check, repair
from blocklib.jobs.commit import commit
from blocklib.jobs.compare import compare
from blocklib.jobs.convert import convert
from blocklib.jobs.create import create
from blocklib.jobs.job import Job, JobEvent, JobEvents, JobStatus, ProgressCallback
from blocklib.jobs.measure import measure
from blocklib.jobs.mirror import mirror
from blocklib.jobs.rebase import rebase
from blocklib.jobs.stream import stream

__all__ = [
    "Job",
    "JobEvent",
    "JobEvents",
    "JobStatus",
    "ProgressCallback",
    "amend",
    "backup",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "measure",
    "mirror",
    "rebase",
    "repair",
    "stream",
]
