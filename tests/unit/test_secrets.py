from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch.http.secrets import SecretError, Secrets
from orchestrator.dispatch.http.signing import Signer
from tests.unit.test_due_queue import Clock

OLD = "whsec_" + base64.b64encode(b"o" * 24).decode()
NEW = "whsec_" + base64.b64encode(b"n" * 32).decode()


def signature(signer: Signer) -> str:
    return signer.signature("id", 1, b"{}")


def test_a_secret_header_is_the_text_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "acme-token").write_text("  Bearer s3cret\n")
    assert Secrets(str(tmp_path)).header("acme-token") == "Bearer s3cret"


@pytest.mark.parametrize("between", [",", "\n", " ,\n"])
def test_a_file_may_hold_several_keys_and_each_signs(tmp_path: Path, between: str) -> None:
    (tmp_path / "acme").write_text(f"{NEW}{between}{OLD}\n")
    assert signature(Secrets(str(tmp_path)).signer("acme")) == signature(Signer((NEW, OLD)))


def test_a_file_that_changes_is_read_again_within_a_second_and_not_looked_at_more_often(tmp_path: Path) -> None:
    clock = Clock()
    secrets = Secrets(str(tmp_path), clock)
    path = tmp_path / "acme"
    path.write_text(OLD)
    before = secrets.signer("acme")
    path.write_text(NEW)
    clock.s = 0.9
    assert secrets.signer("acme") is before
    clock.s = 1.0
    assert signature(secrets.signer("acme")) == signature(Signer((NEW,)))
    after = secrets.signer("acme")
    clock.s = 5.0
    assert secrets.signer("acme") is after  # nothing has changed


def test_secret_files_are_followed_when_their_directory_is_swapped_as_kubernetes_does(tmp_path: Path) -> None:
    clock = Clock()
    for version, text in (("v1", "one"), ("v2", "two")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "token").write_text(text)
        os.utime(tmp_path / version / "token", ns=(0, 0))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "token").symlink_to("..data/token")
    secrets = Secrets(str(tmp_path), clock)
    assert secrets.header("token") == "one"
    (tmp_path / "..new").symlink_to("v2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    clock.s = 1.0
    assert secrets.header("token") == "two"


def test_a_file_that_vanishes_is_missed_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    clock = Clock()
    secrets = Secrets(str(tmp_path), clock)
    path = tmp_path / "token"
    for text in ("one", "two"):
        path.write_text(text)
        assert secrets.header("token") == text
        path.unlink()
        clock.s += 1
        with pytest.raises(SecretError, match=r"^secret token: cannot be read from SECRETS_DIRECTORY: No such file"):
            secrets.header("token")


def test_without_a_directory_there_are_no_secrets() -> None:
    with pytest.raises(SecretError, match=r"^secret token: SECRETS_DIRECTORY is not set for this dispatcher$"):
        Secrets(None).header("token")


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"s3cret\nX-Other: 1", b"s3cret\xff", b"s3cret\0", b"s3cret" * 20_000], ids=str
)
def test_a_text_that_can_be_no_header_is_refused_without_repeating_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(SecretError, match=r"^secret token: .*SECRETS_DIRECTORY") as caught:
        Secrets(str(tmp_path)).header("token")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n,", "s3cret", f"{NEW},s3cret", "whsec_czNjcmV0"])
def test_a_secret_that_cannot_sign_is_refused_without_repeating_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "acme").write_text(content)
    with pytest.raises(SecretError, match=r"acme.*SECRETS_DIRECTORY") as caught:
        Secrets(str(tmp_path)).signer("acme")
    for part in ("s3cret", "czNjcmV0", NEW):
        assert part not in str(caught.value)


def test_only_regular_files_are_read_as_secrets(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("directory", "pipe"):
        with pytest.raises(SecretError, match="not a file"):
            Secrets(str(tmp_path)).header(name)


@given(st.text(max_size=120) | st.sampled_from(["..", ".", "../x", "a/b", "/etc/passwd", ".hidden", "a\n", "a\0", ""]))
def test_a_name_never_leads_out_of_the_directory(name: str) -> None:
    with pytest.raises(SecretError) as caught:
        Secrets("/nonexistent/secrets").header(name)
    if "/" in name or name.startswith(".") or not name.isascii():
        assert "not the name of a file in SECRETS_DIRECTORY" in str(caught.value)
