"""Every field of every structure of an image, made what it must not be: a named error or a correct result, soon, and nothing
else is touched.

A run of all tests takes a slice, the same every time; ``make torture`` takes all of it.  One case alone:
``python -m tests.hostile.cases "snapshots: snapshot 0.l1_size=max" info``.
"""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import pytest

from tests.hostile.cases import KINDS, Workshop
from tests.hostile.commands import COMMANDS, ON_LINUX, Verdict

SLICE = 16
"""One case of so many is taken, with one command each."""
ALWAYS = ("info", "map", "check", "convert to raw", "check -r all", "read", "write")
OTHERS = tuple(name for name in COMMANDS if name not in ALWAYS)

pytestmark = [pytest.mark.requires("qemu-img", "qemu-io"), ON_LINUX]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("hostile"))
    yield made
    made.close()


def _judged(verdicts: Iterator[Verdict]) -> str:
    """What is wrong, and what all of them cost at most."""
    found, worst_seconds, worst_memory, count = [], 0.0, 0, 0
    for verdict in verdicts:
        count += 1
        worst_seconds = max(worst_seconds, verdict.outcome.seconds)
        worst_memory = max(worst_memory, verdict.outcome.memory)
        if verdict.wrong:
            found.append(str(verdict))
    print(f"{count} runs, at most {worst_seconds:.2f} s of a processor and {worst_memory >> 20} MiB each")
    assert count
    return "\n".join(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_all_damages(workshop: Workshop, kind: str) -> None:
    names = list(COMMANDS)

    def verdicts() -> Iterator[Verdict]:
        for case in workshop.cases(kind):
            number = crc32(case.encode())
            if number % SLICE == 0:
                yield from workshop.verdicts(case, [names[number // SLICE % len(names)]])

    assert _judged(verdicts()) == ""


@pytest.mark.torture
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_all_damages(workshop: Workshop, kind: str) -> None:
    """With the commands that everybody uses, and some of the others in turn, so that every field meets all of them."""

    def verdicts() -> Iterator[Verdict]:
        for index, case in enumerate(workshop.cases(kind)):
            others = [OTHERS[(3 * index + step) % len(OTHERS)] for step in range(3)]
            yield from workshop.verdicts(case, [*ALWAYS, *others])

    assert _judged(verdicts()) == ""


@pytest.mark.parametrize("case", ["overlay: header.size=0", "relative data file: L1 entry=0"])
def test_what_a_trusted_image_refers_to_is_seen_being_opened(workshop: Workshop, case: str) -> None:
    """The watch would see it: with references allowed, the files that are named are opened, by name."""
    trial = workshop.trial(case, trusted=True)
    outcome = trial.run("read with io").outcome
    assert {"image.qcow2", "base.qcow2" if case.startswith("overlay") else "image.data"} <= set(outcome.seen)
    trial.close()


def test_a_change_of_the_image_is_seen(workshop: Workshop) -> None:
    trial = workshop.trial("plain: count past the end")
    trial.refused = True
    assert "the image was changed although it is refused" in trial.run("write").wrong
    trial.close()
