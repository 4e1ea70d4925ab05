"""Records behave as the dataclasses that they replace, for their users and for the module `dataclasses`."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import ClassVar

import pytest

from blocklib.records import Record, field, replace


class Point(Record):
    kind: ClassVar[str] = "point"

    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list, compare=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.x + self.y)


@dataclasses.dataclass(frozen=True)
class Twin:
    """What `Point` stands for."""

    x: int
    y: int = 2
    tags: list[str] = dataclasses.field(default_factory=list, compare=False, repr=False)
    total: int = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.x + self.y)


class Changing(Record, frozen=False):
    x: int = 0


def test_fields_are_given_by_position_name_and_default() -> None:
    assert [(one.x, one.y, one.total) for one in (Point(1), Point(1, 3), Point(y=3, x=1))] == [(1, 2, 3), (1, 3, 4), (1, 3, 4)]
    assert Point(1).tags is not Point(1).tags


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((1, 2, [], 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((1,), {"total": 1})],
    ids=["none", "too-many", "twice", "unknown", "set-afterwards"],
)
def test_wrong_arguments_are_a_type_error(values: tuple[int, ...], named: dict[str, int]) -> None:
    for kind in (Point, Twin):
        with pytest.raises(TypeError):
            kind(*values, **named)  # type: ignore[arg-type]


def test_equality_hash_and_text_are_those_of_a_dataclass() -> None:
    assert Point(1) == Point(1, 2, ["other"])
    assert Point(1) != Point(2)
    assert Point(1) != Changing(1)
    assert hash(Point(1)) == hash(Twin(1))
    assert repr(Point(1)) == repr(Twin(1)).replace("Twin", "Point")
    match Point(1):
        case Point(x, y):
            assert (x, y) == (1, 2)


def test_a_frozen_record_refuses_every_change() -> None:
    for name in ("x", "other"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Point(1), name, 2)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(Point(1), name)


def test_a_record_that_is_not_frozen_changes_and_has_no_hash() -> None:
    record = Changing()
    record.x = 5
    assert record == Changing(5)
    with pytest.raises(TypeError):
        hash(record)


def test_dataclasses_takes_a_record_for_its_own() -> None:
    point = Point(1, 3, ["a"])
    assert dataclasses.asdict(point) == dataclasses.asdict(Twin(1, 3, ["a"]))
    assert replace(point, x=5) == Point(5, 3)
    assert dataclasses.replace(point, x=5) == Point(5, 3)
    seen = [
        [
            (one.name, one.type, one.default, one.default_factory, one.init, one.compare, one.repr)
            for one in dataclasses.fields(kind)
        ]
        for kind in (Point, Twin)
    ]
    assert seen[0] == seen[1]
    assert not dataclasses.is_dataclass(Record)
    assert dataclasses.is_dataclass(Point)


def test_a_subclass_has_the_fields_of_its_base_first() -> None:
    class Solid(Point):
        z: int = 0

    assert [one.name for one in dataclasses.fields(Solid)] == ["x", "y", "tags", "total", "z"]
    assert Solid(1, z=3) != Solid(1)


def test_records_survive_copying_and_pickling() -> None:
    point = Point(1, tags=["a"])
    for other in (copy.copy(point), copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        assert (other, other.tags, other.total) == (point, ["a"], 3)


def test_making_records_does_not_import_dataclasses() -> None:
    code = "import sys; from blocklib.reports import Progress; Progress(1, 2); assert 'dataclasses' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
