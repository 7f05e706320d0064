"""TLS of the listener, with certificates of a private authority."""

import os
import socket
import ssl
import time

import httpx2
import openai
import pytest
import trustme
from conftest import chat, run_host, wait_for


class Files:
    """Certificate and key of a server, and the authority that clients trust."""

    def __init__(self, folder):
        self.authority = trustme.CA()
        self.certificate, self.key = folder / "tls.pem", folder / "tls.key"
        self.issue()
        self.context = ssl.create_default_context()
        self.authority.configure_trust(self.context)

    def issue(self):
        """Writes a new certificate and its key; returns the serial number of the certificate."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        for path, blobs in (
            (self.certificate, issued.cert_chain_pems),
            (self.key, [issued.private_key_pem]),
        ):
            draft = path.with_suffix(".new")
            draft.write_bytes(b"".join(blob.bytes() for blob in blobs))
            os.replace(draft, path)

    def arguments(self):
        return ["--tls-certificate", str(self.certificate), "--tls-key", str(self.key)]

    def served(self, url):
        """Returns the certificate that the server presents."""
        host, port = url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            with self.context.wrap_socket(connection, server_hostname=host) as encrypted:
                return encrypted.getpeercert(binary_form=True)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_sdk_runs_a_batch_over_tls(serve, files):
    server = serve(*files.arguments())
    assert server.url.startswith("https://")
    http_client = openai.DefaultHttpxClient(verify=files.context)
    server.client = openai.OpenAI(
        base_url=server.url + "/v1", api_key="none", http_client=http_client, max_retries=0
    )
    batch = server.run([chat("1"), chat("2")])
    assert batch.request_counts.completed == 2
    with httpx2.Client(verify=files.context, http2=True) as client:
        answer = client.get(server.url + "/health/ready")
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
    with pytest.raises(httpx2.HTTPError):
        httpx2.get(server.url.replace("https", "http") + "/health/ready")
    untrusting = ssl.create_default_context()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(server.url + "/health/ready", verify=untrusting)


def test_renewed_certificate_is_served_without_a_restart_and_a_damaged_one_is_not(serve, files):
    server = serve(*files.arguments())
    first = files.served(server.url)
    files.key.write_text("nonsense")
    wait_for(lambda: "previous one still in use" in server.logged(), what="the warning")
    assert files.served(server.url) == first
    files.issue()
    wait_for(lambda: files.served(server.url) != first, what="the renewed certificate")
    assert "certificate replaced" in server.logged()


def test_handshake_that_never_ends_is_closed(serve, files):
    server = serve(*files.arguments(), "--request-head-timeout", "1s")
    host, port = server.url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as silent:
        started = time.monotonic()
        silent.sendall(b"\x16\x03\x01")
        try:
            assert silent.recv(100) == b""
        except ConnectionError:
            pass
        assert time.monotonic() - started < 15
    assert files.served(server.url)
    assert server.stop() == 0


def test_certificate_that_cannot_be_used_is_an_error_at_the_start(files, tmp_path):
    (tmp_path / "plugins").mkdir()
    base = ["serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "data"]
    base += ["--plugins", tmp_path / "plugins"]
    other = Files(tmp_path / "plugins")
    certificate, key = str(files.certificate), str(files.key)
    for arguments, words in [
        (["--tls-certificate", certificate], "tls_key: is missing"),
        (["--tls-key", key], "tls_certificate: is missing"),
        (["--tls-certificate", key, "--tls-key", key], "the file has no certificate"),
        (["--tls-certificate", certificate, "--tls-key", certificate], "private key is expected"),
        (["--tls-certificate", "/nowhere", "--tls-key", key], "/nowhere"),
        (["--tls-certificate", certificate, "--tls-key", str(other.key)], "together"),
    ]:
        done = run_host(*base, *arguments)
        assert done.returncode == 3, done.stderr
        assert words in done.stderr
