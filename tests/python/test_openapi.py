"""Server against its own OpenAPI document: schemathesis sends valid and invalid requests."""

import json
import os
import pathlib
import subprocess
import sys
import urllib.request

from conftest import CHAT
from tenants import Tenants

HERE = pathlib.Path(__file__).parent / "schemathesis"


def test_openapi_document_matches_every_response(serve, tmp_path, request, long):
    tenants = Tenants(serve, tmp_path, "--completion-windows", "24h,2h")
    server = tenants.server
    _, account, _ = tenants.project("one")
    keys = {"TEST_ADMIN_KEY": tenants.key, "TEST_PROJECT_KEY": account.api_key.value}
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            HERE / "schemathesis.toml",
            "run",
            server.url + "/openapi.json",
            "--url",
            server.url + "/v1",
            "--max-examples",
            "100" if long else "40",
            "--continue-on-failure",
            "--seed",
            str(request.config.getoption("--seed") or 1),
        ],
        cwd=tmp_path,
        env={**os.environ, **keys, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(answer.stdout)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "65 selected / 67 total" in answer.stdout
    assert " 500" not in server.logged()


def test_openapi_document_states_the_configured_limits(serve):
    server = serve(
        "--completion-windows", "24h,2h", "--max-metadata-pairs", "3", "--max-batches-per-page", "7"
    )
    with urllib.request.urlopen(server.url + "/openapi.json") as answer:
        document = json.load(answer)
    create = document["components"]["schemas"]["CreateBatch"]["properties"]
    assert (
        create["completion_window"]["enum"] == ["24h", "2h"] and CHAT in create["endpoint"]["enum"]
    )
    assert create["metadata"]["maxProperties"] == 3
    assert create["metadata"]["propertyNames"] == {"type": "string", "maxLength": 64}
    assert create["metadata"]["additionalProperties"]["maxLength"] == 512
    limits = {
        path: parameter["schema"]["maximum"]
        for path in ["/batches", "/files"]
        for parameter in document["paths"][path]["get"]["parameters"]
        if parameter["name"] == "limit"
    }
    assert limits == {"/batches": 7, "/files": 10_000}
    batch = document["components"]["schemas"]["Batch"]
    assert set(batch["required"]) == set(batch["properties"]) and len(batch["required"]) == 22
    assert [server["url"] for server in document["servers"]] == ["/v1", "/v1/openai/v1"]
