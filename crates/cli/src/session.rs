//! `tenure session`: make, look at, renew and end sessions by hand.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use tenure_client::{Client, LeaseState, OnExpire, SessionInfo};

use crate::common::{Common, Failure, Output, OutputArg, duration, exit, millis, print_table};

#[derive(Debug, Args)]
pub(crate) struct SessionArgs {
    #[command(subcommand)]
    command: SessionCommand,
}

#[derive(Debug, Subcommand)]
enum SessionCommand {
    /// Make a session; it lives for its ttl unless something renews it
    Create {
        /// How long it lives without a renewal
        #[arg(long, default_value = "15s", value_parser = duration)]
        ttl: Duration,
        /// A name for people
        #[arg(long, default_value = "")]
        name: String,
        /// Shown to whoever asks who holds a lock
        #[arg(long = "meta", value_name = "KEY=VALUE", value_parser = pair)]
        metadata: Vec<(String, String)>,
        /// What becomes of its keys when it ends
        #[arg(long, value_enum, default_value = "delete")]
        on_expire: KeysThen,
        /// Use this id instead of a random one
        #[arg(long, value_parser = session_id, default_value = "0", hide_default_value = true)]
        id: u64,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List live sessions
    List {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show one session and what it owns
    #[command(visible_alias = "describe")]
    Get {
        #[arg(value_parser = session_id)]
        id: u64,
        #[command(flatten)]
        output: OutputArg,
    },
    /// End a session now: its locks go to the next in line, its keys as it was made
    End {
        #[arg(value_parser = session_id)]
        id: u64,
        /// Only this incarnation of the id
        #[arg(long, default_value = "0", hide_default_value = true)]
        token: u64,
    },
    /// Renew a session until it is lost or this command is stopped
    #[command(visible_alias = "renew")]
    KeepAlive {
        #[arg(value_parser = session_id)]
        id: u64,
        /// Only this incarnation of the id
        #[arg(long, default_value = "0", hide_default_value = true)]
        token: u64,
        /// Renew once and return
        #[arg(long)]
        once: bool,
        #[command(flatten)]
        output: OutputArg,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum KeysThen {
    Delete,
    Release,
}

pub(crate) async fn run(common: &Common, args: SessionArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    match args.command {
        SessionCommand::Create { ttl, name, metadata, on_expire, id, output } => {
            let on_expire = match on_expire {
                KeysThen::Delete => OnExpire::Delete,
                KeysThen::Release => OnExpire::Release,
            };
            let mut create = client.session().ttl(ttl).name(name).on_expire(on_expire).id(id);
            for (key, value) in metadata {
                create = create.metadata(key, value);
            }
            let session = create.await.map_err(Failure::from)?;
            session.leave_on_drop();
            print_made(&session, output.output);
        }
        SessionCommand::List { output } => {
            print_list(&client.list_sessions().await.map_err(Failure::from)?, output.output)
        }
        SessionCommand::Get { id, output } => print_one(&find(&client, id).await?, output.output),
        SessionCommand::End { id, token } => client.end_session(id, token).await.map_err(Failure::from)?,
        SessionCommand::KeepAlive { id, token, once, output } => {
            keep_alive(&client, id, token, once, output.output).await?
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn find(client: &Client, id: u64) -> Result<SessionInfo, Failure> {
    let info = client.session_info(id).await?;
    info.ok_or_else(|| {
        Failure::new(exit::NOT_FOUND, format!("there is no session {id}"))
            .hint("`tenure session list` shows those that live")
    })
}

async fn keep_alive(client: &Client, id: u64, token: u64, once: bool, output: Output) -> Result<(), Failure> {
    let session = client.adopt_session(id, token).await?;
    // The session belongs to whoever made it.
    session.leave_on_drop();
    print_made(&session, output);
    if once {
        return Ok(());
    }
    let mut states = session.states();
    tokio::select! {
        _ = tokio::signal::ctrl_c() => Ok(()),
        reason = session.lost() => Err(Failure::new(exit::SESSION_EXPIRED, format!("session {id} is lost: {reason}"))),
        () = async {
            while states.changed().await.is_ok() {
                match *states.borrow_and_update() {
                    LeaseState::AtRisk => err!("warning: session {id} was not renewed for half of its ttl"),
                    LeaseState::Safe => err!("session {id} is renewed again"),
                    LeaseState::Lost => {}
                }
            }
            std::future::pending().await
        } => Ok(()),
    }
}

fn print_made(session: &tenure_client::Session, output: Output) {
    let ttl_ms = millis(session.ttl());
    match output {
        Output::Json => out!(
            "{}",
            json!({ "id": session.id().to_string(), "token": session.token().to_string(), "ttl_ms": ttl_ms })
        ),
        Output::Table => out!("session {} (token {}, ttl {})", session.id(), session.token(), shown(session.ttl())),
    }
}

fn print_list(sessions: &[SessionInfo], output: Output) {
    if output == Output::Json {
        out!("{}", Value::from(sessions.iter().map(document).collect::<Vec<_>>()));
        return;
    }
    let rows: Vec<_> = sessions.iter().map(row).collect();
    print_table(&["ID", "TOKEN", "NAME", "TTL", "LEFT", "AGE", "OWNS", "KIND"], &rows);
}

fn print_one(session: &SessionInfo, output: Output) {
    if output == Output::Json {
        out!("{}", document(session));
        return;
    }
    print_list(std::slice::from_ref(session), output);
    for (key, value) in &session.metadata {
        out!("  {key}={value}");
    }
    for (kind, name, token) in &session.owned {
        out!("  {kind} {name} {token}");
    }
}

fn row(session: &SessionInfo) -> Vec<String> {
    vec![
        session.id.to_string(),
        session.token.to_string(),
        session.name.clone(),
        shown(session.ttl),
        shown(session.remaining),
        shown(session.age),
        session.owned_count.to_string(),
        kind(session).to_owned(),
    ]
}

fn kind(session: &SessionInfo) -> &'static str {
    if session.lease { "etcd lease" } else { "session" }
}

/// 64-bit numbers are text in JSON, as on the HTTP face.
fn document(session: &SessionInfo) -> Value {
    let owned =
        |(kind, name, token): &(&str, String, u64)| json!({ "kind": kind, "name": name, "token": token.to_string() });
    json!({
        "id": session.id.to_string(),
        "token": session.token.to_string(),
        "name": session.name,
        "metadata": session.metadata,
        "on_expire": match session.on_expire { OnExpire::Delete => "delete", OnExpire::Release => "release" },
        "ttl_ms": millis(session.ttl),
        "remaining_ms": millis(session.remaining),
        "age_ms": millis(session.age),
        "lease": session.lease,
        "owned_count": session.owned_count,
        "owned": session.owned.iter().map(owned).collect::<Vec<_>>(),
    })
}

fn shown(time: Duration) -> String {
    format!("{:.1}s", time.as_secs_f64())
}

/// Decimal, or hexadecimal with `0x` before it as etcd's tools print leases.
fn session_id(text: &str) -> Result<u64, String> {
    let id = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    id.ok()
        .filter(|id| *id <= i64::MAX as u64)
        .ok_or_else(|| format!("`{text}` is not a session id: a number below 2^63"))
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_in_both_notations() {
        assert_eq!((session_id("26"), session_id("0x1a")), (Ok(26), Ok(26)));
        assert!(session_id("lease").is_err() && session_id("18446744073709551615").is_err());
    }
}
