"""The qcow2 header on its way to disk: nothing unknown is lost, and a crash leaves the old header or the new one."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blocklib.errors import UsageError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header import Extension, Header, feature_name_table, header_span, parse_header
from blocklib.formats.qcow2.header_write import HeaderWrite, plan_rewrite, serialize_header
from blocklib.policy import Limits

NAMES = Extension(layout.EXTENSION_FEATURE_NAMES, feature_name_table())
FORMAT = Extension(layout.EXTENSION_BACKING_FORMAT, b"qcow2")
BITMAPS = Extension(layout.EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 0, 32, 0x50000))
LIMITS = Limits()


def header(*extensions: Extension, name: bytes | None = None, cluster_bits: int = 16, **fields: int) -> Header:
    cluster_size = 1 << cluster_bits
    made = Header(
        cluster_bits=cluster_bits,
        l1_size=1,
        l1_table_offset=3 * cluster_size,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=1,
        extensions=list(extensions),
        backing_name_bytes=name,
    )
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def parse(data: bytes) -> Header:
    return parse_header(data, limits=LIMITS)


def on_disk(data: bytes, cluster_bits: int) -> bytes:
    """The header cluster, with something behind the header that nobody refers to."""
    return data + b"\xaa" * ((1 << cluster_bits) - len(data))


def apply(write: HeaderWrite, cluster: bytes) -> bytes:
    image = bytearray(cluster)
    for offset, part in write.rest:
        image[offset : offset + len(part)] = part
    image[: len(write.first)] = write.first
    return bytes(image)


def torn(write: HeaderWrite, cluster: bytes, seed: int) -> bytes:
    """The cluster after a crash in the middle of `rest`: some of its sectors are new, the others old."""
    rng = random.Random(seed)
    whole = bytearray(cluster)
    for offset, part in write.rest:
        whole[offset : offset + len(part)] = part
    sectors = [(whole if rng.random() < 0.5 else cluster)[start : start + 512] for start in range(0, len(cluster), 512)]
    return b"".join(bytes(sector) for sector in sectors)


def without_names(found: Header) -> list[Extension]:
    return [item for item in found.extensions if item.type != layout.EXTENSION_FEATURE_NAMES]


def area_end(found: Header) -> int:
    """Where the end marker ends at the earliest: without the feature names."""
    return found.header_length + sum(layout.extension_span(len(item.data)) for item in without_names(found)) + 8


# Laying out -----------------------------------------------------------------------------------------------------------


def test_fresh_header_is_one_sector_with_all_names() -> None:
    data = serialize_header(header(NAMES))
    assert len(data) == 512
    assert parse(data) == header(NAMES)


def test_parts_lie_in_the_order_of_what_an_image_cannot_do_without() -> None:
    unknown = [Extension(0xAABBCCDD, b"1"), Extension(7, b"22"), Extension(0xAABBCCDD, b"333")]
    data_file = Extension(layout.EXTENSION_DATA_FILE, b"data")
    pointer = Extension(layout.EXTENSION_ENCRYPTION, struct.pack(">QQ", 0x40000, 512))
    shuffled = header(NAMES, unknown[0], BITMAPS, unknown[1], pointer, data_file, unknown[2], FORMAT, crypt_method=2)
    found = parse(serialize_header(shuffled))
    assert found.extensions == [FORMAT, data_file, pointer, BITMAPS, *unknown, NAMES]


def test_backing_name_stays_in_the_first_sector_at_the_cost_of_the_feature_names() -> None:
    found = parse(serialize_header(header(NAMES, FORMAT, name=b"base.qcow2")))
    assert found.backing_name == "base.qcow2"
    assert found.backing_file_offset + found.backing_file_size <= 512
    assert found.extensions == [FORMAT]


def test_short_feature_table_and_backing_name_share_the_first_sector() -> None:
    few = Extension(layout.EXTENSION_FEATURE_NAMES, feature_name_table()[:96])
    found = parse(serialize_header(header(few, FORMAT, name=b"base.qcow2")))
    assert found.extensions == [FORMAT, few]
    assert found.backing_file_offset < 512


def test_long_backing_name_lies_behind_the_first_sector_and_the_feature_names_stay() -> None:
    name = b"n" * 1023
    data = serialize_header(header(NAMES, name=name))
    found = parse(data)
    assert found == header(NAMES, name=name)
    assert found.backing_file_offset == 512
    assert len(data) == 1536


def test_name_that_starts_in_the_first_sector_is_used_where_the_cluster_is_small() -> None:
    made = header(NAMES, name=b"n" * 800, cluster_bits=10)
    found = parse(serialize_header(made))
    assert found.backing_name_bytes == made.backing_name_bytes
    assert found.extensions == []


def test_what_does_not_fit_the_header_cluster_is_refused() -> None:
    assert len(serialize_header(header(name=b"n" * 392, cluster_bits=9))) == 512
    with pytest.raises(UsageError, match="393 bytes"):
        serialize_header(header(name=b"n" * 393, cluster_bits=9))
    with pytest.raises(UsageError):
        serialize_header(header(Extension(7, bytes(65536))))


def test_version_2_ends_at_byte_72() -> None:
    made = header(FORMAT, name=b"base", version=2, header_length=72)
    data = serialize_header(made)
    assert parse(data) == made
    assert data[72:80] == struct.pack(">II", layout.EXTENSION_BACKING_FORMAT, 5)


def test_compression_type_needs_a_header_that_has_room_for_it() -> None:
    zstd = header(compression_type=1, incompatible_features=layout.INCOMPATIBLE_COMPRESSION_TYPE)
    assert parse(serialize_header(zstd)) == zstd
    with pytest.raises(UsageError):
        serialize_header(replace(zstd, header_length=104))


def test_unknown_fields_need_a_header_that_has_room_for_them() -> None:
    made = replace(header(header_length=128), unknown_fields=b"\1\0\2")
    assert parse(serialize_header(made)) == made
    with pytest.raises(UsageError):
        serialize_header(replace(made, unknown_fields=b"x" * 24))


unknown_extensions = st.builds(
    Extension,
    st.integers(1, 0xFFFFFFFF).filter(lambda kind: kind not in layout.EXTENSION_NAMES),
    st.binary(max_size=200),
)
names = st.one_of(st.none(), st.binary(min_size=1, max_size=1023).map(lambda raw: raw.replace(b"\0", b"\1")))


@st.composite
def headers(draw: st.DrawFn, cluster_bits: int | None = None) -> Header:
    version = draw(st.sampled_from([2, 3, 3, 3]))
    extensions = draw(st.lists(unknown_extensions, max_size=4))
    for known in (FORMAT, BITMAPS, NAMES, Extension(layout.EXTENSION_DATA_FILE, b"data.raw")):
        if draw(st.booleans()):
            extensions.insert(draw(st.integers(0, len(extensions))), known)
    made = header(
        *extensions,
        name=draw(names),
        cluster_bits=draw(st.integers(12, 21)) if cluster_bits is None else cluster_bits,
        version=version,
        size=draw(st.integers(0, 1 << 20)),
        header_length=72 if version == 2 else draw(st.sampled_from([104, 112, 112, 160])),
        l1_size=draw(st.integers(4, 1000)) * 64,
    )
    if version == 3:
        made.compatible_features = draw(st.integers(0, (1 << 64) - 1))
        made.autoclear_features = draw(st.integers(0, (1 << 64) - 1))
        made.refcount_order = draw(st.integers(0, 6))
        if made.header_length > layout.HEADER_V3_LENGTH:
            made.unknown_fields = draw(st.binary(max_size=made.header_length - 105)).rstrip(b"\0")
    return made


@given(headers())
def test_parsed_header_survives_any_number_of_round_trips(made: Header) -> None:
    once = parse(serialize_header(made))
    assert replace(once, extensions=[]) == replace(made, extensions=[])
    assert sorted(map(repr, without_names(once))) == sorted(map(repr, without_names(made)))
    assert [x for x in once.extensions if x.type not in layout.EXTENSION_NAMES] == [
        x for x in made.extensions if x.type not in layout.EXTENSION_NAMES
    ]
    assert parse(serialize_header(once)) == once
    assert serialize_header(parse(serialize_header(once))) == serialize_header(once)


# Rewriting ------------------------------------------------------------------------------------------------------------


def qemu_layout(made: Header, gap: int = 0) -> bytes:
    """As QEMU lays it out: extensions in the header's order, the end marker, and straight behind it the name."""
    fields = bytearray(serialize_header(replace(made, extensions=[], backing_name_bytes=None))[: made.header_length])
    for item in made.extensions:
        fields += struct.pack(">II", item.type, len(item.data)) + item.data + bytes(-len(item.data) % 8)
    fields += bytes(8 + gap)
    if made.backing_name_bytes is not None:
        struct.pack_into(">QI", fields, 8, len(fields), len(made.backing_name_bytes))
        fields += made.backing_name_bytes
    return bytes(fields)


def test_change_of_fields_alone_moves_nothing() -> None:
    made = header(FORMAT, NAMES, name=b"base.qcow2")
    cluster = on_disk(qemu_layout(made), 16)
    write = plan_rewrite(replace(made, incompatible_features=1, l1_size=8), cluster[: header_span(cluster)])
    assert (write.rest, write.atomic) == ((), True)
    assert apply(write, cluster)[512:] == cluster[512:]
    found = parse(apply(write, cluster))
    assert found == replace(made, incompatible_features=1, l1_size=8)
    assert found.backing_file_offset == 0x210


def test_rewrite_of_the_same_header_changes_no_byte() -> None:
    made = header(FORMAT, NAMES, name=b"base.qcow2")
    cluster = on_disk(qemu_layout(made), 16)
    assert apply(plan_rewrite(parse(cluster), cluster), cluster) == cluster


def test_new_backing_name_in_an_image_of_qemu_is_one_write() -> None:
    made = header(FORMAT, NAMES, name=b"base.qcow2")
    cluster = on_disk(qemu_layout(made), 16)
    write = plan_rewrite(replace(made, backing_name_bytes=b"other.qcow2"), cluster)
    assert (write.rest, write.atomic) == ((), True)
    assert parse(apply(write, cluster)).backing_name == "other.qcow2"
    assert write.header == parse(apply(write, cluster))
    assert without_names(write.header) == write.header.extensions


def test_bitmaps_extension_that_pushes_the_feature_names_over_the_sector_is_atomic() -> None:
    cluster = on_disk(serialize_header(header(NAMES)), 16)
    added = plan_rewrite(header(NAMES, BITMAPS), cluster)
    assert added.atomic
    assert added.header.extensions == [BITMAPS, NAMES]
    cluster = apply(added, cluster)
    other = Extension(layout.EXTENSION_BITMAPS, struct.pack(">IIQQ", 2, 0, 64, 0x90000))
    changed = plan_rewrite(replace(added.header, extensions=[other, NAMES]), cluster)
    assert (changed.rest, changed.atomic) == ((), True)
    removed = plan_rewrite(replace(added.header, extensions=[NAMES]), apply(changed, cluster))
    assert (removed.rest, removed.atomic) == ((), True)
    assert parse(apply(removed, cluster)).extensions == [NAMES]


def test_feature_names_are_given_up_before_atomicity() -> None:
    cluster = on_disk(serialize_header(header(NAMES, BITMAPS)), 16)
    write = plan_rewrite(header(NAMES, BITMAPS, Extension(layout.EXTENSION_DATA_FILE, b"x" * 60)), cluster)
    assert write.atomic
    assert write.rest == ()
    assert NAMES not in write.header.extensions


def test_long_names_take_turns_in_the_header_cluster() -> None:
    first, second, third = b"a" * 1000, b"b" * 1000, b"c" * 1000
    cluster = on_disk(serialize_header(header(name=first)), 12)
    offsets = []
    for name in (second, third, first):
        write = plan_rewrite(header(name=name, cluster_bits=12), replace_cluster_bits(cluster, 12))
        assert write.atomic
        cluster = apply(write, cluster)
        assert parse(cluster).backing_name_bytes == name
        offsets.append(write.header.backing_file_offset)
    assert offsets == [1512, 512, 1512]


def replace_cluster_bits(cluster: bytes, cluster_bits: int) -> bytes:
    changed = bytearray(cluster)
    struct.pack_into(">I", changed, layout.FIELD_OFFSETS["cluster_bits"], cluster_bits)
    return bytes(changed)


def test_long_name_stays_where_it_is_when_only_extensions_change() -> None:
    cluster = on_disk(serialize_header(header(name=b"n" * 1000)), 16)
    write = plan_rewrite(header(FORMAT, name=b"n" * 1000), cluster)
    assert (write.rest, write.atomic) == ((), True)
    assert parse(apply(write, cluster)).backing_format == "qcow2"


def test_cluster_too_small_for_two_long_names_says_so() -> None:
    old = header(name=b"a" * 800, cluster_bits=10)
    cluster = on_disk(serialize_header(old), 10)
    write = plan_rewrite(replace(old, backing_name_bytes=b"b" * 800), cluster)
    assert not write.atomic
    assert parse(apply(write, cluster)).backing_name_bytes == b"b" * 800


def test_version_2_becomes_version_3_in_one_write() -> None:
    old = header(FORMAT, name=b"base", version=2, header_length=72)
    cluster = on_disk(qemu_layout(old), 16)
    write = plan_rewrite(replace(old, version=3, header_length=112, compatible_features=1), cluster)
    assert (write.rest, write.atomic) == ((), True)
    assert parse(apply(write, cluster)) == replace(old, version=3, header_length=112, compatible_features=1)


def test_header_on_disk_may_be_shorter_than_a_sector() -> None:
    old = header(version=2, header_length=72)
    write = plan_rewrite(replace(old, size=512), qemu_layout(old)[:72])
    assert len(write.first) == 512
    assert parse(write.first) == replace(old, size=512)


@given(headers(12), headers(12), st.integers(0, 64), st.booleans(), st.integers())
def test_crash_during_a_rewrite_leaves_the_old_header_or_the_new_one(
    old: Header, new: Header, gap: int, by_qemu: bool, seed: int
) -> None:
    before = qemu_layout(old, gap) if by_qemu else serialize_header(old)
    assume(len(before) <= 4096)
    cluster = on_disk(before, 12)
    old = parse(cluster)
    write = plan_rewrite(new, cluster[: header_span(cluster)])
    after = apply(write, cluster)
    assert parse(after) == write.header
    assert parse(after).backing_file_offset == write.header.backing_file_offset
    assert replace(write.header, extensions=[]) == replace(new, extensions=[])
    assert sorted(map(repr, without_names(write.header))) == sorted(map(repr, without_names(new)))
    # Extensions that fill more than a sector can only be changed in place; nobody writes such, but it may come to us.
    assert write.atomic or area_end(new) > 512
    if write.atomic:
        assert parse(torn(write, cluster, seed)) == old


@given(headers(12), st.integers())
def test_image_can_be_rewritten_again_and_again(first: Header, seed: int) -> None:
    rng = random.Random(seed)
    cluster = on_disk(serialize_header(first), 12)
    held = parse(cluster)
    for step in range(5):
        changed = replace(held, l1_size=held.l1_size + 1)
        changed.backing_name_bytes = rng.choice([None, b"%d" % step, bytes([65 + step]) * rng.randrange(1, 1024)])
        write = plan_rewrite(changed, cluster[: header_span(cluster)])
        assert write.atomic or area_end(changed) > 512
        if write.atomic:
            assert parse(torn(write, cluster, seed + step)) == held
        cluster = apply(write, cluster)
        held = parse(cluster)
        assert held == write.header
