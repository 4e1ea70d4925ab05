"""The long verbs as jobs: each function starts the work and returns a `Job`; `blocklib` has the same verbs, waited for."""

from __future__ import annotations

from blocklib.jobs.convert import convert
from blocklib.jobs.job import Job, JobEvent, JobEvents, JobStatus, ProgressCallback

__all__ = ["Job", "JobEvent", "JobEvents", "JobStatus", "ProgressCallback", "convert"]
