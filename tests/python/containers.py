"""Container images by buildah, and containers by Podman in namespaces of a test.

Docker is not needed: its commands in the documentation are run by Podman and podman-compose.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TARGET
from packages import LOOPBACK_UP, once, run

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
# The libraries of the base image, which is not there to be pulled.
LIBRARIES = Path("/lib/x86_64-linux-gnu")
BASE_IMAGE = "gcr.io/distroless/cc-debian12"
TAG = "localhost/batchwright:0.1.0"

CLONE_NEWNET = 0x40000000

# What Podman keeps outside of its storage is in memory, and ends with the test.
MOUNTS = """
mount -t tmpfs none /run
mkdir -p /var/lib/containers /var/lib/cni /etc/cni/net.d
mount --bind "$1" /var/lib/containers
mount -t tmpfs none /var/lib/cni
mount -t tmpfs none /etc/cni/net.d
mount -t tmpfs none /dev/shm
echo mounted
exec sleep infinity
"""

# The limits are at most those of the tests, which need not be allowed to raise them.
CONFIG = """
[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
"""

DOCKER = """#!/bin/sh
case "$1" in
build) ;;
compose) shift; exec {python} -m podman_compose "$@" ;;
*) exec podman "$@" ;;
esac
"""


def buildah(*arguments):
    store = TARGET / "images"
    options = ("--root", store, "--runroot", store / "run", "--storage-driver", "vfs")
    return run("buildah", *options, *arguments).strip()


def image_of(folder, name):
    """Makes an image of a folder."""
    container = buildah("from", "scratch")
    buildah("copy", "--quiet", container, folder, "/")
    buildah("commit", "--quiet", container, name)
    buildah("rm", container)


class Image:
    """Image that the Dockerfile makes.

    The stage that compiles is replaced by the release that was packed already.
    """

    def __init__(self, release, folder):
        base = folder / "base"
        for library in ["libc.so.6", "libm.so.6", "libgcc_s.so.1"]:
            (base / "lib/x86_64-linux-gnu").mkdir(parents=True, exist_ok=True)
            shutil.copy(LIBRARIES / library, base / "lib/x86_64-linux-gnu" / library)
        (base / "lib64").mkdir()
        shutil.copy("/lib64/ld-linux-x86-64.so.2", base / "lib64")
        for name in ["proc", "etc", "tmp"]:
            (base / name).mkdir()
        built = folder / "built"
        shutil.copytree(release / "batchwright", built / "source/dist/release/batchwright")
        shutil.copytree(ROOT / "deploy/docker", built / "source/deploy/docker")
        for volume in ["batchwright", "batchwright-backup"]:
            (built / "volume" / volume).mkdir(parents=True)
            (built / "volume" / volume).chmod(0o770)
        compiled, final = re.split(r"^# glibc, libgcc.*$", DOCKERFILE.read_text(), flags=re.M)
        assert compiled.count("FROM ") == final.count("FROM ") == 1
        (folder / "Dockerfile").write_text(final.replace("--from=build", "--from=localhost/built"))
        # As `docker save` writes it.
        self.archive = folder / "image.tar"
        self.root = folder / "root"
        with once("images"):
            image_of(base, BASE_IMAGE)
            image_of(built, "localhost/built")
            options = ("--pull-never", "--isolation", "chroot", "--format", "docker", "--quiet")
            buildah("build", *options, "--file", folder / "Dockerfile", "--tag", TAG, base)
            config = json.loads(buildah("inspect", "--type", "image", TAG))
            self.config = config["Docker"]["config"]
            container = buildah("from", "--pull-never", TAG)
            run("cp", "--archive", buildah("mount", container), self.root)
            buildah("rm", container)
            buildah("push", "--quiet", TAG, f"docker-archive:{self.archive}:{TAG}")
            buildah("rmi", "--prune")


@pytest.fixture
def image(release, tmp_path):
    if not LIBRARIES.exists():
        pytest.skip(f"needs {LIBRARIES}")
    folder = tmp_path / "image"
    folder.mkdir()
    return Image(release, folder)


@contextlib.contextmanager
def own_network():
    """Gives the test, and what it starts, a network with nothing but a loopback device."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        try:
            run(sys.executable, "-c", LOOPBACK_UP)
            yield
        finally:
            if libc.setns(before, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(before)


class Podman:
    """Podman with a storage, a state and a network of its own."""

    def __init__(self, folder):
        self.folder = folder
        storage = folder / "storage"
        storage.mkdir()
        (folder / "containers.conf").write_text(CONFIG)
        programs = folder / "programs"
        programs.mkdir()
        (programs / "docker").write_text(DOCKER.format(python=sys.executable))
        (programs / "docker").chmod(0o755)
        self.env = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "PATH": f"{programs}:{os.environ['PATH']}",
        }
        # Its processes end with the first one.
        setup = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        setup += ["bash", "-ec", MOUNTS, "mounts", storage]
        self.holder = subprocess.Popen(setup, stdout=subprocess.PIPE)
        assert self.holder.stdout.readline() == b"mounted\n"
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        (self.first,) = children.read_text().split()

    def call(self, *command, cwd=None, timeout=120):
        """Runs a command in the namespaces."""
        enter = ["nsenter", "--target", self.first, "--mount", "--pid"]
        enter += ["env", f"--chdir={cwd or self.folder}"]
        return subprocess.run(
            [str(part) for part in [*enter, *command]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.env,
        )

    def run(self, *command, cwd=None):
        """Runs a command that must succeed; returns its standard output."""
        done = self.call(*command, cwd=cwd)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, container):
        return json.loads(self.run("podman", "inspect", container))[0]["State"]

    def logs(self, container):
        done = self.call("podman", "logs", container)
        return done.stdout + done.stderr

    def close(self):
        try:
            self.run("podman", "pod", "rm", "--all", "--force")
            self.run("podman", "rm", "--all", "--force", "--time=0")
        finally:
            self.holder.kill()
            self.holder.wait()


@pytest.fixture
def podman(image, tmp_path):
    """Returns Podman, with the image, in a network of this test's own."""
    folder = tmp_path / "podman"
    folder.mkdir()
    with own_network():
        found = Podman(folder)
        try:
            info = found.call("podman", "info")
            if info.returncode != 0:
                pytest.skip(f"Podman does not work here: {info.stderr}")
            found.run("podman", "load", "--quiet", "--input", image.archive)
            tried = found.call("podman", "run", "--rm", "--publish=127.0.0.1:9:9", TAG, "--version")
            # The status of what Podman itself cannot do; an image that does not run has others.
            if tried.returncode == 125:
                pytest.skip(f"Podman cannot run containers here: {tried.stderr}")
            assert tried.returncode == 0, tried.stderr
            yield found
        finally:
            found.close()
