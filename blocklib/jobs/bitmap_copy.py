"""Taking the stored bitmaps of one image along into another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from blocklib.errors import BlocklibError, UnsupportedFeatureError, UsageError

if TYPE_CHECKING:
    from blocklib.bitmaps import Bitmap
    from blocklib.disk import Disk


def stored_bitmaps(source: Disk, *, skip_broken: bool) -> tuple[list[Bitmap], tuple[str, ...]]:
    """The bitmaps of the top image of `source` that can be copied, and the names of those that are skipped.

    Raises UsageError where the image stores none, or one is inconsistent and not to be skipped.
    """
    node = source.node
    if not node.stores_bitmaps:
        raise UsageError(f"{node.filename or node.name}: an image that stores no bitmaps has none to copy", node=node.name)
    stored = [bitmap for bitmap in source.bitmaps if bitmap.persistent]
    broken = tuple(bitmap.name for bitmap in stored if bitmap.inconsistent)
    if broken and not skip_broken:
        raise UsageError(
            f"{node.filename or node.name}: the bitmap {broken[0]!r} is inconsistent and cannot be copied; it can be skipped",
            node=node.name,
        )
    return [bitmap for bitmap in stored if not bitmap.inconsistent], broken


def refuse_target(name: str, driver: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{name}: this {driver} image cannot store bitmaps", features=("persistent bitmaps",), node=name
    )


@contextmanager
def copied(bitmaps: list[Bitmap], target: Disk) -> Iterator[None]:
    """Around the copying of the data into `target`: it gets bitmaps of the same names, granularities and states.

    They are made before the block, so that what cannot be is known early, and filled after it, so that they do not note
    what it writes.  When the block, or the filling, fails, they are removed again.
    """
    made: list[Bitmap] = []
    with ExitStack() as held:
        try:
            for bitmap in bitmaps:
                held.enter_context(bitmap.held())
                made.append(
                    target.bitmaps.add(bitmap.name, granularity=bitmap.granularity, persistent=True, enabled=False)
                )
            yield
            for bitmap, copy in zip(bitmaps, made, strict=True):
                copy.merge(bitmap)
            for bitmap, copy in zip(bitmaps, made, strict=True):
                if bitmap.enabled:
                    copy.enable()
        except BaseException as exc:
            for copy in made:
                try:
                    copy.remove()
                except BlocklibError as failure:
                    exc.add_note(f"removing the bitmap {copy.name!r} again failed as well: {failure}")
            raise
