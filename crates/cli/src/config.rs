//! `tenure config`: publish, read, follow and roll back configuration.
//!
//! A content goes in from an argument, a file (`--file`) or standard input (`-`), and comes out as it was put in, byte by byte.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tenure_client::{Client, Code, ConfigChange, ConfigEvent, ConfigRollout, ConfigVersion};

use crate::common::{Common, Failure, Output, OutputArg, exit, pair, print_table};

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Publish a version
    Put {
        key: String,
        #[command(flatten)]
        content: Content,
        /// Only if this is the current version; 0: only if there is none
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        /// What it is, such as application/json
        #[arg(long, value_name = "TYPE", default_value = "", hide_default_value = true)]
        media_type: String,
        #[command(flatten)]
        note: Note,
        /// Give it to so many percent of the instances first; `rollout` goes on
        #[arg(long, value_name = "PERCENT", value_parser = percent)]
        candidate: Option<f64>,
        /// Give the candidate only to instances with this label
        #[arg(long = "label", value_name = "NAME=VALUE", value_parser = pair, requires = "candidate")]
        labels: Vec<(String, String)>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Print what is given of a key
    #[command(disable_version_flag = true)]
    Get {
        key: String,
        /// This version
        #[arg(long, default_value = "0", hide_default_value = true)]
        version: u64,
        #[command(flatten)]
        instance: Instance,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List the versions of a key that are kept, the newest first
    History {
        key: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Publish a copy of an older version
    #[command(disable_version_flag = true)]
    Rollback {
        key: String,
        version: u64,
        /// Only if this is the current version
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        #[command(flatten)]
        note: Note,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show the lines that differ between two versions; exit code 1 if there are any
    Diff {
        key: String,
        from: u64,
        /// The current version unless told
        #[arg(default_value = "0", hide_default_value = true)]
        to: u64,
    },
    /// Follow what is given of a key
    Watch {
        key: String,
        /// Follow all keys that begin so
        #[arg(long)]
        prefix: bool,
        #[command(flatten)]
        instance: Instance,
        /// End after so many versions
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List keys with their current versions
    List {
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show, set or remove the JSON Schema of a key
    Schema {
        #[command(subcommand)]
        command: SchemaCommand,
    },
    /// Go on with a candidate, or drop it
    Rollout {
        #[command(subcommand)]
        command: RolloutCommand,
    },
    /// Delete a key; its versions stay readable
    Delete {
        key: String,
        /// Only if this is the current version
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        #[command(flatten)]
        note: Note,
        #[command(flatten)]
        output: OutputArg,
    },
}

#[derive(Debug, Subcommand)]
enum SchemaCommand {
    /// Print the schema in force
    Get { key: String },
    /// Check every content by this schema from now on
    Set {
        key: String,
        #[command(flatten)]
        content: Content,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Check contents no more
    Remove {
        key: String,
        #[command(flatten)]
        output: OutputArg,
    },
}

#[derive(Debug, Subcommand)]
enum RolloutCommand {
    /// Give the candidate to another share of the instances
    #[command(disable_version_flag = true)]
    Stage {
        key: String,
        version: u64,
        #[arg(value_parser = percent)]
        percent: f64,
        /// Only to instances with this label
        #[arg(long = "label", value_name = "NAME=VALUE", value_parser = pair)]
        labels: Vec<(String, String)>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make the candidate the current version
    #[command(disable_version_flag = true)]
    Promote {
        key: String,
        version: u64,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Drop the candidate
    #[command(disable_version_flag = true)]
    Abort {
        key: String,
        version: u64,
        #[command(flatten)]
        output: OutputArg,
    },
}

/// What is published.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Content {
    /// The content; `-` reads standard input
    content: Option<String>,
    /// Read it from this file
    #[arg(long, short = 'f', value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Content {
    fn read(self) -> Result<Vec<u8>, Failure> {
        let mut content = Vec::new();
        match (self.content, self.file) {
            (Some(text), _) if text == "-" => {
                let read = std::io::stdin().read_to_end(&mut content);
                read.map_err(|error| Failure::usage(format!("standard input: {error}")))?;
            }
            (Some(text), _) => content = text.into_bytes(),
            (None, Some(file)) => {
                let read = std::fs::read(&file);
                content = read.map_err(|error| Failure::usage(format!("{}: {error}", file.display())))?;
            }
            (None, None) => {}
        }
        Ok(content)
    }
}

/// Who and why, for people.
#[derive(Debug, Args)]
struct Note {
    /// Who does it
    #[arg(long, env = "USER", default_value = "", hide_default_value = true, hide_env_values = true)]
    author: String,
    /// Why
    #[arg(long, short, default_value = "", hide_default_value = true)]
    message: String,
}

/// Which instance asks: it may be given the candidate.
#[derive(Debug, Args)]
struct Instance {
    /// What this instance is given, by whatever tells it from others
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    instance: String,
    /// A label of this instance
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = pair)]
    labels: Vec<(String, String)>,
}

pub(crate) async fn run(common: &Common, args: ConfigArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    match args.command {
        ConfigCommand::Put { key, content, expect, media_type, note, candidate, labels, output } => {
            let mut publishing = client.publish_config(key, content.read()?);
            publishing = publishing.media_type(media_type).author(note.author).comment(note.message);
            if let Some(expect) = expect {
                publishing = publishing.expect_version(expect);
            }
            if let Some(percent) = candidate {
                publishing = publishing.rollout(rollout(percent, labels));
            }
            changed("published", publishing.await.map_err(failure)?, output.output);
        }
        ConfigCommand::Get { key, version, instance, output } => {
            let mut reading = client.read_config(&key).version(version).instance(instance.instance);
            reading = instance.labels.into_iter().fold(reading, |reading, (name, value)| reading.label(&name, &value));
            let Some(version) = reading.await.map_err(failure)? else { return Err(missing(&key, version).into()) };
            print_content(&version, output.output)?;
        }
        ConfigCommand::History { key, output } => {
            print_versions(&client.config_history(key).await.map_err(failure)?, output.output);
        }
        ConfigCommand::Rollback { key, version, expect, note, output } => {
            let back = client.rollback_config(key, version, expect, &note.author, &note.message);
            changed("rolled back", back.await.map_err(failure)?, output.output);
        }
        ConfigCommand::Diff { key, from, to } => return diff(&client, &key, from, to).await,
        ConfigCommand::Watch { key, prefix, instance, count, output } => {
            watch(&client, key, prefix, instance, count, output.output).await?;
        }
        ConfigCommand::List { prefix, output } => {
            print_list(&client.configs(prefix).await.map_err(failure)?, output.output);
        }
        ConfigCommand::Schema { command } => schema(&client, command).await?,
        ConfigCommand::Rollout { command } => go_on(&client, command).await?,
        ConfigCommand::Delete { key, expect, note, output } => {
            let gone = client.delete_config(key, expect, &note.author, &note.message);
            changed("deleted", gone.await.map_err(failure)?, output.output);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn schema(client: &Client, command: SchemaCommand) -> Result<(), Failure> {
    match command {
        SchemaCommand::Get { key } => {
            let Some(schema) = client.config_schema(&key).await.map_err(failure)? else {
                return Err(Failure::new(exit::NOT_FOUND, format!("`{key}` has no schema")));
            };
            out!("{}", schema.trim_end());
        }
        SchemaCommand::Set { key, content, output } => {
            let text = String::from_utf8(content.read()?).map_err(|_| Failure::usage("a schema is text"))?;
            // An empty one would remove what is there.
            if text.trim().is_empty() {
                return Err(Failure::usage("this schema is empty").hint("`tenure config schema remove` removes one"));
            }
            changed("set", client.set_config_schema(key, text).await.map_err(failure)?, output.output);
        }
        SchemaCommand::Remove { key, output } => {
            changed("removed", client.set_config_schema(key, "").await.map_err(failure)?, output.output);
        }
    }
    Ok(())
}

async fn go_on(client: &Client, command: RolloutCommand) -> Result<(), Failure> {
    let (done, change, output) = match command {
        RolloutCommand::Stage { key, version, percent, labels, output } => {
            ("staged", client.stage_config(key, version, rollout(percent, labels)).await, output)
        }
        RolloutCommand::Promote { key, version, output } => {
            ("promoted", client.promote_config(key, version).await, output)
        }
        RolloutCommand::Abort { key, version, output } => ("aborted", client.abort_config(key, version).await, output),
    };
    changed(done, change.map_err(failure)?, output.output);
    Ok(())
}

fn rollout(percent: f64, labels: Vec<(String, String)>) -> ConfigRollout {
    labels.into_iter().fold(ConfigRollout::percent(percent), |rollout, (name, value)| rollout.label(name, value))
}

async fn watch(
    client: &Client,
    key: String,
    prefix: bool,
    instance: Instance,
    count: Option<u64>,
    output: Output,
) -> Result<(), Failure> {
    let mut watching = client.watch_config(key).instance(instance.instance);
    watching = instance.labels.into_iter().fold(watching, |watching, (name, value)| watching.label(&name, &value));
    let mut watching = if prefix { watching.prefix() } else { watching }.open();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let event = tokio::select! {
            event = watching.next() => event.map_err(failure)?,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        left -= 1;
        match (&event, output) {
            (ConfigEvent::Given(version), Output::Json) => {
                out!("{}", json!({ "type": "GIVEN", "config": with_content(version) }));
            }
            (ConfigEvent::Deleted(key), Output::Json) => out!("{}", json!({ "type": "DELETED", "key": key })),
            (ConfigEvent::Given(version), Output::Table) => {
                let trial = if version.candidate { ", candidate" } else { "" };
                out!("{} (version {}{trial})", version.key, version.version);
                write_content(version)?;
            }
            (ConfigEvent::Deleted(key), Output::Table) => out!("{key} (deleted)"),
            // What a newer library may tell.
            _ => {}
        }
    }
    Ok(())
}

async fn diff(client: &Client, key: &str, from: u64, to: u64) -> anyhow::Result<ExitCode> {
    let read = async |number: u64| {
        let version = client.read_config(key).version(number).await.map_err(failure)?;
        version.ok_or_else(|| missing(key, number))
    };
    let (old, new) = (read(from).await?, read(to).await?);
    if old.content == new.content {
        return Ok(ExitCode::SUCCESS);
    }
    let (Some(before), Some(after)) = (old.text(), new.text()) else {
        out!("version {} and version {} differ, and are no text", old.version, new.version);
        return Ok(ExitCode::FAILURE);
    };
    out!("--- {key} version {}\n+++ {key} version {}", old.version, new.version);
    for line in lines(&before.lines().collect::<Vec<_>>(), &after.lines().collect::<Vec<_>>()) {
        out!("{line}");
    }
    Ok(ExitCode::FAILURE)
}

/// More lines than this on a side are told as all gone and all new: finding what they share takes the product of both.
const DIFF_LINES_MAX: usize = 4_000;

/// All lines, each behind a blank, `-` or `+`: the longest common ones stay.
fn lines(old: &[&str], new: &[&str]) -> Vec<String> {
    let same_front = old.iter().zip(new).take_while(|(a, b)| a == b).count();
    let (front, old, new) = (&old[..same_front], &old[same_front..], &new[same_front..]);
    let mut told: Vec<String> = front.iter().map(|line| format!(" {line}")).collect();
    if old.len() > DIFF_LINES_MAX || new.len() > DIFF_LINES_MAX {
        told.extend(old.iter().map(|line| format!("-{line}")));
        told.extend(new.iter().map(|line| format!("+{line}")));
        return told;
    }
    // common[a][b]: how many lines can stay from `a` and `b` on.
    let mut common = vec![vec![0_u16; new.len() + 1]; old.len() + 1];
    for (a, line) in old.iter().enumerate().rev() {
        for (b, other) in new.iter().enumerate().rev() {
            common[a][b] =
                if line == other { common[a + 1][b + 1] + 1 } else { common[a + 1][b].max(common[a][b + 1]) };
        }
    }
    let (mut a, mut b) = (0, 0);
    while a < old.len() || b < new.len() {
        if a < old.len() && b < new.len() && old[a] == new[b] {
            told.push(format!(" {}", old[a]));
            (a, b) = (a + 1, b + 1);
        } else if b == new.len() || (a < old.len() && common[a + 1][b] >= common[a][b + 1]) {
            told.push(format!("-{}", old[a]));
            a += 1;
        } else {
            told.push(format!("+{}", new[b]));
            b += 1;
        }
    }
    told
}

/// What a refusal means here is not what it means for a lock.
fn failure(error: tenure_client::Error) -> Failure {
    let hint = match error.code() {
        Some(Code::Conflict) => Some("`tenure config get KEY -o json` shows what is current, and the candidate"),
        _ => None,
    };
    Failure::from(error).hint_if(hint)
}

fn missing(key: &str, version: u64) -> Failure {
    let what = match version {
        0 => format!("there is no configuration `{key}`"),
        version => format!("version {version} of `{key}` is not kept"),
    };
    Failure::new(exit::NOT_FOUND, what)
}

fn changed(done: &str, change: ConfigChange, output: Output) {
    if output == Output::Json {
        out!(
            "{}",
            json!({
                "version": change.version.to_string(),
                "current_version": change.current.to_string(),
                "candidate_version": change.candidate.to_string(),
                "schema": change.schema.to_string(),
            })
        );
        return;
    }
    let current = if change.current == 0 { "none".to_owned() } else { format!("version {}", change.current) };
    let trial = if change.candidate == 0 { String::new() } else { format!(", candidate {}", change.candidate) };
    let schema = if change.schema == 0 { String::new() } else { format!(", schema {}", change.schema) };
    out!("{done} (current: {current}{trial}{schema})");
}

fn print_content(version: &ConfigVersion, output: Output) -> Result<(), Failure> {
    if output == Output::Json {
        out!("{}", with_content(version));
        return Ok(());
    }
    write_content(version)
}

/// As it is; a line of text gets its end.
fn write_content(version: &ConfigVersion) -> Result<(), Failure> {
    let mut out = crate::common::stdout();
    let mut written = out.write_all(&version.content);
    if !version.content.ends_with(b"\n") && version.text().is_some() {
        written = written.and_then(|()| out.write_all(b"\n"));
    }
    written.and_then(|()| out.flush()).map_err(|error| Failure::new(exit::FAILURE, format!("standard output: {error}")))
}

fn print_versions(versions: &[ConfigVersion], output: Output) {
    if output == Output::Json {
        out!("{}", Value::from(versions.iter().map(document).collect::<Vec<_>>()));
        return;
    }
    let row = |one: &ConfigVersion| {
        let what = match one {
            one if one.deleted => "deleted".to_owned(),
            one if one.candidate => "candidate".to_owned(),
            one if one.copy_of > 0 => format!("copy of {}", one.copy_of),
            _ => "-".to_owned(),
        };
        let digest = one.digest.get(..12).unwrap_or("-").to_owned();
        let number = one.version.to_string();
        vec![number, what, shown_time(one.time_ms), digest, one.author.clone(), one.comment.clone()]
    };
    let rows: Vec<_> = versions.iter().map(row).collect();
    print_table(&["VERSION", "STATE", "PUBLISHED", "DIGEST", "AUTHOR", "COMMENT"], &rows);
}

fn print_list(versions: &[ConfigVersion], output: Output) {
    if output == Output::Json {
        out!("{}", Value::from(versions.iter().map(document).collect::<Vec<_>>()));
        return;
    }
    let row = |one: &ConfigVersion| {
        let schema = if one.schema == 0 { "-".to_owned() } else { one.schema.to_string() };
        let media = if one.media_type.is_empty() { "-".to_owned() } else { one.media_type.clone() };
        vec![one.key.clone(), one.version.to_string(), schema, media, shown_time(one.time_ms), one.author.clone()]
    };
    let rows: Vec<_> = versions.iter().map(row).collect();
    print_table(&["KEY", "VERSION", "SCHEMA", "TYPE", "PUBLISHED", "AUTHOR"], &rows);
}

/// UTC, as people read it: the days since 1970 become a date of the Gregorian calendar.
fn shown_time(ms: u64) -> String {
    let (days, seconds) = (ms / 86_400_000, ms / 1_000 % 86_400);
    // Years begin in March here, so that a leap day is the last of its year; 146,097 days are 400 years.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", year + era * 400 + next)
}

/// 64-bit numbers are text in JSON, as on the HTTP face.
fn document(one: &ConfigVersion) -> Value {
    json!({
        "key": one.key,
        "version": one.version.to_string(),
        "media_type": one.media_type,
        "author": one.author,
        "comment": one.comment,
        "time_ms": one.time_ms.to_string(),
        "digest": one.digest,
        "revision": one.revision.to_string(),
        "schema": one.schema.to_string(),
        "copy_of": one.copy_of.to_string(),
        "deleted": one.deleted,
        "candidate": one.candidate,
    })
}

fn with_content(one: &ConfigVersion) -> Value {
    let mut document = document(one);
    match one.text() {
        Some(text) => document["content"] = text.into(),
        None => document["content_bytes"] = BASE64.encode(&one.content).into(),
    }
    document
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.trim_end_matches('%').parse().ok().filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| format!("`{text}` is not 0 to 100 percent"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_dates() {
        assert_eq!(shown_time(0), "1970-01-01T00:00:00Z");
        assert_eq!(shown_time(951_782_400_000), "2000-02-29T00:00:00Z");
        assert_eq!(shown_time(1_735_689_599_999), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn what_differs_is_told_and_what_is_common_stays() {
        assert_eq!(lines(&["a", "b", "c"], &["a", "x", "c", "d"]), [" a", "-b", "+x", " c", "+d"]);
        assert_eq!(lines(&[], &["a"]), ["+a"]);
        assert_eq!(lines(&["a"], &[]), ["-a"]);
    }
}
