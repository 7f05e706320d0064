"""`batchwright doctor`: what it finds, its exit status, and what a bundle does not contain."""

import datetime
import http.server
import json
import shutil
import sqlite3

import pytest
import trustme
from conftest import COMPONENTS, PLUGINS, chat, http_server, run_host

FINE, FAILURE, WARNING = 0, 1, 7


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with the plugins that ship, but for the echo adapter's network."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for file in [*COMPONENTS, "standard.toml", "echo.toml"]:
        shutil.copy(PLUGINS / file, plugins / file)
    return tmp_path


def doctor(folder, *arguments, **more):
    """Returns the exit status, and the findings by check."""
    data = more.pop("data", folder / "data")
    done = run_host(
        "doctor", "--json", "--data", data, "--plugins", folder / "plugins", *arguments, **more
    )
    assert done.stdout, done.stderr
    found = {one["check"]: one for one in json.loads(done.stdout)}
    return done.returncode, found


def provider(status, body):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    return http_server(Handler)


def add_plugin(folder, name, url, more=""):
    (folder / "plugins" / f"{name}.toml").write_text(
        f'component = "inference-openai.wasm"\nmodels = ["{name}"]\n'
        f'[settings]\nbase_url = "{url}/v1"\n{more}'
    )


def test_running_server_is_found_healthy(serve):
    server = serve()
    server.run([chat("a")])
    status, found = doctor(server.folder, data=server.data)
    print(json.dumps(list(found.values()), indent=1))
    assert {one["severity"] for one in found.values()} == {"ok"}
    assert status == FINE
    for check in ("settings", "open files", "data folder", "database", "disk", "clock", "webhooks"):
        assert check in found
    assert found["plugin echo"]["message"] == "loaded"
    # It changes nothing that the server needs.
    assert server.run([chat("b")]).status == "completed"
    shown = run_host("doctor", "--deep", "--data", server.data, "--plugins", server.plugins)
    assert shown.returncode == FINE and shown.stdout.startswith("ok ")


@pytest.mark.parametrize(
    ("version", "fault"), [(2, "the server migrates it"), (99, "of a newer version")]
)
def test_database_of_another_version_is_not_called_damaged(folder, serve, version, fault):
    server = serve()
    server.stop()
    with sqlite3.connect(server.data / "batchwright.db") as database:
        database.execute(f"PRAGMA user_version = {version}")
    status, found = doctor(folder, data=server.data)
    assert status == FAILURE
    assert fault in found["database"]["message"] and "restore" not in found["database"]["message"]


def test_providers_say_what_is_wrong(folder, serve):
    serve_once = serve()
    serve_once.stop()
    secret = "planted-secret-4711"
    with (
        provider(200, {"data": []}) as good,
        provider(401, {"error": {"message": "no such key"}}) as refusing,
        provider(500, {"error": {"message": "on fire"}}) as broken,
    ):
        add_plugin(folder, "good", good.url)
        add_plugin(folder, "refusing", refusing.url, '[credentials]\napi_key = "env:PLANTED"\n')
        add_plugin(folder, "broken", broken.url)
        add_plugin(folder, "away", "http://127.0.0.1:9")
        (folder / "plugins/typo.toml").write_text('component = "missing.wasm"\nmodels = ["x"]\n')
        bundle = folder / "bundle.json"
        status, found = doctor(
            folder, "--bundle", bundle, data=serve_once.data, env={"PLANTED": secret}
        )
    assert status == FAILURE
    severity = {check: one["severity"] for check, one in found.items()}
    assert severity["provider of good"] == "ok"
    assert severity["provider of broken"] == "warning"
    assert severity["provider of away"] == severity["provider of refusing"] == "failure"
    assert "no such key" in found["provider of refusing"]["message"]
    assert (
        severity["plugin typo"] == "failure" and "missing.wasm" in found["plugin typo"]["message"]
    )
    text = bundle.read_text()
    assert secret not in text
    written = json.loads(text)
    assert {plugin["name"] for plugin in written["plugins"]} >= {"good", "typo"}
    assert written["settings"]["listen"] == {"value": "127.0.0.1:8080", "source": "default"}
    again = run_host("doctor", "--data", serve_once.data, "--bundle", bundle)
    assert again.returncode == FAILURE and "cannot be written" in again.stderr
    _, offline = doctor(folder, "--offline", data=serve_once.data, env={"PLANTED": secret})
    assert not any(check.startswith("provider") for check in offline)


def test_missing_folder_and_changed_clock_are_found(folder, serve):
    status, found = doctor(folder, data=folder / "nowhere")
    assert status == FAILURE and found["data folder"]["severity"] == "failure"
    server = serve()
    server.run([chat("a")])
    server.stop()
    database = sqlite3.connect(server.data / "batchwright.db")
    database.execute("UPDATE batches SET created_at = created_at + 3600000")
    database.commit()
    database.close()
    server.data.chmod(0o755)
    status, found = doctor(folder, data=server.data)
    assert found["clock"]["severity"] == "failure" and "ahead" in found["clock"]["message"]
    assert found["data folder"]["severity"] == "warning"


def test_damaged_database_is_found(folder, serve):
    server = serve()
    server.run([chat(f"line-{number}", "x" * 2000) for number in range(300)])
    server.stop()
    path = server.data / "batchwright.db"
    content = bytearray(path.read_bytes())
    for at in range(5 * 16384, len(content), 16384):
        content[at : at + 600] = b"\xff" * 600
    path.write_bytes(content)
    status, found = doctor(folder, "--deep", data=server.data)
    assert status == FAILURE
    assert found["database"]["severity"] == "failure"
    assert "restore" in found["database"]["message"]


@pytest.mark.parametrize(("days", "severity"), [(90, "ok"), (3, "warning"), (-3, "failure")])
def test_certificate_that_expires_is_found(folder, serve, days, severity):
    server = serve()
    server.stop()
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    issued = trustme.CA().issue_cert("localhost", not_after=end)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    arguments = ("--tls-certificate", certificate, "--tls-key", key)
    status, found = doctor(folder, *arguments, data=server.data)
    assert found["certificate"]["severity"] == severity, found["certificate"]
    assert status == {"ok": FINE, "warning": WARNING, "failure": FAILURE}[severity]
