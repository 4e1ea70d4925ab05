"""`Secret`, and the secrets that --object defines; what is shown of them is always nothing."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import blocklib
from blocklib.cli.objects import objects_of
from blocklib.cli.session import Failure

CODE = "xyzzy-plugh"


def secrets_of(texts: list[str]) -> dict[str, blocklib.Secret]:
    return {name: found for name, found in objects_of(texts).items() if isinstance(found, blocklib.Secret)}


def test_a_secret_is_shown_as_stars_everywhere() -> None:
    secret = blocklib.Secret(CODE)
    for shown in (repr(secret), str(secret), f"{secret}", f"{[secret]}", repr({"a": secret})):
        assert CODE not in shown
        assert "Secret(***)" in shown
    assert secret.reveal() == CODE.encode()


def test_secrets_are_equal_by_content_and_text_is_utf8() -> None:
    assert blocklib.Secret("é") == blocklib.Secret("é".encode()) == blocklib.Secret(bytearray("é".encode()))
    assert hash(blocklib.Secret("a")) == hash(blocklib.Secret(b"a"))
    assert blocklib.Secret("a") != blocklib.Secret("b")
    assert blocklib.Secret("a") != "a"


def test_a_secret_is_copied_as_itself_and_not_pickled() -> None:
    secret = blocklib.Secret(CODE)
    assert copy.copy(secret) is secret
    assert copy.deepcopy({"key": secret})["key"] is secret
    with pytest.raises(TypeError, match="pickled") as caught:
        pickle.dumps(secret)
    assert CODE not in str(caught.value)


def test_what_is_no_secret_is_refused_without_being_shown() -> None:
    with pytest.raises(blocklib.OptionError):
        blocklib.Secret(12345)  # type: ignore[arg-type]
    with pytest.raises(blocklib.OptionError) as caught:
        blocklib.Secret(CODE + "\ud800")
    _assert_hidden(caught.value)


def _assert_hidden(exc: BaseException) -> None:
    """Nothing of what an error or any error behind it says, or holds, is the secret."""
    assert CODE not in "".join(traceback.format_exception(exc))
    found: BaseException | None = exc
    while found is not None:
        assert CODE not in f"{found!r} {found} {vars(found)}"
        assert not {"object", "doc"} & set(dir(found)), "it holds the text that it is about"
        found = found.__cause__ or found.__context__


def _object(*parts: str) -> bytes:
    return secrets_of([f"secret,id=s,{','.join(parts)}"])["s"].reveal()


def _encrypted(text: bytes, key: bytes, iv: bytes) -> bytes:
    padding = 16 - len(text) % 16
    return Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor().update(text + bytes((padding,)) * padding)


def test_data_and_files_raw_and_in_base64(tmp_path: Path) -> None:
    raw, coded = tmp_path / "raw", tmp_path / "coded"
    raw.write_bytes(b"line\n")
    coded.write_bytes(base64.b64encode(os.urandom(0) + b"\0\xff binary") + b"\n")
    assert _object("data=a,,b=c") == b"a,b=c"
    assert _object("data=YWJj,format=base64") == b"abc"
    assert _object("data=YWJj,format=raw") == b"YWJj"
    assert _object(f"file={raw}") == b"line\n"
    assert _object(f"file={coded}", "format=base64") == b"\0\xff binary"
    assert secrets_of(['{"qom-type": "secret", "id": "s", "data": "a,b"}'])["s"].reveal() == b"a,b"
    assert secrets_of(["qom-type=secret,id=s,data=x"])["s"].reveal() == b"x"


@pytest.mark.parametrize("text", [b"", b"short", b"exactly-16-bytes", b"one block and some more"])
def test_a_secret_that_another_one_encrypts(text: bytes, tmp_path: Path) -> None:
    key, iv = os.urandom(32), os.urandom(16)
    content = _encrypted(text, key, iv)
    (tmp_path / "binary").write_bytes(content)
    master = f"secret,id=k,format=base64,data={base64.b64encode(key).decode()}"
    shared = f"secret,id=s,keyid=k,iv={base64.b64encode(iv).decode()}"
    for rest in (f"format=base64,data={base64.b64encode(content).decode()}", f"file={tmp_path / 'binary'}"):
        assert secrets_of([master, f"{shared},{rest}"])["s"].reveal() == text


@pytest.mark.parametrize(
    "texts",
    [
        ["secret"],
        ["secret,id=s"],
        [f"secret,data={CODE}"],
        [f"secret,id=1,data={CODE}"],
        [f"secret,id=s,data={CODE},file=/dev/null"],
        [f"secret,id=s,data={CODE},format=hex"],
        [f"secret,id=s,data={CODE},format=base64"],
        [f"secret,id=s,data={CODE},colour=red"],
        [f"secret,id=s,{CODE}"],
        [f"secret,id=s,data={CODE},keyid=k,iv=AAAAAAAAAAAAAAAAAAAAAA=="],
        [f"secret,id=s,data={CODE},iv=AAAAAAAAAAAAAAAAAAAAAA=="],
        [f"secret,id=k,data={CODE}", "secret,id=s,data=x,keyid=k"],
        [f"secret,id=k,data={CODE}", "secret,id=s,data=x,keyid=k,iv=AAAAAAAAAAAAAAAAAAAAAA=="],
        [f"secret,id=k,data={CODE:.<32}", f"secret,id=s,data={CODE},keyid=k,iv=AAAAAAAAAAAAAAAAAAAAAA=="],
        [f"secret,id=k,data={CODE:.<32}", f"secret,id=s,data={CODE:.<32},keyid=k,iv=AAAAAAAAAAAAAAAAAAAAAA=="],
        [f"secret,id=k,data={CODE:.<32}", f"secret,id=s,data={CODE:.<32},keyid=k,iv={CODE}"],
        [f"secret,id=s,data={CODE}", f"secret,id=s,data={CODE}"],
        ["secret,id=s,file=/does/not/exist"],
        ["secret,id=s,file=/dev/zero"],
        ['{"qom-type": "secret", "id": "s", "file": "a\\u0000b"}'],
        ['{"qom-type": "secret", "id": "s", "data": "' + CODE + '", "data": "\\ud800"}'],
        [f"iothread,id=s,data={CODE}"],
        ['{"qom-type": "secret", "id": "s", "data": "' + CODE],
        ['{"qom-type": "secret", "id": "s", "data": 5}'],
        ['{"id": "s", "data": "' + CODE + '"}'],
        ["{}"],
        [""],
    ],
    ids=lambda texts: texts[-1][:40].replace(CODE, "..."),
)
def test_an_object_that_makes_no_sense_is_refused_without_being_shown(texts: list[str]) -> None:
    with pytest.raises(Failure) as caught:
        secrets_of(texts)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    _assert_hidden(caught.value)
