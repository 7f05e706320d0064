"""Credentials of projects: which secret goes out with whose request, and who sees it."""

import base64
import json
import os

import openai
import pytest
from conftest import CHAT, chat, jsonl, load_errors, run_host, wait_for
from tenants import Tenants, request

SECRETS = {
    "default": "sk-default-0123456789abcdef",
    "acme": "sk-acme-0123456789abcdefgh",
    "globex": "sk-globex-0123456789abcdef",
    "rotated": "sk-rotated-0123456789abcd",
}


@pytest.fixture
def secret(tmp_path):
    """Writes a secret to a file; returns the source for a plugin's file."""

    def write(name):
        path = tmp_path / f"{name}.secret"
        path.write_text(SECRETS[name] + "\n")
        path.chmod(0o600)
        return f"file:{path}"

    return write


def tenants_of(serve, stub, tmp_path, credential, *arguments):
    more = f"[credentials]\napi_key = {credential}\n" if credential else ""
    plugins = {"p": stub.plugin(["m"], more)}
    return Tenants(serve, tmp_path, *arguments, plugins=plugins)


def sent(client, prompt="!headers"):
    """Runs a request; returns the credential with which it arrived, as the client may see it."""
    file = client.files.create(
        file=("in.jsonl", jsonl([chat("1", prompt, model="m")])), purpose="batch"
    )
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

    def look():
        found = client.batches.retrieve(batch.id)
        return found if found.status == "completed" else None

    found = wait_for(look, 60, f"the end of {batch.id}")
    return client.files.content(found.output_file_id or found.error_file_id).text


def accepts(stub, name):
    """Lets the provider accept one secret alone."""
    stub.ask(f"/mode?key={SECRETS[name]}")


def waiting(tenants, key, batch):
    def look():
        _, body = request(tenants.server, f"/v1/batches/{batch.id}/plugins", key)
        return body["waiting"]

    return wait_for(look, 30, f"the wait of {batch.id}")["message"]


def create(client):
    file = client.files.create(
        file=("in.jsonl", jsonl([chat("1", "hello", model="m")])), purpose="batch"
    )
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_each_project_sends_its_own_credential_and_sees_none(serve, stub, tmp_path, secret):
    credential = f'{{ default = "{secret("default")}", acme = "{secret("acme")}" }}'
    tenants = tenants_of(serve, stub, tmp_path, credential)
    _, _, acme = tenants.project("Acme")
    _, _, other = tenants.project("Other")
    for _ in range(2):
        for client, name in [(acme, "acme"), (other, "default")]:
            accepts(stub, name)
            assert run_one(client).request_counts.completed == 1, name
            text = sent(client)
            assert "[redacted]" in text
            assert not any(secret in text for secret in SECRETS.values())
    logged = tenants.server.logged()
    assert not any(secret in logged for secret in SECRETS.values())


def run_one(client):
    batch = create(client)

    def look():
        found = client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed") else None

    return wait_for(look, 60, f"the end of {batch.id}")


def test_project_without_a_credential_waits_and_sends_nothing(serve, stub, tmp_path, secret):
    tenants = tenants_of(serve, stub, tmp_path, f'{{ acme = "{secret("acme")}" }}')
    _, _, acme = tenants.project("Acme")
    _, account, other = tenants.project("Other")
    accepts(stub, "acme")
    assert run_one(acme).request_counts.completed == 1
    arrived = sum(stub.counts().values())
    batch = create(other)
    message = waiting(tenants, account.api_key.value, batch)
    assert message == "The provider has no credential for this project."
    assert sum(stub.counts().values()) == arrived
    # The plugin's file gets a default, and the request goes out with it.
    stub.ask(f"/mode?key={SECRETS['default']}")
    plugin = tenants.server.plugins / "p.toml"
    text = plugin.read_text().replace(
        "api_key = { ", f'api_key = {{ default = "{secret("default")}", '
    )
    plugin.write_text(text)

    def look():
        return other.batches.retrieve(batch.id).request_counts.completed == 1

    wait_for(look, 60, "the request of the project")


def test_secret_in_the_folder_comes_first_and_is_replaced_at_once(serve, stub, tmp_path, secret):
    folder = tmp_path / "secrets"
    folder.mkdir()
    tenants = tenants_of(serve, stub, tmp_path, f'"{secret("default")}"', "--secrets", str(folder))
    _, _, acme = tenants.project("Acme")
    _, _, other = tenants.project("Other")
    accepts(stub, "default")
    assert run_one(acme).request_counts.completed == 1
    path = folder / "acme" / "p" / "api_key"
    path.parent.mkdir(parents=True)
    for name in ("acme", "rotated"):
        # As a secret manager does it.
        new = path.with_name("new")
        new.write_text(SECRETS[name] + "\n")
        new.chmod(0o600)
        os.replace(new, path)
        accepts(stub, name)
        assert run_one(acme).request_counts.completed == 1, name
        assert SECRETS[name] not in sent(acme)
    accepts(stub, "default")
    assert run_one(other).request_counts.completed == 1
    # A project whose slug is part of a path reaches no other folder.
    assert not any(secret in tenants.server.logged() for secret in SECRETS.values())


def test_secret_that_cannot_be_read_is_not_replaced_by_another(serve, stub, tmp_path, secret):
    folder = tmp_path / "secrets"
    (folder / "acme" / "p").mkdir(parents=True)
    path = folder / "acme" / "p" / "api_key"
    path.symlink_to(tmp_path / "nowhere")
    tenants = tenants_of(serve, stub, tmp_path, f'"{secret("default")}"', "--secrets", str(folder))
    _, account, acme = tenants.project("Acme")
    batch = create(acme)
    message = waiting(tenants, account.api_key.value, batch)
    assert message == "The provider has no credential for this project."
    assert str(tmp_path) not in message
    # A folder that is not mounted says nothing about its secrets.
    path.unlink()
    folder.rename(tmp_path / "unmounted")
    other = create(acme)
    assert waiting(tenants, account.api_key.value, other) == message
    assert not stub.counts(), "a request was sent with the secret of another project"
    (tmp_path / "unmounted").rename(folder)
    path.write_text(SECRETS["acme"])
    path.chmod(0o600)
    accepts(stub, "acme")
    for one in (batch, other):
        wait_for(
            lambda one=one: acme.batches.retrieve(one.id).request_counts.completed == 1,
            60,
            f"the request of {one.id}",
        )


def test_plugin_with_secrets_in_the_folder_alone_serves_the_projects_that_have_one(
    serve, stub, tmp_path
):
    folder = tmp_path / "secrets"
    path = folder / "acme" / "p" / "api_key"
    path.parent.mkdir(parents=True)
    path.write_text(SECRETS["acme"])
    path.chmod(0o600)
    tenants = tenants_of(serve, stub, tmp_path, None, "--secrets", str(folder))
    _, _, acme = tenants.project("Acme")
    accepts(stub, "acme")
    assert run_one(acme).request_counts.completed == 1


def test_answers_in_parallel_show_the_secret_of_no_project(serve, stub, tmp_path, secret):
    credential = f'{{ acme = "{secret("acme")}", globex = "{secret("globex")}" }}'
    tenants = tenants_of(serve, stub, tmp_path, credential)
    clients = {name: tenants.project(name)[2] for name in ("acme", "globex")}
    batches = {}
    for name, client in clients.items():
        lines = [chat(str(line), f"!headers {name} {line}", model="m") for line in range(100)]
        file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        batches[name] = client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
    for name, client in clients.items():
        look = client.batches.retrieve
        wait_for(lambda: look(batches[name].id).status == "completed", 60, "the end")  # noqa: B023
        found = look(batches[name].id)
        assert found.request_counts.completed == 100
        text = client.files.content(found.output_file_id).text
        for line in text.splitlines():
            assert "[redacted]" in json.dumps(json.loads(line))
        assert not any(secret in text for secret in SECRETS.values())


def test_wrong_tables_of_credentials_are_refused_by_name(serve, stub, tmp_path, secret):
    source = secret("default")
    server = serve(
        plugins={
            "typo": stub.plugin(["a"], f'[credentials]\napi_key = {{ form = "{source}" }}\n'),
            "slug": stub.plugin(["b"], f'[credentials]\napi_key = {{ Acme = "{source}" }}\n'),
            "plain": stub.plugin(
                ["c"], '[credentials]\napi_key = { acme = "sk-secret-value-1" }\n'
            ),
            "gone": stub.plugin(["d"], '[credentials]\napi_key = { acme = "file:/no/such" }\n'),
        }
    )
    wait_for(lambda: len(load_errors(server)) == 4, what="the errors of the plugins")
    errors = load_errors(server)
    assert "did you mean `from`" in errors["typo"]
    assert "neither a key nor the slug of a project" in errors["slug"]
    assert "must be `env:NAME` or `file:PATH`" in errors["plain"]
    assert "failed to read /no/such" in errors["gone"]
    assert "sk-secret-value-1" not in server.logged()


@pytest.fixture
def sealing(tmp_path):
    """Returns the arguments of a server that seals the secrets of projects."""
    path = tmp_path / "sealing.key"
    path.write_text(base64.b64encode(bytes(range(32))).decode())
    path.chmod(0o600)
    return ["--credential-key", f"file:{path}"]


def set_credential(tenants, key, value, plugin="p", name="api_key"):
    body = {"plugin": plugin, "name": name, "value": value}
    return request(tenants.server, "/v1/credentials", key, "POST", body=body)


def test_project_sets_its_own_credential_which_nobody_reads_again(
    serve, stub, tmp_path, secret, sealing
):
    source = f'{{ default = "{secret("default")}", from_projects = true }}'
    tenants = tenants_of(serve, stub, tmp_path, source, *sealing)
    _, acme, client = tenants.project("Acme")
    _, globex, other = tenants.project("Globex")
    key = acme.api_key.value
    stub.ask(f"/mode?key={SECRETS['acme']}")
    messages = [{"role": "user", "content": "hi"}]

    def status(one):
        try:
            one.chat.completions.create(model="m", messages=messages)
            return 200
        except openai.APIStatusError as error:
            return error.status_code

    assert status(client) == 503, "the provider refuses the default"
    code, answer = set_credential(tenants, key, SECRETS["acme"])
    assert (code, answer["object"], answer["plugin"]) == (200, "credential", "p")
    # It takes effect with the next request that is sent, for this project alone.
    wait_for(lambda: status(client) == 200, what="the new credential")
    assert status(other) == 503
    code, found = request(tenants.server, "/v1/credentials", key)
    assert [one["name"] for one in found["data"]] == ["api_key"]
    assert request(tenants.server, "/v1/credentials", globex.api_key.value)[1]["data"] == []
    assert SECRETS["acme"] not in json.dumps(found) + tenants.server.logged()
    # A batch sends it too, and neither the database nor the audit log has it.
    assert sent(client, "batch")
    log = list(tenants.admin.audit_logs.list())
    event = next(entry for entry in log if entry.type == "credential.updated")
    assert event.actor.api_key.id == acme.api_key.id
    for path in tenants.server.data.rglob("*"):
        if path.is_file():
            assert SECRETS["acme"].encode() not in path.read_bytes(), path
    # Rotation, a restart, and the end.
    stub.ask(f"/mode?key={SECRETS['rotated']}")
    assert set_credential(tenants, key, SECRETS["rotated"])[0] == 200
    wait_for(lambda: status(client) == 200, what="the rotated credential")
    tenants.server.kill()
    tenants.server.start()
    client = tenants.client(key)
    wait_for(lambda: status(client) == 200, what="the credential after a restart")
    code, answer = request(tenants.server, "/v1/credentials/p/api_key", key, "DELETE")
    assert (code, answer["deleted"]) == (200, True)
    assert status(client) == 503
    assert request(tenants.server, "/v1/credentials/p/api_key", key, "DELETE")[0] == 404


def test_credential_is_set_only_where_the_operator_allows_it(
    serve, stub, tmp_path, secret, sealing
):
    tenants = tenants_of(serve, stub, tmp_path, f'"{secret("default")}"', *sealing)
    project, acme, _ = tenants.project("Acme")
    key = acme.api_key.value
    for plugin, name in (("p", "api_key"), ("q", "api_key"), ("standard", "x")):
        code, answer = set_credential(tenants, key, "x" * 20, plugin, name)
        assert (code, answer["error"]["code"]) == (404, "credential_not_accepted")
    for wrong in ("", "a b", "\u00fc", "x" * 5000, "a\nb"):
        assert set_credential(tenants, key, wrong)[0] == 400, wrong
    assert set_credential(tenants, key, 7)[0] == 400
    path = f"/v1/organization/projects/{project.id}/service_accounts/{acme.id}/api_keys"
    body = {"scopes": ["api.credentials.read"]}
    _, reader = request(tenants.server, path, tenants.key, "POST", body=body)
    code, answer = set_credential(tenants, reader["value"], "x")
    assert (code, answer["error"]["code"]) == (403, "missing_scope")


def test_sealed_credential_needs_its_key(serve, stub, tmp_path, secret, sealing):
    source = "{ from_projects = true }"
    tenants = tenants_of(serve, stub, tmp_path, source, *sealing)
    _, acme, client = tenants.project("Acme")
    content = jsonl([chat("1", "waits", model="m")])
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    wait_for(lambda: waiting(tenants, acme.api_key.value, batch), what="a batch that waits")
    assert set_credential(tenants, acme.api_key.value, SECRETS["acme"])[0] == 200
    messages = [{"role": "user", "content": "hi"}]
    # The batch has opened the breaker, which holds back nothing once there is a credential.
    assert client.chat.completions.create(model="m", messages=messages).choices
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", what="the batch")
    tenants.server.kill()
    (tmp_path / "sealing.key").write_text(base64.b64encode(bytes(32)).decode())
    tenants.server.start()
    client = tenants.client(acme.api_key.value)
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="m", messages=messages)
    assert raised.value.status_code == 503
    assert "no credential for this project" in raised.value.message
    tenants.server.kill()
    # Without a key, a plugin that needs one says so, and a damaged key stops the server.
    (tmp_path / "sealing.key").write_text("short")
    done = run_host("serve", *sealing, "--data", tmp_path / "other", "--listen", "127.0.0.1:0")
    assert done.returncode != 0 and "32 bytes in base64" in done.stderr
    server = serve(
        name="bare", plugins={"p": stub.plugin(["m"], f"[credentials]\napi_key = {source}\n")}
    )
    assert "credential_key" in load_errors(server)["p"]
