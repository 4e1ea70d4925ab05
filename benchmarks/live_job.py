"""``job VERB IMAGE [TARGET]``: a job on a disk that nobody writes to, as a program, to be measured beside ``blocklib convert``.

Like `benchmarks.launcher` it is started by its path; every job ends with its target durable.
"""

from __future__ import annotations

import sys
from typing import Literal

import blocklib
from blocklib import jobs


def main() -> int:
    verb, image, *more = sys.argv[1:]
    mode: Literal["r", "r+"] = "r" if more else "r+"  # what is copied elsewhere stays as it is
    with blocklib.open(image, mode, format="qcow2", references="allow", discard="unmap") as disk:
        if verb == "mirror":
            job = jobs.mirror(disk, more[0], format="qcow2")
            job.wait(until="ready")
            job.cancel()  # the target is kept
            job.wait()
        elif verb == "backup":
            jobs.backup(disk, more[0], format="qcow2").wait()
        elif verb == "stream":
            jobs.stream(disk).wait()
        elif verb == "commit":
            blocklib.commit(disk)
        elif verb == "commit-below":
            blocklib.commit(disk, top=disk.chain()[1])
        else:
            raise SystemExit(f"{verb} is no job that is measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
