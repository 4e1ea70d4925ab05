"""Our NBD client under TLS, against qemu-nbd and nbdkit: who is trusted, who is not, and that nothing goes in clear text."""

from __future__ import annotations

import random
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import blocklib
from blocklib import nbd
from blocklib.errors import NbdError, RequestError, UsageError
from blocklib.options import OptionValue
from blocklib.sizes import MiB
from tests.certificates import make_certificates
from tests.nbd_servers import free_port, nbdkit_at, qemu_nbd_at
from tests.programs import Argument, Program

SIZE = 8 * MiB
Serve = Callable[[], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("pki") / "good")


@pytest.fixture(scope="module")
def other_pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("pki") / "other")


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def serve(
    request: pytest.FixtureRequest, tmp_path: Path, pki: Path, nbdkit: Program, qemu_nbd: Program, qemu_img: Program
) -> Serve:
    """Starts a server that demands TLS and a certificate of its clients; gives its URI without TLS."""

    @contextmanager
    def run() -> Iterator[str]:
        port = free_port()
        if request.param == "nbdkit":
            words: list[Argument] = ["--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer", "memory", SIZE]
            with nbdkit_at(nbdkit, tmp_path, *words, port=port) as uri:
                yield uri
        else:
            qemu_img("create", "-f", "raw", tmp_path / "disk", SIZE)
            credentials = f"tls-creds-x509,id=t,dir={pki},endpoint=server,verify-peer=on"
            words = ["--object", credentials, "--tls-creds", "t", "-e", 8, "-f", "raw", str(tmp_path / "disk")]
            with qemu_nbd_at(qemu_nbd, tmp_path, *words, port=port) as uri:
                yield uri

    return run


def with_tls(uri: str, folder: Path) -> str:
    return uri.replace("nbd://", "nbds://") + f"/?tls-certificates={folder}"


def test_bytes_go_through_tls_by_many_threads_at_a_time(serve: Serve, pki: Path) -> None:
    random.seed(3)
    model = random.randbytes(SIZE)
    with serve() as uri, blocklib.open(with_tls(uri, pki), "r+", format="raw") as disk:
        pieces = list(range(0, SIZE, 512 * 1024 + 512))

        def run(work: Callable[[int, int], None]) -> None:
            def some(first: int) -> None:
                for offset in pieces[first::4]:
                    work(offset, min(512 * 1024 + 512, SIZE - offset))

            threads = [threading.Thread(target=some, args=(first,)) for first in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        found = bytearray(SIZE)
        run(lambda offset, length: disk.write(offset, model[offset : offset + length]))
        run(lambda offset, length: disk.readinto(offset, memoryview(found)[offset : offset + length]))
        assert found == model
        assert sum(extent.length for extent in disk.extents()) == SIZE


def test_credentials_may_be_a_context(serve: Serve, pki: Path) -> None:
    with serve() as uri:
        options: dict[str, OptionValue] = {"file.tls-creds": nbd.tls_context(pki), "file.tls-hostname": "localhost"}
        with blocklib.open(uri, format="raw", options=options) as disk:
            assert disk.read(0, 512) == bytes(512)


def test_a_server_that_demands_tls_tells_nothing_without(serve: Serve) -> None:
    with serve() as uri, pytest.raises(RequestError, match="TLS"):
        blocklib.open(uri, format="raw")


def test_a_server_that_another_authority_has_signed_is_not_trusted(serve: Serve, other_pki: Path) -> None:
    with serve() as uri, pytest.raises(NbdError, match="not accepted"):
        blocklib.open(with_tls(uri, other_pki), format="raw")
    with serve() as uri, pytest.raises(NbdError, match="not accepted"):
        blocklib.open(uri.replace("nbd://", "nbds://"), format="raw")


def test_a_server_of_another_name_is_not_trusted(serve: Serve, pki: Path) -> None:
    with serve() as uri, pytest.raises(NbdError, match="not accepted"):
        blocklib.open(with_tls(uri, pki) + "&tls-hostname=elsewhere", format="raw")


def test_a_client_that_has_no_certificate_is_not_let_in(serve: Serve, pki: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    with serve() as uri, pytest.raises(blocklib.BlocklibError):
        blocklib.open(with_tls(uri, bare), format="raw")


def test_a_server_without_tls_is_left_where_the_uri_demands_it(tmp_path: Path, pki: Path, nbdkit: Program) -> None:
    with nbdkit_at(nbdkit, tmp_path, "memory", SIZE, port=free_port()) as uri, pytest.raises(RequestError, match="policy"):
        blocklib.open(with_tls(uri, pki), format="raw")


def test_a_unix_socket_has_no_name_that_could_be_checked(tmp_path: Path, pki: Path, nbdkit: Program) -> None:
    words: list[Argument] = ["--tls=require", f"--tls-certificates={pki}", "memory", SIZE]
    with nbdkit_at(nbdkit, tmp_path, *words) as uri:
        uri = uri.replace("nbd+unix", "nbds+unix")
        for more in ("", "&tls-hostname=localhost"):
            with blocklib.open(f"{uri}&tls-certificates={pki}{more}", format="raw") as disk:
                assert disk.size == SIZE
        with pytest.raises(NbdError, match="not accepted"):
            blocklib.open(f"{uri}&tls-certificates={pki}&tls-hostname=elsewhere", format="raw")
        with pytest.raises(UsageError, match="tls-hostname"):
            blocklib.open(uri.replace("nbds", "nbd"), format="raw", options={"file.tls-creds": ssl.create_default_context()})
