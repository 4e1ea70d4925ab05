"""Where the ranges of a disk live, many at a time: read from whole L2 tables, laid over each other, counted, written as text.

All of it works on *rows* of four signed integers: guest offset and length in bytes, the place (a host offset, or -1 where there
is none) and a word of flags.  Rows are ascending and contiguous, and neighbours that say the same, with places that follow
each other, are one row.  What an L2 entry says is defined by the driver, which resolves them one by one: it is asked for the
entry at which a kernel stops because it finds fault with it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from blocklib._fast.kernel import U64, Family, i64
from blocklib._fast.pointer import Pointer

DATA: Final = 0x01
ZERO: Final = 0x02
PRESENT: Final = 0x04
PLACED: Final = 0x08
"""Set where, and only where, there is a place."""
COMPRESSED: Final = 0x10
ASK: Final = 0x40
"""Of a run: the file below may have a hole there.  Not of what a disk says."""
DEPTH_SHIFT: Final = 8
"""From this bit on a word has the number of the image in its chain."""
SAID: Final = DATA | ZERO | PRESENT | PLACED | COMPRESSED

_ROW: Final = 4
_SUBCLUSTERS: Final = 32
_PER_PAIR: Final = _SUBCLUSTERS + 1
"""More rows than one extended entry adds."""
_SAVED_PER_ENTRY: Final = 150
"""Nanoseconds that kernels save for an L2 entry, against resolving runs one by one, where runs are of middling length."""
_SAVED_PER_ROW: Final = 10_000
"""And for a row that had to be found one by one."""
_MOST_PARTS: Final = 64
"""Parts of a file that are remembered: all of them are given to the kernel anew after each question."""
_SAVED_PER_ACTION: Final = 400
_SAVED_PER_UNIT_ROW: Final = 400
_SAVED_PER_TEXT: Final = 2_000

family = Family(__name__)

_NONE = U64(0)
_ONE = U64(1)
_ZERO_FLAG = U64(1)
_OFFSET = U64(0x00FF_FFFF_FFFF_FE00)
_NOT_COPIED = U64((1 << 63) - 1)
_COMPRESSED_FLAG = U64(1 << 62)
_LOW_HALF = U64(0xFFFF_FFFF)
_ALL = U64(0xFFFF_FFFF_FFFF_FFFF)


class Rows:
    """Some rows, and room for more."""

    __slots__ = ("_pointer", "_state", "_state_pointer", "most", "numbers")

    def __init__(self, most: int) -> None:
        self.most = most
        self.numbers = array("q", bytes(8 * _ROW * most))
        self._state = array("q", (0, 0))
        self._pointer = Pointer(self.numbers, "q", writable=True)
        self._state_pointer = Pointer(self._state, "q", writable=True)

    def __len__(self) -> int:
        return self._state[0]

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        used = self.numbers[: self._state[0] * _ROW].tolist()
        return zip(used[0::4], used[1::4], used[2::4], used[3::4], strict=True)

    @property
    def full(self) -> bool:
        """Whether the next entry of an L2 table may find no room."""
        return self._state[0] + _PER_PAIR > self.most

    @property
    def start(self) -> int:
        """Where the rows, of which there are some, begin: a guest offset."""
        return self.numbers[0]

    @property
    def end(self) -> int:
        """Where they end."""
        last = (self._state[0] - 1) * _ROW
        return self.numbers[last] + self.numbers[last + 1]

    @property
    def words(self) -> set[int]:
        """The words of flags that occur."""
        return set(self.numbers[3 : self._state[0] * _ROW : _ROW])

    def append(self, offset: int, length: int, place: int, word: int) -> None:
        """Add a row, which begins at the end of the last; it may become part of that."""
        if _append(self._pointer.view, self._state, self.most, offset, length, place, word):
            raise AssertionError("no room for a row")

    def pop(self) -> tuple[int, int, int, int]:
        """Take the last row away."""
        count = self._state[0] = self._state[0] - 1
        offset, length, place, word = self.numbers[count * _ROW : (count + 1) * _ROW]
        return offset, length, place, word

    def prepend(self, offset: int, length: int, place: int, word: int) -> bool:
        """Let the first row begin with this one, which ends where it begins, if both can be one."""
        numbers = self.numbers
        if numbers[3] != word or not (place < 0 or place + length == numbers[2]):
            return False
        numbers[0], numbers[1], numbers[2] = offset, length + numbers[1], place
        return True

    def clip(self, start: int, end: int) -> None:
        """Leave nothing but [start, end), of which there are rows."""
        numbers = self.numbers
        count = self._state[0]
        while numbers[(count - 1) * _ROW] >= end:
            count -= 1
        first = 0
        while numbers[first * _ROW] + numbers[first * _ROW + 1] <= start:
            first += 1
        if first:
            count -= first
            numbers[: count * _ROW] = numbers[first * _ROW : (first + count) * _ROW]
        self._state[0] = count
        last = (count - 1) * _ROW
        numbers[last + 1] = min(numbers[last + 1], end - numbers[last])
        cut = start - numbers[0]
        if cut > 0:
            numbers[0] += cut
            numbers[1] -= cut
            if numbers[2] >= 0:
                numbers[2] += cut


class Facts(NamedTuple):
    """What must be known of an image to read its L2 entries."""

    cluster_bits: int
    allocated_mask: int
    """An entry without zero flag has a host cluster if any of these bits is set."""
    zero_allowed: bool
    external: bool
    """Guest clusters lie in a file of their own, each at its guest offset."""
    data: int
    """The flags of a plain cluster."""
    told: int
    """The flags that may be told: without PLACED, nobody learns of a place."""
    extended: bool


def worth_entries(entries: int) -> bool:
    """Whether the kernels pay for reading so many L2 entries; where they do they can be had."""
    return _standard.worth(entries * _SAVED_PER_ENTRY) is not None


def worth_rows(rows: int) -> bool:
    """The same where so many rows had to be found without them."""
    return _standard.worth(rows * _SAVED_PER_ROW) is not None


def one_row(offset: int, length: int, place: int, word: int) -> Rows:
    rows = Rows(1)
    rows.append(offset, length, place, word)
    return rows


def read_entries(words: Pointer, first: int, n: int, guest_offset: int, facts: Pointer, rows: Rows) -> int:
    """Add the rows of L2 entries, from number `first` on, of `n` in all, the first of which maps `guest_offset`.

    The number of the entry where it ended: `n`, one for which there is no room, or one that is not what it should be.
    """
    extended = bool(facts.view[6])
    assert 0 <= first <= n
    assert n << extended <= words.length
    assert facts.length == len(Facts._fields)
    assert 9 <= facts.view[0] <= 21
    kernel = (_extended if extended else _standard).loaded()
    rows._state[1] = first
    kernel(words, n, guest_offset, facts, rows._state_pointer, rows._pointer, rows.most)
    return rows._state[1]


def facts_pointer(facts: Facts) -> Pointer:
    """`facts` as `read_entries` takes them."""
    return Pointer(array("Q", [int(fact) for fact in facts]), "Q")


def labelled(rows: Rows, depth: int, zero_from: int) -> Rows:
    """What the image at `depth` says, of runs that it resolved: flags of storage are taken off, the depth is put on.

    From guest offset `zero_from` on, what it does not determine reads as zero; below, it has no place.
    """
    found = Rows(len(rows) + 1)
    _label.loaded()(rows._pointer, len(rows), depth << DEPTH_SHIFT, zero_from, found._state_pointer, found._pointer, found.most)
    return found


class Holes:
    """What is known of the data and the holes of a file: parts that end where the file goes on otherwise."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}

    def add(self, start: int, end: int, zero: int) -> None:
        """From `start` to `end` all is data, or with ZERO for `zero` a hole; it goes on otherwise at `end`.

        What was known otherwise of that part is forgotten: the file is being written.
        """
        if len(self._ends) > _MOST_PARTS:
            self._ends.clear()
            self._parts.clear()
        known = self._parts.get(end)
        if known is not None and known[1] == zero:
            start = min(start, known[0])
        first, last = bisect_right(self._ends, start), bisect_right(self._ends, end)
        for old in self._ends[first:last]:
            del self._parts[old]
        for behind in self._ends[last : last + 1]:
            self._parts[behind] = max(self._parts[behind][0], end), self._parts[behind][1]
        self._ends[first:last] = [end]
        self._parts[end] = start, zero

    def numbers(self) -> array[int]:
        """Three for each part, by their ends."""
        return array("q", [number for end in self._ends for number in (self._parts[end][0], end, self._parts[end][1])])


def asked(runs: Rows, holes: Holes, most: int, ask: Callable[[int], tuple[int, int]]) -> Rows:
    """Split runs of data where the file below has holes: those bytes are zero although they are allocated.

    `ask` tells of a place that is not known yet: (where that part ends, ZERO or 0).
    """
    rows = Rows(most)
    position = array("q", (0, 0, -1))
    pointer = Pointer(position, "q", writable=True)
    while True:
        numbers = holes.numbers()
        arguments = (Pointer(numbers, "q"), len(numbers) // 3, pointer, rows._state_pointer, rows._pointer, most)
        _ask.loaded()(runs._pointer, len(runs), *arguments)
        if position[2] < 0:
            return rows
        holes.add(position[2], *ask(position[2]))


def undetermined(rows: Rows) -> tuple[int, int]:
    """From the first to the last row that nothing determines yet: (start, end), guest offsets; (0, 0) where all is known."""
    found = array("q", (0, 0))
    _undetermined.loaded()(rows._pointer, len(rows), Pointer(found, "q", writable=True))
    return found[0], found[1]


def merged(upper: Rows, lower: Rows) -> Rows:
    """`upper`, and `lower` where that leaves it open; `lower` covers all such rows and begins with the first of them."""
    found = Rows(len(upper) + len(lower) + 1)
    arguments = (upper._pointer, len(upper), lower._pointer, len(lower))
    _merge.loaded()(*arguments, found._state_pointer, found._pointer, found.most)
    return found


def units_with_data(rows: Rows, shift: int, counted: int) -> tuple[int, int]:
    """(how many units of ``1 << shift`` bytes hold any data, the first that was not looked at).

    Of those before `counted`, the latter of the rows before, nothing is said.
    """
    kernel = _units.worth(len(rows) * _SAVED_PER_UNIT_ROW)
    if kernel is None:
        return units_with_data_definition(rows, shift, counted)
    found = array("q", (0, counted))
    kernel(rows._pointer, len(rows), shift, Pointer(found, "q", writable=True))
    return found[0], found[1]


def units_with_data_definition(rows: Rows, shift: int, counted: int) -> tuple[int, int]:
    """What `units_with_data` answers."""
    units = 0
    for offset, length, _place, word in rows:
        if not word & ZERO:
            first = max(offset >> shift, counted)
            counted = ((offset + length - 1) >> shift) + 1
            units += counted - first
    return units, counted


def actions(rows: Rows, meaning: tuple[int, int, int, int]) -> list[tuple[int, int, int]]:
    """(offset, length, what to do) of ranges, neighbours joined; `meaning` says what, by twice PRESENT plus ZERO."""
    kernel = _actions.worth(len(rows) * _SAVED_PER_ACTION)
    if kernel is None:
        return actions_definition(rows, meaning)
    found = array("q", bytes(8 * 3 * len(rows)))
    count = kernel(rows._pointer, len(rows), Pointer(array("q", meaning), "q"), Pointer(found, "q", writable=True))
    numbers = found[: count * 3].tolist()
    return list(zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True))


def actions_definition(rows: Rows, meaning: tuple[int, int, int, int]) -> list[tuple[int, int, int]]:
    """What `actions` answers."""
    found: list[tuple[int, int, int]] = []
    for offset, length, _place, word in rows:
        what = meaning[word >> 1 & 2 | word >> 1 & 1]
        if found and found[-1][2] == what:
            start, before, _what = found[-1]
            found[-1] = start, before + length, what
        else:
            found.append((offset, length, what))
    return found


def json_text(rows: Rows, buffer: bytearray) -> Iterator[memoryview | bytes]:
    """Rows as the entries of a JSON array in qemu-img's layout, a comma and a line break before each: parts of the text.

    They may lie in `buffer`, until the next is asked for.
    """
    kernel = _json.worth(len(rows) * _SAVED_PER_TEXT)
    if kernel is None:
        yield json_text_definition(rows)
        return
    texts, out = Pointer(_TEXTS, "B"), Pointer(buffer, "B", writable=True)
    assert out.length > _LONGEST_TEXT
    position = array("q", (0, 0))
    pointer = Pointer(position, "q", writable=True)
    while position[0] < len(rows):
        kernel(rows._pointer, len(rows), texts, out, out.length - _LONGEST_TEXT, pointer)
        yield memoryview(buffer)[: position[1]]


def json_text_definition(rows: Rows) -> bytes:
    """What `json_text` gives, in one part."""
    lines = []
    for offset, length, place, word in rows:
        present, zero, data = ("true" if word & flag else "false" for flag in (PRESENT, ZERO, DATA))
        where = f', "offset": {place}' if word & PLACED else ""
        lines.append(
            f',\n{{ "start": {offset}, "length": {length}, "depth": {word >> DEPTH_SHIFT}, "present": {present}, '
            f'"zero": {zero}, "data": {data}{where}}}'
        )
    return "".join(lines).encode()


_SLOT: Final = 64
_LONGEST_TEXT: Final = 256
"""More bytes than one entry has."""


def _texts() -> bytes:
    texts = [b',\n{ "start": ', b', "length": ', b', "depth": ', b', "offset": ', b"}", b"", b"", b""]
    for flags in range(8):
        words = [b"true" if flags & flag else b"false" for flag in (PRESENT, ZERO, DATA)]
        texts.append(b', "present": %s, "zero": %s, "data": %s' % tuple(words))
    return b"".join((bytes((len(text),)) + text).ljust(_SLOT, b"\0") for text in texts)


_TEXTS: Final = _texts()
"""Slots of _SLOT bytes: a length and a text."""


@family.helper
def _append(rows: Any, state: Any, most: int, offset: int, length: int, place: int, word: int) -> int:
    """Add a row to the state[0] that there are; 1 where there is no room for it."""
    n = state[0]
    at = (n - 1) * 4
    if n > 0 and rows[at + 3] == word and (place < 0 or rows[at + 2] + rows[at + 1] == place):
        rows[at + 1] += length
        return 0
    if n >= most:
        return 1
    at += 4
    rows[at] = offset
    rows[at + 1] = length
    rows[at + 2] = place
    rows[at + 3] = word
    state[0] = n + 1
    return 0


@family.helper
def _add(rows: Any, state: Any, most: int, offset: int, length: int, host: int, word: int, told: int) -> int:
    """The same, of a run whose place is `host` if it has one that may be told."""
    word &= told
    return _append(rows, state, most, offset, length, host if word & 8 else -1, word)


@family.kernel("i64(u64*, i64, i64, u64*, i64*, i64*, i64)")
def _standard(words: Any, n: int, guest: int, facts: Any, state: Any, rows: Any, most: int) -> int:
    """Add the rows of entries state[1] to `n`, as far as there is room and no fault; state[1] is then where it ended."""
    bits = i64(facts[0])
    size = 1 << bits
    mask = size - 1
    allocated = facts[1]
    zero_allowed = facts[2] != _NONE
    external = facts[3] != _NONE
    data = i64(facts[4])
    told = i64(facts[5])
    index = state[1]
    while index < n:
        entry = words[index]
        offset = guest + (index << bits)
        host = i64(entry & _OFFSET)
        placed = False
        if entry & _COMPRESSED_FLAG != _NONE:
            if external:
                break
            word = 0x15
        elif entry & _ZERO_FLAG != _NONE:
            if not zero_allowed:
                break
            placed = host != 0
            word = 0x0E if placed else 0x06
        elif entry & allocated == _NONE:
            if entry & _NOT_COPIED != _NONE:
                break
            word = 0
        else:
            placed = True
            word = data
        if placed and (host & mask != 0 or (external and host != offset)):
            break
        if _add(rows, state, most, offset, size, host, word, told) != 0:
            break
        index += 1
    state[1] = index
    return 0


@family.kernel("i64(u64*, i64, i64, u64*, i64*, i64*, i64)")
def _extended(words: Any, n: int, guest: int, facts: Any, state: Any, rows: Any, most: int) -> int:
    """The same of entries of two words."""
    bits = i64(facts[0])
    size = 1 << bits
    allocated = facts[1]
    external = facts[3] != _NONE
    data = i64(facts[4])
    told = i64(facts[5])
    part = size >> 5
    index = state[1]
    while index < n:
        if state[0] + 33 > most:
            break
        entry = words[index * 2]
        bitmap = words[index * 2 + 1]
        offset = guest + (index << bits)
        if entry & _COMPRESSED_FLAG != _NONE:
            if external:
                break
            _add(rows, state, most, offset, size, -1, 0x15, told)
            index += 1
            continue
        host = i64(entry & _OFFSET)
        placed = entry & allocated != _NONE
        full = bitmap & _LOW_HALF
        zero = bitmap >> U64(32)
        if entry & _ZERO_FLAG != _NONE or host & (size - 1) != 0 or full & zero != _NONE:
            break
        if not placed and (entry & _NOT_COPIED != _NONE or full != _NONE):
            break
        if external and placed and host != offset:
            break
        in_place = 8 if placed else 0
        if bitmap == _NONE:
            _add(rows, state, most, offset, size, host, in_place, told)
        elif full == _LOW_HALF:
            _add(rows, state, most, offset, size, host, data, told)
        elif zero == _LOW_HALF:
            _add(rows, state, most, offset, size, host, 6 | in_place, told)
        else:
            for number in range(32):
                shift = U64(number)
                word = in_place
                if full >> shift & _ONE != _NONE:
                    word = data
                elif zero >> shift & _ONE != _NONE:
                    word = 6 | in_place
                _add(rows, state, most, offset + number * part, part, host + number * part, word, told)
        index += 1
    state[1] = index
    return 0


@family.kernel("i64(i64*, i64, i64, i64, i64*, i64*, i64)")
def _label(runs: Any, n: int, depth: int, zero_from: int, state: Any, rows: Any, most: int) -> int:
    for index in range(n):
        at = index * 4
        offset = runs[at]
        length = runs[at + 1]
        place = runs[at + 2]
        word = runs[at + 3] & 0x1F
        if word & 6 == 0:
            before = min(max(zero_from - offset, 0), length)
            if before > 0:
                _append(rows, state, most, offset, before, -1, depth)
                offset += before
                length -= before
                place = place + before if place >= 0 else -1
            word |= 2
        if length > 0:
            _append(rows, state, most, offset, length, place, word | depth)
    return 0


@family.kernel("i64(i64*, i64, i64*, i64, i64*, i64*, i64*, i64)")
def _ask(runs: Any, n: int, parts: Any, n_parts: int, position: Any, state: Any, rows: Any, most: int) -> int:
    """Add rows from byte position[1] of run position[0] on; position[2] is the place that is not known, or -1 at the end."""
    index = position[0]
    done = position[1]
    position[2] = -1
    while index < n:
        at = index * 4
        length = runs[at + 1] - done
        place = runs[at + 2] + done if runs[at + 2] >= 0 else -1
        word = runs[at + 3] & 0x1F
        if runs[at + 3] & 0x41 == 0x41:
            low = 0
            high = n_parts
            while low < high:  # the first part that ends behind the place
                middle = (low + high) >> 1
                if parts[middle * 3 + 1] > place:
                    high = middle
                else:
                    low = middle + 1
            if low == n_parts or parts[low * 3] > place:
                position[2] = place
                break
            length = min(length, parts[low * 3 + 1] - place)
            word |= parts[low * 3 + 2]
        if _append(rows, state, most, runs[at] + done, length, place, word) != 0:
            break
        done += length
        if done == runs[at + 1]:
            index += 1
            done = 0
    position[0] = index
    position[1] = done
    return 0


@family.kernel("i64(i64*, i64, i64*)")
def _undetermined(rows: Any, n: int, found: Any) -> int:
    for index in range(n):
        at = index * 4
        if rows[at + 3] & 6 == 0:
            if found[1] == 0:
                found[0] = rows[at]
            found[1] = rows[at] + rows[at + 1]
    return 0


@family.kernel("i64(i64*, i64, i64*, i64, i64*, i64*, i64)")
def _merge(upper: Any, n: int, lower: Any, m: int, state: Any, rows: Any, most: int) -> int:
    below = 0
    for index in range(n):
        at = index * 4
        offset = upper[at]
        end = offset + upper[at + 1]
        if upper[at + 3] & 6 != 0:
            _append(rows, state, most, offset, upper[at + 1], upper[at + 2], upper[at + 3])
            continue
        while offset < end and below < m:
            under = below * 4
            stop = lower[under] + lower[under + 1]
            if stop <= offset:
                below += 1
                continue
            cut = offset - lower[under]
            place = lower[under + 2] + cut if lower[under + 2] >= 0 else -1
            stop = min(stop, end)
            _append(rows, state, most, offset, stop - offset, place, lower[under + 3])
            offset = stop
    return 0


@family.kernel("i64(i64*, i64, i64, i64*)")
def _units(rows: Any, n: int, shift: int, found: Any) -> int:
    units = found[0]
    counted = found[1]
    for index in range(n):
        at = index * 4
        if rows[at + 3] & 2 == 0:
            first = max(rows[at] >> shift, counted)
            counted = ((rows[at] + rows[at + 1] - 1) >> shift) + 1
            units += counted - first
    found[0] = units
    found[1] = counted
    return 0


@family.kernel("i64(i64*, i64, i64*, i64*)")
def _actions(rows: Any, n: int, meaning: Any, found: Any) -> int:
    count = 0
    for index in range(n):
        at = index * 4
        word = rows[at + 3]
        what = meaning[(word >> 1) & 2 | (word >> 1) & 1]
        to = count * 3
        if count > 0 and found[to - 1] == what:
            found[to - 2] += rows[at + 1]
            continue
        found[to] = rows[at]
        found[to + 1] = rows[at + 1]
        found[to + 2] = what
        count += 1
    return count


@family.helper
def _put_text(out: Any, at: int, texts: Any, slot: int) -> int:
    """Write the text in a slot; where it ends."""
    start = slot * 64
    length = i64(texts[start])
    for index in range(length):
        out[at + index] = texts[start + 1 + index]
    return at + length


@family.helper
def _put_number(out: Any, at: int, number: int) -> int:
    digits = 1
    rest = number
    while rest >= 10:
        rest //= 10
        digits += 1
    rest = number
    for index in range(digits):
        out[at + digits - 1 - index] = 48 + rest % 10
        rest //= 10
    return at + digits


@family.kernel("i64(i64*, i64, u8*, u8*, i64, i64*)")
def _json(rows: Any, n: int, texts: Any, out: Any, most: int, position: Any) -> int:
    """Write rows from number position[0] on until `most` bytes are exceeded; the numbers of rows and bytes written."""
    index = position[0]
    at = 0
    while index < n and at <= most:
        row = index * 4
        word = rows[row + 3]
        at = _put_number(out, _put_text(out, at, texts, 0), rows[row])
        at = _put_number(out, _put_text(out, at, texts, 1), rows[row + 1])
        at = _put_number(out, _put_text(out, at, texts, 2), word >> 8)
        at = _put_text(out, at, texts, 8 + (word & 7))
        if word & 8 != 0:
            at = _put_number(out, _put_text(out, at, texts, 3), rows[row + 2])
        at = _put_text(out, at, texts, 4)
        index += 1
    position[0] = index
    position[1] = at
    return 0
