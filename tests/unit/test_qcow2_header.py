"""The qcow2 header parser: what it reads, what it refuses and in which words."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklib.errors import (
    FormatMismatchError,
    ImageCorruptError,
    ImageError,
    ImageLimitError,
    UnsupportedFeatureError,
    UsageError,
)
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.header import (
    Extension,
    Header,
    check_supported,
    feature_name_table,
    header_span,
    parse_header,
)
from blocklib.policy import Limits

LIMITS = Limits()
CLUSTER = 65536
FILE_LENGTH = 0x30008

V2_WITH_BACKING = bytes.fromhex(
    "514649fb0000000200000000000000600000000a000000100000000000100000"
    "0000000000000001000000000003000000000000000100000000000100000000"
    "0000000000000000e2792aca0000000571636f77320000000000000000000000"
    "626173652e71636f773200000000000000000000000000000000000000000000"
)
"""`qemu-img create -f qcow2 -o compat=0.10 -b base.qcow2 -F qcow2`, version 7.2."""

FIELD_FORMATS = {
    **dict.fromkeys(layout.FIELD_OFFSETS, ">I"),
    **dict.fromkeys(
        (
            "backing_file_offset",
            "size",
            "l1_table_offset",
            "refcount_table_offset",
            "snapshots_offset",
            "incompatible_features",
            "compatible_features",
            "autoclear_features",
        ),
        ">Q",
    ),
    "compression_type": ">B",
}


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def image(
    *extensions: bytes,
    name: bytes = b"",
    name_offset: int | None = None,
    end: bytes = bytes(8),
    length: int = CLUSTER,
    fields: Mapping[str, int] | None = None,
    **more_fields: int,
) -> bytes:
    """A header cluster of a 1 MiB image; `fields` and further keywords override header fields by name."""
    fields = {**(fields or {}), **more_fields}
    data = bytearray(length)
    area = b"".join(extensions) + end
    header_length = min(fields.get("header_length", 112), length - len(area))
    data[header_length : header_length + len(area)] = area
    struct.pack_into(">4sI", data, 0, b"QFI\xfb", 3)
    if name:
        name_offset = header_length + len(area) if name_offset is None else name_offset
        data[name_offset : name_offset + len(name)] = name
    values = {
        "backing_file_offset": name_offset or 0,
        "backing_file_size": len(name),
        "cluster_bits": 16,
        "size": 1 << 20,
        "l1_size": 1,
        "l1_table_offset": 0x30000,
        "refcount_table_offset": 0x10000,
        "refcount_table_clusters": 1,
        "refcount_order": 4,
        "header_length": 112,
        **fields,
    }
    for field, value in values.items():
        struct.pack_into(FIELD_FORMATS[field], data, layout.FIELD_OFFSETS[field], value)
    return bytes(data)


def parse(data: bytes) -> Header:
    return parse_header(data, limits=LIMITS, file_length=FILE_LENGTH)


# What is read ---------------------------------------------------------------------------------------------------------


def test_every_field_of_version_3_is_read() -> None:
    header = parse(
        image(
            autoclear_features=1 << 40,
            compatible_features=3,
            incompatible_features=layout.INCOMPATIBLE_DIRTY | layout.INCOMPATIBLE_COMPRESSION_TYPE,
            compression_type=1,
            refcount_order=6,
            nb_snapshots=2,
            snapshots_offset=0x20000,
        )
    )
    assert header == Header(
        version=3,
        cluster_bits=16,
        size=1 << 20,
        l1_size=1,
        l1_table_offset=0x30000,
        refcount_table_offset=0x10000,
        refcount_table_clusters=1,
        nb_snapshots=2,
        snapshots_offset=0x20000,
        incompatible_features=9,
        compatible_features=3,
        autoclear_features=1 << 40,
        refcount_order=6,
        header_length=112,
        compression_type=1,
    )
    assert header.geometry().refcount_bits == 64


def test_version_2_has_extensions_and_a_backing_name() -> None:
    header = parse(V2_WITH_BACKING)
    assert (header.version, header.backing_name, header.backing_format) == (2, "base.qcow2", "qcow2")
    assert (header.backing_file_offset, header.backing_file_size) == (0x60, 10)
    assert header.size == 1 << 20


def test_version_2_gets_its_defaults_by_version_and_never_from_byte_72_on() -> None:
    data = bytearray(image(version=2, header_length=72))
    data[72:112] = extension(0x12345678, b"\xff" * 32)  # what version 3 would read as features, order and length
    header = parse(bytes(data))
    assert header.incompatible_features == header.compatible_features == header.autoclear_features == 0
    assert (header.refcount_order, header.header_length, header.compression_type) == (4, 72, 0)
    assert header.extensions == [Extension(0x12345678, b"\xff" * 32)]


def test_header_of_104_bytes_has_no_compression_type() -> None:
    header = parse(image(extension(layout.EXTENSION_BACKING_FORMAT, b"raw"), header_length=104))
    assert (header.compression_type, header.unknown_fields, header.backing_format) == (0, b"", "raw")


def test_unknown_fields_and_extensions_are_kept_in_order() -> None:
    unknown = [Extension(0xAABBCCDD, b"one"), Extension(0xAABBCCDD, b"two"), Extension(1, b"")]
    data = bytearray(image(*(extension(item.type, item.data) for item in unknown), header_length=128))
    data[105:128] = b"\1\2\3".ljust(23, b"\0")
    header = parse(bytes(data))
    assert header.unknown_fields == b"\1\2\3"
    assert header.header_length == 128
    assert header.extensions == unknown


def test_names_of_all_extensions_are_decoded() -> None:
    table = b"\0\x09future feature".ljust(48, b"\0") + b"\2\1" + b"x" * 46 + b"\1"  # the odd byte is no entry
    header = parse(
        image(
            extension(layout.EXTENSION_DATA_FILE, b"data.raw"),
            extension(layout.EXTENSION_BACKING_FORMAT, b"qcow2"),
            extension(layout.EXTENSION_FEATURE_NAMES, table),
            name=b"base.qcow2",
        )
    )
    assert header.backing_name == "base.qcow2"
    assert header.backing_format == "qcow2"
    assert header.data_file_name == "data.raw"
    assert header.feature_names == {(0, 9): "future feature", (2, 1): "x" * 46}


def test_extension_area_ends_at_the_end_marker_whatever_its_length_says() -> None:
    data = image(end=struct.pack(">II", 0, 77) + extension(layout.EXTENSION_BACKING_FORMAT, b"raw"))
    assert parse(data).extensions == []


def test_extension_area_ends_at_the_backing_name_without_an_end_marker() -> None:
    header = parse(image(extension(layout.EXTENSION_BACKING_FORMAT, b"raw"), end=b"", name=b"base.img"))
    assert (header.backing_format, header.backing_name) == ("raw", "base.img")


def test_file_that_ends_behind_the_header_has_no_extensions() -> None:
    assert parse_header(image()[:112], limits=LIMITS).extensions == []


@pytest.mark.parametrize("raw", [b"", b"\0\0\0"])
def test_empty_backing_name_is_no_backing_file(raw: bytes) -> None:
    header = parse(image(name=raw, backing_file_offset=4096))
    assert header.backing_name is None
    assert header.backing_name_bytes is None


def test_backing_size_means_nothing_without_an_offset() -> None:
    assert parse(image(backing_file_size=0xFFFFFFFF)).backing_name is None


@pytest.mark.parametrize("offset", [120, 512, 5000, CLUSTER - 1023])
def test_backing_name_may_lie_anywhere_in_the_first_cluster(offset: int) -> None:
    name = b"n" * 1023
    assert parse(image(name=name, name_offset=offset)).backing_name_bytes == name


def test_name_that_is_not_utf_8_keeps_its_bytes() -> None:
    raw = b"b\xff\xfe.img"
    header = parse(image(name=raw))
    assert header.backing_name_bytes == raw
    name = header.backing_name
    header.backing_name = name
    assert header.backing_name_bytes == raw


def test_trailing_nuls_are_no_part_of_a_name_but_are_kept() -> None:
    header = parse(image(name=b"base\0\0"))
    assert (header.backing_name, header.backing_name_bytes) == ("base", b"base\0\0")


def test_autoclear_bits_without_their_data_are_accepted() -> None:
    # QEMU opens these; the bits are cleared, or mean nothing, where they would matter.
    header = parse(image(autoclear_features=layout.AUTOCLEAR_BITMAPS | layout.AUTOCLEAR_RAW_EXTERNAL))
    assert header.extension(layout.EXTENSION_BITMAPS) is None


# What is refused ------------------------------------------------------------------------------------------------------


def test_other_magic_is_another_format() -> None:
    with pytest.raises(FormatMismatchError) as caught:
        parse(b"QED\0" + bytes(200))
    assert caught.value.found == repr(b"QED\0")


@pytest.mark.parametrize("length", [4, 8, 71, 72, 103])
def test_header_cut_short_is_corrupt(length: int) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse(image()[:length])
    assert caught.value.structure == "header"
    assert caught.value.found == f"{length} bytes"


def test_empty_file_is_another_format() -> None:
    with pytest.raises(FormatMismatchError):
        parse(b"")


CORRUPT, LIMIT, UNSUPPORTED = ImageCorruptError, ImageLimitError, UnsupportedFeatureError
BAD_FIELDS: list[tuple[type[ImageError], str, int, dict[str, int]]] = [
    *((UNSUPPORTED, "version", value, {}) for value in (0, 1, 4, 0xFFFFFFFF)),
    *((CORRUPT, "cluster_bits", value, {}) for value in (0, 8)),
    *((LIMIT, "cluster_bits", value, {}) for value in (22, 63, 64, 0xFFFFFFFF)),
    (CORRUPT, "cluster_bits", 13, {"incompatible_features": layout.INCOMPATIBLE_EXTENDED_L2}),
    *((CORRUPT, "header_length", value, {}) for value in (0, 72, 103, 105, 116, CLUSTER + 8, 0xFFFFFFF8)),
    *((CORRUPT, "refcount_order", value, {}) for value in (7, 0xFFFFFFFF)),
    (UNSUPPORTED, "crypt_method", 3, {}),
    (CORRUPT, "crypt_method", 2, {}),
    *((LIMIT, "size", value, {}) for value in (1 << 63, (1 << 64) - 1)),
    (CORRUPT, "l1_size", 0, {}),
    (CORRUPT, "l1_size", 1, {"size": (1 << 29) + 1}),
    (LIMIT, "l1_size", (4 << 20) + 1, {}),
    *((CORRUPT, "l1_table_offset", value, {}) for value in (0, 1, 512, 1 << 56, 1 << 63, (1 << 64) - 1, 0x40000)),
    (CORRUPT, "l1_table_offset", 0x30000, {"l1_size": 2}),
    *((CORRUPT, "refcount_table_offset", value, {}) for value in (0, 1, 512, 1 << 56, (1 << 64) - 512, 0x40000)),
    (CORRUPT, "refcount_table_clusters", 0, {}),
    *((LIMIT, "refcount_table_clusters", value, {}) for value in (129, 0xFFFFFFFF)),
    *((LIMIT, "nb_snapshots", value, {}) for value in (65537, 0xFFFFFFFF)),
    (CORRUPT, "snapshots_offset", 5, {}),
    *((CORRUPT, "snapshots_offset", value, {"nb_snapshots": 1}) for value in (0, 1, 1 << 56, 0x40000)),
    (UNSUPPORTED, "incompatible_features", 1 << 5, {}),
    (UNSUPPORTED, "incompatible_features", 1 << 63, {}),
    (CORRUPT, "compression_type", 1, {}),
    (CORRUPT, "compression_type", 0, {"incompatible_features": 8}),
    (UNSUPPORTED, "compression_type", 2, {"incompatible_features": 8}),
    (CORRUPT, "backing_file_offset", CLUSTER + 1, {}),
    (CORRUPT, "backing_file_offset", (1 << 64) - 1, {}),
    (CORRUPT, "backing_file_offset", 111, {}),
    (CORRUPT, "backing_file_size", 1024, {"backing_file_offset": 4096}),
    (CORRUPT, "backing_file_size", 11, {"backing_file_offset": CLUSTER - 10}),
    (CORRUPT, "backing_file_size", 1, {"backing_file_offset": CLUSTER}),
]


@pytest.mark.parametrize(("error", "field", "value", "others"), BAD_FIELDS)
def test_bad_field_is_refused_by_name_and_place(
    error: type[ImageError], field: str, value: int, others: dict[str, int]
) -> None:
    with pytest.raises(error) as caught:
        parse(image(fields={field: value, **others}))
    assert type(caught.value) is error
    assert caught.value.structure == f"header field {field}"
    assert caught.value.host_offset == layout.FIELD_OFFSETS[field]
    assert caught.value.expected
    assert caught.value.found
    assert field in str(caught.value) or isinstance(caught.value, UnsupportedFeatureError)


@pytest.mark.parametrize(
    ("field", "value", "limits"),
    [
        ("cluster_bits", 16, replace(LIMITS, cluster_size=32768)),
        ("size", 1 << 20, replace(LIMITS, virtual_size=(1 << 20) - 1)),
        ("l1_size", 1, replace(LIMITS, l1_bytes=7)),
        ("refcount_table_clusters", 2, replace(LIMITS, refcount_table_bytes=CLUSTER)),
        ("nb_snapshots", 1, replace(LIMITS, snapshots=0)),
    ],
)
def test_callers_limits_are_kept(field: str, value: int, limits: Limits) -> None:
    data = image(fields={field: value})
    with pytest.raises(ImageLimitError) as caught:
        parse_header(data, limits=limits)
    assert caught.value.structure == f"header field {field}"


@pytest.mark.parametrize(
    ("data", "structure"),
    [
        (image(extension(layout.EXTENSION_BACKING_FORMAT, b"x" * 16)), "backing file format name"),
        (image(extension(layout.EXTENSION_BACKING_FORMAT, b"q\0cow2")), "backing file format name"),
        (image(extension(layout.EXTENSION_DATA_FILE, b"data\0.raw")), "external data file name"),
        (image(struct.pack(">II", layout.EXTENSION_DATA_FILE, CLUSTER)), "external data file name"),
        (image(struct.pack(">II", 0xAABBCCDD, 0xFFFFFFFF)), "header extension 0xaabbccdd"),
        (image(extension(0xAABBCCDD, b"x" * 64), name=b"base", name_offset=160), "header extension 0xaabbccdd"),
        (image(*[extension(layout.EXTENSION_BACKING_FORMAT, b"raw")] * 2), "backing file format name"),
        (image(name=b"base\0.qcow2"), "backing file name"),
    ],
)
def test_malformed_extension_or_name_is_refused_by_name_and_place(data: bytes, structure: str) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse(data)
    assert caught.value.structure == structure
    assert caught.value.host_offset is not None
    assert caught.value.expected
    assert caught.value.found


@pytest.mark.parametrize(
    ("crypt_method", "pointer"),
    [
        (2, struct.pack(">QQ", 0, 512)),
        (2, struct.pack(">QQ", 0x40001, 512)),
        (2, struct.pack(">QQ", 0x40000, (1 << 64) - 1)),
        (2, b"short"),
        (0, struct.pack(">QQ", 0x40000, 512)),
        (1, struct.pack(">QQ", 0x40000, 512)),
    ],
)
def test_encryption_pointer_must_fit_the_method(crypt_method: int, pointer: bytes) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse(
            image(
                extension(layout.EXTENSION_DATA_FILE, b"d"),
                extension(layout.EXTENSION_ENCRYPTION, pointer),
                crypt_method=crypt_method,
            )
        )
    if crypt_method == layout.CRYPT_LUKS:
        assert caught.value.structure == "full disk encryption header pointer"
        assert caught.value.host_offset == 128
    else:
        assert caught.value.structure == "header field crypt_method"


def test_luks_image_with_its_pointer_is_accepted() -> None:
    pointer = struct.pack(">QQ", 0x40000, 512)
    header = parse(image(extension(layout.EXTENSION_ENCRYPTION, pointer), crypt_method=2))
    assert header.extension(layout.EXTENSION_ENCRYPTION) == pointer


def test_name_or_extension_past_the_end_of_the_file_is_corrupt() -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse_header(image(name=b"base.qcow2")[:125], limits=LIMITS)
    assert caught.value.structure == "header field backing_file_size"
    with pytest.raises(ImageCorruptError) as caught:
        parse_header(image(extension(7, b"x" * 100))[:200], limits=LIMITS)
    assert caught.value.structure == "header extension 0x00000007"


def test_torn_image_is_read_when_its_length_is_not_given() -> None:
    data = image(l1_table_offset=0x40000)
    with pytest.raises(ImageCorruptError):
        parse(data)
    assert parse_header(data, limits=LIMITS).l1_table_offset == 0x40000


@pytest.mark.parametrize("fields", [{"refcount_table_clusters": 0}, {"refcount_table_offset": 0x7FFF0000}])
def test_check_may_look_at_an_image_without_refcount_table(fields: dict[str, int]) -> None:
    with pytest.raises(ImageCorruptError):
        parse(image(fields=fields))
    parse_header(image(fields=fields), limits=LIMITS, file_length=FILE_LENGTH, for_check=True)


def test_error_carries_the_node() -> None:
    with pytest.raises(ImageCorruptError) as caught:
        parse_header(image(cluster_bits=1), limits=LIMITS, node="disk.qcow2")
    assert caught.value.node == "disk.qcow2"
    assert str(caught.value).startswith("disk.qcow2: header field cluster_bits is 1")


# Features -------------------------------------------------------------------------------------------------------------


def test_unknown_incompatible_features_go_by_the_names_in_the_image() -> None:
    table = b"\0\x07time travel\x1b[31m".ljust(48, b"\0") + b"\1\x08compatible one".ljust(48, b"\0")
    data = image(extension(layout.EXTENSION_FEATURE_NAMES, table), incompatible_features=1 << 7 | 1 << 8 | 1)
    with pytest.raises(UnsupportedFeatureError) as caught:
        parse(data)
    assert caught.value.features == ("time travel?[31m", "incompatible feature bit 8")


def test_unknown_features_are_refused_even_where_extensions_are_malformed() -> None:
    broken = struct.pack(">II", layout.EXTENSION_FEATURE_NAMES, 0xFFFFFFFF)
    with pytest.raises(UnsupportedFeatureError) as caught:
        parse(image(broken, incompatible_features=1 << 7))
    assert caught.value.features == ("incompatible feature bit 7",)


def test_supported_mask_decides_about_known_features() -> None:
    known = layout.INCOMPATIBLE_DATA_FILE | layout.INCOMPATIBLE_EXTENDED_L2
    header = parse(image(incompatible_features=known))
    check_supported(header, layout.INCOMPATIBLE_KNOWN)
    with pytest.raises(UnsupportedFeatureError) as caught:
        check_supported(header, layout.INCOMPATIBLE_DIRTY, node="n")
    assert caught.value.features == ("external data file", "extended L2 entries")
    assert caught.value.node == "n"


def test_image_cannot_rename_a_feature_that_is_known() -> None:
    table = b"\0\x04harmless".ljust(48, b"\0")
    header = parse(image(extension(layout.EXTENSION_FEATURE_NAMES, table), incompatible_features=1 << 4))
    with pytest.raises(UnsupportedFeatureError) as caught:
        check_supported(header, 0)
    assert caught.value.features == ("extended L2 entries",)


def test_feature_name_table_holds_every_known_name() -> None:
    header = Header(extensions=[Extension(layout.EXTENSION_FEATURE_NAMES, feature_name_table())])
    assert header.feature_names == layout.FEATURE_NAMES


# Names as they are set ------------------------------------------------------------------------------------------------


def test_names_are_set_through_the_extensions() -> None:
    header = Header()
    header.backing_name, header.backing_format, header.data_file_name = "a", "raw", "data"
    header.backing_format = "qcow2"
    assert header.extensions == [
        Extension(layout.EXTENSION_BACKING_FORMAT, b"qcow2"),
        Extension(layout.EXTENSION_DATA_FILE, b"data"),
    ]
    header.backing_name = header.backing_format = header.data_file_name = None
    assert (header.extensions, header.backing_name_bytes) == ([], None)


def _set_backing_name(header: Header, name: str) -> None:
    header.backing_name = name


def _set_backing_format(header: Header, name: str) -> None:
    header.backing_format = name


def _set_data_file_name(header: Header, name: str) -> None:
    header.data_file_name = name


@pytest.mark.parametrize(
    ("set_name", "longest"),
    [(_set_backing_name, 1023), (_set_backing_format, 15), (_set_data_file_name, 65536 - 112)],
)
def test_name_that_is_too_long_or_no_file_name_cannot_be_set(
    set_name: Callable[[Header, str], None], longest: int
) -> None:
    set_name(Header(), "x" * longest)
    with pytest.raises(UsageError):
        set_name(Header(), "x" * (longest + 1))
    for name in ("a\0b", "\ud800"):
        with pytest.raises(UsageError):
            set_name(Header(), name)


# Any bytes ------------------------------------------------------------------------------------------------------------


def parse_or_refuse(data: bytes) -> Header | None:
    """The header, or None where it was refused as it should be; any other exception fails the test."""
    try:
        header = parse(data)
        header.geometry()
    except ImageError as error:
        if None in (error.structure, error.host_offset, error.expected, error.found):
            raise
        return None
    return header


@given(st.data())
def test_any_damage_ends_in_an_image_error_or_a_header(data: st.DataObject) -> None:
    extensions = [
        extension(layout.EXTENSION_BACKING_FORMAT, b"qcow2"),
        extension(layout.EXTENSION_FEATURE_NAMES, feature_name_table()),
    ]
    damaged = bytearray(image(*extensions, name=b"base.qcow2"))
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(4, 560))
        damage = data.draw(st.binary(min_size=1, max_size=8))
        damaged[offset : offset + len(damage)] = damage
    del damaged[data.draw(st.sampled_from([CLUSTER, 4096, 512, 100])) :]
    header = parse_or_refuse(bytes(damaged))
    assert header is None or "\0" not in (header.backing_name or "")


@given(st.binary(max_size=600))
def test_any_bytes_behind_the_magic_end_in_an_image_error_or_a_header(tail: bytes) -> None:
    parse_or_refuse(b"QFI\xfb\0\0\0\3" + tail)


@pytest.mark.parametrize(
    ("data", "span"),
    [
        (image(), 120),
        (image(extension(7, b"x" * 100)), 112 + 112 + 8),
        (image(name=b"base.qcow2", name_offset=4096), 4106),
        (image(name=b"n" * 10, name_offset=CLUSTER - 10), CLUSTER),
        (image(end=extension(7, bytes(CLUSTER - 128))), CLUSTER),
        (b"QED\0" + bytes(508), 112),
        (image(cluster_bits=60), 112),
        (V2_WITH_BACKING, 112),
    ],
)
def test_header_span_says_how_much_the_parser_needs(data: bytes, span: int) -> None:
    assert header_span(data[:512]) == span


@given(
    st.lists(st.tuples(st.integers(1, 0xFFFFFFFF), st.binary(max_size=700)), max_size=4),
    st.integers(0, 1023),
    st.integers(0, 20_000),
)
def test_bytes_of_the_span_parse_as_the_whole_cluster(
    extensions: list[tuple[int, bytes]], name_length: int, gap: int
) -> None:
    packed = [extension(kind, data) for kind, data in extensions if kind not in layout.EXTENSION_NAMES]
    end = 112 + sum(map(len, packed)) + 8
    data = image(*packed, name=b"n" * name_length, name_offset=end + gap if name_length else None)
    span = header_span(data[:512])
    if len(data) > span:
        span = header_span(data[: max(span, 512)])
    assert parse(data[:span]) == parse(data)


def test_header_span_asks_for_the_cluster_when_extensions_run_past_the_first_read() -> None:
    data = image(extension(7, b"x" * 1000))
    assert header_span(data[:512]) == CLUSTER
    assert header_span(data[:4096]) == 112 + 1008 + 8
