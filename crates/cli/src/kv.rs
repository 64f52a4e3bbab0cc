//! `tenure kv`: keys from a shell.
//!
//! A value that is not valid UTF-8 is printed as it is by `get` (so that it can go into a file) and as base64 in JSON.

use crate::common::{Common, Failure, Output, OutputArg, exit, fenced_by_lock, payload, stdout};
use anyhow::Result;
use base64::Engine as _;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::process::ExitCode;
use tenure_client::{Client, Compare, LockProof, Op, OpReply, RangeReply, Record, TxnReply};

#[derive(Debug, clap::Args)]
pub(crate) struct KvArgs {
    #[command(subcommand)]
    command: KvCommand,
}

#[derive(Debug, clap::Subcommand)]
enum KvCommand {
    /// Read one key, or every key of a range
    Get(GetArgs),
    /// Write a key
    Put(PutArgs),
    /// Delete a key, or every key with a prefix
    Del(DelArgs),
    /// Run a transaction: compares, then one of two lists of operations, in one commit
    Txn(TxnArgs),
}

#[derive(Debug, clap::Args)]
struct GetArgs {
    /// The key
    key: String,
    /// Up to this key, not included
    range_end: Option<String>,
    /// Every key that begins with KEY
    #[arg(long, conflicts_with = "range_end")]
    prefix: bool,
    /// As it was at this revision
    #[arg(long, alias = "rev", default_value_t = 0, value_name = "N")]
    revision: u64,
    /// At most this many keys
    #[arg(long, default_value_t = 0, value_name = "N")]
    limit: u32,
    /// Without values
    #[arg(long)]
    keys_only: bool,
    /// Only the number of keys
    #[arg(long)]
    count_only: bool,
    /// Print values only, without keys
    #[arg(long)]
    print_value_only: bool,
    /// From this member alone, which may be behind; tells how old that may be
    #[arg(long)]
    stale: bool,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, clap::Args)]
struct PutArgs {
    /// The key
    key: String,
    /// The value; `-` reads standard input
    value: String,
    /// The key ends with this session (an etcd lease is one)
    #[arg(long, alias = "lease", default_value_t = 0, value_name = "ID")]
    session: u64,
    /// Only while this lock is held under this token; repeatable
    #[arg(long, value_name = "NAME:TOKEN", value_parser = lock_proof)]
    require_lock: Vec<LockProof>,
    /// Only if there is no such key
    #[arg(long, group = "expect")]
    if_absent: bool,
    /// Only if the key has this version
    #[arg(long, group = "expect", value_name = "N")]
    if_version: Option<u64>,
    /// Only if the key was last changed at this revision
    #[arg(long, group = "expect", value_name = "N")]
    if_mod_revision: Option<u64>,
    /// Only if the key has this value
    #[arg(long, group = "expect", value_name = "VALUE")]
    if_value: Option<String>,
    /// Print the key as it was
    #[arg(long, alias = "prev-kv")]
    prev: bool,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, clap::Args)]
struct DelArgs {
    /// The key
    key: String,
    /// Up to this key, not included
    range_end: Option<String>,
    /// Every key that begins with KEY
    #[arg(long, conflicts_with = "range_end")]
    prefix: bool,
    /// Only while this lock is held under this token; repeatable
    #[arg(long, value_name = "NAME:TOKEN", value_parser = lock_proof)]
    require_lock: Vec<LockProof>,
    /// Print the keys as they were
    #[arg(long, alias = "prev-kv")]
    prev: bool,
    #[command(flatten)]
    output: OutputArg,
}

/// Reads standard input, in the manner of etcdctl: compares, an empty line, operations if all hold, an empty line, operations if not.
///
///   version("config") = "0"
///
///   put config "colour = green"
///
///   get config
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
struct TxnArgs {
    /// Only while this lock is held under this token; repeatable
    #[arg(long, value_name = "NAME:TOKEN", value_parser = lock_proof)]
    require_lock: Vec<LockProof>,
    #[command(flatten)]
    output: OutputArg,
}

/// `NAME:TOKEN`; the name may itself hold colons.
fn lock_proof(text: &str) -> Result<LockProof, String> {
    let wrong = || format!("`{text}` is not NAME:TOKEN, such as jobs/nightly:42");
    let (name, token) = text.rsplit_once(':').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
    Ok((name, token.parse::<u64>().map_err(|_| wrong())?).into())
}

pub(crate) async fn run(common: &Common, args: KvArgs) -> Result<ExitCode> {
    let client = common.client()?;
    match args.command {
        KvCommand::Get(args) => get(&client, args).await,
        KvCommand::Put(args) => put(&client, args).await,
        KvCommand::Del(args) => del(&client, args).await,
        KvCommand::Txn(args) => txn(&client, args).await,
    }
}

async fn get(client: &Client, args: GetArgs) -> Result<ExitCode> {
    let one = !args.prefix && args.range_end.is_none();
    let mut range = client.range(args.key.clone()).at(args.revision);
    range = match (&args.range_end, args.prefix) {
        (Some(end), _) => range.until(end.clone()),
        (None, true) => range.prefix(),
        // The first key behind it is the key with a zero byte appended.
        (None, false) => range.until([args.key.as_bytes(), &[0]].concat()),
    };
    if args.keys_only {
        range = range.keys_only();
    }
    if args.count_only {
        range = range.count_only();
    }
    if args.stale {
        range = range.stale();
    }
    let found = if args.limit > 0 || args.count_only { range.limit(args.limit).await? } else { range.all().await? };
    match args.output.output {
        Output::Json if args.stale => {
            let mut told = range_json(&found);
            told["stale_ms"] = json!(found.age.map(|age| age.as_millis().to_string()));
            out!("{told}");
        }
        Output::Json => out!("{}", range_json(&found)),
        Output::Table if args.count_only => out!("{}", found.count),
        Output::Table => print_records(&found.records, args.print_value_only || one, args.keys_only)?,
    }
    if args.stale && args.output.output == Output::Table {
        // Beside the answer, which may be read by a program.
        let age = found.age.map_or("of unknown age".to_owned(), |age| format!("at most {} ms old", age.as_millis()));
        err!("revision {}, {age}", found.revision);
    }
    if one && found.count == 0 {
        return Err(Failure::new(exit::NOT_FOUND, format!("there is no key `{}`", args.key)).into());
    }
    Ok(ExitCode::SUCCESS)
}

/// A single key prints its value alone; several print each key and its value on a line of their own, as etcdctl does.
fn print_records(records: &[Record], values_only: bool, keys_only: bool) -> Result<()> {
    let mut out = stdout();
    for record in records {
        if !values_only || keys_only {
            out.write_all(&record.key)?;
            out.write_all(b"\n")?;
        }
        if !keys_only {
            out.write_all(&record.value)?;
            out.write_all(b"\n")?;
        }
    }
    Ok(())
}

async fn put(client: &Client, args: PutArgs) -> Result<ExitCode> {
    let mut put = client.put(args.key, payload(args.value)?).session(args.session);
    for proof in args.require_lock {
        put = put.require_lock(proof);
    }
    put = match (args.if_absent, args.if_version, args.if_mod_revision, args.if_value) {
        (true, ..) => put.expect_absent(),
        (_, Some(version), ..) => put.expect_version(version),
        (_, _, Some(revision), _) => put.expect_mod_revision(revision),
        (_, _, _, Some(value)) => put.expect_value(value),
        _ => put,
    };
    if args.prev {
        put = put.prev();
    }
    let done = put.await.map_err(fenced_by_lock)?;
    match args.output.output {
        Output::Json => out!(
            "{}",
            json!({ "revision": done.revision.to_string(), "replayed": done.replayed, "prev": done.prev.as_ref().map(record_json) })
        ),
        Output::Table => {
            out!("ok, revision {}", done.revision);
            print_records(done.prev.as_slice(), false, false)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn del(client: &Client, args: DelArgs) -> Result<ExitCode> {
    let mut delete = client.delete(args.key);
    if let Some(end) = args.range_end {
        delete = delete.until(end);
    }
    if args.prefix {
        delete = delete.prefix();
    }
    if args.prev {
        delete = delete.prev();
    }
    for proof in args.require_lock {
        delete = delete.require_lock(proof);
    }
    let done = delete.await.map_err(fenced_by_lock)?;
    match args.output.output {
        Output::Json => {
            let prev: Vec<Value> = done.prev.iter().map(record_json).collect();
            out!(
                "{}",
                json!({ "revision": done.revision.to_string(), "deleted": done.deleted.to_string(), "prev": prev })
            );
        }
        Output::Table => {
            out!("{} deleted, revision {}", done.deleted, done.revision);
            print_records(&done.prev, false, false)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn txn(client: &Client, args: TxnArgs) -> Result<ExitCode> {
    let mut text = String::new();
    std::io::stdin().lock().read_to_string(&mut text)?;
    let mut txn = client.txn();
    for proof in args.require_lock {
        txn = txn.require_lock(proof);
    }
    let mut block = 0;
    for (number, line) in text.lines().enumerate() {
        let wrong = |why: String| Failure::usage(format!("line {}: {why}", number + 1));
        match (line.trim(), block) {
            ("", _) => block += 1,
            (line, 0) => txn = txn.when(compare(line).map_err(wrong)?),
            (line, 1) => txn = txn.then(operation(line).map_err(wrong)?),
            (line, 2) => txn = txn.otherwise(operation(line).map_err(wrong)?),
            (_, _) => return Err(wrong("there are three blocks: compares, then, otherwise".into()).into()),
        }
    }
    let done = txn.await.map_err(fenced_by_lock)?;
    match args.output.output {
        Output::Json => out!("{}", txn_json(&done)),
        Output::Table => {
            out!(
                "{}, revision {}",
                if done.succeeded { "compares held" } else { "a compare did not hold" },
                done.revision
            );
            print_replies(&done.replies)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_replies(replies: &[OpReply]) -> Result<()> {
    for reply in replies {
        match reply {
            OpReply::Put(prev) => {
                out!("ok");
                print_records(prev.as_slice(), false, false)?;
            }
            OpReply::Deleted(n) => out!("{n} deleted"),
            OpReply::Range(range) => print_records(&range.records, false, false)?,
            OpReply::Txn(nested) => print_replies(&nested.replies)?,
        }
    }
    Ok(())
}

/// `version("key") = "3"`, with the targets and relations of etcdctl.
fn compare(line: &str) -> Result<Compare, String> {
    let wrong = || format!("`{line}` is no compare: write version(\"key\") = \"3\", or create, mod or value");
    let (target, rest) = line.split_once('(').ok_or_else(wrong)?;
    let mut words = words(&rest.replacen(')', " ", 1))?.into_iter();
    let (Some(key), Some(relation), Some(wanted), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(wrong());
    };
    let comparing = match target.trim() {
        "version" | "ver" => Compare::version(key),
        "create" | "c" => Compare::create_revision(key),
        "mod" | "m" => Compare::mod_revision(key),
        "value" | "val" if relation == "=" => return Ok(Compare::value(key, wanted)),
        "value" | "val" => return Err("values are compared with = only".into()),
        _ => return Err(wrong()),
    };
    let number = wanted.parse().map_err(|_| format!("`{wanted}` is no number"))?;
    match relation.as_str() {
        "=" => Ok(comparing.equals(number)),
        "!=" => Ok(comparing.differs_from(number)),
        ">" => Ok(comparing.above(number)),
        "<" => Ok(comparing.below(number)),
        _ => Err(format!("`{relation}` is none of = != < >")),
    }
}

/// `put KEY VALUE`, `get KEY [--prefix]` or `del KEY [--prefix]`.
fn operation(line: &str) -> Result<Op, String> {
    let words = words(line)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["put", key, value] => Ok(Op::put(key.to_string(), value.to_string())),
        ["get", key] => Ok(Op::get(key.to_string())),
        ["get", "--prefix", key] | ["get", key, "--prefix"] => Ok(Op::range_prefix(key.to_string())),
        ["del", key] => Ok(Op::delete(key.to_string())),
        ["del", "--prefix", key] | ["del", key, "--prefix"] => Ok(Op::delete_prefix(key.to_string())),
        _ => Err(format!("`{line}` is no operation: write put KEY VALUE, get KEY or del KEY")),
    }
}

/// Words between spaces; double quotes keep spaces, a backslash the character after it.
fn words(line: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' => word.get_or_insert_default().extend(characters.next()),
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    if quoted { Err(format!("`{line}` opens a quote that it does not close")) } else { Ok(words) }
}

/// Text as text; other bytes as base64 under the same name with `_bytes` behind it, as the HTTP face does.
pub(crate) fn text_or_base64(object: &mut Value, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object[name] = text.into(),
        Err(_) => object[format!("{name}_bytes")] = base64::engine::general_purpose::STANDARD.encode(bytes).into(),
    }
}

pub(crate) fn record_json(r: &Record) -> Value {
    let mut object = json!({
        "create_revision": r.create_revision.to_string(), "mod_revision": r.mod_revision.to_string(),
        "version": r.version.to_string(), "session": r.session.to_string(),
    });
    text_or_base64(&mut object, "key", &r.key);
    text_or_base64(&mut object, "value", &r.value);
    object
}

fn range_json(r: &RangeReply) -> Value {
    let records: Vec<Value> = r.records.iter().map(record_json).collect();
    json!({ "revision": r.revision.to_string(), "count": r.count.to_string(), "records": records })
}

fn txn_json(t: &TxnReply) -> Value {
    let replies: Vec<Value> = t
        .replies
        .iter()
        .map(|reply| match reply {
            OpReply::Put(prev) => json!({ "put": { "prev": prev.as_ref().map(record_json) } }),
            OpReply::Deleted(n) => json!({ "deleted": n.to_string() }),
            OpReply::Range(range) => json!({ "range": range_json(range) }),
            OpReply::Txn(nested) => json!({ "txn": txn_json(nested) }),
        })
        .collect();
    json!({ "revision": t.revision.to_string(), "succeeded": t.succeeded, "replies": replies })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_quotes() {
        assert_eq!(
            words(r#"put a "b c" d\ e """#),
            Ok(vec!["put".into(), "a".into(), "b c".into(), "d e".into(), String::new()])
        );
        assert!(words("put \"a").is_err());
    }

    #[test]
    fn compares_are_read_as_etcdctl_writes_them() {
        for good in [
            "mod(\"k\") > \"0\"",
            "version(k) = 3",
            "value(\"a b\") = \"c d\"",
            "c(k)!= 1".replace("!=", " != ").as_str(),
        ] {
            assert!(compare(good).is_ok(), "{good}");
        }
        for wrong in ["mod(k)", "size(k) = 1", "mod(k) ~ 1", "value(k) > 1", "mod(k) = x"] {
            assert!(compare(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_lock_name_may_hold_colons() {
        let proof = lock_proof("a:b:42").unwrap();
        assert_eq!((proof.name.as_str(), proof.token), ("a:b", 42));
        assert!(lock_proof("a").is_err() && lock_proof(":1").is_err() && lock_proof("a:x").is_err());
    }
}
