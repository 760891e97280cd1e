"""Certificates made for a test run, by openssl."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest


class Certificates:
    """A CA, and what it signed: a server for localhost, one for elsewhere, and a client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = str(folder / "ca.pem")
        self._openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca "
                      "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=keyCertSign,cRLSign "
                      "-keyout ca.key -out ca.pem")  # fmt: skip
        self.server = self._signed("server", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        self.elsewhere = self._signed("elsewhere", "subjectAltName=DNS:elsewhere.test")
        self.client = self._signed("client", "extendedKeyUsage=clientAuth")

    def context(self, pair: tuple[str, str], *, ask: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*pair)
        context.set_alpn_protocols(["h2", "http/1.1"])
        if ask:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca)
        return context

    def locked(self) -> tuple[str, str]:
        """The client's, its key behind a pass phrase."""
        self._openssl("pkey -in client.key -aes128 -passout pass:secret -out locked.key")
        return self.client[0], str(self._folder / "locked.key")

    def together(self) -> str:
        """The client's, certificate and key in one file."""
        file = self._folder / "together.pem"
        file.write_bytes(b"".join(Path(part).read_bytes() for part in self.client))
        return str(file)

    def _signed(self, name: str, extension: str) -> tuple[str, str]:
        (self._folder / "extensions").write_text(f"{extension}\nauthorityKeyIdentifier=keyid\n")
        self._openssl(f"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} "
                      f"-keyout {name}.key -out {name}.csr")  # fmt: skip
        self._openssl(f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
                      f"-extfile extensions -out {name}.pem")  # fmt: skip
        return str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key")

    def _openssl(self, arguments: str) -> None:
        subprocess.run(["openssl", *arguments.split()], cwd=self._folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))
