//! Every chore of the project, by the standard library alone: it must build in a second on a fresh machine.
//!
//! `cargo xtask test` is what CI runs: it installs what is missing, runs every check and suite, and ends with `N passed, M failed`.

mod run;
mod tidy;
mod tools;

use run::{Outcome, Tally, root};
use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask <chore>

  test              everything that CI runs; installs what the tests need and is missing
  quick             formatting, clippy and tests of the pure crates: seconds
  sim [ARGS]        simulated members: `--seeds 2000`, `--seed N`, `--from N`
  diff-etcd [ARGS]  the same seeded operations against the real etcd and against us
  clients           the unmodified Go client and etcdctl against us
  kill-loop [N]     N rounds of kill -9 under load by the real Go client
  cluster [ARGS]    three members as real processes: cut, killed, stopped, on full and broken disks, judged by what clients saw;
                    `-duration 30m`, `-seed N`, `-members 5`, `-faults disk,leader`, `-list`; needs root for namespaces and disks
  codegen [--check] generates crates/wire from proto/, or proves it fresh
  tidy              dead links, missing headers, words that do not belong in the project
  deny              licences, bans and sources of every dependency
  bench [ARGS]      the table of docs/performance.md: builds for release, runs beside the real etcd";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    let mut tally = Tally::default();
    let known = match args.first().map(String::as_str) {
        Some("test") => {
            test(&mut tally);
            true
        }
        Some(chore) => one(&mut tally, chore, &rest),
        None => false,
    };
    if !known {
        eprintln!("{USAGE}");
        return ExitCode::from(64);
    }
    tally.close()
}

fn one(tally: &mut Tally, chore: &str, rest: &[&str]) -> bool {
    match chore {
        "quick" => quick(tally),
        "sim" => sim(tally, rest),
        "diff-etcd" => diff_etcd(tally, rest),
        "clients" => clients(tally),
        "kill-loop" => kill_loop(tally, rest.first().copied().unwrap_or("50")),
        "cluster" => cluster(tally, "three members under every fault", rest),
        "codegen" => tally
            .step("codegen", |t| t.cargo(&[&["run", "--quiet", "--package", "tenure-codegen", "--"], rest].concat())),
        "tidy" => tally.step("tidy", |_| tidy::check(&root())),
        "deny" => deny(tally),
        "bench" => bench(tally, rest),
        _ => return false,
    }
    true
}

/// Cheap checks first, so that a slip is told within a minute.
fn test(tally: &mut Tally) {
    tools::install_missing(tally);
    tally.step("formatting", |t| t.cargo(&["fmt", "--all", "--check"]));
    tally.step("tidy", |_| tidy::check(&root()));
    tally.step("generated code is fresh", |t| {
        t.cargo(&["run", "--quiet", "--package", "tenure-codegen", "--", "--check"])
    });
    tally.step("build", |t| t.cargo(&["build", "--workspace", "--all-targets"]));
    tally.step("clippy", |t| t.cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    tally.step("documentation", |t| {
        t.clone().with("RUSTDOCFLAGS", "-D warnings").cargo(&["doc", "--workspace", "--no-deps"])
    });
    deny(tally);
    tally.step("unit, script and integration tests", |t| {
        let Some(validator) = tools::openapi_validator(t) else {
            return Outcome::failed("the validator of OpenAPI documents could not be installed");
        };
        t.clone().with("OPENAPI_VALIDATOR", &validator).cargo(&["test", "--workspace", "--no-fail-fast"])
    });
    sim(tally, &[]);
    diff_etcd(tally, &[]);
    clients(tally);
    kill_loop(tally, "50");
    cluster(tally, "the cluster suite notices what is wrong", &["-selfcheck"]);
    cluster(tally, "three members under every fault, for three minutes", &["-duration", "3m"]);
}

fn quick(tally: &mut Tally) {
    let pure = ["-p", "tenure-machine", "-p", "tenure-replica"];
    tally.step("formatting", |t| t.cargo(&["fmt", "--all", "--check"]));
    tally.step("clippy of the pure crates", |t| {
        t.cargo(&[&["clippy", "--all-targets"], &pure[..], &["--", "-D", "warnings"]].concat())
    });
    tally.step("tests of the pure crates", |t| t.cargo(&[&["test"], &pure[..]].concat()));
}

fn sim(tally: &mut Tally, rest: &[&str]) {
    let args = if rest.is_empty() { &["ci"][..] } else { rest };
    tally
        .step("simulated members", |t| t.cargo(&[&["run", "--quiet", "--package", "tenure-sim", "--"], args].concat()));
}

fn deny(tally: &mut Tally) {
    tally.step("licences, bans and sources", |t| {
        let Some(deny) = tools::cargo_deny(t) else {
            return Outcome::failed("cargo-deny could not be installed");
        };
        println!("advisories: skipped, the database is a repository that cannot be reached from here");
        t.command(&deny, &["check", "bans", "licenses", "sources"])
    });
}

fn diff_etcd(tally: &mut Tally, rest: &[&str]) {
    let args = if rest.is_empty() { &["-seeds", "100", "-budget", "100s"][..] } else { rest };
    real_client(tally, "the same operations against etcd and against us", "diff", args);
}

fn clients(tally: &mut Tally) {
    let subject = tenure(tally);
    tally.step("the unmodified Go client", |t| {
        t.in_folder("tests").with("SUBJECT_CMD", &subject).command("go", &["test", "-count=1", "./clients/..."])
    });
    real_client(tally, "the unmodified etcdctl", "ctl", &[]);
}

fn kill_loop(tally: &mut Tally, rounds: &str) {
    real_client(tally, "kill -9 in a loop under load", "killloop", &["-rounds", rounds, "-budget", "170s"]);
}

/// Runs members of ours as processes of their own; the suite makes their networks, disks and folders.
fn cluster(tally: &mut Tally, name: &str, args: &[&str]) {
    tally.quiet_step("build tenure", |t| t.cargo(&["build", "--quiet", "--package", "tenure"]));
    let member = format!(
        "{} serve --name {{name}} --data-dir {{dir}} --listen {{ip}}:{{port}} --peer-listen {{ip}}:{{peer}} --cluster {{cluster}} --insecure",
        root().join("target/debug/tenure").display()
    );
    let program = root().join("target/etcd/cluster").display().to_string();
    tally.step(name, |t| {
        let t = t.in_folder("tests");
        t.command("go", &["build", "-o", &program, "./cluster"])
            .and(|| t.with("CLUSTER_CMD", &member).command(&program, args))
    });
}

/// Runs one of the programs of tests/etcd with the real etcd as the reference and us as the subject.
fn real_client(tally: &mut Tally, name: &str, program: &str, args: &[&str]) {
    let Some(tools) = etcd_tools(tally) else { return };
    let subject = tenure(tally);
    tally.step(name, |t| {
        let built = format!("{tools}/{program}");
        let t = t.in_folder("tests");
        t.command("go", &["build", "-o", &built, &format!("./etcd/{program}")]).and(|| {
            t.with("REF_CMD", &format!("{tools}/etcd"))
                .with("ETCDCTL", &format!("{tools}/etcdctl"))
                .with("SUBJECT_CMD", &subject)
                .command(&built, args)
        })
    });
}

fn bench(tally: &mut Tally, rest: &[&str]) {
    let Some(etcd) = etcd_tools(tally) else {
        return;
    };
    tally.step("release build", |t| t.cargo(&["build", "--release"]));
    let tenure = root().join("target/release/tenure").display().to_string();
    let etcd = format!("{etcd}/etcd");
    tally.step("bench", |t| t.command(&tenure, &[&["bench", "compare", "--etcd", &etcd], rest].concat()));
}

/// The folder with the real etcd, etcdctl and etcdutl, built from their Go modules.
fn etcd_tools(tally: &mut Tally) -> Option<String> {
    let folder = root().join("target/etcd");
    let done = tally.quiet_step("build the real etcd", |t| tools::build_etcd(t, &folder));
    done.then(|| folder.display().to_string())
}

/// How to start the program under test, of the profile that the other tests built; the suites fill in folder and port.
fn tenure(tally: &mut Tally) -> String {
    tally.quiet_step("build tenure", |t| t.cargo(&["build", "--quiet", "--package", "tenure"]));
    format!("{} serve --data-dir {{dir}} --listen 127.0.0.1:{{port}}", root().join("target/debug/tenure").display())
}
