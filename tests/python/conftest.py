"""A real server, a real stub provider, the real SDK: what every test here starts with."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import urllib.request

import openai
import pytest

ROOT = pathlib.Path(__file__).parents[2]
HOST = ROOT / "dist/batchwright"
PLUGINS = ROOT / "dist/plugins"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
STUB = TARGET / "release/stub-provider"
COMPONENTS = ["validator-standard.wasm", "one-model.wasm", "inference-openai.wasm", "inference-echo.wasm"]
CHAT = "/v1/chat/completions"


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="of the crash test and of schemathesis")
    parser.addoption("--kills", type=int, default=25, help="of the crash test")


@functools.cache
def built(part):
    """The folder target/`part` with test plugins, built when a test first asks for it."""
    if not os.environ.get("TEST_PLUGINS_BUILT"):
        subprocess.run(["cargo", "xtask", "build", part], cwd=ROOT, check=True)
    return TARGET / part


# What was contained, and how: a line each at the end of the tests.
CONTAINED = []


def pytest_terminal_summary(terminalreporter):
    if CONTAINED:
        terminalreporter.section("contained")
        for name, how in CONTAINED:
            terminalreporter.write_line(f"{name:<34} {' '.join(how.split())[:200]}")


def wait_for(condition, seconds=30, what="the condition"):
    """Waits until a condition gives something, and returns that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true within {seconds} s")


def chat(custom_id, content="hi", model="echo", **body):
    """A line of an input file."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def jsonl(lines):
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


class Process:
    """A program that says `listening on URL`; its standard error goes to a file."""

    def __init__(self, command, log, env=None):
        self.log = log
        with open(log, "ab") as errors:
            environment = {**os.environ, **(env or {})}
            self.child = subprocess.Popen(
                [str(part) for part in command], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        line = self.child.stdout.readline()
        assert line.startswith("listening on http"), f"it said {line!r}; its log: {self.logged()}"
        self.url = line.split()[-1]

    def said(self):
        """The next line of its standard output."""
        return self.child.stdout.readline()

    def logged(self):
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
        """How often each prompt came."""
        return {prompt: len(times) for prompt, times in self.ask("/arrivals").items()}

    def plugin(self, models, more=""):
        """A TOML file for the OpenAI adapter that points here."""
        models = json.dumps(models)
        return (
            f'component = "inference-openai.wasm"\nmodels = {models}\n[settings]\nbase_url = "{self.url}/v1"\n{more}'
        )


class Server(Process):
    """A server with a data folder and a plugin folder of its own."""

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
            return batch if batch.status in ("completed", "failed", "cancelled", "expired") else None

        return wait_for(look, seconds, f"the end of {batch_id}")

    def run(self, lines, **more):
        return self.ended(self.create(lines, **more).id)

    def results(self, batch):
        """The lines of the output and of the error file, each in its order."""

        def read(file_id):
            if file_id is None:
                return []
            content = self.client.files.content(file_id).content
            assert content.endswith(b"\n")
            return [json.loads(line) for line in content[:-1].split(b"\n")]

        return read(batch.output_file_id), read(batch.error_file_id)

    def models(self):
        return [model.id for model in self.client.models.list()]


def leftovers(server):
    """Objects on the disk that no record leads to, and notes of objects that were never finished."""
    database = sqlite3.connect(f"file:{server.data}/batchwright.db?mode=ro", uri=True)
    recorded = {row[0] for row in database.execute("SELECT id FROM files WHERE NOT removed")}
    noted = {row[0] for row in database.execute("SELECT id FROM pending_objects")}
    database.close()
    # What readiness writes for a moment is nobody's.
    written = [path.name for path in (server.data / "objects").rglob("*") if path.is_file()]
    return {name for name in written if not name.startswith("probe")} - recorded | noted


def load_errors(server):
    """What the operator was told last of each plugin that does not load as it is."""
    logged = re.compile(
        r'(?:plugin not loaded|plugin not replaced, previous version still serving) plugin="([^"]*)" error=(.*)$', re.M
    )
    return dict(logged.findall(server.logged()))


@pytest.fixture
def stub(tmp_path):
    stub = Stub(tmp_path)
    yield stub
    stub.kill()


@pytest.fixture
def serve(tmp_path):
    """Starts servers, which end with the test."""
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


@pytest.fixture
def server(serve):
    return serve()


def run_host(*arguments, env=None, timeout=60, **more):
    """Runs the host to its end."""
    return subprocess.run(
        [str(part) for part in [HOST, *arguments]],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        **more,
    )
