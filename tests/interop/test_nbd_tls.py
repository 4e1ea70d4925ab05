"""TLS: certificates of both sides against libnbd's and QEMU's programs, and nothing told without it."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import struct
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import blocklib
from blocklib import MiB, nbd
from blocklib.errors import BlocklibError, StorageError, UnsupportedFeatureError, UsageError
from blocklib.nbd import wire
from tests.programs import Program

_BEGIN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(2090, 1, 1, tzinfo=datetime.UTC)


class Authority:
    """A CA that writes folders of certificates as QEMU and libnbd lay them out."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.certificate = self._signed(self.name, self.key.public_key(), None)

    def _signed(self, name: x509.Name, key: ec.EllipticCurvePublicKey, usage: x509.ObjectIdentifier | None) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_BEGIN)
            .not_valid_after(_END)
            .add_extension(x509.BasicConstraints(ca=usage is None, path_length=None), critical=True)
        )
        if usage is None:
            builder = builder.add_extension(
                x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True
            )
        else:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def write(self, folder: Path, *ends: str, common_name: str = "someone") -> Path:
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        for end in ends:
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name(
                [
                    x509.NameAttribute(NameOID.COUNTRY_NAME, "GB"),
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example, Org"),
                    x509.NameAttribute(NameOID.COMMON_NAME, common_name),
                ]
            )
            usage = ExtendedKeyUsageOID.SERVER_AUTH if end == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
            certificate = self._signed(name, key.public_key(), usage)
            (folder / f"{end}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
            (folder / f"{end}-key.pem").write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
        return folder


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    blocklib.create(tmp_path / "disk", 3 * MiB, format="raw")
    with blocklib.open(tmp_path / "disk", "r+", format="raw") as disk:
        disk.write(0, bytes(range(256)) * 4096)
    return tmp_path / "disk"


@pytest.mark.requires("nbdcopy")
@pytest.mark.parametrize("verify", [True, False])
def test_nbdcopy_reads_and_writes_over_tls(
    image: Path, tmp_path: Path, authority: Authority, nbdcopy: Program, *, verify: bool
) -> None:
    servers = authority.write(tmp_path / "server", "server")
    clients = authority.write(tmp_path / "client", *(["client"] if verify else []))
    context = nbd.tls_context(servers, endpoint="server", verify_peer=verify)
    with blocklib.open(image, "r+", format="raw") as disk:
        with nbd.Server(disk, listen="nbds://localhost:0/", tls=context) as server:
            uri = f"nbds://localhost:{server.uri.rpartition(':')[2].strip('/')}/?tls-certificates={clients}"
            nbdcopy(uri, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == image.read_bytes()
            (tmp_path / "copy").write_bytes(bytes(reversed(range(256))) * 12288)
            nbdcopy("--request-size=131072", tmp_path / "copy", uri)
            assert disk.read(0, 3 * MiB) == bytes(reversed(range(256))) * 12288


@pytest.mark.parametrize("ends", [(), ("client",)])
def test_a_client_without_a_certificate_of_our_ca_is_not_let_in(
    image: Path, tmp_path: Path, authority: Authority, nbdinfo: Program, ends: tuple[str, ...]
) -> None:
    servers = authority.write(tmp_path / "server", "server")
    clients = Authority().write(tmp_path / "client", *ends)
    (clients / "ca-cert.pem").write_bytes((servers / "ca-cert.pem").read_bytes())
    context = nbd.tls_context(servers, endpoint="server")
    with blocklib.open(image, format="raw") as disk, nbd.Server(disk, listen="nbds://localhost:0/", tls=context) as server:
        port = server.uri.rpartition(":")[2].strip("/")
        assert nbdinfo.run("--size", f"nbds://localhost:{port}/?tls-certificates={clients}").returncode != 0
        assert nbdinfo.run("--size", f"nbd://localhost:{port}/").returncode != 0
        good = authority.write(tmp_path / "good", "client")
        assert nbdinfo("--size", f"nbds://localhost:{port}/?tls-certificates={good}").strip() == str(3 * MiB)
        with blocklib.open(
            f"nbds://localhost:{port}/?tls-certificates={good}", format="raw"
        ) as remote:
            assert remote.read(0, 256) == bytes(range(256))
        with pytest.raises(BlocklibError):
            blocklib.open(f"nbds://localhost:{port}/?tls-certificates={clients}", format="raw").close()


def test_names_of_clients_are_spelled_as_qemu_nbd_spells_them(
    image: Path, tmp_path: Path, authority: Authority, nbdinfo: Program, qemu_nbd: Program
) -> None:
    servers = authority.write(tmp_path / "server", "server")
    clients = authority.write(tmp_path / "client", "client", common_name="laptop")
    names: list[str] = []

    def authorize(name: str) -> bool:
        names.append(name)
        return True

    context = nbd.tls_context(servers, endpoint="server")
    with blocklib.open(image, format="raw") as disk:
        with nbd.Server(disk, listen="nbds://localhost:0/", tls=context, authorize=authorize) as server:
            port = server.uri.rpartition(":")[2].strip("/")
            uri = f"nbds://localhost:{port}/?tls-certificates={clients}"
            assert nbdinfo("--size", uri).strip() == str(3 * MiB)
    (name,) = names
    identity = name.replace(",", ",,")
    for identities, admitted in ((identity, True), (identity + "x", False)):
        socket_path = tmp_path / f"q{admitted}"
        qemu_nbd(
            *("--fork", "-r", "-t", "-f", "raw", "-k", socket_path, "--pid-file", tmp_path / "pid", "--object"),
            *(f"tls-creds-x509,id=t,endpoint=server,dir={servers}", "--object"),
            *(f"authz-simple,id=a,identity={identities}", "--tls-creds=t", "--tls-authz=a", image),
        )
        try:
            uri = f"nbds+unix:///?socket={socket_path}&tls-certificates={clients}&tls-verify-peer=false"
            assert (nbdinfo.run("--size", uri).returncode == 0) is admitted
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_who_is_not_authorized_hears_nothing(image: Path, tmp_path: Path, authority: Authority, nbdinfo: Program) -> None:
    servers = authority.write(tmp_path / "server", "server")
    clients = authority.write(tmp_path / "client", "client")
    context = nbd.tls_context(servers, endpoint="server")
    with blocklib.open(image, format="raw") as disk:
        with nbd.Server(disk, listen="nbds://localhost:0/", tls=context, authorize=lambda name: False) as server:
            port = server.uri.rpartition(":")[2].strip("/")
            assert nbdinfo.run("--size", f"nbds://localhost:{port}/?tls-certificates={clients}").returncode != 0


def test_without_tls_every_question_is_refused(image: Path, tmp_path: Path, authority: Authority) -> None:
    context = nbd.tls_context(authority.write(tmp_path / "server", "server"), endpoint="server")
    path = tmp_path / "s"
    with blocklib.open(image, format="raw") as disk:
        with nbd.Server(disk, listen=f"nbds+unix:///?socket={path}", tls=context):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(str(path))
                file = client.makefile("rb")
                file.read(18)
                client.sendall(struct.pack(">L", 3))
                go = wire.go_data("", ())
                contexts = wire.contexts_data("", ())
                for option, data in ((3, b""), (6, go), (7, go), (9, contexts), (10, contexts), (8, b"")):
                    client.sendall(wire.option(option, data))
                    _magic, echoed, kind, length = wire.OPTION_REPLY.unpack(file.read(20))
                    file.read(length)
                    assert (echoed, kind) == (option, wire.NBD_REP_ERR_TLS_REQD)
                client.sendall(wire.option(wire.NBD_OPT_EXPORT_NAME, b""))
                assert file.read() == b""


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, authority: Authority) -> None:
    folder = authority.write(tmp_path / "only-ca")
    with pytest.raises(StorageError, match="server-cert"):
        nbd.tls_context(folder, endpoint="server")
    (folder / "server-cert.pem").write_text("nothing")
    (folder / "server-key.pem").write_text("nothing")
    with pytest.raises(StorageError, match="server-cert"):
        nbd.tls_context(folder, endpoint="server")
    with pytest.raises(StorageError, match="ca-cert"):
        nbd.tls_context(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        nbd.tls_context(folder, endpoint="neither")  # type: ignore[arg-type]


@pytest.mark.skipif(getattr(ssl, "HAS_PSK", False), reason="this Python has pre-shared keys")
def test_pre_shared_keys_are_refused_by_name_where_python_has_none(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("qemu:0123\n")
    with pytest.raises(UnsupportedFeatureError, match=r"3\.13"):
        nbd.psk_context(tmp_path)
