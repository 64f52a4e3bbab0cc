//! `tenure watch`: changes of keys as they happen, without loss or repeat over reconnects.

use crate::common::{Common, Output, OutputArg};
use crate::kv::text_or_base64;
use anyhow::Result;
use serde_json::json;
use std::io::Write as _;
use std::process::ExitCode;
use tenure_client::{EventKind, WatchEvent};

#[derive(Debug, clap::Args)]
pub(crate) struct WatchArgs {
    /// The key
    key: String,
    /// Up to this key, not included
    range_end: Option<String>,
    /// Every key that begins with KEY
    #[arg(long, conflicts_with = "range_end")]
    prefix: bool,
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
    let mut watching = client.watch(args.key.clone());
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

fn print(event: &WatchEvent, output: Output) -> Result<()> {
    let mut out = std::io::stdout().lock();
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
