//! `tenure txn`: run one transaction over all primitives.
//!
//! It reads the JSON body of `POST /v1/txn:run`, checks it against the same descriptors as the server does, and prints what each operation answered and
//! which compare failed.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, SerializeOptions};
use serde_json::Value;

use crate::common::{Common, Failure, Output, OutputArg, exit, print_failure, print_table};

/// The largest transaction that is read; the server takes 1.5 MiB by default.
const BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, Args)]
#[command(after_help = "The file is the JSON body of POST /v1/txn:run, such as

  {\"compares\":  [{\"key\": {\"key\": \"seat/12\", \"version\": \"0\"}}],
   \"then\":      [{\"put\": {\"key\": \"seat/12\", \"value\": \"ann\"}}],
   \"otherwise\": [{\"range\": {\"key\": \"seat/12\", \"end\": \"seat/13\"}}]}

Exit code 10: a compare did not hold, and `otherwise` ran.")]
pub(crate) struct TxnArgs {
    /// The transaction as JSON; `-` is standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    #[command(flatten)]
    output: OutputArg,
}

pub(crate) async fn run(common: &Common, args: TxnArgs) -> anyhow::Result<ExitCode> {
    let text = read(&args.file)?;
    let client = common.client()?;
    let pool = DescriptorPool::decode(tenure_wire::DESCRIPTORS)?;
    let message = |name: &str| pool.get_message_by_name(name).ok_or_else(|| anyhow::anyhow!("no message {name}"));
    let mut json = serde_json::Deserializer::from_str(&text);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let request = DynamicMessage::deserialize_with_options(message("tenure.v1.TxnRunRequest")?, &mut json, &options)
        .and_then(|request| json.end().map(|()| request))
        .map_err(|error| Failure::usage(format!("this is not a transaction: {error}")))?;
    let reply = client.run_encoded(&prost::Message::encode_to_vec(&request)).await.map_err(Failure::from)?;
    let reply = DynamicMessage::decode(message("tenure.v1.TxnRunReply")?, reply.as_slice())?;
    // `succeeded` is told when it is false, too.
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    let full = reply.serialize_with_options(serde_json::value::Serializer, &options)?;
    let brief = SerializeOptions::new().use_proto_field_name(true);
    let mut value = reply.serialize_with_options(serde_json::value::Serializer, &brief)?;
    value["succeeded"] = full["succeeded"].clone();
    let succeeded = value["succeeded"] == true;
    match args.output.output {
        Output::Json => out!("{}", serde_json::to_string_pretty(&value)?),
        Output::Table => print(&value, succeeded),
    }
    Ok(if succeeded { ExitCode::SUCCESS } else { ExitCode::from(exit::CONFLICT) })
}

fn read(file: &std::path::Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = if file.as_os_str() == "-" {
        std::io::stdin().take(BYTES_MAX).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(BYTES_MAX).read_to_string(&mut text))
    };
    match read {
        Ok(_) => Ok(text),
        Err(error) => Err(Failure::usage(format!("cannot read {}: {error}", file.display()))),
    }
}

fn print(reply: &Value, succeeded: bool) {
    let list = if succeeded { "then" } else { "otherwise" };
    out!("{list} ran, revision {}", reply["header"]["revision"].as_str().unwrap_or("0"));
    let mut rows = Vec::new();
    gather(&mut rows, "", &reply["answers"]);
    if !rows.is_empty() {
        print_table(&["OP", "WHAT", "ANSWER"], &rows);
    }
    if let Some(message) = reply["failed"]["message"].as_str() {
        let index = &reply["failed"]["index"];
        print_failure(&format!("compare {} does not hold: {message}", index.as_u64().unwrap_or(0)), None);
    }
}

/// A row for each operation, those of nested lists under their place.
fn gather(rows: &mut Vec<Vec<String>>, place: &str, answers: &Value) {
    for (index, answer) in answers.as_array().into_iter().flatten().enumerate() {
        let place = format!("{place}{index}");
        let Some((what, answer)) = answer.as_object().and_then(|one| one.iter().next()) else { continue };
        let mut own = answer.clone();
        let nested = own.as_object_mut().and_then(|own| own.remove("answers"));
        let told =
            if own.as_object().is_some_and(serde_json::Map::is_empty) { "ok".to_owned() } else { own.to_string() };
        rows.push(vec![place.clone(), what.clone(), told]);
        gather(rows, &format!("{place}."), &nested.unwrap_or_default());
    }
}
