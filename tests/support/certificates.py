"""Certificates for tests, made by the openssl program: an authority, and what it signs."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

_CONFIG = """
[ca]
default_ca = this
[this]
database = {folder}/index.txt
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
"""


class Authority:
    """Signs certificates for receivers; `trusted` is the PEM file to trust. All files are in the folder."""

    def __init__(self, openssl: str, folder: Path) -> None:
        self._openssl = openssl
        self._folder = folder
        self.trusted = folder / "authority.pem"
        (folder / "index.txt").write_text("")
        (folder / "ca.cnf").write_text(_CONFIG.format(folder=folder))
        usage = "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"  # without which Python 3.13 trusts nobody
        request = ["req", "-x509", *self._key("authority.key"), "-subj", "/CN=tests", "-addext", usage]
        self._run(*request, "-out", str(self.trusted))

    def certificate(
        self, name: str, *, subject_alt_name: str = "IP:127.0.0.1", from_days: int = -1, days: int = 1
    ) -> Path:
        """A PEM file with the key and the certificate, valid from `from_days` until `days` from now."""
        request, signed, both = (self._folder / f"{name}.{end}" for end in ("csr", "crt", "pem"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={subject_alt_name}\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        )
        self._run("req", *self._key(f"{name}.key"), "-subj", f"/CN={name}", "-out", str(request))
        now = datetime.now(UTC)
        first, last = (f"{now + timedelta(days=day):%y%m%d%H%M%SZ}" for day in (from_days, days))
        self._run(
            "ca", "-batch", "-notext", "-config", str(self._folder / "ca.cnf"), "-cert", str(self.trusted),
            "-keyfile", str(self._folder / "authority.key"), "-startdate", first, "-enddate", last,
            "-extfile", str(extensions), "-in", str(request), "-out", str(signed),
        )  # fmt: skip
        both.write_text((self._folder / f"{name}.key").read_text() + signed.read_text())
        return both

    def self_signed(self, name: str) -> Path:
        both = self._folder / f"{name}.pem"
        self._run(
            "req", "-x509", *self._key(f"{name}.key"), "-subj", "/CN=localhost", "-out", f"{both}.crt",
            "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=critical,keyCertSign,digitalSignature",
        )  # fmt: skip
        both.write_text((self._folder / f"{name}.key").read_text() + Path(f"{both}.crt").read_text())
        return both

    def _key(self, name: str) -> list[str]:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        return [*curve, "-nodes", "-keyout", str(self._folder / name)]

    def _run(self, *arguments: str) -> None:
        subprocess.run([self._openssl, *arguments], check=True, capture_output=True)
