//! `tenure counter`: add to counters and take numbers from sequences.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tenure_client::{Client, CounterInfo, SequenceInfo};

use crate::common::{Common, Failure, Output, OutputArg, exit, print_table};

#[derive(Debug, Args)]
pub(crate) struct CounterArgs {
    #[command(subcommand)]
    command: CounterCommand,
}

#[derive(Debug, Subcommand)]
enum CounterCommand {
    /// Add to a counter and print its value; one that is not there counts as 0
    Add(AddArgs),
    /// Set a counter
    Set(SetArgs),
    /// Delete a counter
    #[command(visible_alias = "del")]
    Delete(DeleteArgs),
    /// Print the value of a counter
    Get {
        /// The counter
        name: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List counters
    List {
        /// Only names that begin so
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Take the next number of a sequence, or several; nobody else is given them
    Next(NextArgs),
    /// List sequences
    Sequences {
        /// Only names that begin so
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        output: OutputArg,
    },
}

#[derive(Debug, Args)]
struct AddArgs {
    /// The counter
    name: String,
    /// How much; may be below zero
    #[arg(default_value_t = 1, allow_negative_numbers = true)]
    delta: i64,
    /// Only if the sum is not below (exit code 10)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    min: Option<i64>,
    /// Only if the sum is not above (exit code 10)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max: Option<i64>,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
struct SetArgs {
    /// The counter
    name: String,
    /// Its value
    #[arg(allow_negative_numbers = true)]
    value: i64,
    /// Only if there is no such counter (exit code 10)
    #[arg(long, group = "set_expect")]
    if_absent: bool,
    /// Only if it has this value (exit code 10)
    #[arg(long, group = "set_expect", value_name = "N", allow_negative_numbers = true)]
    if_value: Option<i64>,
    /// Only if this was its last change (exit code 10)
    #[arg(long, group = "set_expect", value_name = "N")]
    if_revision: Option<u64>,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    /// The counter
    name: String,
    /// Only if it has this value (exit code 10)
    #[arg(long, group = "delete_expect", value_name = "N", allow_negative_numbers = true)]
    if_value: Option<i64>,
    /// Only if this was its last change (exit code 10)
    #[arg(long, group = "delete_expect", value_name = "N")]
    if_revision: Option<u64>,
}

#[derive(Debug, Args)]
struct NextArgs {
    /// The sequence
    name: String,
    /// How many numbers; the first one and the last one are printed
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    block: u64,
    /// Leave out what is below
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    at_least: u64,
    #[command(flatten)]
    output: OutputArg,
}

pub(crate) async fn run(common: &Common, args: CounterArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    match args.command {
        CounterCommand::Add(args) => add(&client, args).await?,
        CounterCommand::Set(args) => set(&client, args).await?,
        CounterCommand::Delete(args) => delete(&client, args).await?,
        CounterCommand::Get { name, output } => {
            let missing = || Failure::new(exit::NOT_FOUND, format!("there is no counter `{name}`"));
            print_one(&client.counter(&name).get().await?.ok_or_else(missing)?, output.output);
        }
        CounterCommand::List { prefix, output } => print_counters(&client.counters(&prefix).await?, output.output),
        CounterCommand::Next(args) => next(&client, args).await?,
        CounterCommand::Sequences { prefix, output } => {
            print_sequences(&client.sequences(&prefix).await?, output.output);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn add(client: &Client, args: AddArgs) -> anyhow::Result<()> {
    let counter = client.counter(args.name);
    let mut add = counter.add(args.delta);
    if let Some(min) = args.min {
        add = add.min(min);
    }
    if let Some(max) = args.max {
        add = add.max(max);
    }
    print_one(&add.await?, args.output.output);
    Ok(())
}

async fn set(client: &Client, args: SetArgs) -> anyhow::Result<()> {
    let counter = client.counter(args.name);
    let set = counter.set(args.value);
    let set = match (args.if_absent, args.if_value, args.if_revision) {
        (true, ..) => set.if_absent(),
        (_, Some(value), _) => set.if_value(value),
        (.., Some(revision)) => set.if_revision(revision),
        _ => set,
    };
    print_one(&set.await?, args.output.output);
    Ok(())
}

async fn delete(client: &Client, args: DeleteArgs) -> anyhow::Result<()> {
    let counter = client.counter(&args.name);
    let delete = counter.delete();
    let delete = match (args.if_value, args.if_revision) {
        (Some(value), _) => delete.if_value(value),
        (_, Some(revision)) => delete.if_revision(revision),
        _ => delete,
    };
    let deleted = delete.await?;
    out!("{}", if deleted { "deleted" } else { "there was none" });
    Ok(())
}

async fn next(client: &Client, args: NextArgs) -> anyhow::Result<()> {
    let numbers = client.sequence(args.name).block_at_least(args.block, args.at_least).await?;
    match args.output.output {
        Output::Json => out!("{}", json!({ "from": numbers.start.to_string(), "to": numbers.end.to_string() })),
        Output::Table if args.block == 1 => out!("{}", numbers.start),
        Output::Table => out!("{} {}", numbers.start, numbers.end - 1),
    }
    Ok(())
}

fn print_one(counter: &CounterInfo, output: Output) {
    match output {
        Output::Json => out!("{}", document(counter)),
        Output::Table => out!("{}", counter.value),
    }
}

fn print_counters(counters: &[CounterInfo], output: Output) {
    if output == Output::Json {
        out!("{}", Value::from(counters.iter().map(document).collect::<Vec<_>>()));
        return;
    }
    let row = |c: &CounterInfo| vec![c.name.clone(), c.value.to_string(), c.revision.to_string()];
    print_table(&["NAME", "VALUE", "REVISION"], &counters.iter().map(row).collect::<Vec<_>>());
}

/// 64-bit numbers are text in JSON, as on the HTTP face.
fn document(counter: &CounterInfo) -> Value {
    json!({ "name": counter.name, "value": counter.value.to_string(), "revision": counter.revision.to_string() })
}

fn print_sequences(sequences: &[SequenceInfo], output: Output) {
    if output == Output::Json {
        let one = |s: &SequenceInfo| json!({ "name": s.name, "next": s.next.to_string(), "revision": s.revision.to_string() });
        out!("{}", Value::from(sequences.iter().map(one).collect::<Vec<_>>()));
        return;
    }
    let row = |s: &SequenceInfo| vec![s.name.clone(), s.next.to_string(), s.revision.to_string()];
    print_table(&["NAME", "NEXT", "REVISION"], &sequences.iter().map(row).collect::<Vec<_>>());
}
