//! Generates `crates/wire/src/gen` from `proto/`: message types, client stubs, the encoded descriptors, and what else follows from them.
//!
//! Promises. The output depends on the proto files and on the pinned versions of the generators only: one input, one output, byte for byte.
//! `--check` writes nothing and fails with the names of the files that are not what would be generated, leftovers included.
//! Leaves out. Server stubs: the server dispatches by method path. Well-known types: no message of ours uses one.
//! Relies on. `proto/` lying two folders above this crate, and on no `protoc`: the compiler is a library.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use protox::prost_reflect::prost_types::{DescriptorProto, FileDescriptorProto, FileDescriptorSet};

const USAGE: &str = "usage: tenure-codegen [--check]";
/// Encoded descriptors of every file, in `gen/`.
const DESCRIPTORS: &str = "descriptors.bin";
/// What the comments of our own files say of services, methods, messages and fields, in `gen/`: a line with name, tab, text for each.
const DESCRIPTIONS: &str = "descriptions.txt";
/// The namespace of every request of our own, in `gen/`.
const NAMESPACES: &str = "namespaces.rs";
/// Files whose comments are told.
const DESCRIBED: &str = "tenure.v1";
/// Generated for the HTTP annotations; nothing but the descriptors needs them.
const UNWANTED: &str = "google.api.rs";

/// File name to content.
type Files = BTreeMap<String, Vec<u8>>;

fn main() -> ExitCode {
    match run() {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String> {
    let check = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => bail!("{USAGE}"),
    };
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().context("the root of the workspace")?;
    let target = root.join("crates/wire/src/gen");
    let fresh = generate(&root.join("proto"))?;
    if !check {
        write(&target, &fresh)?;
        return Ok(format!("generated {} files", fresh.len()));
    }
    let stale = differences(&fresh, &read(&target)?);
    if !stale.is_empty() {
        bail!(
            "crates/wire/src/gen is stale: {}\nhint: run `cargo xtask codegen` and commit the result",
            stale.join(", ")
        );
    }
    Ok(format!("{} generated files are fresh", fresh.len()))
}

/// Compiles every file below `proto` and returns what belongs into `gen/`.
fn generate(proto: &Path) -> Result<Files> {
    let sources = sources(proto)?;
    let scratch = Scratch::new()?;
    // The code takes the comments; the descriptors go without them, which is a third of the size.
    let commented = compile(proto, &sources, true)?.file_descriptor_set();
    let descriptions = descriptions(&commented);
    let namespaces = namespaces(&commented);
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .bytes(".")
        // Ordered, so that equal messages have equal bytes.
        .btree_map(".")
        .client_mod_attribute(".", "#[cfg(feature = \"client\")]")
        .emit_rerun_if_changed(false)
        .out_dir(&scratch.0)
        .compile_fds(commented)
        .context("cannot generate the code")?;
    let mut files = read(&scratch.0)?;
    files.remove(UNWANTED);
    // Encoded by the compiler itself: a set that went through the plain descriptor types has lost the HTTP annotations.
    files.insert(DESCRIPTIONS.to_owned(), descriptions.into_bytes());
    files.insert(NAMESPACES.to_owned(), namespaces.into_bytes());
    files.insert(DESCRIPTORS.to_owned(), compile(proto, &sources, false)?.encode_file_descriptor_set());
    Ok(files)
}

/// The leading comments of what has a name, sorted by it.
fn descriptions(set: &FileDescriptorSet) -> String {
    let mut lines = Vec::new();
    for file in set.file.iter().filter(|file| file.package() == DESCRIBED) {
        for location in file.source_code_info.iter().flat_map(|info| &info.location) {
            let text = location.leading_comments().split_whitespace().collect::<Vec<_>>().join(" ");
            if let (Some(name), false) = (name_at(file, &location.path), text.is_empty()) {
                lines.push(format!("{DESCRIBED}.{name}\t{text}\n"));
            }
        }
    }
    lines.sort();
    lines.concat()
}

/// For each message that a method of ours takes, how its namespace is found.
fn namespaces(set: &FileDescriptorSet) -> String {
    let ours = || set.file.iter().filter(|file| file.package() == DESCRIBED);
    let messages = || ours().flat_map(|file| &file.message_type);
    let methods = ours().flat_map(|file| &file.service).flat_map(|service| &service.method);
    let taken: BTreeSet<&str> = methods.filter_map(|method| method.input_type().rsplit('.').next()).collect();
    let mut text = "// This file is @generated by `cargo xtask codegen`.\n".to_owned();
    for name in taken {
        let has_one = messages().any(|it| it.name() == name && it.field.iter().any(|it| it.name() == "namespace"));
        let found = if has_one { "&self.namespace" } else { "\"\"" };
        text += &format!(
            "impl crate::Spaced for {name} {{\n    fn namespace(&self) -> &str {{\n        {found}\n    }}\n}}\n"
        );
    }
    text
}

/// What stands at a path of field numbers and places, as `descriptor.proto` numbers them.
fn name_at(file: &FileDescriptorProto, path: &[i32]) -> Option<String> {
    let at = |place: i32| usize::try_from(place).ok();
    match path {
        [6, service] => Some(file.service.get(at(*service)?)?.name().to_owned()),
        [6, service, 2, method] => {
            let service = file.service.get(at(*service)?)?;
            Some(format!("{}.{}", service.name(), service.method.get(at(*method)?)?.name()))
        }
        [4, message, rest @ ..] => in_message(file.message_type.get(at(*message)?)?, rest),
        [5, kind] => Some(file.enum_type.get(at(*kind)?)?.name().to_owned()),
        _ => None,
    }
}

fn in_message(message: &DescriptorProto, path: &[i32]) -> Option<String> {
    let at = |place: i32| usize::try_from(place).ok();
    let inner = match path {
        [] => return Some(message.name().to_owned()),
        [2, field] => message.field.get(at(*field)?)?.name().to_owned(),
        [3, nested, rest @ ..] => in_message(message.nested_type.get(at(*nested)?)?, rest)?,
        _ => return None,
    };
    Some(format!("{}.{inner}", message.name()))
}

fn compile(proto: &Path, sources: &[PathBuf], comments: bool) -> Result<protox::Compiler> {
    let mut compiler = protox::Compiler::new([proto])?;
    compiler.include_imports(true).include_source_info(comments);
    compiler.open_files(sources)?;
    Ok(compiler)
}

/// Every proto file below `folder`, sorted: the order decides the order of the output.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|it| it == "proto") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The files of one flat folder; none if it does not exist yet.
fn read(folder: &Path) -> Result<Files> {
    let mut files = Files::new();
    if !folder.exists() {
        return Ok(files);
    }
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.insert(name, fs::read(entry.path()).with_context(|| format!("cannot read {}", entry.path().display()))?);
    }
    Ok(files)
}

/// Makes `folder` hold exactly `files`. A file that is as it should be is left alone, so that nothing is rebuilt for it.
fn write(folder: &Path, files: &Files) -> Result<()> {
    fs::create_dir_all(folder)?;
    let there = read(folder)?;
    for name in there.keys().filter(|name| !files.contains_key(*name)) {
        fs::remove_file(folder.join(name))?;
    }
    for (name, content) in files.iter().filter(|(name, content)| there.get(*name) != Some(content)) {
        fs::write(folder.join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}

/// What must change for `there` to become `fresh`, in words.
fn differences(fresh: &Files, there: &Files) -> Vec<String> {
    let changed = fresh.iter().filter_map(|(name, content)| match there.get(name) {
        None => Some(format!("{name} is missing")),
        Some(old) if old != content => Some(format!("{name} differs")),
        Some(_) => None,
    });
    let leftover = there.keys().filter(|name| !fresh.contains_key(*name)).map(|name| format!("{name} is left over"));
    changed.chain(leftover).collect()
}

/// A folder that goes away with its value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tenure-codegen-{}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("warning: {} stays behind: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(of: &[(&str, &str)]) -> Files {
        of.iter().map(|(name, content)| ((*name).to_owned(), content.as_bytes().to_vec())).collect()
    }

    #[test]
    fn stale_files_are_named() {
        let fresh = files(&[("a", "1"), ("b", "2"), ("c", "3")]);
        assert_eq!(differences(&fresh, &fresh), Vec::<String>::new());
        let there = files(&[("a", "1"), ("b", "x"), ("d", "4")]);
        assert_eq!(differences(&fresh, &there), ["b differs", "c is missing", "d is left over"]);
    }

    #[test]
    fn one_input_gives_one_output() -> Result<()> {
        let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
        let first = generate(&proto)?;
        assert!(first.contains_key("tenure.v1.rs") && !first.contains_key(UNWANTED));
        assert_eq!(differences(&generate(&proto)?, &first), Vec::<String>::new());
        Ok(())
    }
}
