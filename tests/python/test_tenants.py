"""Tenants and their keys: what one tenant sees of another, and what a key allows."""

import json

import openai
import pytest
from conftest import chat, jsonl, run_host, wait_for
from tenants import Tenants, admin_key, error_of, request, run_batch

# Calls that need each scope.
SCOPED_CALLS = {
    "api.files.write": [
        lambda client: client.files.create(file=b"x", purpose="user_data"),
        lambda client: client.files.delete("file-x"),
    ],
    "api.files.read": [
        lambda client: client.files.list(),
        lambda client: client.files.retrieve("file-x"),
        lambda client: client.files.content("file-x"),
    ],
    "api.batch.read": [
        lambda client: client.batches.list(),
        lambda client: client.batches.retrieve("batch_x"),
        lambda client: client.get("/batches/batch_x/plugins", cast_to=object),
    ],
    "api.batch.write": [
        lambda client: client.batches.create(
            input_file_id="file-x", endpoint="/v1/chat/completions", completion_window="24h"
        ),
        lambda client: client.batches.cancel("batch_x"),
    ],
    "api.model.read": [
        lambda client: client.models.list(),
        lambda client: client.models.retrieve("echo"),
        lambda client: client.get("/plugins", cast_to=object),
    ],
}


def test_tenants_see_nothing_of_each_other(tenants):
    _, _, one = tenants.project("one")
    _, _, other = tenants.project("other")
    batch = run_batch(one)
    unknown = {"batch": "batch_" + "0" * 32, "file": "file-" + "0" * 32}
    running = {
        "input_file_id": batch.input_file_id,
        "endpoint": batch.endpoint,
        "completion_window": "24h",
    }

    def calls(batch_id, file_id, client):
        return [
            lambda: client.batches.retrieve(batch_id),
            lambda: client.batches.cancel(batch_id),
            lambda: client.batches.list(after=batch_id),
            lambda: client.get(f"/batches/{batch_id}/plugins", cast_to=object),
            lambda: client.files.retrieve(file_id),
            lambda: client.files.content(file_id),
            lambda: client.files.delete(file_id),
            lambda: client.files.list(after=file_id),
        ]

    for file_id in (batch.input_file_id, batch.output_file_id):
        foreign = calls(batch.id, file_id, other)
        for call, same in zip(
            foreign, calls(unknown["batch"], unknown["file"], other), strict=True
        ):
            (status, error), (expected, model) = error_of(call), error_of(same)
            message = error["message"].replace(batch.id, unknown["batch"])
            message = message.replace(file_id, unknown["file"])
            assert (status, {**error, "message": message}) == (expected, model)
    assert list(other.batches.list()) == list(other.files.list()) == []
    # The foreign calls have changed nothing.
    assert one.batches.retrieve(batch.id).status == "completed"
    for file_id in (batch.input_file_id, batch.output_file_id):
        assert one.files.content(file_id).content

    # The same idempotency key is another key of another tenant.
    with_key = {"extra_headers": {"idempotency-key": "night"}}
    mine = one.batches.create(**running, **with_key)
    theirs = other.batches.create(**running, **with_key)
    assert mine.id != theirs.id
    ended = wait_for(
        lambda: (
            (found := other.batches.retrieve(theirs.id)).status in ("failed", "completed") and found
        )
    )
    assert ended.status == "failed"
    assert ended.errors.data[0].message.startswith("Cannot find file")
    assert one.batches.retrieve(batch.id).id == batch.id


def test_tenant_follows_from_the_key_alone(tenants):
    project, owner, one = tenants.project("one")
    _, account, _ = tenants.project("other")
    batch = run_batch(one)
    key, server = account.api_key.value, tenants.server
    for headers in (
        {"openai-project": project.id},
        {"openai-organization": project.id, "x-tenant": "one", "x-project-id": project.id},
        {"cookie": f"project={project.id}"},
    ):
        status, _ = request(server, f"/v1/batches/{batch.id}", key, headers=headers)
        assert status == 404
    for path in (
        f"/v1/batches/{batch.id}?project={project.id}&tenant=one",
        f"/v1/openai/v1/batches/{batch.id}",
    ):
        assert request(server, path, key)[0] == 404
        assert request(server, path, owner.api_key.value)[0] == 200


def test_key_is_refused_if_missing_changed_or_in_another_form(tenants):
    _, account, client = tenants.project("one")
    server, key = tenants.server, account.api_key.value
    assert request(server, "/v1/batches", key)[0] == 200
    for scheme in ("bearer", "BEARER"):
        headers = {"authorization": f"{scheme} {key}"}
        assert request(server, "/v1/batches", headers=headers)[0] == 200
    changed = [
        key[:at] + ("0" if key[at] != "0" else "1") + key[at + 1 :] for at in range(len(key))
    ]
    for wrong in [*changed, key[:-1], key + "0", key.upper(), "none", "bw_", "x" * 10_000]:
        status, body = request(server, "/v1/batches", wrong)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key"), wrong
        assert key[30:] not in body["error"]["message"]
    for headers in ({}, {"authorization": key}, {"authorization": f"Basic {key}"}):
        status, body = request(server, "/v1/batches", headers=headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    # The key does not count in another place, and probes need none.
    assert request(server, f"/v1/batches?api_key={key}")[0] == 401
    for probe in ("live", "serving", "ready"):
        assert request(server, f"/health/{probe}")[0] == 200
    assert request(server, "/v1/files", method="POST", body={})[0] == 401
    assert request(server, "/v1/organization/projects", method="POST", body={})[0] == 401


def test_scope_allows_its_calls_alone(tenants):
    admin = tenants.admin
    project, account, _ = tenants.project("one")
    for scope in SCOPED_CALLS:
        key = admin.projects.service_accounts.api_keys.create(
            account.id, project_id=project.id, scopes=[scope]
        )
        client = tenants.client(key.value)
        for needed, calls in SCOPED_CALLS.items():
            for call in calls:
                try:
                    call(client)
                    assert needed == scope
                except openai.NotFoundError:
                    assert needed == scope
                except openai.PermissionDeniedError as error:
                    assert needed != scope and error.body["code"] == "missing_scope"
                    assert needed in error.body["message"]
    for scopes in ([], ["api.batch.*"], ["API.BATCH.READ"], "api.batch.read", [1]):
        path = f"/projects/{project.id}/service_accounts/{account.id}/api_keys"
        with pytest.raises(openai.BadRequestError):
            tenants.client(tenants.key).post(
                "/organization" + path, cast_to=object, body={"scopes": scopes}
            )


def test_project_key_administers_nothing_and_admin_key_reads_no_data(tenants):
    project, account, _ = tenants.project("one")
    server, key = tenants.server, account.api_key.value
    path = f"/v1/organization/projects/{project.id}"
    for method, target, body in [
        ("GET", "/v1/organization/projects", None),
        ("POST", "/v1/organization/projects", {"name": "x"}),
        ("POST", path, {"name": "mine"}),
        ("POST", path + "/archive", {}),
        ("POST", f"{path}/api_keys/{account.api_key.id}", {"scopes": ["api.batch.read"]}),
        ("DELETE", f"{path}/api_keys/{account.api_key.id}", None),
        ("GET", "/v1/organization/admin_api_keys", None),
        ("GET", "/v1/organization/audit_logs", None),
    ]:
        status, answer = request(server, target, key, method, body=body)
        assert (status, answer["error"]["code"]) == (403, "admin_key_required"), target
    for target in ("/v1/batches", "/v1/files", "/v1/models", "/v1/plugins"):
        status, answer = request(server, target, tenants.key)
        assert (status, answer["error"]["code"]) == (403, "project_key_required"), target


def test_expired_key_and_revoked_key_are_refused(tenants):
    admin = tenants.admin
    project, account, client = tenants.project("one")
    short = admin.projects.service_accounts.api_keys.create(
        account.id, project_id=project.id, expires_in_seconds=5
    )
    expiring = tenants.client(short.value)
    expiring.batches.list()

    def refused(client):
        try:
            client.batches.list()
        except openai.AuthenticationError as error:
            return error.body["message"]
        return None

    assert "has expired" in wait_for(lambda: refused(expiring), 30, "the end of the key")
    client.batches.list()
    admin.projects.api_keys.delete(account.api_key.id, project_id=project.id)
    assert refused(client)
    with pytest.raises(openai.BadRequestError, match="has expired"):
        admin.projects.api_keys.update(short.id, project_id=project.id, expires_in_seconds=100)


def test_archived_project_can_be_read_and_creates_nothing(serve, stub, tmp_path):
    tenants = Tenants(serve, tmp_path, plugins={"p": stub.plugin(["echo"])})
    admin = tenants.admin
    project, account, client = tenants.project("one")
    done = run_batch(client)
    slow = [chat(str(number), f"!delay 60000 {number}") for number in range(3)]
    file = client.files.create(file=("in.jsonl", jsonl(slow)), purpose="batch")
    open_batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_for(lambda: client.batches.retrieve(open_batch.id).status == "in_progress")
    archived = admin.projects.archive(project.id)
    assert archived.status == "archived" and archived.archived_at
    assert [found.name for found in admin.projects.list()] == ["default"]
    assert len(list(admin.projects.list(include_archived=True))) == 2

    wait_for(lambda: client.batches.retrieve(open_batch.id).status == "cancelled", 60)
    assert client.files.content(done.output_file_id).text.count("\n") == 3
    for call in (
        lambda: client.files.create(file=b"x", purpose="user_data"),
        lambda: client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        ),
    ):
        status, error = error_of(call)
        assert (status, error["code"]) == (403, "project_archived")
    for call in (
        lambda: admin.projects.update(project.id, name="x"),
        lambda: admin.projects.service_accounts.create(project.id, name="x"),
        lambda: admin.projects.service_accounts.api_keys.create(account.id, project_id=project.id),
    ):
        status, error = error_of(call)
        assert (status, error["code"]) == (403, "project_archived")
    assert client.files.delete(file.id).deleted
    # The name is free again, and the slug is not.
    again = admin.projects.create(name="one")
    assert again.model_extra["slug"] == "one-2"


def test_first_key_requires_keys_and_default_project_keeps_its_data(serve, tmp_path):
    server = serve()
    before = server.run([chat("1")])
    status, body = request(server, "/v1/organization/projects", method="POST", body={"name": "x"})
    assert status == 401
    assert "batchwright admin key create" in body["error"]["message"]
    assert server.stop() == 0
    admin_key(server.data, "--name", "ops")
    key = admin_key(server.data, "--project", "default", "--name", "nightly")
    server.start()
    assert request(server, f"/v1/batches/{before.id}")[0] == 401
    assert request(server, f"/v1/batches/{before.id}", "none")[0] == 401
    status, body = request(server, f"/v1/batches/{before.id}", key)
    assert (status, body["id"]) == (200, before.id)


def test_server_without_keys_refuses_a_public_address_unless_insecure(serve, tmp_path):
    arguments = ["serve", "--listen", "0.0.0.0:0", "--data", tmp_path / "data"]
    done = run_host(*arguments, "--plugins", tmp_path)
    assert done.returncode == 3
    for part in ("no keys", "batchwright admin key create", "--insecure"):
        assert part in done.stderr
    server = serve("--listen", "0.0.0.0:0", "--insecure", name="insecure")
    assert "every client that reaches this address can read and delete" in server.logged()
    (tmp_path / "keys").mkdir()
    admin_key(tmp_path / "keys/data", "--name", "ops")
    server = serve("--listen", "0.0.0.0:0", name="keys")
    assert "every client" not in server.logged()


def test_key_is_nowhere_in_the_data_folder_the_log_or_the_audit_log(serve, tmp_path):
    tenants = Tenants(serve, tmp_path, "--log-filter", "trace")
    project, account, client = tenants.project("one")
    run_batch(client, count=1)
    request(tenants.server, "/v1/batches", account.api_key.value + "0")
    log = json.dumps([entry.to_dict() for entry in tenants.admin.audit_logs.list()])
    tenants.server.stop()
    secrets = [key.split("_")[2] for key in (tenants.key, account.api_key.value)]
    texts = [log.encode(), tenants.server.logged().encode()]
    texts += [path.read_bytes() for path in tenants.server.data.rglob("*") if path.is_file()]
    for secret in secrets:
        assert all(secret.encode() not in text for text in texts)
        assert all(bytes.fromhex(secret) not in text for text in texts)
