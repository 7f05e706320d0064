"""Random operations of several tenants: no answer to one depends on what another does."""

import concurrent.futures
import os
import random
import re
import subprocess
import sys
import threading

import httpx2
import pytest
from conftest import CHAT, ROOT, chat, jsonl, wait_for
from tenants import Tenants

IDS = re.compile(r"(?:file-|batch_req_|batch_)[0-9a-f]{32}")
UNKNOWN = ["file-" + "0" * 32, "batch_" + "0" * 32]

# Members whose values differ from run to run; only their presence counts.
VOLATILE = {"request_id", "provider_request_id", "loaded_at", "created"}


class Client:
    """Client of one tenant, which remembers its ids in the order of their appearance."""

    def __init__(self, url, key):
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx2.Client(base_url=url + "/v1", headers=headers, timeout=60)
        self.ids = {}

    def close(self):
        self.http.close()

    def call(self, method, path, **more):
        """Sends a request; returns the status and the answer without what differs by run."""
        answer = self.http.request(method, path, **more)
        text = IDS.sub(lambda found: self.name(found[0]), answer.text)
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status_code, steady(answer.json() if is_json else None, text, self)

    def name(self, found):
        if found in UNKNOWN:
            return found
        kind = found.rsplit("_", 1)[0] if found.startswith("batch") else "file"
        return self.ids.setdefault(found, f"{kind} {len(self.ids)}")

    def known(self, kind):
        return [found for found in self.ids if found.startswith(kind)]


def steady(value, text, client):
    """Replaces ids by their order, and times by their presence."""
    if value is None:
        return text
    if isinstance(value, list):
        return [steady(item, "", client) for item in value]
    if isinstance(value, dict):
        return {
            key: (found is not None)
            if key.endswith("_at") or key in VOLATILE
            else steady(found, "", client)
            for key, found in value.items()
            if found is not None or not key.endswith("_at")
        }
    if isinstance(value, str):
        return IDS.sub(lambda found: client.name(found[0]), value)
    return value


def operation(client, choices):
    """Does one random operation; returns its answer. Equal choices do equal operations."""

    def pick(kind, unknown):
        return choices.choice([*client.known(kind), unknown])

    file_id, batch_id = pick("file-", UNKNOWN[0]), pick("batch_", UNKNOWN[1])
    if batch_id.startswith("batch_req_"):
        batch_id = UNKNOWN[1]
    action = choices.randrange(11)
    if action <= 1:
        lines = [
            chat(
                str(number), f"prompt {choices.randrange(99)}", model=choices.choice(["echo", "x"])
            )
            for number in range(choices.randrange(1, 4))
        ]
        form = {"purpose": choices.choice(["batch", "user_data"])}
        return client.call("POST", "/files", data=form, files={"file": ("f.jsonl", jsonl(lines))})
    if action <= 4:
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        key = f"key {choices.randrange(3)}".replace(" ", "-")
        headers = {"idempotency-key": key} if choices.random() < 0.3 else {}
        status, created = client.call("POST", "/batches", json=body, headers=headers)
        if status != 200:
            return status, created
        # The end of a batch, and not a moment before it, is the same in every run.
        newest = next(found for found, name in client.ids.items() if name == created["id"])

        def ended():
            found = client.call("GET", f"/batches/{newest}")
            return found if found[1]["status"] in ("completed", "failed", "cancelled") else None

        return wait_for(ended, 60, "the end of a batch")
    return client.call(
        *[
            ("GET", f"/files/{file_id}"),
            ("GET", f"/files/{file_id}/content"),
            ("DELETE", f"/files/{file_id}"),
            ("GET", f"/files?after={file_id}&limit=3"),
            ("GET", f"/batches?after={batch_id}&limit=3"),
            ("POST", f"/batches/{batch_id}/cancel"),
        ][action - 5],
        **({"json": {}} if action == 10 else {}),
    )


def answers(url, key, seed, number):
    """Returns the answers to a sequence of random operations."""
    client, choices = Client(url, key), random.Random(seed)
    found = [operation(client, choices) for _ in range(number)]
    found.append(client.call("GET", "/files"))
    found.append(client.call("GET", "/batches"))
    found.append(client.call("GET", "/models"))
    client.close()
    return found, client.known("file-") + client.known("batch_")


@pytest.mark.parametrize("round", range(2))
def test_answers_to_a_tenant_do_not_depend_on_others(serve, tmp_path, round, request):
    seed = (request.config.getoption("--seed") or 1) * 100 + round
    tenants = Tenants(serve, tmp_path)
    keys = [tenants.project(f"project {number}")[1].api_key.value for number in range(4)]
    url = tenants.server.url
    # The first tenant is alone.
    alone, ids = answers(url, keys[0], seed, 60)
    # Another tenant does the same, while two more do something else and attack all known ids.
    done = threading.Event()

    def disturb(key, other_seed):
        client, choices = Client(url, key), random.Random(other_seed)
        while not done.is_set():
            operation(client, choices)
            foreign = choices.choice(ids)
            kind = "files" if foreign.startswith("file-") else "batches"
            status = client.http.get(f"/{kind}/{foreign}").status_code
            assert status == 404
            client.http.delete(f"/files/{foreign}")
            client.http.post(f"/batches/{foreign}/cancel", json={})
        client.close()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        others = [
            pool.submit(disturb, key, seed + 1 + number) for number, key in enumerate(keys[2:])
        ]
        try:
            disturbed, _ = answers(url, keys[1], seed, 60)
        finally:
            done.set()
        for other in others:
            other.result()
    assert disturbed == alone
    assert len({str(answer) for answer in alone}) > 20, "the operations are varied"


def test_two_clients_run_the_sdk_tests_side_by_side_on_one_server(tenants, tmp_path):
    """Runs the tests of both SDKs twice at the same time, each test in a project of its own.

    The tests count what they list, so what another project adds or deletes fails them.
    """
    shared = {
        "TEST_SERVER_URL": tenants.server.url,
        "TEST_ADMIN_KEY": tenants.key,
        "TEST_SERVER_DATA": str(tenants.server.data),
    }
    python = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = ["tests/python/test_sdk.py", "tests/python/test_lines.py"]
    commands = 2 * [[*python, *files]] + 2 * [["node", "--test", "tests/node/sdk.test.mjs"]]
    running = []
    for number, command in enumerate(commands):
        log = tmp_path / f"client{number}.log"
        with open(log, "wb") as output:
            environment = {**os.environ, **shared}
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        running.append((child, log))
    for child, log in running:
        assert child.wait(timeout=240) == 0, log.read_text()[-5000:]
    passed = [int(count) for count in re.findall(r"(\d+) passed", running[0][1].read_text())]
    assert sum(passed) >= 20, passed
    # Each test has left a project, and none of them sees a batch of another.
    projects = list(tenants.admin.projects.list(limit=100))
    assert len(projects) >= 2 * sum(passed)
