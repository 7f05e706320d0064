"""Limits of projects: stored files, open batches, requests, models; what happens at each."""

import concurrent.futures

import openai
import pytest
from conftest import CHAT, chat, jsonl, run_host, wait_for
from tenants import Tenants, error_of, request, run_batch


def set_limits(tenants, project, **limits):
    """Changes limits of a project; returns the limits that hold."""
    path = f"/v1/organization/projects/{project.id}/limits"
    status, body = request(tenants.server, path, tenants.key, "POST", body=limits)
    assert status == 200, body
    return body


def upload(client, size=10):
    return client.files.create(file=("x.jsonl", b"x" * size), purpose="user_data")


def create(client, file_id):
    return client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")


def test_upload_beyond_the_stored_bytes_is_refused_until_files_are_deleted(tenants):
    project, _, client = tenants.project("one")
    _, _, other = tenants.project("other")
    limits = set_limits(tenants, project, max_stored_bytes=100)
    assert limits["own"] == ["max_stored_bytes"]
    first = upload(client, 60)
    status, error = error_of(lambda: upload(client, 41))
    assert (status, error["code"]) == (400, "storage_limit_exceeded")
    assert "limit" in error["message"]
    upload(client, 40)
    assert error_of(lambda: upload(client, 1))[1]["code"] == "storage_limit_exceeded"
    upload(other, 1000)
    # Lowered below what is used: nothing is deleted, and nothing new fits.
    limits = set_limits(tenants, project, max_stored_bytes=10)
    assert limits["usage"] == {"stored_bytes": 100, "stored_files": 2, "open_batches": 0}
    assert client.files.content(first.id).content == b"x" * 60
    assert error_of(lambda: upload(client, 1))[0] == 400
    set_limits(tenants, project, max_stored_bytes=100)
    assert client.files.delete(first.id).deleted
    wait_for(lambda: can(lambda: upload(client, 60)), what="the removal of the deleted file")
    assert set_limits(tenants, project, max_stored_bytes=None)["max_stored_bytes"] is None
    upload(client, 1000)


def test_uploads_beyond_the_stored_bytes_end_before_they_are_written(tenants):
    project, _, client = tenants.project("one")
    set_limits(tenants, project, max_stored_bytes=1 << 20)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sizes = [50 << 20] * 8
        outcomes = list(pool.map(lambda size: can(lambda: upload(client, size)), sizes))
    assert outcomes == [False] * 8
    assert sum(path.stat().st_size for path in objects(tenants.server)) < 2 << 20
    upload(client, 1 << 20)


def objects(server):
    """Returns the files of all stored contents."""
    return [path for path in (server.data / "objects").rglob("*") if path.is_file()]


def test_results_are_stored_beyond_a_limit_and_count_toward_it(tenants):
    project, _, client = tenants.project("one")
    set_limits(tenants, project, max_stored_files=1)
    batch = run_batch(client)
    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    assert client.files.content(batch.output_file_id).text.count("\n") == 3
    status, error = error_of(lambda: upload(client))
    assert (status, error["code"]) == (400, "file_limit_exceeded")
    for file in list(client.files.list()):
        client.files.delete(file.id)
    wait_for(lambda: can(lambda: upload(client)), what="the removal of the deleted files")


def can(call):
    """Returns true if a call succeeds, false if its project allows no more."""
    try:
        call()
    except (openai.BadRequestError, openai.RateLimitError):
        return False
    return True


def test_parallel_requests_with_room_for_one_get_one(serve, stub, tmp_path):
    tenants = Tenants(serve, tmp_path, plugins={"p": stub.plugin(["echo"])})
    project, account, client = tenants.project("one")
    lines = jsonl([chat("1", "!delay 60000")])
    file = client.files.create(file=("in.jsonl", lines), purpose="batch")
    set_limits(tenants, project, max_open_batches=2, max_stored_bytes=file.bytes + 15)
    create(client, file.id)
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        created = [pool.submit(can, lambda: create(client, file.id)) for _ in range(50)]
        stored = [pool.submit(can, lambda: upload(client)) for _ in range(50)]
        assert sum(done.result() for done in created) == 1
        assert sum(done.result() for done in stored) == 1
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    status, error = request(tenants.server, "/v1/batches", account.api_key.value, "POST", body=body)
    assert (status, error["error"]["code"]) == (429, "open_batch_limit_exceeded")
    assert error_headers(tenants, account, body)["retry-after"] == "60"
    # A place is free when a batch has ended, also after a kill of the server.
    tenants.server.kill()
    tenants.server.start()
    client = tenants.client(account.api_key.value)
    assert not can(lambda: create(client, file.id))
    for batch in list(client.batches.list()):
        client.batches.cancel(batch.id)
    wait_for(lambda: can(lambda: create(client, file.id)), 60, "the end of a batch")


def error_headers(tenants, account, body):
    with pytest.raises(openai.RateLimitError) as raised:
        tenants.client(account.api_key.value).batches.create(**body)
    return raised.value.response.headers


def test_file_with_more_requests_than_the_project_allows_is_rejected(tenants):
    project, _, client = tenants.project("one")
    set_limits(tenants, project, max_requests_per_batch=2)
    batch = run_batch(client, count=3)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "too_many_requests")
    assert "more than 2 requests" in batch.errors.data[0].message
    assert run_batch(client, count=2).status == "completed"


def test_server_defaults_hold_for_projects_without_a_value_of_their_own(serve, tmp_path):
    arguments = ["--max-stored-files", "1", "--max-open-batches", "7"]
    tenants = Tenants(serve, tmp_path, *arguments)
    project, _, client = tenants.project("one")
    upload(client)
    assert error_of(lambda: upload(client))[1]["code"] == "file_limit_exceeded"
    limits = set_limits(tenants, project, max_stored_files=2)
    assert (limits["max_stored_files"], limits["max_open_batches"]) == (2, 7)
    assert limits["own"] == ["max_stored_files"]
    upload(client)
    for wrong in (-1, 1.5, "1", True, 10**20):
        path = f"/v1/organization/projects/{project.id}/limits"
        status, body = request(
            tenants.server, path, tenants.key, "POST", body={"max_stored_files": wrong}
        )
        assert status == 400 and body["error"]["param"] == "max_stored_files", wrong
    status, body = request(tenants.server, path, tenants.key, "POST", body={"max_stored_fils": 1})
    assert body["error"]["code"] == "unknown_parameter"


def test_model_that_a_project_may_not_use_looks_like_an_unknown_one(serve, stub, tmp_path):
    aliases = '[aliases]\n"nickname" = "large"\n'
    plugin = stub.plugin(["large", "small", "any-*"]).replace("[settings]", aliases + "[settings]")
    tenants = Tenants(serve, tmp_path, plugins={"p": plugin})
    project, _, client = tenants.project("one")
    _, _, other = tenants.project("other")
    permissions = tenants.admin.projects.model_permissions

    def outcome(client, model):
        lines = jsonl([chat("1", "hi", model=model)])
        file = client.files.create(file=("in.jsonl", lines), purpose="batch")
        batch = create(client, file.id)
        ended = wait_for(
            lambda: (
                (found := client.batches.retrieve(batch.id)).status in ("failed", "completed")
                and found
            )
        )
        return ended.errors.data[0].message if ended.errors else ended.status

    def models(client):
        return sorted(model.id for model in client.models.list())

    assert models(client) == ["large", "nickname", "small"]
    rule = permissions.update(project.id, mode="deny_list", model_ids=["large"])
    assert (rule.mode, rule.api_model_ids) == ("deny_list", ["large"])
    unknown = outcome(client, "nothing")
    for model in ("large", "nickname"):
        assert outcome(client, model) == unknown.replace("nothing", model)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)
    assert "'large'" not in unknown and "'small'" in unknown
    assert models(client) == ["small"] and models(other) == ["large", "nickname", "small"]
    assert outcome(client, "small") == outcome(client, "any-thing") == "completed"

    permissions.update(project.id, mode="allow_list", model_ids=["large"])
    assert models(client) == ["large", "nickname"]
    assert outcome(client, "nickname") == "completed"
    assert "not supported" in outcome(client, "small")
    assert "not supported" in outcome(client, "any-thing")
    assert permissions.retrieve(project.id).mode == "allow_list"
    permissions.update(project.id, mode="allow_list", model_ids=[])
    assert models(client) == []
    assert permissions.delete(project.id).deleted
    assert models(client) == models(other)
    for body in ({"mode": "x", "model_ids": []}, {"mode": "allow_list"}, {"model_ids": ["a"]}):
        path = f"/v1/organization/projects/{project.id}/model_permissions"
        assert request(tenants.server, path, tenants.key, "POST", body=body)[0] == 400


def test_apply_makes_the_server_equal_to_a_file_and_touches_nothing_else(tenants, tmp_path):
    untouched, _, _ = tenants.project("Untouched")
    set_limits(tenants, untouched, max_open_batches=3)
    file = tmp_path / "tenants.toml"
    file.write_text(
        '[projects.acme-labs]\nname = "Acme Labs"\n'
        '[projects.acme-labs.limits]\nmax_stored_bytes = "1GiB"\nmax_open_batches = 5\n'
        '[projects.acme-labs.models]\nallow = ["echo"]\n'
        "[projects.untouched.limits]\nmax_stored_files = 9\n"
    )

    def apply(*arguments):
        environment = {"BATCHWRIGHT_ADMIN_KEY": tenants.key, "BATCHWRIGHT_URL": tenants.server.url}
        return run_host("admin", "apply", file, *arguments, env=environment)

    planned = apply("--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert 'acme-labs: create the project "Acme Labs"' in planned.stdout
    assert "acme-labs: max_open_batches default -> 5" in planned.stdout
    assert "not applied" in planned.stdout
    assert [project.name for project in tenants.admin.projects.list()] == ["default", "Untouched"]
    applied = apply()
    assert applied.stdout.splitlines()[:-1] == planned.stdout.splitlines()[:-1]
    acme = list(tenants.admin.projects.list())[2]
    limits = set_limits(tenants, acme)
    assert (limits["max_stored_bytes"], limits["max_open_batches"]) == (1 << 30, 5)
    kept = set_limits(tenants, untouched)
    assert (kept["max_open_batches"], kept["max_stored_files"]) == (3, 9)
    assert apply().stdout == "nothing to change\n"
    file.write_text(file.read_text().replace("Acme Labs", "Acme").replace('"echo"', '"other"'))
    changed = apply().stdout
    assert 'name "Acme Labs" -> "Acme"' in changed and "models allow_list other" in changed

    good = file.read_text()
    for wrong, words in [
        (good + "\n" * 30 + "max_stored_fils = 1\n", ["max_stored_fils", "nothing was applied"]),
        (good + "[projects.Upper]\n", ["projects.Upper", "a slug has"]),
        (good.replace("1GiB", "1 GiBi"), ["max_stored_bytes"]),
        (good + "[projects.new]\nname = ''\n", ["projects.new", "it is empty"]),
        (good.replace('"Acme"', '"UNTOUCHED"'), ["projects.acme-labs", "another project has"]),
        (good + "[projects.acme]\n", ["projects.acme:", "another project has"]),
    ]:
        file.write_text(wrong.replace("max_open_batches = 5", "max_open_batches = 6"))
        done = apply()
        assert done.returncode == 2, done.stdout
        assert all(word in done.stderr for word in words), done.stderr
        assert set_limits(tenants, acme)["max_open_batches"] == 5
