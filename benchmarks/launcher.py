"""Runs programs and says what each took: one JSON array (argv, folder) a line in, one JSON array out.

A process of its own, because Linux hands the peak memory of the process that starts a program on to the program: this one
stays small.  Answers are [seconds, CPU seconds, peak bytes, exit code].
"""

from __future__ import annotations

import json
import os
import sys
import time


def serve() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    errors = os.dup(2)
    for line in sys.stdin:
        argv, folder = json.loads(line)
        os.chdir(folder)
        files = [(os.POSIX_SPAWN_DUP2, nowhere, 0), (os.POSIX_SPAWN_DUP2, nowhere, 1), (os.POSIX_SPAWN_DUP2, errors, 2)]
        before = time.perf_counter()
        pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=files)
        _pid, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - before
        answer = [seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)]
        print(json.dumps(answer), flush=True)  # the one line that is read


if __name__ == "__main__":
    serve()
