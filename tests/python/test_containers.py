"""The Compose file and the pod of the Helm chart, run by Podman.

The commands of the documentation run as they are written, with Podman in the place of Docker. There
is no cluster: Podman is the kubelet of one pod, the test takes the secrets out of their objects, as
the kubelet does, and asks the probes.
"""

import copy
import hashlib
import json
import re
import shutil
import urllib.error
import urllib.request

import pytest
import trustme
import yaml
from conftest import PLUGINS, ROOT, chat, jsonl, run_host, wait_for
from packages import needs_root_and
from registries import LOGIN

pytestmark = needs_root_and("buildah", "podman", "runc", "catatonit", "unshare", "nsenter")

PAGE = ROOT / "docs/operating/packages.md"
WASM = "application/wasm"


def asked(path, port=8081):
    """Returns the status of a path, and none while nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def finish_batch(folder, admin_key, model="echo"):
    """Makes a key with the admin key, and runs a batch with it."""
    env = {"BATCHWRIGHT_ADMIN_KEY": admin_key, "BATCHWRIGHT_URL": "http://127.0.0.1:8080"}
    made = run_host("admin", "key", "create", "--project", "default", "--name", "n", env=env)
    assert made.returncode == 0, made.stderr
    env["BATCHWRIGHT_API_KEY"] = made.stdout.strip()
    (folder / "in.jsonl").write_bytes(jsonl([chat("a", model=model)]))
    made = run_host("batch", "create", folder / "in.jsonl", "--json", env=env)
    assert made.returncode == 0, made.stderr
    batch = json.loads(made.stdout)["id"]
    watched = run_host("batch", "watch", batch, env=env)
    assert watched.returncode == 0, watched.stderr
    return batch, env


def test_compose_file_starts_a_server_that_is_healthy_and_keeps_its_data(podman, tmp_path):
    pytest.importorskip("podman_compose")
    block = r"<!-- not run: [^>]*test_containers\.py runs it[^>]*-->\n```sh\n(.*?)^```$"
    start, administer, restore = re.findall(block, PAGE.read_text(), re.M | re.S)
    folder = tmp_path / "deploy/docker"
    shutil.copytree(ROOT / "deploy/docker", folder)
    try:
        podman.run("bash", "-euo", "pipefail", "-c", start, cwd=tmp_path)
        (name,) = podman.run("podman", "ps", "--format={{.Names}}").split()
        wait_for(lambda: asked("/health/ready") == 200, what=lambda: podman.logs(name))
        # As the engine does each ten seconds.
        podman.run("podman", "healthcheck", "run", name)
        made = podman.run("bash", "-ec", administer, cwd=folder)
        assert "acme-labs" in made
        key = (folder / ".env").read_text().strip().partition("=")[2]
        batch, env = finish_batch(tmp_path, key)
        # A stop is graceful, and the data is on the volume.
        podman.run("docker", "compose", "stop", cwd=folder)
        assert podman.state(name)["ExitCode"] == 0, podman.logs(name)
        podman.run("docker", "compose", "start", cwd=folder)
        wait_for(lambda: asked("/health/serving") == 200, what="a server that has started again")
        # Backed up, and restored into another folder.
        podman.run("bash", "-euo", "pipefail", "-c", restore, cwd=folder)
        wait_for(lambda: asked("/health/serving") == 200, what="the restored server")
        (name,) = podman.run("podman", "ps", "--format={{.Names}}").split()
        started = "data=/var/lib/batchwright/restored"
        wait_for(lambda: started in podman.logs(name), what="the log of the start")
        shown = run_host("batch", "get", batch, "--json", env=env)
        assert json.loads(shown.stdout)["status"] == "completed", shown.stderr
    finally:
        podman.call("docker", "compose", "down", cwd=folder)


# --- chart ---


def claim(name):
    """Returns a volume that belongs to the group of the pod, as `fsGroup` makes it."""
    owner = {"volume.podman.io/uid": "65532", "volume.podman.io/gid": "65532"}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "annotations": owner},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }


def ports_of(spec):
    """Returns the ports of the containers of a pod, by name."""
    return {
        port["name"]: port["containerPort"]
        for container in spec["containers"]
        for port in container.get("ports", [])
    }


def probe(spec, kind):
    """Returns the status that a probe of the chart gets."""
    request = spec["containers"][0][kind]["httpGet"]
    return asked(request["path"], ports_of(spec)[request["port"]])


def resolve(spec, secrets, folder):
    """Replaces what a kubelet takes from secrets, and takes out what Podman cannot do."""
    spec = copy.deepcopy(spec)
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for probe in ["startupProbe", "livenessProbe", "readinessProbe", "ports"]:
            container.pop(probe, None)
        for variable in container.get("env", []):
            source = variable.pop("valueFrom", None)
            if source:
                reference = source["secretKeyRef"]
                variable["value"] = secrets[reference["name"]][reference["key"]]
    for volume in spec["volumes"]:
        secret = volume.pop("secret", None)
        if secret:
            place = folder / f"secret-{volume['name']}"
            place.mkdir(exist_ok=True)
            for item in secret["items"]:
                (place / item["path"]).write_text(secrets[secret["secretName"]][item["key"]])
            volume["hostPath"] = {"path": str(place), "type": "Directory"}
    spec["hostNetwork"] = True
    return spec


@pytest.fixture
def play(podman, tmp_path):
    """Returns a function that starts a pod with the volumes and configs that it names."""

    def start(name, spec, objects):
        configs = [item for (kind, _), item in objects.items() if kind == "ConfigMap"]
        claims = [
            claim(volume["persistentVolumeClaim"]["claimName"])
            for volume in spec["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        known = podman.run("podman", "volume", "ls", "--quiet").split()
        new = [volume for volume in claims if volume["metadata"]["name"] not in known]
        # Else Podman removes a container that has just ended, which can fail.
        metadata = {
            "name": name,
            "annotations": {"io.podman.annotations.init.container.type": "always"},
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump_all([*new, *configs, pod]))
        return podman.call("podman", "kube", "play", file)

    return start


def test_pod_of_the_chart_pulls_a_plugin_serves_drains_and_is_backed_up(
    render, play, podman, registry, tmp_path
):
    # A private registry with a certificate of an authority of its own.
    authority = trustme.CA()
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    authority.cert_pem.write_to_path(certificates / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.pem")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    registry = registry(users=True, tls=(tmp_path / "tls.pem", tmp_path / "tls.key"))
    component = (PLUGINS / "inference-echo.wasm").read_bytes()
    digest = registry.push("team/parrot", "1.0", (WASM, component))
    file = f"parrot-{hashlib.sha256(component).hexdigest()[:16]}.wasm"
    key = run_host("admin", "key", "generate").stdout.strip()
    login = json.dumps({"auths": {registry.address: {"auth": LOGIN}}})
    secrets = {"batchwright-admin": {"key": key}, "login": {".dockerconfigjson": login}}
    values = {
        "image": {"repository": "localhost/batchwright"},
        "plugins": {"parrot": f'component = "{file}"\nmodels = ["parrot"]\n'},
        "pull": [{"name": "parrot", "reference": f"{registry.address}/team/parrot@{digest}"}],
        "pullSecret": "login",
        "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/certificates/ca.pem"}],
        "extraVolumes": [{"name": "ca", "hostPath": {"path": str(certificates)}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/certificates"}],
        "shutdown": {"delaySeconds": 1, "graceSeconds": 5},
        "backup": {"enabled": True, "existingClaim": "backups"},
    }
    objects = render(values)
    name, data = "team-batchwright-0", "data-team-batchwright-0"
    container = f"{name}-batchwright"

    def serve(objects):
        """Starts the pod of the server; returns its grace period."""
        server = objects["StatefulSet", "team-batchwright"]["spec"]
        (template,) = server["volumeClaimTemplates"]
        assert f"{template['metadata']['name']}-{name}" == data
        spec = resolve(server["template"]["spec"], secrets, tmp_path)
        spec["volumes"].append({"name": "data", "persistentVolumeClaim": {"claimName": data}})
        played = play(name, spec, objects)
        assert played.returncode == 0, played.stderr
        chart = server["template"]["spec"]
        wait_for(lambda: probe(chart, "startupProbe") == 200, what=lambda: podman.logs(container))
        wait_for(lambda: probe(chart, "readinessProbe") == 200, what=lambda: podman.logs(container))
        assert probe(chart, "livenessProbe") == 200
        return spec["terminationGracePeriodSeconds"]

    def finish(name, spec):
        """Runs the pod of a job to its end."""
        played = play(name, spec, objects)
        assert played.returncode == 0, played.stderr
        wait_for(lambda: not podman.state(f"{name}-job")["Running"], what="the end of the job")
        assert podman.state(f"{name}-job")["ExitCode"] == 0, podman.logs(f"{name}-job")

    grace = serve(objects)
    assert asked("/health/ready") == 200
    batch, env = finish_batch(tmp_path, key, "parrot")

    # The job of the backup, beside the server.
    job = objects["CronJob", "team-batchwright-backup"]["spec"]["jobTemplate"]["spec"]["template"]
    finish("backup", resolve(job["spec"], secrets, tmp_path))

    # A pod that is deleted drains within its grace period.
    podman.run("podman", "pod", "stop", f"--time={grace}", name)
    assert podman.state(container)["ExitCode"] == 0, podman.logs(container)
    wait_for(lambda: "server stopped" in podman.logs(container), what="the log of the end")

    # Restored by a task, as the page of the chart says, and served.
    values["persistence"] = {"folder": "restored"}
    task = {"args": ["restore", "/backup/batchwright"]}
    objects = render({**values, "task": task})
    assert objects["StatefulSet", "team-batchwright"]["spec"]["replicas"] == 0
    (job,) = [item["spec"]["template"] for (kind, _), item in objects.items() if kind == "Job"]
    finish("restore", resolve(job["spec"], secrets, tmp_path))
    podman.run("podman", "pod", "rm", "--force", name)
    serve(render(values))
    started = "data=/var/lib/batchwright/restored"
    wait_for(lambda: started in podman.logs(container), what="the log of the start")
    shown = run_host("batch", "get", batch, "--json", env=env)
    assert json.loads(shown.stdout)["status"] == "completed", shown.stderr
