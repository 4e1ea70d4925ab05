"""The words of the job room: which states a job has, how it moves between them, and which verb it takes in which.

Source: ``JobStatus``, ``JobVerb`` and the ``job-*`` commands of QEMU's ``qapi/job.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from blocklib.records import Record
from blocklib.reports import Progress

JobStatus: TypeAlias = Literal[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]
JobVerb: TypeAlias = Literal["cancel", "pause", "resume", "set-speed", "complete", "finalize", "dismiss"]

TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    "undefined": frozenset({"created"}),
    "created": frozenset({"running", "aborting", "null"}),
    "running": frozenset({"paused", "ready", "waiting", "aborting"}),
    "paused": frozenset({"running"}),
    "ready": frozenset({"standby", "waiting", "aborting"}),
    "standby": frozenset({"ready"}),
    "waiting": frozenset({"pending", "aborting"}),
    "pending": frozenset({"concluded", "aborting"}),
    "aborting": frozenset({"concluded"}),
    "concluded": frozenset({"null"}),
    "null": frozenset(),
}

VERBS: Final[Mapping[JobVerb, frozenset[JobStatus]]] = {
    # Wider than QEMU's: cancelling what has just ended does nothing, since the caller cannot know (as Future.cancel).
    "cancel": frozenset({"created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting", "concluded"}),
    "pause": frozenset({"created", "running", "paused", "ready", "standby"}),
    "resume": frozenset({"created", "running", "paused", "ready", "standby"}),
    "set-speed": frozenset({"created", "running", "paused", "ready", "standby"}),
    "complete": frozenset({"ready"}),
    "finalize": frozenset({"pending"}),
    "dismiss": frozenset({"concluded"}),
}

ENDED: Final[frozenset[JobStatus]] = frozenset({"concluded", "null"})


class JobEvent(Record):
    """Something happened to a job: its status then, how far it was, and the error once it has failed."""

    status: JobStatus
    progress: Progress
    error: BaseException | None = None
