"""Fixtures and helpers of the end-to-end tests: server process, stub provider, official SDK.

The server under test is the built one (`dist/batchwright`), started as a process of its own.
"""

import contextlib
import functools
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
import urllib.request
import uuid

import openai
import pytest

# Fixtures of the tests with a hostile plugin, of packages, charts, images and registries, and with
# several tenants.
pytest_plugins = ["containment", "packages", "charts", "containers", "registries", "tenants"]
# Failed asserts of this module show their values, like those of a test.
pytest.register_assert_rewrite("outages")

ROOT = pathlib.Path(__file__).parents[2]
HOST = ROOT / "dist/batchwright"
PLUGINS = ROOT / "dist/plugins"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
STUB = TARGET / "release/stub-provider"
COMPONENTS = [
    "validator-standard.wasm",
    "one-model.wasm",
    "inference-openai.wasm",
    "inference-echo.wasm",
]
CHAT = "/v1/chat/completions"


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="random seed of the crash test and of schemathesis")
    parser.addoption("--kills", type=int, default=25, help="number of kills of the crash test")
    parser.addoption("--long", action="store_true", help="run the long mode of tests that have one")


@functools.cache
def built(part):
    """Returns the folder target/`part` of test plugins; builds the plugins on first use."""
    if not os.environ.get("TEST_PLUGINS_BUILT"):
        subprocess.run(["cargo", "xtask", "build", part], cwd=ROOT, check=True)
    return TARGET / part


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "quiet: measures, or uses up a resource, so nothing runs beside it"
    )


# Attacks and the error that contained each, printed in the terminal summary.
CONTAINED = []


def pytest_terminal_summary(terminalreporter):
    if CONTAINED:
        terminalreporter.section("contained")
        for name, how in CONTAINED:
            terminalreporter.write_line(f"{name:<34} {' '.join(how.split())[:200]}")


def handles(process, sent):
    """Returns true if a process has a handler for a signal."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.M)[1], 16)
    return bool(caught >> (sent - 1) & 1)


def wait_for(condition, seconds=30, what="a condition"):
    """Returns the first true value of a condition; fails after a timeout."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    what = what() if callable(what) else what
    raise AssertionError(f"timed out after {seconds} s waiting for {what}")


def chat(custom_id, content="hi", model="echo", **body):
    """Returns one line of an input file as a dictionary."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def jsonl(lines):
    return "".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
    ).encode()


def lines(path):
    """Returns the parsed lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Process:
    """Program that prints `listening on URL`; its standard error goes to a log file."""

    def __init__(self, command, log, env=None):
        self.log = log
        with open(log, "ab") as errors:
            environment = {**os.environ, **(env or {})}
            self.child = subprocess.Popen(
                [str(part) for part in command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        line = self.child.stdout.readline()
        assert line.startswith("listening on http"), f"printed {line!r}; log: {self.logged()}"
        self.url = line.split()[-1]

    def read_line(self):
        """Returns the next line of standard output."""
        return self.child.stdout.readline()

    def logged(self):
        """Returns the log so far."""
        return pathlib.Path(self.log).read_text()

    def kill(self):
        self.child.kill()
        self.child.wait()

    def stop(self):
        self.child.send_signal(signal.SIGTERM)
        return self.child.wait(timeout=60)


class Stub(Process):
    def __init__(self, folder, name="stub", port=0):
        super().__init__([STUB, "--name", name, "--port", port], folder / f"{name}.log")

    def ask(self, path):
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def counts(self):
        """Returns how many times each prompt arrived."""
        return {prompt: len(times) for prompt, times in self.ask("/arrivals").items()}

    def plugin(self, models, more=""):
        """Returns a plugin file for the OpenAI adapter with this stub as its provider."""
        models = json.dumps(models)
        return (
            f'component = "inference-openai.wasm"\nmodels = {models}\n'
            f'[settings]\nbase_url = "{self.url}/v1"\n{more}'
        )


class Server(Process):
    """Server with its own data folder and plugin folder."""

    tenant = "default"

    def __init__(self, folder, *arguments, env=None):
        self.folder = folder
        self.data = folder / "data"
        self.plugins = folder / "plugins"
        if not self.plugins.exists():
            self.plugins.mkdir()
            for file in [*COMPONENTS, "standard.toml", "echo.toml"]:
                shutil.copy(PLUGINS / file, self.plugins / file)
        self.arguments = arguments
        self.env = env
        self.start()

    def start(self):
        listen = [] if "--listen" in self.arguments else ["--listen", "127.0.0.1:0"]
        command = [HOST, "serve", *listen, "--data", self.data, "--plugins", self.plugins]
        super().__init__([*command, *self.arguments], self.folder / "server.log", self.env)
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    def add_plugin(self, name, text):
        (self.plugins / f"{name}.toml").write_text(text)

    def upload(self, lines, **more):
        content = lines if isinstance(lines, bytes) else jsonl(lines)
        return self.client.files.create(file=("in.jsonl", content), purpose="batch", **more)

    def create(self, lines, endpoint=CHAT, **more):
        return self.client.batches.create(
            input_file_id=self.upload(lines).id, endpoint=endpoint, completion_window="24h", **more
        )

    def ended(self, batch_id, seconds=60):
        def look():
            batch = self.client.batches.retrieve(batch_id)
            return (
                batch if batch.status in ("completed", "failed", "cancelled", "expired") else None
            )

        return wait_for(look, seconds, f"the end of {batch_id}")

    def run(self, lines, **more):
        return self.ended(self.create(lines, **more).id)

    def results(self, batch):
        """Returns the parsed lines of the output file and of the error file."""

        def read(file_id):
            if file_id is None:
                return []
            content = self.client.files.content(file_id).content
            assert content.endswith(b"\n")
            return [json.loads(line) for line in content[:-1].split(b"\n")]

        return read(batch.output_file_id), read(batch.error_file_id)

    def models(self):
        return [model.id for model in self.client.models.list()]


@contextlib.contextmanager
def http_server(handler):
    """Serves a request handler class on a free port, in threads; the server has a `url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def leftovers(server):
    """Returns objects without a record in the database, and records of unfinished objects."""
    database = sqlite3.connect(f"file:{server.data}/batchwright.db?mode=ro", uri=True)
    recorded = {row[0] for row in database.execute("SELECT id FROM files WHERE NOT removed")}
    pending = {row[0] for row in database.execute("SELECT id FROM pending_objects")}
    database.close()
    # The readiness check writes a short-lived probe, which belongs to no file.
    written = [path.name for path in (server.data / "objects").rglob("*") if path.is_file()]
    return {name for name in written if not name.startswith("probe")} - recorded | pending


def plugin_states(server):
    """Returns the plugins of a server by name, as a client sees them."""
    with urllib.request.urlopen(server.url + "/v1/plugins") as answer:
        return {plugin["name"]: plugin for plugin in json.load(answer)["data"]}


def load_errors(server):
    """Returns the last error in the log of each plugin that does not load."""
    logged_error = re.compile(
        r"(?:plugin not loaded|plugin not replaced, previous version still serving)"
        r' plugin="([^"]*)" error=(.*)$',
        re.M,
    )
    return dict(logged_error.findall(server.logged()))


@pytest.fixture
def long(request):
    """Returns true if tests run in their long mode."""
    return request.config.getoption("--long")


@pytest.fixture
def stub(tmp_path):
    stub = Stub(tmp_path)
    yield stub
    stub.kill()


@pytest.fixture
def serve(tmp_path):
    """Starts servers; stops them at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, env=None, name="server", plugins=None):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            if plugins is not None:
                (folder / "plugins").mkdir()
                for file in [*COMPONENTS, "standard.toml"]:
                    shutil.copy(PLUGINS / file, folder / "plugins" / file)
                for plugin, text in plugins.items():
                    (folder / "plugins" / f"{plugin}.toml").write_text(text)
            server = Server(folder, *arguments, env=env)
            stack.callback(lambda: server.kill())
            return server

        yield start


class SharedServer(Server):
    """Project of its own on a server that other tests use at the same time."""

    def __init__(self):
        self.url, admin_key = os.environ["TEST_SERVER_URL"], os.environ["TEST_ADMIN_KEY"]
        self.data = pathlib.Path(os.environ["TEST_SERVER_DATA"])
        self.log = self.data.parent / "server.log"
        url = self.url + "/v1"
        projects = openai.OpenAI(base_url=url, api_key="none", admin_api_key=admin_key)
        projects = projects.admin.organization.projects
        project = projects.create(name=f"test {uuid.uuid4()}")
        key = projects.service_accounts.create(project.id, name="tests").api_key.value
        self.tenant = project.model_extra["slug"]
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        # Requests without an SDK have the key too.
        opener = urllib.request.build_opener()
        opener.addheaders = [("authorization", f"Bearer {key}")]
        urllib.request.install_opener(opener)


def pytest_collection_modifyitems(config, items):
    """With a shared server, keeps the tests that need no server of their own."""
    if "TEST_SERVER_URL" in os.environ:
        items[:] = [item for item in items if "server" in item.fixturenames]


@pytest.fixture
def server(request):
    if "TEST_SERVER_URL" in os.environ:
        return SharedServer()
    return request.getfixturevalue("serve")()


def run_host(*arguments, env=None, timeout=60, **more):
    """Runs the host until it exits; returns the finished process."""
    return subprocess.run(
        [str(part) for part in [HOST, *arguments]],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        **more,
    )
