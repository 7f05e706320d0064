"""Supply of plugins from registries: pulls, pins, passwords.

Attacks: corrupt blobs, wrong artifacts, registries that ask for the password on another host.
"""

import contextlib
import hashlib
import http.server
import json

from conftest import PLUGINS, built, chat, http_server, run_host, wait_for
from conftest import plugin_states as states

ECHO = PLUGINS / "inference-echo.wasm"


WASM = "application/wasm"


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
    with http_server(RedirectingRegistry) as server:
        server.seen, server.answer = [], answer
        server.address = f"127.0.0.1:{server.server_port}"
        yield server


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
