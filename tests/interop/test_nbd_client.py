"""Our NBD client against qemu-nbd and nbdkit: the same bytes, the same extents, the same words as qemu-img's."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import blocklib
from blocklib.errors import OptionError, ReadOnlyError, RequestError, StorageError
from blocklib.options import OptionValue
from blocklib.sizes import KiB, MiB
from tests.cli.running import CommandLine
from tests.nbd_servers import NbdKit, free_port, nbdkit_at, qemu_nbd_at, uri_of
from tests.programs import Argument, Program

SIZE = 8 * MiB
TCP_AND_UNIX = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])


@pytest.fixture
def cli() -> CommandLine:
    return CommandLine()


@pytest.fixture
def image(tmp_path: Path, qemu_img: Program, qemu_io: Program) -> Path:
    """A qcow2 image of data, holes and zeroes in small pieces."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, SIZE)
    commands = ["write -P 1 0 1M", "write -P 2 2M 64k", "write -z 3M 1M", "write -P 3 5000k 100k", "write -P 9 8128k 64k"]
    qemu_io("-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    return path


@pytest.fixture(params=["raw", "qcow2"])
def served(request: pytest.FixtureRequest, tmp_path: Path, image: Path, qemu_img: Program, qemu_nbd: Program) -> Iterator[str]:
    """The URI of an export of the image, in either format."""
    if request.param == "raw":
        qemu_img("convert", "-O", "raw", image, tmp_path / "disk.raw")
        image = tmp_path / "disk.raw"
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", request.param, "-e", 10, image, export="a disk".replace(" ", "-")) as uri:
        yield uri


BLOCK_SIZES = ("blocksize-minimum=4096", "blocksize-maximum=64k", "blocksize-error-policy=error")


def port_or_none(tcp: bool) -> int | None:
    return free_port() if tcp else None


# -- the same words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["info"], ["info", "--output=json"], ["map"], ["map", "--output=json"], ["measure", "-O", "qcow2"]]
)
def test_commands_print_what_qemu_img_prints(served: str, command: list[str], cli: CommandLine, qemu_img: Program) -> None:
    assert cli(*command, served) == qemu_img(*command, served)


def test_options_mean_what_they_mean_to_qemu_img(
    tmp_path: Path, image: Path, cli: CommandLine, qemu_img: Program, qemu_nbd: Program
) -> None:
    port = free_port()
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "qcow2", "-e", 10, image, export="x", port=port) as uri:
        for options in (
            f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export=x",
            f"driver=nbd,host=127.0.0.1,port={port},export=x",
            f"driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port={port},file.export=x,file.reconnect-delay=1",
        ):
            for command in (["info"], ["info", "--output=json"], ["map"], ["map", "--output=json"]):
                words = [*command, "--image-opts", options]
                assert cli(*words) == qemu_img(*words)
        legacy = f"nbd:127.0.0.1:{port}:exportname=x"
        assert cli("info", legacy) == qemu_img("info", legacy)
        assert cli("map", "--output=json", legacy) == qemu_img("map", "--output=json", uri)


def test_a_dirty_bitmap_is_mapped_as_qemu_img_maps_it(
    tmp_path: Path, image: Path, cli: CommandLine, qemu_img: Program, qemu_io: Program, qemu_nbd: Program
) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    qemu_io("-f", "qcow2", "-c", "write 1M 64k", "-c", "write 4M 1M", image)
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "qcow2", "-B", "b0", "-e", 10, image):
        place = f"driver=nbd,server.type=unix,server.path={tmp_path / 'nbd.sock'}"
        words = ["map", "--output=json", "--image-opts", f"{place},x-dirty-bitmap=qemu:dirty-bitmap:b0"]
        assert cli(*words) == qemu_img(*words)
        with pytest.raises(OptionError, match="b1"):
            blocklib.open(blocklib.parse_options(f"{place},x-dirty-bitmap=qemu:dirty-bitmap:b1"))


def test_the_table_of_extents_is_that_of_the_single_steps(served: str) -> None:
    with blocklib.open(served, format="raw") as disk:
        table = disk.map()
        steps = list(disk.extents())
        assert [tuple(row) for row in table[["offset", "length", "data", "zero"]].tolist()] == [
            (step.offset, step.length, step.data, step.zero) for step in steps
        ]
        assert sum(step.length for step in steps) == SIZE


# -- the same bytes ----------------------------------------------------------------------------------------------------


def test_convert_and_compare_see_the_same_content(served: str, tmp_path: Path, cli: CommandLine, qemu_img: Program) -> None:
    for format in ("raw", "qcow2"):
        target = tmp_path / f"copy.{format}"
        cli("convert", "-O", format, served, target)
        assert "identical" in qemu_img("compare", served, target)
        assert "identical" in cli("compare", served, target)


@TCP_AND_UNIX
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_random_writes_arrive_and_are_read_back(
    tcp: bool, format: str, tmp_path: Path, qemu_img: Program, qemu_nbd: Program
) -> None:
    path = tmp_path / "target"
    qemu_img("create", "-f", format, path, SIZE)
    random.seed(7)
    model = bytearray(SIZE)
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", format, "-e", 10, path, port=port_or_none(tcp)) as uri:
        with blocklib.open(uri, "r+", format="raw") as disk:
            for _ in range(60):
                offset = random.randrange(SIZE)
                length = min(random.choice([1, 511, 512, 4096, 70_000, 1 * MiB]), SIZE - offset)
                if random.random() < 0.2:
                    disk.write_zeroes(offset, length, unmap=bool(random.randrange(2)))
                    model[offset : offset + length] = bytes(length)
                else:
                    data = random.randbytes(length)
                    disk.write(offset, data, fua=not random.randrange(4))
                    model[offset : offset + length] = data
                start = random.randrange(SIZE)
                assert disk.read(start, min(9000, SIZE - start)) == model[start : start + 9000]
            assert disk.read(0, SIZE) == model
        with blocklib.open(uri, format="raw") as disk:
            assert disk.read(0, SIZE) == model
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", format, "-O", "raw", path, raw)
    assert raw.read_bytes() == model


def test_an_image_can_be_made_inside_an_export(
    tmp_path: Path, image: Path, cli: CommandLine, qemu_img: Program, qemu_nbd: Program
) -> None:
    path = tmp_path / "holder.raw"
    qemu_img("create", "-f", "raw", path, 16 * MiB)
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "raw", "-e", 10, path) as uri:
        cli("create", "-f", "qcow2", uri, SIZE)
        assert qemu_img.json("info", uri)["virtual-size"] == SIZE
        cli("convert", "-n", "-O", "qcow2", image, uri)
        cli("check", uri)
        assert "identical" in qemu_img("compare", image, uri)
        cli("convert", "-O", "raw", image, tmp_path / "flat.raw")
        cli("convert", "-n", "-O", "raw", tmp_path / "flat.raw", uri)
        assert path.read_bytes()[:SIZE] == (tmp_path / "flat.raw").read_bytes()
        assert "cannot grow" in cli.fails("create", "-f", "raw", uri, 17 * MiB)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_an_export_held_before_does_not_show_in_what_is_converted_into_it(
    format: str, tmp_path: Path, image: Path, cli: CommandLine, qemu_img: Program, qemu_nbd: Program
) -> None:
    holder = tmp_path / "holder.raw"
    holder.write_bytes(b"\xa5" * (SIZE * 2))
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "raw", "-e", 10, holder) as uri:
        cli("convert", "-O", format, image, uri)
        cli("convert", "-n", "-O", format, image, uri)
        copy = tmp_path / "copy.raw"
        with blocklib.open(uri, format=format) as disk:
            copy.write_bytes(disk.read(0, SIZE))
        assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", image, copy)


def test_an_export_is_a_backing_file_like_any_other(
    tmp_path: Path, image: Path, cli: CommandLine, qemu_img: Program, qemu_nbd: Program
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "qcow2", "-r", "-e", 10, image) as uri:
        cli("create", "-f", "qcow2", "-b", uri, "-F", "raw", overlay)
        for command in (["info", "--backing-chain"], ["map", "--output=json"], ["map"]):
            assert cli(*command, overlay) == qemu_img(*command, overlay)
        with pytest.raises(blocklib.PolicyError):
            blocklib.open(overlay, format="qcow2")
        cli("io", "-c", "write -P 8 3M 64k", overlay)
        with blocklib.open(overlay, format="qcow2", references="allow") as disk:
            assert disk.read(2 * MiB, 4) == b"\2\2\2\2"
            assert disk.read(3 * MiB, 4) == b"\10\10\10\10"


# -- what servers differ in --------------------------------------------------------------------------------------------


@TCP_AND_UNIX
@pytest.mark.parametrize(
    "arguments",
    [
        ["memory", SIZE],
        ["--filter=noparallel", "memory", SIZE, "serialize=requests"],
        ["--filter=delay", "memory", SIZE, "rdelay=1ms", "wdelay=1ms"],
        ["--filter=blocksize-policy", "memory", SIZE, *BLOCK_SIZES],
        ["--filter=nozero", "--filter=noextents", "memory", SIZE],
        ["--filter=fua", "memory", SIZE, "fuamode=emulate"],
        ["--filter=multi-conn", "memory", SIZE, "multi-conn-mode=disable"],
        ["--no-sr", "memory", SIZE],
        ["--newstyle", "--mask-handshake=0", "memory", SIZE],
        ["--mask-handshake=1", "memory", SIZE],
    ],
    ids=lambda arguments: str(arguments[0]) + str(len(arguments)),
)
def test_nbdkit_keeps_what_was_written(tcp: bool, arguments: list[Argument], tmp_path: Path, nbdkit: Program) -> None:
    random.seed(1)
    model = bytearray(SIZE)
    with nbdkit_at(nbdkit, tmp_path, *arguments, port=port_or_none(tcp)) as uri:
        with blocklib.open(uri, "r+", format="raw") as disk:
            for _ in range(20):
                offset = random.randrange(SIZE - 300 * KiB)
                data = random.randbytes(random.choice([1, 513, 4096, 300 * KiB]))
                disk.write(offset, data)
                model[offset : offset + len(data)] = data
            disk.write_zeroes(1 * MiB, 1 * MiB)
            model[MiB : 2 * MiB] = bytes(MiB)
            assert disk.read(0, SIZE) == model
        with blocklib.open(uri, format="raw") as disk:
            assert disk.read(0, SIZE) == model
            assert sum(extent.length for extent in disk.extents()) == SIZE


def test_a_file_that_nbdkit_serves_has_the_extents_that_qemu_img_sees(
    tmp_path: Path, image: Path, cli: CommandLine, qemu_img: Program, nbdkit: Program
) -> None:
    qemu_img("convert", "-O", "raw", image, tmp_path / "disk.raw")
    with nbdkit_at(nbdkit, tmp_path, "file", tmp_path / "disk.raw") as uri:
        assert cli("map", "--output=json", uri) == qemu_img("map", "--output=json", uri)
        assert "identical" in cli("compare", uri, image)


def test_a_pattern_larger_than_any_file_is_read_at_its_end(tmp_path: Path, nbdkit: Program) -> None:
    size = 1 << 62
    with nbdkit_at(nbdkit, tmp_path, "pattern", size) as uri, blocklib.open(uri, format="raw") as disk:
        assert disk.size == size
        assert disk.read(size - 16, 16) == (size - 16).to_bytes(8, "big") + (size - 8).to_bytes(8, "big")


def test_an_export_of_odd_size_is_shown_as_qemu_img_shows_it(
    tmp_path: Path, cli: CommandLine, qemu_img: Program, nbdkit: Program
) -> None:
    with nbdkit_at(nbdkit, tmp_path, "pattern", 100_001) as uri:
        for command in (["info"], ["map", "--output=json"]):
            assert cli(*command, uri) == qemu_img(*command, uri)
        cli("convert", "-O", "raw", uri, tmp_path / "ours")
        qemu_img("convert", "-O", "raw", uri, tmp_path / "theirs")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_an_export_of_odd_size_is_filled_to_its_last_byte(tmp_path: Path, nbdkit: Program) -> None:
    with nbdkit_at(nbdkit, tmp_path, "memory", 100_001) as uri, blocklib.open(uri, "r+", format="raw") as disk:
        assert disk.size == 100_352
        disk.write(0, bytes([7]) * 100_001 + bytes(351))
        assert disk.read(0, disk.size) == bytes([7]) * 100_001 + bytes(351)
        disk.write_zeroes(100_000, 352)
        assert disk.read(99_999, 353) == bytes([7]) + bytes(352)
        with pytest.raises(StorageError) as caught:
            disk.write(99_840, bytes([7]) * 512)
        assert caught.value.errno == errno.ENOSPC


def test_errors_of_the_server_are_errors_of_the_request_only(tmp_path: Path, nbdkit: Program) -> None:
    trigger = tmp_path / "trigger"
    rule = ("error=ENOSPC", "error-pwrite-rate=100%", f"error-file={trigger}")
    arguments: list[Argument] = ["--filter=error", "memory", SIZE, *rule]
    with nbdkit_at(nbdkit, tmp_path, *arguments) as uri, blocklib.open(uri, "r+", format="raw") as disk:
        disk.write(0, b"before")
        trigger.touch()
        with pytest.raises(StorageError) as caught:
            disk.write(0, b"during")
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.operation == "write"
        trigger.unlink()
        disk.write(10, b"after")
        assert disk.read(0, 15) == b"before\0\0\0\0after"


def test_every_request_that_fails_of_many_says_so(tmp_path: Path, nbdkit: Program) -> None:
    arguments: list[Argument] = ["--filter=error", "pattern", SIZE, "error=EIO", "error-pread-rate=30%"]
    with nbdkit_at(nbdkit, tmp_path, *arguments) as uri, blocklib.open(uri, format="raw") as disk:
        failed = 0
        for offset in range(0, SIZE, 64 * KiB):
            try:
                data = disk.read(offset, 64 * KiB)
            except StorageError as exc:
                failed += exc.errno == errno.EIO
            else:
                assert data[:8] == offset.to_bytes(8, "big")
                assert data[-8:] == (offset + 64 * KiB - 8).to_bytes(8, "big")
        assert 0 < failed < 128


def test_an_export_that_is_read_only_is_not_opened_for_writing(
    tmp_path: Path, image: Path, cli: CommandLine, qemu_nbd: Program
) -> None:
    with qemu_nbd_at(qemu_nbd, tmp_path, "-r", "-f", "qcow2", "-e", 10, image) as uri:
        with pytest.raises(StorageError) as caught:
            blocklib.open(uri, "r+", format="raw")
        assert caught.value.errno == errno.EACCES
        options = {"auto-read-only": True, "file.auto-read-only": True}
        with blocklib.open(uri, "r+", format="raw", options=options) as disk, pytest.raises(ReadOnlyError):
            disk.write(0, b"x")
        assert "read-only" in cli.fails("io", "-f", "raw", "-c", "write 0 512", uri)


def test_an_export_that_is_not_there_is_refused_by_name(
    tmp_path: Path, image: Path, cli: CommandLine, qemu_nbd: Program
) -> None:
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "qcow2", "-e", 10, image, export="right") as uri:
        with pytest.raises(RequestError, match="wrong"):
            blocklib.open(uri.replace("right", "wrong"), format="raw")
        assert "wrong" in cli.fails("info", uri.replace("right", "wrong"))


def test_a_server_that_is_not_there_is_a_storage_error(tmp_path: Path, cli: CommandLine) -> None:
    with pytest.raises(StorageError) as caught:
        blocklib.open(f"nbd+unix:///?socket={tmp_path}/none.sock", format="raw")
    assert caught.value.errno == errno.ENOENT
    assert "Connection refused" in cli.fails("info", f"nbd://127.0.0.1:{free_port()}")


# -- losing the server -------------------------------------------------------------------------------------------------


def test_without_a_delay_a_lost_server_fails_every_request(tmp_path: Path, nbdkit: Program) -> None:
    with NbdKit(nbdkit, tmp_path, "memory", SIZE) as server:
        disk = blocklib.open(server.uri, "r+", format="raw")
        disk.write(0, b"x")
        server.kill()
        with pytest.raises(StorageError) as caught:
            disk.read(0, 512)
        assert caught.value.errno == errno.EIO
    with NbdKit(nbdkit, tmp_path, "memory", SIZE):
        with pytest.raises(StorageError):
            disk.write(0, b"x")
        with pytest.raises(StorageError):
            disk.close()


def test_with_a_delay_requests_go_on_with_a_new_server(tmp_path: Path, nbdkit: Program) -> None:
    with NbdKit(nbdkit, tmp_path, "memory", SIZE) as server:
        options: dict[str, OptionValue] = {"file.reconnect-delay": 60}
        disk = blocklib.open(server.uri, "r+", format="raw", options=options)
        disk.write(0, b"gone with the memory, but not flushed")
        disk.write_zeroes(4 * KiB, 4 * KiB)
    with NbdKit(nbdkit, tmp_path, "memory", SIZE):
        disk.write(1 * MiB, b"later")
        assert disk.read(0, 37) == b"gone with the memory, but not flushed", "what was not flushed is written again"
        assert disk.read(1 * MiB, 5) == b"later"
        disk.close()


def test_opening_waits_for_a_server_that_appears(tmp_path: Path, image: Path, qemu_nbd: Program) -> None:
    opened: list[bytes] = []

    def read() -> None:
        options = {"file.open-timeout": 60}
        with blocklib.open(uri_of(tmp_path, "", None), format="raw", options=options) as disk:
            opened.append(disk.read(0, 4))

    # A listener that never answers would be waited for; one that is not there is tried again.
    thread = threading.Thread(target=read)
    thread.start()
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "qcow2", image):
        thread.join()
    assert opened == [b"\1\1\1\1"]


def test_closing_lets_a_server_go_that_exits_with_its_last_client(tmp_path: Path, nbdkit: Program) -> None:
    with NbdKit(nbdkit, tmp_path, "--filter=exitlast", "pattern", SIZE) as server:
        with blocklib.open(server.uri, format="raw") as disk:
            assert disk.read(SIZE - 8, 8) == (SIZE - 8).to_bytes(8, "big")
        assert server.wait() == 0


def test_a_socket_that_is_open_already_is_used(tmp_path: Path, image: Path, qemu_nbd: Program) -> None:
    with qemu_nbd_at(qemu_nbd, tmp_path, "-f", "qcow2", image), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "nbd.sock"))
        with blocklib.open({"driver": "nbd", "server.type": "fd", "server.str": str(sock.fileno())}) as disk:
            assert disk.read(0, 4) == b"\1\1\1\1"


def test_threads_go_on_while_their_server_is_killed_again_and_again(tmp_path: Path, nbdkit: Program) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    pieces = SIZE // 8
    models = [bytearray(pieces) for _ in range(8)]
    failures: list[BaseException] = []
    stop = threading.Event()
    options: dict[str, OptionValue] = {"file.reconnect-delay": 60}

    def work(disk: blocklib.Disk, number: int) -> None:
        source = random.Random(number)
        model = models[number]
        try:
            while not stop.is_set():
                offset = source.randrange(pieces - 70_000)
                length = source.choice([512, 4096, 70_000])
                if source.random() < 0.6:
                    data = source.randbytes(length)
                    disk.write(number * pieces + offset, data)
                    model[offset : offset + length] = data
                else:
                    assert disk.read(number * pieces + offset, length) == model[offset : offset + length]
        except BaseException as exc:
            failures.append(exc)
            raise

    server = NbdKit(nbdkit, tmp_path, "file", path)
    try:
        disk = blocklib.open(server.uri, "r+", format="raw", options=options)
        threads = [threading.Thread(target=work, args=(disk, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            disk.read(0, 512)
            server.kill()
            server = NbdKit(nbdkit, tmp_path, "file", path)
        disk.read(0, 512)
        stop.set()
        for thread in threads:
            thread.join()
        disk.close()
    finally:
        server.kill()
    assert not failures
    assert path.read_bytes() == b"".join(models)
