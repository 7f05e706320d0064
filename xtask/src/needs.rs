//! Programs that the tasks need besides Rust and a C compiler.
//!
//! On Debian as root, missing programs are installed. Elsewhere, the install command is printed,
//! and tests that can run without the missing programs run.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::run::{run, step};

/// Program, and the Debian packages that it needs.
struct Need {
    program: &'static str,
    /// Command that succeeds if the program is installed.
    check: &'static [&'static str],
    /// Names of packages, separated by spaces.
    packages: &'static str,
}

const fn need(
    program: &'static str,
    check: &'static [&'static str],
    packages: &'static str,
) -> Need {
    Need { program, check, packages }
}

/// Required by every build.
const TO_BUILD: [Need; 1] = [need("make", &["make", "--version"], "make")];

/// Required by a release.
const TO_PACK: [Need; 2] = [
    need("dpkg-shlibdeps", &["dpkg-shlibdeps", "--version"], "dpkg-dev"),
    need("strip", &["strip", "--version"], "binutils"),
];

/// Required by the end-to-end tests.
const TO_TEST: [Need; 4] = [
    need("git", &["git", "--version"], "git"),
    need("python3 with venv", &["python3", "-c", "import ensurepip, venv"], "python3-venv"),
    need("node", &["node", "--version"], "nodejs"),
    need("npm", &["npm", "--version"], "npm"),
];

/// Required by some tests, which are skipped without them.
const FOR_SOME_TESTS: [Need; 8] = [
    need("buildah", &["buildah", "--version"], "buildah"),
    need("debootstrap", &["sh", "-c", "command -v debootstrap"], "debootstrap"),
    need("docker-registry", &["sh", "-c", "command -v docker-registry"], "docker-registry"),
    // Podman with the programs that it calls, which its package only recommends or leaves open.
    need(
        "podman",
        &["sh", "-c", "command -v podman && command -v catatonit && command -v iptables"],
        "podman catatonit containernetworking-plugins iptables",
    ),
    need("runc", &["sh", "-c", "command -v runc"], "runc"),
    need("ssh-keygen", &["sh", "-c", "command -v ssh-keygen"], "openssh-client"),
    need("systemd-analyze", &["systemd-analyze", "--version"], "systemd"),
    need("systemd-nspawn", &["systemd-nspawn", "--version"], "systemd-container"),
];

impl Need {
    fn is_installed(&self) -> bool {
        let Some((program, arguments)) = self.check.split_first() else { return true };
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }
}

fn missing(needs: &'static [Need]) -> Vec<&'static Need> {
    needs.iter().filter(|need| !need.is_installed()).collect()
}

/// Provides the programs that a build needs.
pub fn to_build() -> Result<()> {
    provide(&[&TO_BUILD], &[])
}

/// Provides the programs that a release needs.
pub fn to_pack() -> Result<()> {
    provide(&[&TO_BUILD, &TO_PACK], &[])
}

/// Provides the programs that the tests need; a missing optional program is only reported.
pub fn to_test() -> Result<()> {
    provide(&[&TO_BUILD, &TO_TEST], &[&FOR_SOME_TESTS])
}

/// Installs missing programs, or fails with the install command if a required one is missing.
fn provide(required: &[&'static [Need]], optional: &[&'static [Need]]) -> Result<()> {
    let missing_of =
        |lists: &[&'static [Need]]| lists.iter().flat_map(|list| missing(list)).collect::<Vec<_>>();
    let (missing_required, missing_optional) = (missing_of(required), missing_of(optional));
    let packages: Vec<&str> = missing_required
        .iter()
        .chain(&missing_optional)
        .flat_map(|need| need.packages.split(' '))
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    if can_install() {
        step(&format!("installing {}", packages.join(", ")));
        run(Command::new("apt-get").args(["update", "-qq"]))?;
        let mut install = Command::new("apt-get");
        install.args(["install", "-qq", "--yes", "--no-install-recommends"]).args(&packages);
        run(install.env("DEBIAN_FRONTEND", "noninteractive"))?;
        return Ok(());
    }
    let names =
        |needs: &[&Need]| needs.iter().map(|need| need.program).collect::<Vec<_>>().join(", ");
    let command = format!("sudo apt-get install --no-install-recommends {}", packages.join(" "));
    if !missing_required.is_empty() {
        bail!("not installed: {}; on Debian or Ubuntu, run: {command}", names(&missing_required));
    }
    eprintln!(
        "not installed: {}; tests that need it are skipped. On Debian or Ubuntu, run: {command}",
        names(&missing_optional)
    );
    Ok(())
}

/// Returns true if apt-get exists and the user is root.
fn can_install() -> bool {
    let is_root =
        Command::new("id").arg("-u").output().is_ok_and(|found| found.stdout.trim_ascii() == b"0");
    is_root && need("apt-get", &["apt-get", "--version"], "").is_installed()
}
