//! `cargo xtask dist`: what a release consists of, in `dist/release`.
//!
//! A folder with the program, its plugins and its papers is packed as an archive and as a Debian
//! package; the Dockerfile copies from the same folder.

mod papers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::build;
use crate::examples::{install, program};
use crate::needs;
use crate::run::{cargo, output, root, run, step, target};

/// Version of cargo-deb that makes the Debian package.
const CARGO_DEB: &str = "3.8.0";

/// Maximum size of the program, in bytes.
const MAX_PROGRAM_BYTES: u64 = 30_000_000;

/// Name of the program, its package and its archives.
const NAME: &str = "batchwright";

/// What to pack.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Everything
    All,
    /// The folder alone, which the Dockerfile copies from
    Folder,
}

/// Builds and packs a release. A quick one packs the program that the tests use, which is larger.
pub fn pack(part: Part, quick: bool) -> Result<()> {
    needs::to_pack()?;
    build::run_part(build::Part::Plugins)?;
    let built = if quick { quick_program()? } else { small_program()? };
    let release = root().join("dist/release");
    if release.exists() {
        fs::remove_dir_all(&release)?;
    }
    let folder = release.join(NAME);
    fill(&folder, &built)?;
    let version = format!("{}{}", env!("CARGO_PKG_VERSION"), if quick { "~quick" } else { "" });
    papers::add(&folder)?;
    if part == Part::All {
        step("archive");
        archive(&release, &version)?;
        step("Debian package");
        debian(&release, &version)?;
        checksums(&release)?;
    }
    eprintln!("packed {}", release.display());
    Ok(())
}

/// Builds the program with the profile of releases.
fn small_program() -> Result<PathBuf> {
    step("program");
    let mut build = cargo();
    build.args(["rustc", "--profile", "dist", "--package", NAME, "--bin", NAME, "--"]);
    if cfg!(target_arch = "x86_64") {
        // lld, which rustc uses here, keeps equal functions once if nothing compares their
        // addresses.
        build.args(["-C", "link-arg=-Wl,--icf=safe"]);
    }
    // Messages of panics name source files; the folders of this machine are nobody's business.
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    let folders =
        [(root(), "/batchwright"), (target(), "/target"), (home.unwrap_or_default(), "/cargo")];
    let flags: Vec<String> = folders
        .iter()
        .map(|(folder, name)| format!("--remap-path-prefix={}={name}", folder.display()))
        .collect();
    build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    run(&mut build)?;
    let built = target().join("dist").join(NAME);
    let root = root().display().to_string();
    let bytes = fs::read(&built)?;
    let names_root = bytes.windows(root.len()).any(|window| window == root.as_bytes());
    ensure!(!names_root, "{} contains the path {root}", built.display());
    let size = u64::try_from(bytes.len())?;
    ensure!(
        size <= MAX_PROGRAM_BYTES,
        "{} has {size} bytes, more than {MAX_PROGRAM_BYTES}",
        built.display()
    );
    Ok(built)
}

/// Returns a copy of the program of `cargo xtask build` without symbols.
fn quick_program() -> Result<PathBuf> {
    step("program");
    run(cargo().args(["build", "--release", "--workspace", "--bins"]))?;
    let stripped = target().join("release/batchwright.stripped");
    run(Command::new("strip").arg("-o").arg(&stripped).arg(target().join("release").join(NAME)))?;
    Ok(stripped)
}

/// Fills the folder of a release.
fn fill(folder: &Path, built: &Path) -> Result<()> {
    step("folder");
    for part in ["plugins", "etc/plugins", "man", "completions"] {
        fs::create_dir_all(folder.join(part))?;
    }
    let program = folder.join(NAME);
    fs::copy(built, &program)?;
    // Nothing else that lies in dist/plugins is part of a release.
    for name in build::shipped_plugins()? {
        let path = root().join("dist/plugins").join(&name);
        fs::copy(&path, folder.join("plugins").join(&name))
            .with_context(|| path.display().to_string())?;
        // An installation has the plugin files in /etc, where an upgrade keeps changes.
        if name.ends_with(".toml") {
            let text = installed(&fs::read_to_string(&path)?);
            fs::write(folder.join("etc/plugins").join(&name), text)?;
        }
    }
    run(Command::new(&program).arg("man").arg(folder.join("man")))?;
    let completions = folder.join("completions");
    for (shell, file) in
        [("bash", "batchwright.bash"), ("zsh", "_batchwright"), ("fish", "batchwright.fish")]
    {
        let script = output(Command::new(&program).args(["completions", shell]))?;
        fs::write(completions.join(file), script)?;
    }
    for (from, to) in [
        ("LICENSE", "LICENSE"),
        ("CHANGELOG.md", "CHANGELOG.md"),
        ("deploy/systemd/batchwright.service", "batchwright.service"),
        ("deploy/systemd/batchwright-backup.service", "batchwright-backup.service"),
        ("deploy/systemd/batchwright-backup.timer", "batchwright-backup.timer"),
        ("deploy/debian/batchwright.toml", "etc/batchwright.toml"),
        ("deploy/prometheus/alerts.yml", "alerts.yml"),
        ("deploy/grafana/batchwright.json", "grafana.json"),
    ] {
        fs::copy(root().join(from), folder.join(to)).with_context(|| from.to_owned())?;
    }
    // The pages that alerts name, among others.
    let mut copy = Command::new("cp");
    run(copy.arg("--recursive").arg(root().join("docs")).arg(folder.join("docs")))
}

/// Returns the text of a plugin file for an installation. One that needs a key is off: without the
/// key it would be an error from the first start on.
fn installed(plugin: &str) -> String {
    let Some((component, rest)) = plugin.split_once(".wasm\"\n") else { return plugin.to_owned() };
    if !rest.contains("env:") {
        return plugin.to_owned();
    }
    format!("{component}.wasm\"\n# Delete this line once the key is set.\nenabled = false\n{rest}")
}

/// Packs the folder, with equal bytes for equal content.
fn archive(release: &Path, version: &str) -> Result<()> {
    let name = format!("{NAME}-{version}-{}-linux-gnu.tar.gz", std::env::consts::ARCH);
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .args(["--mode=u+rw,go+r-w,a+X", "--use-compress-program=gzip --no-name --best"])
        .arg(format!("--mtime=@{}", epoch()?))
        .arg("--file")
        .arg(release.join(name))
        .arg(NAME);
    run(tar.current_dir(release))
}

/// Returns the time that files of a release have: `SOURCE_DATE_EPOCH`, or that of the commit.
fn epoch() -> Result<String> {
    if let Ok(given) = std::env::var("SOURCE_DATE_EPOCH") {
        ensure!(given.bytes().all(|byte| byte.is_ascii_digit()), "SOURCE_DATE_EPOCH: {given}");
        return Ok(given);
    }
    let mut log = Command::new("git");
    let seconds = output(log.args(["log", "-1", "--format=%ct"]).current_dir(root()));
    Ok(seconds.map_or_else(|_| "0".to_owned(), |found| found.trim().to_owned()))
}

/// Makes the Debian package from the folder; `host/Cargo.toml` says where each file goes.
fn debian(release: &Path, version: &str) -> Result<()> {
    install("cargo-deb", CARGO_DEB, "lzma")?;
    let mut deb = Command::new(program("cargo-deb"));
    deb.args(["--no-build", "--no-strip", "--package", NAME, "--deb-version", version])
        .arg("--output")
        .arg(release)
        .env("SOURCE_DATE_EPOCH", epoch()?)
        .env("CARGO_TARGET_DIR", target())
        .current_dir(root());
    run(&mut deb)
}

/// Writes the digest of each file of a release.
fn checksums(release: &Path) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(release)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            names.push(entry.file_name());
        }
    }
    ensure!(!names.is_empty(), "{} is empty", release.display());
    names.sort();
    let sums = output(Command::new("sha256sum").args(&names).current_dir(release))?;
    fs::write(release.join("SHA256SUMS"), sums)?;
    Ok(())
}
