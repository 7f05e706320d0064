"""Registry of components, as plugins are pulled from."""

import hashlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess

import pytest
from conftest import wait_for

# User `batch`, password `pass word`.
LOGIN = "YmF0Y2g6cGFzcyB3b3Jk"


class Registry:
    """docker-registry of Debian on loopback; tests push artifacts over its API.

    With `users`, it has the user `batch`. With `tls`, the paths of a certificate and its key, it
    speaks HTTPS.
    """

    def __init__(self, folder, users=False, tls=None):
        program = shutil.which("docker-registry", path=os.environ["PATH"] + ":/usr/bin")
        if program is None:
            pytest.skip("docker-registry is not installed; it is a package of Debian")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.storage = folder / "registry"
        config = {
            "version": "0.1",
            "log": {"level": "warn"},
            "http": {"addr": self.address},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}},
        }
        self.headers = {}
        self.is_encrypted = tls is not None
        if tls:
            certificate, key = tls
            config["http"]["tls"] = {"certificate": str(certificate), "key": str(key)}
        if users:
            self.headers["authorization"] = f"Basic {LOGIN}"
            (folder / "htpasswd").write_text(
                "batch:$2b$04$f5OmI5pwgNQwG7B0h8t0deV0//sCKZwtm/tSzQf35dLadX82oqw0K\n"
            )
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
        # JSON is valid YAML.
        (folder / "registry.yml").write_text(json.dumps(config))
        command = [program, "serve", folder / "registry.yml"]
        with open(folder / "registry.log", "wb") as log:
            self.child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: self.ask("GET", "/v2/")[0] in (200, 401), what="the registry")
        except AssertionError:
            self.child.kill()
            raise

    def ask(self, method, path, body=None, **headers):
        if self.is_encrypted:
            # What tests push is checked by its digests.
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(self.address, context=context)
        else:
            connection = http.client.HTTPConnection(self.address)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, {**self.headers, **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        except OSError:
            return 0, {}, b""
        finally:
            connection.close()

    def blob(self, name, content):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        _, headers, _ = self.ask("POST", f"/v2/{name}/blobs/uploads/")
        place = headers["Location"].partition(self.address)[2]
        status, _, answer = self.ask(
            "PUT", f"{place}&digest={digest}", content, content_type="application/octet-stream"
        )
        assert status == 201, answer
        return digest

    def push(self, name, tag, *layers):
        """Pushes layers (media type, content) as `wkg` and `oras` do; returns the digest."""
        config = b"{}"
        described = [
            {"mediaType": kind, "digest": self.blob(name, content), "size": len(content)}
            for kind, content in layers
        ]
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {
                    "mediaType": "application/vnd.wasm.config.v0+json",
                    "digest": self.blob(name, config),
                    "size": len(config),
                },
                "layers": described,
            }
        ).encode()
        kind = "application/vnd.oci.image.manifest.v1+json"
        status, _, answer = self.ask(
            "PUT", f"/v2/{name}/manifests/{tag}", manifest, content_type=kind
        )
        assert status == 201, answer
        return "sha256:" + hashlib.sha256(manifest).hexdigest()

    def corrupt(self, content):
        """Flips a bit of a stored blob."""
        digest = hashlib.sha256(content).hexdigest()
        path = self.storage / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"
        changed = bytearray(path.read_bytes())
        changed[-1] ^= 1
        path.write_bytes(changed)


@pytest.fixture
def registry(tmp_path):
    registries = []

    def start(**more):
        folder = tmp_path / f"registry{len(registries)}"
        folder.mkdir()
        registries.append(Registry(folder, **more))
        return registries[-1]

    yield start
    for registry in registries:
        registry.child.kill()
        registry.child.wait()
