"""Records: values with named fields, like dataclasses, which take them for their own (`fields`, `replace`, `asdict`).

A dataclass writes its methods as text and compiles them: half a millisecond a class at every start of the command line, and
five for the module with what it imports.  Here one class does all of it, and `dataclasses` is imported by who asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, NoReturn, TypeVar, dataclass_transform

_R = TypeVar("_R", bound="Record")
_MISSING: Final = object()


class _Field:
    """What is known of one field of a class."""

    __slots__ = ("compare", "default", "default_factory", "init", "type")

    def __init__(self, default: Any, default_factory: Callable[[], Any] | None, *, init: bool, compare: bool) -> None:
        self.type = ""
        self.default = default
        self.default_factory = default_factory
        self.init = init
        self.compare = compare


def field(
    *, default: Any = _MISSING, default_factory: Callable[[], Any] | None = None, init: bool = True, compare: bool = True
) -> Any:
    """A field with a new default for every record, or not compared; or, without `init`, one that `__post_init__` sets.

    What is not compared is not shown either, and what is set afterwards is not compared.
    """
    return _Field(default, default_factory, init=init, compare=compare and init)


class _DataclassFields:
    """The `__dataclass_fields__` of a record class, made when `dataclasses` asks for them."""

    def __get__(self, record: Record | None, owner: type[Record]) -> dict[str, Any]:
        if not owner.record_fields:
            raise AttributeError("__dataclass_fields__")
        import dataclasses

        made = []
        for name, about in owner.record_fields.items():
            spec: dict[str, Any] = {"init": about.init, "repr": about.compare, "compare": about.compare}
            if about.default_factory is not None:
                spec["default_factory"] = about.default_factory
            elif about.default is not _MISSING:
                spec["default"] = about.default
            made.append((name, about.type, dataclasses.field(**spec)))
        found: dict[str, Any] = dataclasses.make_dataclass(owner.__name__, made).__dict__["__dataclass_fields__"]
        owner.__dataclass_fields__ = found  # type: ignore[assignment]
        return found


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Record:
    """The base of records: a subclass lists its fields with their types, and defaults, as a dataclass does.

    Frozen, equal by class and fields, hashable; a subclass made with ``frozen=False`` may change and has no hash.
    """

    record_fields: ClassVar[dict[str, _Field]] = {}
    __dataclass_fields__: ClassVar[_DataclassFields] = _DataclassFields()
    __match_args__: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, frozen: bool = True) -> None:
        super().__init_subclass__()
        cls.__dataclass_fields__ = _DataclassFields()  # each class its own: it is replaced by what it makes
        cls.record_fields = dict(cls.record_fields)
        for name, its_type in cls.__annotations__.items():
            if its_type.startswith("ClassVar"):
                continue
            given = cls.__dict__.get(name, _MISSING)
            if isinstance(given, _Field):
                delattr(cls, name)
            else:
                given = _Field(given, None, init=True, compare=True)
            given.type = its_type
            cls.record_fields[name] = given
        cls.__match_args__ = tuple([name for name, about in cls.record_fields.items() if about.init])  # type: ignore[misc]
        if not frozen:
            cls.__setattr__ = object.__setattr__  # type: ignore[method-assign, assignment]
            cls.__delattr__ = object.__delattr__  # type: ignore[method-assign]
            cls.__hash__ = None  # type: ignore[assignment]

    def __init__(self, *values: Any, **named: Any) -> None:
        names = self.__match_args__
        given = dict(zip(names, values))
        if len(values) > len(names) or not given.keys().isdisjoint(named):
            raise TypeError(f"{type(self).__name__} takes each of {', '.join(names)} once")
        given.update(named)
        put = object.__setattr__  # the way around our own
        for name in names:
            if name in given:
                put(self, name, given.pop(name))
                continue
            about = self.record_fields[name]
            if about.default_factory is not None:
                put(self, name, about.default_factory())
            elif about.default is not _MISSING:
                put(self, name, about.default)
            else:
                raise TypeError(f"{type(self).__name__} needs a value for {name}")
        if given:
            raise TypeError(f"{type(self).__name__} has no {', '.join(given)}")
        self.__post_init__()

    def __post_init__(self) -> None:
        """For subclasses: check the fields, and set those that follow from others (by ``object.__setattr__``)."""

    def __setattr__(self, name: str, value: object) -> None:
        _refuse_change("assign to", name)

    def __delattr__(self, name: str) -> None:
        _refuse_change("delete", name)

    def _compared(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name, about in self.record_fields.items() if about.compare])

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(self._compared())

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name, about in self.record_fields.items() if about.compare]
        return f"{type(self).__qualname__}({', '.join(shown)})"


def replace(record: _R, **changes: Any) -> _R:
    """The same record with other values of some fields."""
    kept = {name: getattr(record, name) for name in record.__match_args__}
    return type(record)(**kept | changes)


def _refuse_change(what: str, name: str) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot {what} field {name!r}")
