"""Signatures as Standard Webhooks defines them."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch.http.signing import Signer
from orchestrator.errors import SettingsError
from orchestrator.settings.webhook_secrets import decode_secret

OLD = "whsec_" + base64.b64encode(b"o" * 24).decode()
NEW = "whsec_" + base64.b64encode(b"n" * 64).decode()


def test_the_published_example_of_the_specification_is_reproduced() -> None:
    signer = Signer(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])
    signature = signer.signature("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@given(st.binary(min_size=24, max_size=64), st.text(max_size=40), st.integers(0, 2**33), st.binary())
def test_a_signature_is_the_hmac_of_id_timestamp_and_body(
    key: bytes, event_id: str, timestamp: int, body: bytes
) -> None:
    signature = Signer(["whsec_" + base64.b64encode(key).decode()]).signature(event_id, timestamp, body)
    expected = hmac.digest(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256)
    assert signature == "v1," + base64.b64encode(expected).decode()


def test_each_secret_signs_in_the_order_given() -> None:
    both = Signer([NEW, OLD]).signature("id", 1, b"{}")
    alone = [Signer([secret]).signature("id", 1, b"{}") for secret in (NEW, OLD)]
    assert both.split(" ") == alone


def test_signing_twice_gives_the_same_signature() -> None:
    signer = Signer([OLD])
    assert signer.signature("id", 1, b"{}") == signer.signature("id", 1, b"{}")


def test_without_secrets_there_is_no_signature() -> None:
    assert Signer([]).signature("id", 1, b"{}") == ""


def test_base64_padding_may_be_left_out_of_a_secret() -> None:
    padded = base64.b64encode(b"k" * 25).decode()
    assert padded.endswith("=")
    assert decode_secret("whsec_" + padded.rstrip("=")) == b"k" * 25


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        "c2hvcnQ",
        base64.b64encode(b"k" * 32).decode(),
        "whsec_c2hvcnQ=",
        "whsec_" + base64.b64encode(b"k" * 65).decode(),
        "whsec_" + "!" * 40,
        "whsec_" + "ä" * 40,
    ],
)
def test_a_malformed_secret_is_named_by_its_place_and_not_repeated(secret: str) -> None:
    with pytest.raises(SettingsError, match="WEBHOOK_SECRETS: secret 2: expected whsec_") as caught:
        Signer([OLD, secret])
    assert not secret or secret == "whsec_" or secret not in str(caught.value)
