"""Fixtures of the tests with several tenants: a server with keys and its administrator."""

import json
import urllib.error
import urllib.request

import openai
import pytest
from conftest import chat, jsonl, run_host, wait_for


def admin_key(data, *arguments):
    """Creates a key in the data folder of a stopped server; returns the key."""
    done = run_host("admin", "key", "create", "--data", data, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "the key is alone on standard output"
    return done.stdout.strip()


class Tenants:
    """Server with keys."""

    def __init__(self, serve, folder, *arguments, **more):
        self.key = admin_key(folder / "server/data", "--name", "ops")
        self.server = serve(*arguments, **more)
        self.admin = openai.OpenAI(
            base_url=self.server.url + "/v1", api_key="none", admin_api_key=self.key, max_retries=0
        ).admin.organization

    def client(self, key, **more):
        return openai.OpenAI(base_url=self.server.url + "/v1", api_key=key, max_retries=0, **more)

    def project(self, name):
        """Creates a project with a key; returns both, and a client."""
        project = self.admin.projects.create(name=name)
        account = self.admin.projects.service_accounts.create(project.id, name="tests")
        return project, account, self.client(account.api_key.value)


@pytest.fixture
def tenants(serve, tmp_path):
    return Tenants(serve, tmp_path)


def error_of(call):
    """Returns the status and the error object of a call that fails."""
    with pytest.raises(openai.APIStatusError) as raised:
        call()
    return raised.value.status_code, raised.value.body


def request(server, path, key=None, method="GET", headers=None, body=None):
    """Sends a request without an SDK; returns the status and the parsed body."""
    headers = {"content-type": "application/json", **(headers or {})}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    sent = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(sent, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def run_batch(client, count=3):
    """Runs a batch with a client; returns the ended batch."""
    lines = [chat(str(number), f"prompt {number}") for number in range(count)]
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    ended = ("completed", "failed", "cancelled", "expired")

    def look():
        found = client.batches.retrieve(batch.id)
        return found if found.status in ended else None

    return wait_for(look, 60, f"the end of {batch.id}")
