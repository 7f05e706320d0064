"""Debian that a test boots: a root folder of its own, systemd as PID 1, and no outer network."""

import shutil
import subprocess
import uuid

import pytest
from conftest import wait_for
from packages import run

# In a mount namespace with the one hierarchy of control groups that systemd and Debian 12 expect.
BOOT = """
umount --recursive --lazy /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$2"
echo $$ > "/sys/fs/cgroup/$2/cgroup.procs"
exec systemd-nspawn --quiet $3 --register=no --keep-unit --private-network --link-journal=no \
    --console=pipe --directory="$1" $4
"""

# Removes the control groups of a machine, which are empty now.
CLEAN_UP = """
mount -t cgroup2 none /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"""

ENVIRONMENT = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
    "DEBIAN_FRONTEND=noninteractive",
]


class Machine:
    """Booted copy of a Debian; commands run in it as root."""

    def __init__(self, debian, folder):
        self.root = folder / "machine"
        self.group = f"batchwright-test-{uuid.uuid4().hex}"
        run("cp", "--archive", debian, self.root)
        (self.root / "root").chmod(0o755)
        self.skip_unless_possible()
        self.log = folder / "boot.log"
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                self.command("--boot", ""), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def command(self, option, program):
        private = ["unshare", "--mount", "--propagation", "private", "bash", "-ec", BOOT]
        return [*private, "boot", str(self.root), self.group, option, program]

    def skip_unless_possible(self):
        """Skips the test on a system that does not allow what a machine needs."""
        tried = subprocess.run(
            self.command("--as-pid2", "/bin/true"), capture_output=True, text=True, timeout=60
        )
        if tried.returncode != 0:
            pytest.skip(f"systemd-nspawn does not work here: {tried.stderr}")
        self.remove_group()

    def remove_group(self):
        private = ["unshare", "--mount", "--propagation", "private", "bash", "-ec"]
        run(*private, CLEAN_UP, "clean-up", self.group)

    def __enter__(self):
        def is_up():
            if self.child.poll() is not None:
                raise AssertionError(f"it does not boot: {self.log.read_text()}")
            return self.first() and self.call("systemctl", "is-system-running").stdout in (
                "running\n",
                "degraded\n",
            )

        try:
            wait_for(is_up, 60, "a booted system")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            # systemd halts at this signal.
            self.child.send_signal(15)
            try:
                self.child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        self.remove_group()
        shutil.rmtree(self.root, ignore_errors=True)

    def first(self):
        """Returns the process that is PID 1 of the machine; none before it exists."""
        try:
            with open(f"/proc/{self.child.pid}/task/{self.child.pid}/children") as children:
                found = children.read().split()
            for pid in found:
                with open(f"/proc/{pid}/comm") as name:
                    if name.read() == "systemd\n":
                        return pid
        except OSError:
            pass
        return None

    def call(self, *command, env=None, timeout=120):
        """Runs a command in the machine."""
        more = [f"{name}={value}" for name, value in (env or {}).items()]
        enter = ["nsenter", "--target", self.first(), "--all", "env", "--chdir=/root", "-i"]
        return subprocess.run(
            [str(part) for part in [*enter, *ENVIRONMENT, *more, *command]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def run(self, *command, env=None):
        """Runs a command that must succeed; returns its standard output."""
        done = self.call(*command, env=env)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.journal()}"
        return done.stdout

    def journal(self):
        return self.call("journalctl", "--no-pager", "--lines=60", "--unit=batchwright*").stdout

    def property(self, name, unit="batchwright"):
        shown = self.run("systemctl", "show", "--value", f"--property={name}", unit)
        return shown.strip()

    def write(self, path, text):
        file = self.root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
