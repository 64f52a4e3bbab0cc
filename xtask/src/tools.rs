//! What the tests need beside Rust: installed by its ordinary client where it is missing.

use crate::run::{Outcome, Runner, Tally, root};
use std::path::Path;
use std::process::{Command, Stdio};

/// Packages of Debian: the program that shows that it is there, and the package.
const DEBIAN: [(&str, &str); 5] =
    [("curl", "curl"), ("jq", "jq"), ("ip", "iproute2"), ("go", "golang-go"), ("python3", "python3-venv")];

pub(crate) fn install_missing(tally: &mut Tally) {
    let missing: Vec<&str> =
        DEBIAN.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return;
    }
    tally.step(&format!("installing {}", missing.join(", ")), |t| {
        let t = t.clone().with("DEBIAN_FRONTEND", "noninteractive");
        t.command("apt-get", &["update", "-qq"]).and(|| {
            t.command("apt-get", &[&["install", "-y", "-qq", "--no-install-recommends"], &missing[..]].concat())
        })
    });
}

fn is_there(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// The real etcd and its tools, from their Go modules (versions in tests/go.mod).
pub(crate) fn build_etcd(t: &Runner, folder: &Path) -> Outcome {
    let target = format!("{}/", folder.display());
    if let Err(e) = std::fs::create_dir_all(folder) {
        return Outcome::failed(&format!("{target}: {e}"));
    }
    let packages = ["go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/etcdctl/v3", "go.etcd.io/etcd/etcdutl/v3"];
    let names = ["etcd", "etcdctl", "etcdutl"];
    packages.iter().zip(names).fold(Outcome::ok(), |so_far, (package, name)| {
        so_far.and(|| t.in_folder("tests").command("go", &["build", "-o", &format!("{target}{name}"), package]))
    })
}

/// The path of a public validator of OpenAPI documents, installed into the target folder when it is not there.
pub(crate) fn openapi_validator(t: &Runner) -> Option<String> {
    let tools = root().join("target/tools/openapi");
    let program = tools.join("bin/openapi-spec-validator");
    if !program.is_file() {
        let folder = tools.display().to_string();
        let pip = tools.join("bin/pip").display().to_string();
        let _ = t
            .command("python3", &["-m", "venv", &folder])
            .and(|| t.command(&pip, &["install", "--quiet", "openapi-spec-validator==0.9.0"]));
    }
    program.is_file().then(|| program.display().to_string())
}

/// The path of cargo-deny, installed into the target folder when it is not on the machine.
pub(crate) fn cargo_deny(t: &Runner) -> Option<String> {
    if Command::new("cargo-deny")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
    {
        return Some("cargo-deny".to_owned());
    }
    let tools = root().join("target/tools");
    let program = tools.join("bin/cargo-deny");
    if !program.is_file() {
        // Unoptimised: it runs for a second and would take minutes to optimise.
        let root = tools.display().to_string();
        let _ = t.cargo(&["install", "--quiet", "--debug", "--locked", "--root", &root, "cargo-deny"]);
    }
    program.is_file().then(|| program.display().to_string())
}
