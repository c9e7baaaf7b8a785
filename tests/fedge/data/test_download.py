"""Downloads against a real HTTPS server with a certificate of its own."""

import datetime
import hashlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.data.download import Source, fetch
from fedge.errors import DataError

BODY = b"63,1,4,140\n" * 10


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _certificate(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(secret + certificate.public_bytes(pem))


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server; its address."""
    _certificate(tmp_path / "server.pem")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.delenv("FEDGE_DATA", raising=False)
    monkeypatch.setenv("FEDGE_CACHE", str(tmp_path / "cache"))
    yield f"https://localhost:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def _source(url: str, body: bytes = BODY, max_bytes: int = 1000) -> Source:
    return Source("rows/site.csv", url, hashlib.sha256(body).hexdigest(), max_bytes)


def test_a_file_is_downloaded_once_and_then_read_from_the_cache(
    publisher: str, tmp_path: Path
) -> None:
    path = fetch(_source(f"{publisher}/file"))
    assert path == tmp_path / "cache" / "rows" / "site.csv"
    assert path.read_bytes() == BODY
    assert fetch(_source(f"{publisher}/missing")) == path
    assert [p.name for p in path.parent.iterdir()] == ["site.csv"]


def test_a_file_that_changed_at_its_publisher_is_not_kept(publisher: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the publisher may have changed it"):
        fetch(_source(f"{publisher}/file", b"other"))
    assert not (tmp_path / "cache" / "rows" / "site.csv").exists()


def test_a_large_file_is_not_read_to_its_end(publisher: str) -> None:
    with pytest.raises(DataError, match="larger than 50 bytes"):
        fetch(_source(f"{publisher}/file", max_bytes=50))


def test_a_missing_file_or_host_says_what_to_do(publisher: str) -> None:
    with pytest.raises(DataError, match=r"404.*set FEDGE_DATA|Not Found.*set FEDGE_DATA"):
        fetch(_source(f"{publisher}/missing"))
    with pytest.raises(DataError, match=r"cannot download .*put the file in a folder as rows/site"):
        fetch(_source("https://localhost:1/file"))


def test_an_unknown_certificate_is_refused(publisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DataError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(_source(f"{publisher}/file"))


def test_only_https_is_spoken(publisher: str) -> None:
    with pytest.raises(DataError, match="is not an https address"):
        fetch(_source(publisher.replace("https", "http")))


def test_a_local_folder_is_used_instead_and_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"cannot read .*FEDGE_DATA points there"):
        fetch(_source("https://localhost:1/"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "site.csv").write_bytes(BODY)
    assert fetch(_source("https://localhost:1/")).read_bytes() == BODY
    (tmp_path / "rows" / "site.csv").write_bytes(BODY + b"1")
    with pytest.raises(DataError, match="has sha256"):
        fetch(_source("https://localhost:1/"))


def test_a_damaged_cache_is_noticed(publisher: str) -> None:
    path = fetch(_source(f"{publisher}/file"))
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete it to have it downloaded again"):
        fetch(_source(f"{publisher}/file"))
