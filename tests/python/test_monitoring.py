"""Monitoring: the alert rules and the dashboard of `deploy/`, with the real Prometheus."""

import json
import re
import subprocess

from conftest import ROOT, chat, wait_for
from packages import Prometheus, promtool
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


def test_configs_of_the_documentation_are_valid(prometheus, tmp_path):
    pages = [(ROOT / f"docs/operating/{name}.md").read_text() for name in ("metrics", "alerts")]
    found = re.findall(
        r"^```yaml\n((?:rule_files|scrape_configs):.*?)^```$", "\n".join(pages), re.M | re.S
    )
    assert len(found) == 3
    (tmp_path / "key").write_text("bw_")
    (tmp_path / "alerts.yml").write_text(RULES.read_text())
    for text in found:
        config = tmp_path / "prometheus.yml"
        config.write_text(text.replace("/etc/prometheus/batchwright-key", f"{tmp_path}/key"))
        status, output = promtool(prometheus, "check", "config", config)
        assert status == 0, output
    (text,) = re.findall(r"^```yaml\n(route:.*?)^```$", pages[1], re.M | re.S)
    (tmp_path / "alertmanager.yml").write_text(text)
    amtool = [prometheus("amtool"), "check-config", tmp_path / "alertmanager.yml"]
    done = subprocess.run(amtool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    with Prometheus(prometheus, target, RULES.read_text(), tmp_path) as watched:
        watched.wait_for_scrape()
        assert "BatchwrightDeadlineAtRisk" not in watched.firing()
        # A line takes two seconds, so that the rest will take ten minutes.
        lines = [chat(f"line-{number}", "!delay 2000 slow", model="m") for number in range(300)]
        server.client.batches.create(
            input_file_id=server.upload(lines).id,
            endpoint="/v1/chat/completions",
            completion_window="1m",
        )
        alert = wait_for(lambda: watched.firing().get("BatchwrightDeadlineAtRisk"), 60, "the alert")
        print(alert["annotations"]["summary"])
        assert float(alert["value"]) == 1
        # The margin itself is in the time series of Prometheus.
        margin = watched.ask("query?query=batchwright_batch_deadline_margin_seconds")["result"]
        assert float(margin[0]["value"][1]) < 0
        assert "BatchwrightDown" not in watched.firing()
