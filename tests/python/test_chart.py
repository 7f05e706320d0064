"""Helm chart: rendered by Helm, checked against the schemas of Kubernetes, and its settings used.

No cluster runs here: what a rendered object does in one is not tested.
"""

import json
import re
import subprocess

import kubernetes_validate
import pytest
import yaml
from charts import CHART
from conftest import ROOT, run_host
from packages import promtool

NODE = ROOT / "tests/node"

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
    "backup": {"enabled": True, "schedule": "5 3 * * *", "existingClaim": "backups"},
    "task": {"args": ["restore", "/backup/batchwright"]},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "host": "batch.example.com",
        "tlsSecret": "certificate",
        "annotations": {"a": "b"},
    },
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "ml"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "batch", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
}


def pod(objects):
    return objects["StatefulSet", "team-batchwright"]["spec"]["template"]["spec"]


def settings(objects):
    return objects["ConfigMap", "team-batchwright-settings"]["data"]["batchwright.toml"]


def validate_monitoring(objects):
    """Validates objects by the schemas of the Prometheus operator; returns what it refuses."""
    command = ["node", "monitoring.mjs"]
    done = subprocess.run(
        command, cwd=NODE, input=json.dumps(objects), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_objects_are_valid_for_kubernetes(render, helm, values, tmp_path):
    (tmp_path / "lint.yaml").write_text(yaml.safe_dump(values))
    lint = helm("lint", "--strict", CHART, "--values", tmp_path / "lint.yaml")
    assert lint.returncode == 0, lint.stdout
    objects = render(values)
    monitoring = []
    for item in objects.values():
        if item["apiVersion"].startswith("monitoring.coreos.com/"):
            monitoring.append(item)
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(item, version, strict=True)
    assert len(objects) - len(monitoring) >= (13 if values else 7)
    if values:
        assert [item["kind"] for item in monitoring] == ["PrometheusRule", "ServiceMonitor"]
        refused = validate_monitoring(monitoring)
        assert refused == "", refused
        (endpoint,) = monitoring[1]["spec"]["endpoints"]
        endpoint["port"] = 8081
        assert "endpoints/0/port" in validate_monitoring(monitoring)
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


def test_jobs_share_the_volume_of_the_server_and_get_no_requests(render):
    objects = render(EVERYTHING)
    backup = objects["CronJob", "team-batchwright-backup"]["spec"]["jobTemplate"]["spec"][
        "template"
    ]
    (task,) = [item["spec"]["template"] for (kind, _), item in objects.items() if kind == "Job"]
    server = objects["StatefulSet", "team-batchwright"]
    (template,) = server["spec"]["volumeClaimTemplates"]
    for job in [backup, task]:
        volumes = {volume["name"]: volume for volume in job["spec"]["volumes"]}
        claim = volumes["data"]["persistentVolumeClaim"]["claimName"]
        assert claim == f"{template['metadata']['name']}-{server['metadata']['name']}-0"
        assert job["spec"]["securityContext"] == pod(objects)["securityContext"]
        # No service, budget or policy of the server selects it.
        own = job["metadata"]["labels"].items()
        for (kind, name), item in objects.items():
            spec = item.get("spec", {})
            selector = spec.get("podSelector", spec.get("selector", {}))
            selector = selector.get("matchLabels", selector)
            assert not selector or not selector.items() <= own or name.endswith("-jobs"), kind
    # A backup runs where the server runs; a task runs without the server.
    (near,) = backup["spec"]["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert near["labelSelector"]["matchLabels"].items() <= labels.items()
    assert server["spec"]["replicas"] == 0 and "podAffinity" not in task["spec"]["affinity"]
    assert render()["StatefulSet", "team-batchwright"]["spec"]["replicas"] == 1
    # Another command is another job, since a job cannot change.
    other = render({**EVERYTHING, "task": {"args": ["doctor"]}})
    names = [{name for kind, name in found if kind == "Job"} for found in [objects, other]]
    assert not names[0] & names[1]


def test_mounts_of_users_are_in_every_container_and_never_twice(render):
    mounts = [{"name": "more", "mountPath": path} for path in ("/more", "/tmp")]
    spec = pod(render({**EVERYTHING, "extraVolumeMounts": mounts}))
    for container in [*spec["initContainers"], *spec["containers"]]:
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(paths) == len(set(paths)) and {"/more", "/tmp"} <= set(paths)


def test_upgrade_changes_nothing_that_cannot_change_and_makes_no_secret(render, tmp_path):
    newer = tmp_path / "newer"
    subprocess.run(["cp", "--recursive", "--dereference", CHART, newer], check=True)
    chart = newer / "Chart.yaml"
    text = re.sub("^(version|appVersion): .*$", r"\1: 9.9.9", chart.read_text(), flags=re.M)
    chart.write_text(text)
    # Without the task, which is another job for each upgrade.
    values = {**EVERYTHING, "task": {"args": []}}
    before, after = render(values), render(values, newer)
    assert before.keys() == after.keys()
    assert not [kind for kind, _ in before if kind == "Secret"]
    fixed = ["selector", "serviceName", "volumeClaimTemplates"]
    for kind, name in before:
        old, new = before[kind, name].get("spec", {}), after[kind, name].get("spec", {})
        for field in fixed:
            assert old.get(field) == new.get(field), (kind, name, field)
    # The same values make the same objects, so that an upgrade restarts no pod without a reason.
    assert before == render(values)


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
        ({"settings": {"batch": {"max_file_sise": "1GiB"}}}, "max_file_sise"),
        ({"settings": {"batch": {"max_file_size": True}}}, "/settings/batch/max_file_size"),
        ({"settings": {"prices": [{"model": "m"}]}}, "/settings/prices/0"),
        ({"settings": {"metrics": {}}}, "metrics"),
        ({"backup": {"schedule": "every day"}}, "/backup/schedule"),
        ({"ingress": {"enabled": True}}, "/ingress"),
        ({"backup": {"enabled": True}}, "/backup"),
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
