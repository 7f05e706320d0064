"""Monitoring: the alert rules and the dashboard of `deploy/`, with the real Prometheus."""

import json
import re
import socket
import subprocess
import urllib.request

from conftest import ROOT, chat, wait_for
from packages import promtool
from test_metrics import documented, scrape

RULES = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/batchwright.json"
ADMIN_LISTENER = ("--admin-listen", "127.0.0.1:0")

# Suffixes of the series of a histogram.
HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


def metrics_in(text):
    """Returns the metrics that an expression names, as the reference has them."""
    names = set(re.findall(r"\b(?:batchwright|process)_\w+", text))
    known = documented()
    return {name if name in known else HISTOGRAM.sub("", name) for name in names}


def alerts():
    """Returns the names of the alerts."""
    return re.findall(r"- alert: (\w+)", RULES.read_text())


def test_rules_are_valid_and_name_metrics_and_documentation_that_exist(prometheus):
    status, output = promtool(prometheus, "check", "rules", RULES)
    assert status == 0, output
    text = RULES.read_text()
    unknown = {name for name in metrics_in(text) if name not in documented()}
    assert not unknown
    page = (ROOT / "docs/operating/alerts.md").read_text()
    for alert in alerts():
        assert f"\n## {alert}\n" in page, alert
        assert f"runbook: docs/operating/alerts.md#{alert.lower()}\n" in text
    assert len(re.findall(r"^## ", page, re.M)) == len(alerts())


def test_dashboard_names_metrics_that_exist():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(expressions) > 50
    named = metrics_in("\n".join(expressions))
    ours = {name for name in named if name.startswith("batchwright_")}
    assert ours <= set(documented())
    # A metric that no one looks at is not worth its cost.
    assert set(documented()) - ours == set()


def test_metrics_are_valid_for_promtool(prometheus, serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    server.run([chat("a", "hi", model="m"), chat("b", "!status 400 no", model="m")])
    status, output = promtool(prometheus, "check", "metrics", text=scrape(server.url)[2])
    print(output)
    assert status == 0 and not output, output


def test_prometheus_raises_the_alert_of_a_deadline_at_risk(prometheus, serve, stub, tmp_path):
    server = serve(
        *ADMIN_LISTENER,
        "--completion-windows=24h,1m",
        plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 1\n")},
    )
    target = server.read_line().split("//")[-1].strip()
    # The same rules, without their time for which a condition has to last.
    rules = re.sub(r"for: \d+m", "for: 0s", RULES.read_text())
    (tmp_path / "alerts.yml").write_text(rules)
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        "rule_files: [alerts.yml]\n"
        "scrape_configs:\n"
        "  - job_name: batchwright\n"
        f"    static_configs: [{{targets: ['{target}']}}]\n"
    )
    status, output = promtool(prometheus, "check", "config", tmp_path / "prometheus.yml")
    assert status == 0, output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = (tmp_path / "prometheus.log").open("w")
    child = subprocess.Popen(
        [
            prometheus("prometheus"),
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/prometheus",
            f"--web.listen-address={address}",
        ],
        stdout=log,
        stderr=log,
    )

    def ask(path):
        try:
            with urllib.request.urlopen(f"http://{address}/api/v1/{path}", timeout=10) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def firing():
        found = ask("alerts")
        return {alert["labels"]["alertname"]: alert for alert in found["alerts"]} if found else {}

    try:
        wait_for(
            lambda: any(
                found["health"] == "up" for found in (ask("targets") or {}).get("activeTargets", [])
            ),
            what="a scrape",
        )
        assert "BatchwrightDeadlineAtRisk" not in firing()
        # A line takes two seconds, so that the rest will take ten minutes.
        lines = [chat(f"line-{number}", "!delay 2000 slow", model="m") for number in range(300)]
        server.client.batches.create(
            input_file_id=server.upload(lines).id,
            endpoint="/v1/chat/completions",
            completion_window="1m",
        )
        alert = wait_for(lambda: firing().get("BatchwrightDeadlineAtRisk"), 60, "the alert")
        print(alert["annotations"]["summary"])
        assert float(alert["value"]) == 1
        # The margin itself is in the time series of Prometheus.
        margin = ask("query?query=batchwright_batch_deadline_margin_seconds")["result"]
        assert float(margin[0]["value"][1]) < 0
        assert "BatchwrightDown" not in firing()
    finally:
        child.terminate()
        child.wait(timeout=30)
