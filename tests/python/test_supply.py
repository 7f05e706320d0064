"""Supply chain of plugins: registries, pins, signatures, serials.

Attacks: corrupt blobs, wrong artifacts, stolen passwords, unsigned edits, old signed versions.
"""

import contextlib
import hashlib
import http.client
import http.server
import json
import os
import pathlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.request

import pytest
from conftest import PLUGINS, built, chat, load_errors, run_host, wait_for

ECHO = PLUGINS / "inference-echo.wasm"
WASM = "application/wasm"


class Registry:
    """docker-registry of Debian on loopback; tests push artifacts over its API."""

    def __init__(self, folder, users=False):
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
        if users:
            # User `batch`, password `pass word`.
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
        connection = http.client.HTTPConnection(self.address)
        try:
            connection.request(
                method,
                path,
                body,
                {name.replace("_", "-"): value for name, value in headers.items()},
            )
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        except OSError:
            return 0, {}, b""
        finally:
            connection.close()

    def blob(self, name, content):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        _, headers, _ = self.ask("POST", f"/v2/{name}/blobs/uploads/")
        place = headers["Location"].removeprefix(f"http://{self.address}")
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


def pull(registry, reference, to, *more, env=None, **options):
    # A folder without a login, instead of the user's own configuration.
    options["env"] = {"DOCKER_CONFIG": str(registry.storage), **(env or {})}
    return run_host(
        "plugin",
        "pull",
        f"{registry.address}/{reference}",
        "--to",
        to,
        "--plain-http",
        *more,
        **options,
    )


def states(server):
    with urllib.request.urlopen(server.url + "/v1/plugins") as answer:
        return {plugin["name"]: plugin for plugin in json.load(answer)["data"]}


def test_pulled_plugin_is_pinned_and_disabled_until_enabled(serve, registry):
    registry = registry()
    content = ECHO.read_bytes()
    digest = registry.push("team/parrot", "1.0", (WASM, content))
    server = serve(plugins={})
    pulled = pull(registry, "team/parrot:1.0", server.plugins)
    assert pulled.returncode == 0, pulled.stderr
    sha256 = hashlib.sha256(content).hexdigest()
    component = f"parrot-{sha256[:16]}.wasm"
    assert (
        f"@{digest}" in pulled.stdout
        and "imports nothing" in " ".join(pulled.stdout.split())
        and sha256 in pulled.stdout
    )
    manifest = server.plugins / "parrot.toml"
    text = manifest.read_text()
    assert (
        f'component = "{component}"' in text
        and f'sha256 = "{sha256}"' in text
        and f"@{digest}" in text
    )
    assert (server.plugins / component).read_bytes() == content
    wait_for(
        lambda: states(server).get("parrot", {}).get("state") == "disabled",
        what="the disabled plugin",
    )
    # The operator enables the plugin.
    manifest.write_text(
        text.replace("enabled = false", "enabled = true ").replace(
            "models = []", 'models = ["parrot"]'
        )
    )
    wait_for(lambda: "parrot" in server.models(), what="the plugin")
    assert server.run([chat("a", model="parrot")]).request_counts.completed == 1
    # A later version has its own file name; the serving component is not touched.
    later = content + b"\x00\x05\x04note"
    digest = registry.push("team/parrot", "1.0", (WASM, later))
    kept = manifest.read_text()
    pulled = pull(registry, f"team/parrot@{digest}", server.plugins)
    assert pulled.returncode == 0 and "stays as it is" in pulled.stdout
    assert manifest.read_text() == kept and (server.plugins / component).read_bytes() == content
    lines = [
        line for line in pulled.stdout.splitlines() if line.startswith(("component =", "sha256 ="))
    ]
    changed = [
        line for line in kept.splitlines() if not line.startswith(("component =", "sha256 ="))
    ]
    manifest.write_text("\n".join(lines + changed))
    wait_for(
        lambda: states(server)["parrot"]["sha256"] == hashlib.sha256(later).hexdigest(),
        what="the later version",
    )
    assert states(server)["parrot"]["state"] == "loaded"


def test_pull_errors_are_reported_and_leave_no_file(registry, tmp_path):
    registry = registry()
    content = ECHO.read_bytes()
    registry.push("p", "good", (WASM, content))
    registry.push("p", "image", ("application/vnd.oci.image.layer.v1.tar+gzip", b"x"))
    registry.push("p", "several", (WASM, content), (WASM, content + b"\x00\x05\x04note"))
    registry.push("p", "module", (WASM, (built("hostile") / "core-module.wasm").read_bytes()))
    spoiled = content + b"\x00\x05\x04spoi"
    registry.push("p", "spoiled", (WASM, spoiled))
    registry.corrupt(spoiled)
    index = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [],
        }
    ).encode()
    registry.ask(
        "PUT",
        "/v2/p/manifests/index",
        index,
        content_type="application/vnd.oci.image.index.v1+json",
    )
    to = tmp_path / "plugins"
    to.mkdir()
    for reference, parts in {
        "p:missing": ["p:missing", "the registry has no such repository"],
        "nobody/knows:1": ["the registry has no such repository"],
        "p:image": ["no layer of it is a component (application/wasm)", "tar+gzip"],
        "p:several": ["several layers of WebAssembly"],
        "p:module": ["core WebAssembly module"],
        "p:spoiled": ["igest"],
        "p:index": ["index of several images"],
        f"p@sha256:{'0' * 64}": ["the registry has no such repository"],
        "P:UPPER CASE": ["REGISTRY/REPOSITORY:TAG"],
    }.items():
        pulled = pull(registry, reference, to)
        assert pulled.returncode != 0, reference
        for part in parts:
            assert part in pulled.stderr, pulled.stderr
        assert "panicked" not in pulled.stderr and list(to.iterdir()) == [], reference
    # Missing TLS, closed port, missing folder, invalid name.
    address = f"{registry.address}/p:good"
    assert "failed to pull" in run_host("plugin", "pull", address, "--to", to).stderr
    assert (
        "refused"
        in run_host("plugin", "pull", "127.0.0.1:1/p:good", "--to", to, "--plain-http").stderr
    )
    assert "--to" in pull(registry, "p:good", tmp_path / "nowhere").stderr
    assert "not a plugin name" in pull(registry, "p:good", to, "--name", "../b").stderr
    assert list(to.iterdir()) == []
    assert pull(registry, "p:good", to, "--name", "other").returncode == 0
    assert {path.suffix for path in to.iterdir()} == {".toml", ".wasm"} and (
        to / "other.toml"
    ).exists()


def test_pull_authenticates_with_username_or_docker_config(registry, tmp_path):
    registry = registry(users=True)
    refused = pull(registry, "p:1", tmp_path, env={"DOCKER_CONFIG": str(tmp_path)})
    assert refused.returncode != 0 and "--username" in refused.stderr
    who = ["--username", "batch", "--password", "env:REGISTRY_PASSWORD"]
    known = pull(registry, "p:1", tmp_path, *who, env={"REGISTRY_PASSWORD": "pass word"})
    assert "--username" not in known.stderr and "has no such repository" in known.stderr, (
        known.stderr
    )
    wrong = pull(registry, "p:1", tmp_path, *who, env={"REGISTRY_PASSWORD": "password"})
    assert wrong.returncode != 0 and "password" not in wrong.stderr.replace("--password", "")
    # The configuration that `docker login` writes.
    (tmp_path / "config.json").write_text(
        json.dumps({"auths": {registry.address: {"auth": "YmF0Y2g6cGFzcyB3b3Jk"}}})
    )
    known = pull(registry, "p:1", tmp_path, env={"DOCKER_CONFIG": str(tmp_path)})
    assert "has no such repository" in known.stderr, known.stderr


@pytest.fixture
def keys(tmp_path):
    """Creates SSH key pairs by name."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed; it is in openssh-client of Debian")

    def make(name, passphrase="", kind="ed25519"):
        path = tmp_path / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", name, "-f", path], check=True
        )
        return path

    return make


def test_trusted_keys_require_a_signature(serve, stub, keys, tmp_path):
    ours, theirs = keys("ours"), keys("theirs", kind="ecdsa")
    trusted = tmp_path / "trusted"
    trusted.write_text("# the platform team\n" + pathlib.Path(f"{ours}.pub").read_text())
    server = serve("--trusted-keys", trusted, plugins={"p": stub.plugin(["m"])})

    def state(name):
        return states(server).get(name, {})

    wait_for(lambda: {"p", "standard"} <= set(states(server)), what="the errors in the log")
    assert state("p")["state"] == state("standard")["state"] == "failed"
    assert "p.toml: signature: there is none" in load_errors(server).get(
        "p", ""
    ) and "plugin sign" in load_errors(server).get("p", "")

    def sign(name, key, *more, **options):
        return run_host(
            "plugin", "sign", server.plugins / f"{name}.toml", "--key", key, *more, **options
        )

    signed = sign("p", ours)
    assert signed.returncode == 0, signed.stderr
    assert sign("standard", ours).returncode == 0
    wait_for(
        lambda: state("p").get("state") == state("standard").get("state") == "loaded",
        what="the signed plugins",
    )
    assert state("p")["signed_by"].startswith("SHA256:") and state("p")["signed_by"].endswith(
        " ours"
    )
    assert server.run([chat("a", model="m")]).request_counts.completed == 1
    # ssh-keygen accepts the signature of the printed statement.
    (tmp_path / "allowed").write_text("team " + pathlib.Path(f"{ours}.pub").read_text())
    statement = run_host("plugin", "sign", server.plugins / "p.toml", "--statement")
    assert statement.stdout.startswith("batchwright plugin v1\nname p\nmanifest sha256:"), (
        statement.stderr
    )
    verified = subprocess.run(
        [
            "ssh-keygen",
            "-Y",
            "verify",
            "-f",
            tmp_path / "allowed",
            "-I",
            "team",
            "-n",
            "batchwright-plugin",
            "-s",
            server.plugins / "p.toml.sig",
        ],
        input=statement.stdout,
        text=True,
        capture_output=True,
    )
    assert verified.returncode == 0 and "Good" in verified.stdout, verified.stderr
    # Changed file, changed component, untrusted key: the old plugin keeps serving.
    text = (server.plugins / "p.toml").read_text()
    server.add_plugin("p", text.replace('["m"]', '["m", "n"]'))
    wait_for(lambda: state("p")["state"] == "outdated", what="the error in the log")
    assert (
        "changed after it was signed" in load_errors(server).get("p", "")
        and "n" not in server.models()
    )
    sign("p", theirs)
    wait_for(
        lambda: "a key that is not in" in load_errors(server).get("p", ""),
        what="the error in the log",
    )
    sign("p", ours)
    wait_for(lambda: "n" in server.models(), what="the newly signed file")
    component = server.plugins / "inference-openai.wasm"
    component.write_bytes(component.read_bytes() + b"\x00\x05\x04note")
    wait_for(lambda: state("p")["state"] == "outdated", what="the error in the log")
    assert server.run([chat("a", model="n")]).request_counts.completed == 1
    verify = [
        "plugin",
        "verify",
        "--trusted-keys",
        trusted,
        server.plugins / "p.toml",
        server.plugins / "standard.toml",
    ]
    verified = run_host(*verify)
    assert (
        verified.returncode == 1
        and "changed after it was signed" in verified.stdout
        and "ok " in verified.stdout
    )
    sign("p", ours)
    assert run_host(*verify).returncode == 0
    # Disabling a plugin needs a signature too.
    signed = (server.plugins / "p.toml").read_text()
    server.add_plugin("p", "enabled = false\n" + signed)
    wait_for(lambda: state("p")["state"] == "outdated", what="the error in the log")
    assert server.run([chat("a", model="n")]).request_counts.completed == 1
    sign("p", ours)
    wait_for(lambda: state("p")["state"] == "disabled", what="the plugin to be disabled")
    server.add_plugin("p", signed)
    sign("p", ours)
    wait_for(lambda: state("p")["state"] == "loaded", what="the plugin")
    # The signature covers the name, so a copy under another name is refused.
    for end in ["toml", "toml.sig"]:
        shutil.copy(server.plugins / f"p.{end}", server.plugins / f"q.{end}")
    wait_for(lambda: state("q").get("state") == "failed", what="the error in the log")
    assert "changed after it was signed" in load_errors(server)["q"]


def test_openssh_signatures_are_accepted_and_bad_keys_reported(serve, keys, tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    shutil.copy(ECHO, folder)
    manifest = folder / "e.toml"
    manifest.write_text('component = "inference-echo.wasm"\nmodels = ["e"]\n')
    key = keys("locked", "open sesame")
    trusted = tmp_path / "locked.pub"
    sign = ["plugin", "sign", manifest, "--key", key]
    before = manifest.read_text()
    assert "--passphrase" in run_host(*sign).stderr
    wrong = run_host(*sign, "--passphrase", "env:P", env={"P": "wrong"})
    assert wrong.returncode != 0 and "the passphrase is wrong" in wrong.stderr
    assert manifest.read_text() == before
    assert run_host(*sign, "--passphrase", "env:P", env={"P": "open sesame"}).returncode == 0
    check = ["plugin", "check", manifest, "--trusted-keys", trusted]
    assert run_host(*check).returncode == 0
    # The host never sees the key: ssh-keygen signs the printed statement.
    statement = run_host("plugin", "sign", manifest, "--statement").stdout
    plain = keys("plain")
    signature = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-n", "batchwright-plugin", "-f", plain],
        input=statement.encode(),
        capture_output=True,
        check=True,
    ).stdout
    (folder / "e.toml.sig").write_bytes(signature)
    assert "a key that is not in" in run_host(*check).stdout
    assert run_host("plugin", "check", manifest, "--trusted-keys", f"{plain}.pub").returncode == 0
    for content, part in [("", "holds no public key"), ("ssh-ed25519 nonsense", "line 1")]:
        bad = tmp_path / "bad"
        bad.write_text(content)
        refused = run_host("plugin", "check", manifest, "--trusted-keys", bad)
        assert (
            refused.returncode == 3 and part in refused.stderr and "trusted_keys" in refused.stderr
        ), refused.stderr
    assert "is not a private key" in run_host("plugin", "sign", manifest, "--key", trusted).stderr


def test_old_serial_and_withdrawn_key_are_refused(serve, tmp_path):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed; it is in openssh-client of Debian")
    for name in ["ours", "theirs"]:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True
        )
    public = {name: (tmp_path / f"{name}.pub").read_text() for name in ["ours", "theirs"]}
    trusted = tmp_path / "trusted"
    trusted.write_text(public["ours"] + 'names="other" ' + public["theirs"])
    server = serve("--trusted-keys", trusted)

    def sign(name, key):
        signed = run_host(
            "plugin", "sign", server.plugins / f"{name}.toml", "--key", tmp_path / key
        )
        assert signed.returncode == 0, signed.stderr

    sign("standard", "ours")
    sign("echo", "ours")
    wait_for(lambda: server.models() == ["echo"], what="the signed plugin")
    old = {end: (server.plugins / f"echo.{end}").read_bytes() for end in ["toml", "toml.sig"]}
    sign("echo", "ours")
    serial = lambda: int(
        (server.plugins / "echo.toml").read_text().split("serial = ")[1].split()[0]
    )  # noqa: E731
    kept = lambda: json.loads((server.data / "serials").read_text()).get("echo")  # noqa: E731
    wait_for(lambda: kept() == serial(), what="the serial to be stored")
    for end, content in old.items():
        (server.plugins / f"echo.{end}").write_bytes(content)
    wait_for(lambda: "its serial is" in server.logged(), what="the error in the log")
    server.stop()
    server.start()
    assert server.models() == []
    sign("echo", "ours")
    wait_for(lambda: server.models() == ["echo"], what="the newly signed plugin")
    # A key for another plugin name, then a withdrawn key.
    sign("echo", "theirs")
    wait_for(lambda: "may sign only other" in server.logged(), what="the error in the log")
    sign("echo", "ours")
    trusted.write_text('names="other" ' + public["theirs"])
    wait_for(
        lambda: "trusted keys changed" in server.logged() and "is not in" in server.logged(),
        20,
        "the complaint",
    )
    wait_for(lambda: server.models() == [], what="the plugin to be unloaded")
    # The last key can be withdrawn too.
    trusted.write_text("# no key\n")
    wait_for(lambda: server.logged().count("trusted keys changed") == 2, 20, "the keys to be read")


def test_unsigned_edit_keeps_the_signed_plugin_serving(serve, tmp_path):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed; it is in openssh-client of Debian")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "ours"], check=True
    )
    server = serve("--trusted-keys", tmp_path / "ours.pub")
    for name in ["standard", "echo"]:
        assert (
            run_host(
                "plugin", "sign", server.plugins / f"{name}.toml", "--key", tmp_path / "ours"
            ).returncode
            == 0
        )
    wait_for(lambda: server.models() == ["echo"], what="the signed plugin")
    with open(server.plugins / "echo.toml", "a") as file:
        file.write("# edited\n")
    wait_for(lambda: "changed after it was signed" in server.logged(), what="the error in the log")
    time.sleep(5)
    assert server.models() == ["echo"] and server.run([chat("a")]).request_counts.completed == 1


class RedirectingRegistry(http.server.BaseHTTPRequestHandler):
    """Registry that redirects clients, and the target of the redirect."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("authorization")))
        status, headers, body = self.server.answer(self.path, self.headers.get("authorization"))
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(answer):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RedirectingRegistry)
    server.seen, server.answer = [], answer
    server.address = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_registry_password_is_sent_to_no_other_host(tmp_path):
    component = ECHO.read_bytes()
    digest = "sha256:" + hashlib.sha256(component).hexdigest()
    layer = {"mediaType": "application/wasm", "digest": digest, "size": len(component)}
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": layer,
            "layers": [layer],
        }
    )
    size = 0

    def elsewhere(path, authorization):
        if path.startswith("/token"):
            return 200, {}, b'{"token":"T","access_token":"T"}'
        # Two redirects before the content.
        if path == "/one":
            return 307, {"location": "/two"}, b""
        return 200, {}, component

    def registry(path, authorization):
        if authorization != "Bearer T":
            return (
                401,
                {"www-authenticate": f'Bearer realm="http://{other.address}/token",service="s"'},
                b"{}",
            )
        if "/manifests/" in path:
            return 200, {}, manifest.encode() + b" " * size
        return 307, {"location": f"http://{other.address}/one"}, b""

    with serving(elsewhere) as other, serving(registry) as ours:
        who = ["--username", "u", "--password", "env:SECRET", "--plain-http"]
        env = {"SECRET": "hunter2", "DOCKER_CONFIG": str(tmp_path)}
        command = ["plugin", "pull", f"{ours.address}/team/p:1", "--to", tmp_path, *who]
        refused = run_host(*command, env=env)
        assert refused.returncode != 0 and "--auth-host 127.0.0.1" in refused.stderr, refused.stderr
        assert other.seen == []
        pulled = run_host(*command, "--auth-host", "127.0.0.1", env=env)
        assert pulled.returncode == 0, pulled.stderr
        assert [path.split("?")[0] for path, _ in other.seen] == ["/token", "/one", "/two"]
        assert [authorization for _, authorization in other.seen][1:] == [None, None]
        size = 5 << 20
        large = run_host(*command, "--auth-host", "127.0.0.1", env=env)
        assert large.returncode != 0 and "its manifest is larger than" in large.stderr
