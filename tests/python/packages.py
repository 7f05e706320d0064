"""Fixtures and helpers of the tests of packages and of monitoring.

A release, root folders to run it in, and the programs of Prometheus.
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, TARGET, wait_for

RELEASE = ROOT / "dist/release"

# Turns the loopback device of a new network namespace on.
LOOPBACK_UP = """
import fcntl, socket, struct
request = struct.pack("16sh", b"lo", 0x41)
fcntl.ioctl(socket.socket(), 0x8914, request)
"""


@contextlib.contextmanager
def once(name):
    """Holds a lock, so that of two test processes one makes what both use."""
    TARGET.mkdir(exist_ok=True)
    with open(TARGET / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(*command, **more):
    """Runs a command that must succeed; returns its standard output."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **more
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def has_namespaces():
    """Returns true if the system allows to make namespaces and to mount in them."""
    command = ["unshare", "--mount", "--pid", "--net", "--fork", "mount", "--bind", "/tmp", "/tmp"]
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


def needs_root_and(*programs):
    """Returns a marker that skips a test without root, without programs, or without namespaces."""
    missing = [program for program in programs if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        return pytest.mark.skip(reason=f"needs root and {', '.join(programs)}")
    needs_namespaces = "unshare" in programs and not has_namespaces()
    return pytest.mark.skipif(needs_namespaces, reason="this system does not allow namespaces")


@pytest.fixture(scope="session")
def release():
    """Returns the folder of the packed release."""
    if not os.environ.get("TEST_PLUGINS_BUILT"):
        with once("release"):
            subprocess.run(["cargo", "xtask", "dist", "--quick"], cwd=ROOT, check=True)
    return RELEASE


@pytest.fixture(scope="session")
def debian():
    """Returns the root of a minimal Debian 12."""
    root = TARGET / "debian"
    with once("debian"):
        if not (root / "etc/passwd").exists():
            made = Path(tempfile.mkdtemp(dir=TARGET))
            made.chmod(0o755)
            include = "--include=systemd,dbus,sudo,openssl,ca-certificates"
            command = ["debootstrap", "--variant=minbase", include, "bookworm", made]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                subprocess.run(["umount", "--lazy", made / "proc"], capture_output=True)
                shutil.rmtree(made, ignore_errors=True)
                pytest.skip(f"debootstrap failed: {done.stdout.strip().splitlines()[-1:]}")
            made.rename(root)
    return root


def newer(package, folder):
    """Returns the package with a higher version and with other shipped files."""
    tree = folder / "newer"
    run("dpkg-deb", "--raw-extract", package, tree)
    control = tree / "DEBIAN/control"
    control.write_text(
        re.sub(r"^Version: .*$", "Version: 9.9.9-1", control.read_text(), flags=re.M)
    )
    plugin = tree / "etc/batchwright/plugins/echo.toml"
    plugin.write_text(plugin.read_text() + "# New in 9.9.9.\n")
    quick = ("-Zgzip", "-z1")
    run("dpkg-deb", *quick, "--build", "--root-owner-group", tree, folder / "newer.deb")
    return folder / "newer.deb"


@pytest.fixture(scope="session")
def prometheus():
    """Returns a function from the name of a program of Prometheus to its path.

    The packages of Debian are unpacked and not installed, because they would start services.
    """
    if all(shutil.which(name) for name in ("prometheus", "promtool", "amtool")):
        return shutil.which
    folder = TARGET / "prometheus"
    with once("prometheus"):
        if not (folder / "usr/bin/amtool").exists():
            if shutil.which("apt-get") is None:
                pytest.skip("Prometheus is not installed")
            folder.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                subprocess.run(["apt-get", "update", "-qq"], check=True)
            for name in ("prometheus", "prometheus-alertmanager"):
                subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
                (package,) = folder.glob(f"{name}_*.deb")
                subprocess.run(["dpkg", "--extract", package, folder], check=True)
    return lambda name: folder / "usr/bin" / name


def promtool(prometheus, *arguments, text=None):
    done = subprocess.run(
        [prometheus("promtool"), *arguments], input=text, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


class Prometheus:
    """Prometheus that scrapes one server; its alerts fire as soon as their condition holds."""

    def __init__(self, prometheus, target, rules, folder):
        (folder / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 0s", rules))
        config = folder / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            "rule_files: [alerts.yml]\n"
            "scrape_configs:\n"
            "  - job_name: batchwright\n"
            f"    static_configs: [{{targets: ['{target}']}}]\n"
        )
        status, output = promtool(prometheus, "check", "config", config)
        assert status == 0, output
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.command = [
            str(prometheus("prometheus")),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder}/prometheus",
            f"--web.listen-address={self.address}",
        ]
        self.log = folder / "prometheus.log"

    def __enter__(self):
        with self.log.open("w") as log:
            self.child = subprocess.Popen(self.command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait(timeout=30)

    def ask(self, path):
        """Returns the data of a path of the API; none while Prometheus starts."""
        try:
            with urllib.request.urlopen(
                f"http://{self.address}/api/v1/{path}", timeout=10
            ) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def firing(self):
        """Returns the alerts that fire, by name."""
        found = self.ask("alerts")
        return {alert["labels"]["alertname"]: alert for alert in found["alerts"]} if found else {}

    def wait_for_scrape(self):
        def scraped():
            targets = (self.ask("targets") or {}).get("activeTargets", [])
            return any(target["health"] == "up" for target in targets)

        wait_for(scraped, what="a scrape")


class Namespace:
    """Root folder that a program runs in as PID 1, with a network of its own."""

    def __init__(self, root, command, log, user=0, group=0, env=(), mounts=(), read_only=True):
        self.log = Path(log)
        self.user, self.group, self.root = user, group, root
        steps = ["set -e", f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc"]
        steps += [f"mount --bind {source} {root}{place}" for source, place in mounts]
        if read_only:
            steps.append(f"mount -o remount,bind,ro {root}")
        steps += [f"{sys.executable} -c '{LOOPBACK_UP}'", 'exec "$@"']
        as_user = [shutil.which("chroot"), f"--userspec={user}:{group}", "--groups=", root]
        environment = [f"{name}={value}" for name, value in env]
        enter = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child"]
        setup = ["bash", "-c", "\n".join(steps), "setup"]
        confined = ["setpriv", "--no-new-privs", "env", "--ignore-environment", *environment]
        whole = [*enter, *setup, *confined, *as_user, *command]
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(
                [str(part) for part in whole], stdout=output, stderr=output
            )

    def first(self):
        """Returns the process that is PID 1 in the namespace; none before it exists."""
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text()
        return int(children.split()[0]) if children.split() else None

    def inside(self, *command):
        """Runs a command in the namespace and its root folder, as the same user."""
        return subprocess.run(
            [
                str(part)
                for part in [
                    *("nsenter", "--target", self.first(), "--mount", "--pid", "--net"),
                    *("chroot", f"--userspec={self.user}:{self.group}", "--groups=", self.root),
                    *command,
                ]
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )

    def beside(self, *command, env=None):
        """Runs a command of this machine in the network of the namespace."""
        return subprocess.run(
            [str(part) for part in ["nsenter", "--target", self.first(), "--net", *command]],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **(env or {})},
        )

    def terminate(self):
        """Sends SIGTERM to PID 1 and returns the exit status."""
        os.kill(self.first(), 15)
        return self.child.wait(timeout=60)

    def kill(self):
        # The child of unshare outlives it, since it has become another user.
        if self.child.poll() is None and self.first():
            os.kill(self.first(), 9)
        self.child.kill()
        self.child.wait()
