//! Rules that a compiler does not know: links lead somewhere, modules say what they promise, the project speaks of itself alone.

use crate::run::Outcome;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Words that must not stand in any tracked file. Split, so that this file does not hold them.
fn unwanted() -> Vec<String> {
    [["/wo", "rk/"], ["/ro", "ot/"], ["/fa", "rm/"], ["crates.", "io/api"], ["npm", "js.org"], ["bash_", "jobs"]]
        .iter()
        .map(|parts| parts.concat())
        .collect()
}

pub(crate) fn check(root: &Path) -> Outcome {
    let files = tracked(root);
    let mut complaints = Vec::new();
    if files.is_empty() {
        complaints.push("git lists no files".to_owned());
    }
    for file in &files {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else {
            continue;
        };
        let name = file.display();
        complaints.extend(words(&text).into_iter().map(|w| format!("{name}: holds `{w}`")));
        match file.extension().and_then(|e| e.to_str()) {
            Some("md") => complaints
                .extend(dead_links(root, file, &text).into_iter().map(|l| format!("{name}: link leads nowhere: {l}"))),
            Some("rs") if needs_header(file) && !text.trim_start().starts_with("//!") => {
                complaints.push(format!("{name}: has no header that says what it promises"));
            }
            _ => {}
        }
    }
    for complaint in &complaints {
        println!("{complaint}");
    }
    if complaints.is_empty() { Outcome::ok() } else { Outcome::failed(&format!("{} complaints", complaints.len())) }
}

fn tracked(root: &Path) -> Vec<PathBuf> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output();
    let Ok(listed) = listed else {
        return Vec::new();
    };
    String::from_utf8_lossy(&listed.stdout)
        .split('\0')
        .filter(|f| !f.is_empty() && !f.ends_with(".lock"))
        .map(PathBuf::from)
        .collect()
}

fn words(text: &str) -> Vec<String> {
    unwanted().into_iter().filter(|w| text.contains(w.as_str())).collect()
}

fn needs_header(file: &Path) -> bool {
    let path = file.to_string_lossy();
    path.contains("/src/") && !path.contains("/gen/") && !path.ends_with("tests.rs")
}

/// Relative links of a Markdown file whose target is not there.
fn dead_links(root: &Path, file: &Path, text: &str) -> Vec<String> {
    let folder = root.join(file).parent().map_or_else(|| root.to_owned(), Path::to_owned);
    link_targets(text)
        .into_iter()
        .filter(|link| !link.contains("://") && !link.starts_with('#') && !link.starts_with("mailto:"))
        .filter(|link| !folder.join(link.split('#').next().unwrap_or_default()).exists())
        .collect()
}

fn link_targets(text: &str) -> Vec<String> {
    let mut in_code = false;
    let mut targets = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for piece in line.split("](").skip(1) {
            if let Some((target, _)) = piece.split_once(')') {
                targets.push(target.split(' ').next().unwrap_or_default().to_owned());
            }
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_outside_code_are_found() {
        let text = "see [a](b.md#c) and [d](e.md \"title\")\n```\n[no](code.md)\n```\n";
        assert_eq!(link_targets(text), ["b.md#c", "e.md"]);
    }
}
