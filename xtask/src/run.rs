//! Running programs as steps, and counting what they say of themselves.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// The folder of the workspace.
pub(crate) fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or(here.clone(), PathBuf::from)
}

/// How a step ended, with the tests that its output counted.
#[derive(Default)]
pub(crate) struct Outcome {
    passed: u64,
    failed: u64,
    complaint: Option<String>,
}

impl Outcome {
    pub(crate) fn failed(why: &str) -> Self {
        Self { failed: 1, complaint: Some(why.to_owned()), ..Self::default() }
    }

    pub(crate) fn ok() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    /// Both must be well.
    pub(crate) fn and(self, next: impl FnOnce() -> Self) -> Self {
        if self.failed > 0 { self } else { next() }
    }
}

/// What all steps gave.
#[derive(Default)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    failures: Vec<String>,
    done: Vec<String>,
}

impl Tally {
    /// Runs a step and counts it; a step that counts tests of its own counts as those.
    pub(crate) fn step(&mut self, name: &str, step: impl FnOnce(&Runner) -> Outcome) {
        println!("\n== {name}");
        let began = Instant::now();
        let outcome = step(&Runner::default());
        self.passed += outcome.passed;
        self.failed += outcome.failed;
        if outcome.failed > 0 {
            self.failures.push(format!("{name}: {}", outcome.complaint.as_deref().unwrap_or("tests failed")));
        }
        println!(
            "== {name}: {} passed, {} failed in {:.0} s",
            outcome.passed,
            outcome.failed,
            began.elapsed().as_secs_f64()
        );
        let _ = std::io::stdout().flush();
    }

    /// A step that other steps need: done once, told only when it fails.
    pub(crate) fn quiet_step(&mut self, name: &str, step: impl FnOnce(&Runner) -> Outcome) -> bool {
        if self.done.iter().any(|d| d == name) {
            return true;
        }
        let outcome = step(&Runner::default());
        if outcome.failed > 0 {
            self.failed += 1;
            self.failures.push(format!("{name}: {}", outcome.complaint.as_deref().unwrap_or("failed")));
            return false;
        }
        self.done.push(name.to_owned());
        true
    }

    pub(crate) fn close(self) -> ExitCode {
        println!();
        for failure in &self.failures {
            println!("FAILED {failure}");
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Starts programs for a step.
#[derive(Default, Clone)]
pub(crate) struct Runner {
    folder: Option<String>,
    environment: Vec<(String, String)>,
}

impl Runner {
    pub(crate) fn in_folder(&self, folder: &str) -> Self {
        Self { folder: Some(folder.to_owned()), ..self.clone() }
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn cargo(&self, args: &[&str]) -> Outcome {
        self.command(env!("CARGO"), args)
    }

    /// Runs to the end, shows what it prints, and counts the totals in it. An exit code other than 0 is a failure whatever it counted.
    pub(crate) fn command(&self, program: &str, args: &[&str]) -> Outcome {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        command.current_dir(self.folder.as_ref().map_or_else(root, |f| root().join(f)));
        command.envs(self.environment.iter().map(|(n, v)| (n, v)));
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => return Outcome::failed(&format!("{program} does not start: {e}")),
        };
        let counted = child.stdout.take().map(count_totals).unwrap_or_default();
        let status = match child.wait() {
            Ok(status) => status,
            Err(e) => return Outcome::failed(&format!("{program}: {e}")),
        };
        judge(program, counted, status.success(), &status.to_string())
    }
}

fn judge(program: &str, (passed, failed): (u64, u64), success: bool, status: &str) -> Outcome {
    if success && failed == 0 {
        return Outcome { passed: passed.max(1), ..Outcome::default() };
    }
    Outcome { passed, failed: failed.max(1), complaint: Some(format!("{program} ended with {status}")) }
}

/// Copies the output through and adds up the totals that test runners print.
fn count_totals(output: impl Read) -> (u64, u64) {
    let (mut passed, mut failed) = (0, 0);
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let _ = std::io::stdout().write_all(&line);
        if let Some((p, f)) = totals(&String::from_utf8_lossy(&line)) {
            passed += p;
            failed += f;
        }
        line.clear();
    }
    (passed, failed)
}

/// `test result: ok. 3 passed; 0 failed; ...`, `3 passed, 0 failed`, or a package of `go test`.
fn totals(line: &str) -> Option<(u64, u64)> {
    let line = line.trim_end();
    if line.starts_with("ok  \t") {
        return Some((1, 0));
    }
    if line.starts_with("FAIL\t") {
        return Some((0, 1));
    }
    let counts = line.strip_prefix("test result: ").map_or(line, |l| l.split_once(". ").map_or(l, |(_, rest)| rest));
    let words: Vec<&str> = counts.split([' ', ',', ';']).filter(|w| !w.is_empty()).collect();
    match words.as_slice() {
        [p, "passed", f, "failed", ..] => Some((p.parse().ok()?, f.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::totals;

    #[test]
    fn totals_of_the_runners() {
        let check = |line: &str, expected| assert_eq!(totals(line), expected, "{line}");
        check(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            Some((12, 0)),
        );
        check("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out", Some((3, 2)));
        check("7 passed, 1 failed", Some((7, 1)));
        check("ok  \ttests/clients\t1.2s", Some((1, 0)));
        check("FAIL\ttests/clients\t1.2s", Some((0, 1)));
        check("all is passed over", None);
    }
}
