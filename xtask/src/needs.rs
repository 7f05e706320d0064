//! The programs that the tasks need beside Rust and a C compiler. On Debian as root, what is missing is installed; elsewhere the one command
//! that does it is printed, and what can be done without it is done.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::run::{run, step};

/// A program, and the Debian package that has it.
struct Need {
    program: &'static str,
    /// Shows that it is there.
    check: &'static [&'static str],
    package: &'static str,
}

const fn need(
    program: &'static str,
    check: &'static [&'static str],
    package: &'static str,
) -> Need {
    Need { program, check, package }
}

/// Without these nothing is built.
const TO_BUILD: [Need; 1] = [need("make", &["make", "--version"], "make")];

/// Without these no end-to-end test runs.
const TO_TEST: [Need; 4] = [
    need("git", &["git", "--version"], "git"),
    need("python3 with venv", &["python3", "-c", "import ensurepip, venv"], "python3-venv"),
    need("node", &["node", "--version"], "nodejs"),
    need("npm", &["npm", "--version"], "npm"),
];

/// Without these, the tests that need them are skipped and say so.
const FOR_SOME_TESTS: [Need; 2] = [
    need("docker-registry", &["sh", "-c", "command -v docker-registry"], "docker-registry"),
    need("ssh-keygen", &["sh", "-c", "command -v ssh-keygen"], "openssh-client"),
];

impl Need {
    fn is_there(&self) -> bool {
        let Some((program, arguments)) = self.check.split_first() else { return true };
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }
}

fn missing(needs: &'static [Need]) -> Vec<&'static Need> {
    needs.iter().filter(|need| !need.is_there()).collect()
}

/// Has there be what building takes.
pub fn to_build() -> Result<()> {
    provide(&[&TO_BUILD], &[])
}

/// Has there be what the tests take, as far as it can.
pub fn to_test() -> Result<()> {
    provide(&[&TO_BUILD, &TO_TEST], &[&FOR_SOME_TESTS])
}

fn provide(required: &[&'static [Need]], optional: &[&'static [Need]]) -> Result<()> {
    let look =
        |lists: &[&'static [Need]]| lists.iter().flat_map(|list| missing(list)).collect::<Vec<_>>();
    let (lacking, also) = (look(required), look(optional));
    let packages: Vec<&str> = lacking.iter().chain(&also).map(|need| need.package).collect();
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
    if !lacking.is_empty() {
        bail!("{} missing; on Debian or Ubuntu: {command}", names(&lacking));
    }
    eprintln!(
        "not here: {}; the tests that need it are skipped. On Debian or Ubuntu: {command}",
        names(&also)
    );
    Ok(())
}

/// Debian's package manager, and the right to use it.
fn can_install() -> bool {
    let is_root =
        Command::new("id").arg("-u").output().is_ok_and(|found| found.stdout.trim_ascii() == b"0");
    is_root && need("apt-get", &["apt-get", "--version"], "").is_there()
}
