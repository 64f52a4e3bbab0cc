//! `tenure watch`: changes of keys, or of the things of a kind, as they happen, without loss or repeat over reconnects.

use crate::common::{Common, Output, OutputArg};
use crate::kv::text_or_base64;
use anyhow::Result;
use serde_json::json;
use std::io::Write as _;
use std::process::ExitCode;
use tenure_client::{Client, EventKind, ThingEvent, WatchEvent};

#[derive(Debug, clap::Args)]
pub(crate) struct WatchArgs {
    /// The key, or with --kind the name: without one, everything of the kind
    #[arg(required_unless_present = "kind")]
    key: Option<String>,
    /// Up to this key, not included
    #[arg(conflicts_with = "kind")]
    range_end: Option<String>,
    /// Watch things that are no keys: session, lock, election, config, service and so on, or any
    #[arg(long)]
    kind: Option<String>,
    /// Everything that begins with KEY
    #[arg(long, conflicts_with = "range_end", requires = "key")]
    prefix: bool,
    /// With --kind: what there is first
    #[arg(long, requires = "kind", conflicts_with = "revision")]
    snapshot: bool,
    /// Changes from this revision on; the past too, as far as history is kept
    #[arg(long, alias = "rev", value_name = "N")]
    revision: Option<u64>,
    /// Print the key as it was before, too
    #[arg(long, alias = "prev-kv")]
    prev: bool,
    /// Stop after this many changes
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    #[command(flatten)]
    output: OutputArg,
}

/// Prints until it is stopped, the count is reached, or history was compacted away under it.
pub(crate) async fn run(common: &Common, args: WatchArgs) -> Result<ExitCode> {
    let client = common.client()?;
    if let Some(kind) = &args.kind {
        return run_things(&client, kind, &args).await;
    }
    let mut watching = client.watch(args.key.clone().unwrap_or_default());
    if args.prefix {
        watching = watching.prefix();
    }
    if let Some(end) = &args.range_end {
        watching = watching.until(end.clone());
    }
    if let Some(revision) = args.revision {
        watching = watching.from_revision(revision);
    }
    if args.prev {
        watching = watching.prev();
    }
    let mut watch = watching.await?;
    let mut seen = 0;
    while args.count.is_none_or(|count| seen < count) {
        let Some(event) = watch.next().await else { break };
        print(&event?, args.output.output)?;
        seen += 1;
    }
    Ok(ExitCode::SUCCESS)
}

async fn run_things(client: &Client, kind: &str, args: &WatchArgs) -> Result<ExitCode> {
    let mut watching = client.watch_things(kind);
    watching = match &args.key {
        Some(name) if !args.prefix => watching.name(name),
        Some(prefix) => watching.prefix(prefix),
        None => watching,
    };
    if args.snapshot {
        watching = watching.snapshot();
    }
    if let Some(revision) = args.revision {
        watching = watching.from_revision(revision);
    }
    if args.prev {
        watching = watching.prev();
    }
    let mut watch = watching.await?;
    let mut seen = 0;
    while args.count.is_none_or(|count| seen < count) {
        let Some(event) = watch.next().await else { break };
        let event = event?;
        print_thing(&event, args.output.output)?;
        // What tells where it stands is no change.
        seen += u64::from(!matches!(event, ThingEvent::Synced(_) | ThingEvent::Resync));
    }
    Ok(ExitCode::SUCCESS)
}

fn print_thing(event: &ThingEvent, output: Output) -> Result<()> {
    let (what, thing, revision) = match event {
        ThingEvent::Snapshot(thing) => ("SNAPSHOT", Some(thing), thing.revision),
        ThingEvent::Put(thing) => ("PUT", Some(thing), thing.revision),
        ThingEvent::Delete(thing) => ("DELETE", Some(thing), thing.revision),
        ThingEvent::Synced(revision) => ("SYNCED", None, *revision),
        ThingEvent::Resync => ("RESYNC", None, 0),
    };
    let mut out = crate::common::stdout();
    match (output, thing) {
        (Output::Table, Some(thing)) => {
            write!(out, "{what} {revision} {} ", thing.kind)?;
            out.write_all(&thing.name)?;
            for (name, fact) in &thing.facts {
                write!(out, " {name}={fact:?}")?;
            }
            writeln!(out)?;
            if !thing.prev.is_empty() {
                write!(out, "was:")?;
                for (name, fact) in &thing.prev {
                    write!(out, " {name}={fact:?}")?;
                }
                writeln!(out)?;
            }
        }
        (Output::Table, None) => writeln!(out, "{what} {revision}")?,
        (Output::Json, thing) => {
            let mut object = json!({ "type": what, "revision": revision.to_string() });
            if let Some(thing) = thing {
                object["kind"] = json!(thing.kind);
                text_or_base64(&mut object, "name", &thing.name);
                object["facts"] = json!(thing.facts);
                if !thing.prev.is_empty() {
                    object["prev_facts"] = json!(thing.prev);
                }
            }
            writeln!(out, "{object}")?;
        }
    }
    Ok(out.flush()?)
}

fn print(event: &WatchEvent, output: Output) -> Result<()> {
    let mut out = crate::common::stdout();
    let kind = match event.kind {
        EventKind::Put => "PUT",
        EventKind::Delete => "DELETE",
    };
    match output {
        Output::Table => {
            writeln!(out, "{kind} {}", event.record.mod_revision)?;
            out.write_all(&event.record.key)?;
            out.write_all(b"\n")?;
            if event.kind == EventKind::Put {
                out.write_all(&event.record.value)?;
                out.write_all(b"\n")?;
            }
            if let Some(prev) = &event.prev {
                out.write_all(b"was: ")?;
                out.write_all(&prev.value)?;
                out.write_all(b"\n")?;
            }
        }
        Output::Json => {
            let mut object = json!({ "type": kind, "record": crate::kv::record_json(&event.record) });
            if let Some(prev) = &event.prev {
                text_or_base64(&mut object, "prev_value", &prev.value);
            }
            writeln!(out, "{object}")?;
        }
    }
    // A reader at the other end of a pipe wants each change when it happens.
    Ok(out.flush()?)
}
