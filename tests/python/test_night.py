"""A night of faults: for each one, the metric, the alert, the log line and the page about it.

One server has a provider that is down, a plugin that is broken, a certificate that ends, a webhook
endpoint that is dead and a disk that fills. The real Prometheus has the rules of `deploy/`.
"""

import datetime
import os
import re
import ssl
import subprocess
import time

import openai
import pytest
import trustme
from conftest import ROOT, chat, jsonl, wait_for
from packages import Prometheus
from test_metrics import samples

PAGE = ROOT / "docs/operating/alerts.md"

# Alert, metric with the value that a fault changes, and log line.
FAULTS = {
    "provider down": (
        "BatchwrightProviderOutage",
        ("batchwright_provider_outages", lambda value: value > 0),
        "breaker opened",
    ),
    "plugin broken": (
        "BatchwrightPluginNotLoaded",
        ('batchwright_plugins{state="failed"}', lambda value: value > 0),
        "plugin not loaded",
    ),
    "certificate expiring": (
        "BatchwrightCertificateExpires",
        (
            "batchwright_tls_certificate_expiry_timestamp_seconds",
            lambda value: 0 < value - time.time() < 7 * 86_400,
        ),
        "certificate expires soon",
    ),
    "webhook endpoint dead": (
        "BatchwrightWebhooksFail",
        ("batchwright_webhook_oldest_delivery_seconds", lambda value: value > 3),
        "webhook endpoint fails",
    ),
    "disk filling": (
        "BatchwrightDiskFilling",
        ("batchwright_disk_free_bytes", lambda value: value < 10 << 20),
        "almost full",
    ),
}


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system at the data folder of the server."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    data = tmp_path / "server/data"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", data], check=True)
    yield data
    subprocess.run(["umount", "-l", data], check=True)


def is_of(series, metric):
    """Returns true if a series has the name and the label of a metric."""
    (name, labels), (wanted, _, label) = series, metric.partition("{")
    return name == wanted and all(f'{key}="{value}"' in label or not label for key, value in labels)


def section_of(alert):
    """Returns the section of the page about an alert."""
    found = re.search(rf"^## {alert}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return " ".join(found.group(1).split())


def test_each_fault_of_a_night_is_seen_and_explained(prometheus, small_disk, serve, stub, tmp_path):
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", not_after=end)
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.pem")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    server = serve(
        *("--tls-certificate", tmp_path / "tls.pem", "--tls-key", tmp_path / "tls.key"),
        *("--admin-listen", "127.0.0.1:0", "--webhook-allow-http", "127.0.0.1"),
        plugins={"p": stub.plugin(["m"])},
    )
    admin = server.read_line().split()[-1]
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    client = openai.OpenAI(
        base_url=server.url.replace("127.0.0.1", "localhost") + "/v1",
        api_key="none",
        http_client=openai.DefaultHttpxClient(verify=trust),
    )

    def create(lines):
        file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        return client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )

    rules = (ROOT / "deploy/prometheus/alerts.yml").read_text()
    rules = rules.replace("oldest_delivery_seconds > 3600", "oldest_delivery_seconds > 3")
    with Prometheus(prometheus, admin.removeprefix("http://"), rules, tmp_path) as watched:
        watched.wait_for_scrape()
        # The certificate ends soon from the start, and nothing else is wrong.
        wait_for(lambda: "BatchwrightCertificateExpires" in watched.firing(), 60, "the first alert")
        assert watched.firing().keys() == {"BatchwrightCertificateExpires"}
        # The night begins. Nobody listens on this port.
        client.webhooks.create(
            name="dead", url="http://127.0.0.1:9/", event_types=["batch.completed"]
        )
        server.add_plugin("broken", 'component = "gone.wasm"\n')
        first = create([chat("before", "hi", model="m")])
        wait_for(lambda: "webhook endpoint fails" in server.logged(), 60, "the webhook")
        stub.kill()
        waiting = create([chat(str(number), "hi", model="m") for number in range(5)])
        free = os.statvfs(small_disk)
        filler = small_disk / "filler"
        filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - (6 << 20)))
        for fault, (alert, (metric, is_wrong), line) in FAULTS.items():
            fired = wait_for(lambda alert=alert: watched.firing().get(alert), 60, alert)
            values = [value for series, value in samples(admin).items() if is_of(series, metric)]
            assert any(is_wrong(value) for value in values), (fault, metric, values)
            wait_for(lambda line=line: line in server.logged(), 30, f"{line!r} in the log")
            section = section_of(alert)
            assert line in section, f"docs/operating/alerts.md#{alert} does not name {line!r}"
            print(f"{fault:<22} {alert:<30} {fired['annotations']['summary']}")
        # In the morning: what waited goes on, and the alerts end.
        filler.unlink()
        assert client.batches.retrieve(first.id).status == "completed"
        assert client.batches.retrieve(waiting.id).status == "in_progress"
        wait_for(
            lambda: "BatchwrightDiskFilling" not in watched.firing(), 60, "the end of the alert"
        )
        wait_for(lambda: "has room again" in server.logged(), 30, "the end in the log")
        (server.plugins / "broken.toml").unlink()
        wait_for(
            lambda: "BatchwrightPluginNotLoaded" not in watched.firing(), 60, "the end of the alert"
        )
