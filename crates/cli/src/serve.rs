//! `tenure serve`: the server in the foreground, and where each of its settings comes from.
//!
//! Flags before environment before file before default. The file is TOML and its keys are the long flags; an unknown key is an error.

use crate::common::{Failure, duration, exit};
use anyhow::Result;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args as _};
use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tenure_server::{Config, Server, StartError, TlsFiles};

#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// Settings as TOML, keys as the long flags; flags and environment go before it
    #[arg(long, env = "TENURE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Name of this member
    #[arg(long, env = "TENURE_NAME", default_value = "n0")]
    name: String,
    /// Folder of the log and the snapshots; made if it is not there
    #[arg(long, env = "TENURE_DATA_DIR", default_value = "tenure-data", value_name = "DIR")]
    data_dir: PathBuf,
    /// Where clients connect: gRPC, JSON and pages on one port
    #[arg(long, env = "TENURE_LISTEN", default_value = "127.0.0.1:2379", value_name = "HOST:PORT")]
    listen: String,
    /// Address that clients are told to use; the listen address unless given
    #[arg(long, env = "TENURE_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where the other members connect; a lone member listens there once another is added
    #[arg(long, env = "TENURE_PEER_LISTEN", default_value = "127.0.0.1:2380", value_name = "HOST:PORT")]
    peer_listen: String,
    /// Every member of a new cluster as name=host:port, comma separated, the same on each; this one alone unless given
    ///
    /// Read when the data folder is empty. Later the members know each other; `tenure member` changes who belongs.
    #[arg(long, env = "TENURE_CLUSTER", value_delimiter = ',', value_name = "NAME=HOST:PORT,...")]
    cluster: Vec<String>,
    /// What `tenure member add` or `replace` printed: start as a new member of a running cluster
    #[arg(long, env = "TENURE_JOIN", value_name = "TOKEN", conflicts_with = "cluster")]
    join: Option<String>,
    /// Certificate of this member for the connections with other members, PEM; all three turn mutual TLS on
    #[arg(long, env = "TENURE_PEER_CERT", value_name = "FILE", requires_all = ["peer_key", "peer_ca"])]
    peer_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, env = "TENURE_PEER_KEY", value_name = "FILE", requires_all = ["peer_cert", "peer_ca"])]
    peer_key: Option<PathBuf>,
    /// Who signs the certificates of members, PEM: only those it signed are talked to
    #[arg(long, env = "TENURE_PEER_CA", value_name = "FILE", requires_all = ["peer_cert", "peer_key"])]
    peer_ca: Option<PathBuf>,
    /// Keeps clusters apart that were started with equal flags
    #[arg(long, env = "TENURE_CLUSTER_TOKEN", default_value = "tenure-cluster", value_name = "TEXT")]
    cluster_token: String,
    /// Listen beyond loopback although nothing authenticates clients
    #[arg(long, env = "TENURE_INSECURE")]
    insecure: bool,
    /// Beyond this much state history is cut
    #[arg(long, env = "TENURE_MEMORY_SOFT_LIMIT", default_value = "3GiB", value_parser = bytes, value_name = "SIZE")]
    memory_soft_limit: u64,
    /// Beyond this much state growth is refused; deleting, releasing and renewing go on
    #[arg(long, env = "TENURE_MEMORY_HARD_LIMIT", default_value = "4GiB", value_parser = bytes, value_name = "SIZE")]
    memory_hard_limit: u64,
    /// Largest request
    #[arg(long, env = "TENURE_MAX_REQUEST_BYTES", default_value = "1536KiB", value_parser = bytes, value_name = "SIZE")]
    max_request_bytes: u64,
    /// Most operations in one list of a transaction
    #[arg(long, env = "TENURE_MAX_TXN_OPS", default_value_t = 128, value_name = "N")]
    max_txn_ops: u64,
    /// Most streams and long polls that watch or observe at a time, those of etcd's clients too
    #[arg(long, env = "TENURE_MAX_WATCH_STREAMS", default_value_t = 20_000, value_name = "N")]
    max_watch_streams: u64,
    /// History is kept at least this long
    #[arg(long, env = "TENURE_HISTORY", default_value = "1h", value_parser = duration, value_name = "DURATION")]
    history: Duration,
    /// ... and at least this many revisions
    #[arg(long, env = "TENURE_HISTORY_REVISIONS", default_value_t = 10_000, value_name = "N")]
    history_revisions: u64,
    /// Without word from a leader for this long a member asks for an election
    #[arg(long, env = "TENURE_ELECTION_TIMEOUT", default_value = "1s", value_parser = duration, value_name = "DURATION")]
    election_timeout: Duration,
    /// How often a leader speaks
    #[arg(long, env = "TENURE_HEARTBEAT", default_value = "100ms", value_parser = duration, value_name = "DURATION")]
    heartbeat: Duration,
    /// A watch that asked for progress hears of it this often when nothing else happens
    #[arg(long, env = "TENURE_WATCH_PROGRESS_INTERVAL", default_value = "10m", value_parser = duration, value_name = "DURATION")]
    watch_progress_interval: Duration,
    /// Probe no registered instances over HTTP, TCP or gRPC while this member leads
    #[arg(long, env = "TENURE_NO_ACTIVE_CHECKS")]
    no_active_checks: bool,
    /// A snapshot is taken when the log has grown by this much
    #[arg(long, env = "TENURE_SNAPSHOT_LOG_BYTES", default_value = "256MiB", value_parser = bytes, value_name = "SIZE")]
    snapshot_log_bytes: u64,
    /// Writes are refused while the disk has less free space than this
    #[arg(long, env = "TENURE_DISK_RESERVE", default_value = "64MiB", value_parser = bytes, value_name = "SIZE")]
    disk_reserve: u64,
    /// DANGER: acknowledge before the disk has it; a crash of the machine loses acknowledged writes
    #[arg(long, env = "TENURE_UNSAFE_NO_FSYNC")]
    unsafe_no_fsync: bool,
    /// How log lines are written
    #[arg(long, env = "TENURE_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Least level of log lines: error, warn, info, debug or trace
    #[arg(long, env = "TENURE_LOG", default_value = "info")]
    log_level: tracing::Level,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Reads a size such as `64MiB`, `1536KiB` or a number of bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size: write 64MiB, 3GiB or a number of bytes");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return Err(wrong()),
    };
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(wrong)
}

/// The arguments again with those of the settings file that neither a flag nor the environment gave.
///
/// Nothing to add: `None`.
pub(crate) fn with_file(all: &[OsString], matches: &ArgMatches) -> Result<Option<Vec<OsString>>> {
    let Some(serve) = matches.subcommand_matches("serve") else { return Ok(None) };
    let Some(path) = serve.get_one::<PathBuf>("config") else { return Ok(None) };
    let wrong = |why: String| Failure::usage(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
    let mut all = all.to_vec();
    for (key, value) in table {
        let id = key.replace('-', "_");
        if id == "config" || !is_flag(&id) {
            return Err(wrong(format!("`{key}` is no setting of `tenure serve`")).into());
        }
        let given = matches!(serve.value_source(&id), Some(ValueSource::CommandLine | ValueSource::EnvVariable));
        if !given && let Some(flag) = as_flag(&key, &value).map_err(wrong)? {
            all.push(flag.into());
        }
    }
    Ok(Some(all))
}

fn is_flag(id: &str) -> bool {
    ServeArgs::augment_args(clap::Command::new("serve")).get_arguments().any(|a| a.get_id() == id)
}

fn as_flag(key: &str, value: &toml::Value) -> Result<Option<String>, String> {
    let key = key.replace('_', "-");
    match value {
        toml::Value::Boolean(true) => Ok(Some(format!("--{key}"))),
        toml::Value::Boolean(false) => Ok(None),
        toml::Value::String(s) => Ok(Some(format!("--{key}={s}"))),
        toml::Value::Integer(n) => Ok(Some(format!("--{key}={n}"))),
        other => Err(format!("`{key}` is a {}, not a text, number or truth value", other.type_str())),
    }
}

/// Runs until a signal or a fault.
pub(crate) fn run(args: ServeArgs) -> Result<ExitCode> {
    log_to_stderr(&args);
    if args.unsafe_no_fsync {
        tracing::warn!("--unsafe-no-fsync: a crash of this machine WILL lose acknowledged writes");
    }
    // Huge pages double the memory of an empty member and make it grow in steps; Redis and others advise against them too. A
    // kernel without them refuses, which is as good.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(network_threads()).enable_all().build()?;
    runtime.block_on(async {
        let server = Server::start(config(&args)).await.map_err(start_failure)?;
        greet(&server, &args);
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = tokio::signal::ctrl_c() => tracing::info!("interrupted: stopping"),
            fault = server.wait() => {
                tracing::error!("stopped: {fault}");
                return Ok(ExitCode::from(exit::FAILURE));
            }
        }
        server.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}

/// The driver has a thread of its own, so a core is left to it: one network thread more than that only adds wake-ups.
fn network_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1)).max(1)
}

fn config(args: &ServeArgs) -> Config {
    Config {
        name: args.name.clone(),
        data_dir: args.data_dir.clone(),
        listen: args.listen.clone(),
        advertise: args.advertise.clone(),
        peer_listen: args.peer_listen.clone(),
        cluster: args.cluster.clone(),
        cluster_token: args.cluster_token.clone(),
        join: args.join.clone(),
        peer_tls: peer_tls(args),
        insecure: args.insecure,
        memory_soft_limit: args.memory_soft_limit,
        memory_hard_limit: args.memory_hard_limit,
        max_request_bytes: args.max_request_bytes,
        max_txn_ops: args.max_txn_ops,
        max_watch_streams: args.max_watch_streams,
        election_timeout: args.election_timeout,
        heartbeat: args.heartbeat,
        snapshot_log_bytes: args.snapshot_log_bytes,
        disk_reserve: args.disk_reserve,
        fsync: !args.unsafe_no_fsync,
        history: args.history,
        history_revisions: args.history_revisions,
        watch_progress_interval: args.watch_progress_interval,
        active_checks: !args.no_active_checks,
        ..Config::default()
    }
}

fn peer_tls(args: &ServeArgs) -> Option<TlsFiles> {
    Some(TlsFiles { cert: args.peer_cert.clone()?, key: args.peer_key.clone()?, ca: args.peer_ca.clone()? })
}

fn log_to_stderr(args: &ServeArgs) {
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(args.log_level)
        .with_target(false)
        // It would tell of a closed standard error on standard error, by a macro that panics.
        .log_internal_errors(false);
    match args.log_format {
        LogFormat::Text => {
            let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            builder.with_ansi(colour).init();
        }
        LogFormat::Json => builder.json().init(),
    }
}

fn start_failure(error: StartError) -> Failure {
    let hint = match &error {
        StartError::AddressInUse { .. } => {
            Some("--listen HOST:PORT chooses another address, 127.0.0.1:0 any free port")
        }
        StartError::NotLoopback { .. } | StartError::PeerNotLoopback { .. } => {
            Some("only do so on a network where everybody may change everything")
        }
        StartError::Folder(_) | StartError::Member(_) => Some("--data-dir DIR chooses another folder"),
        _ => None,
    };
    Failure::new(exit_of(&error), error.to_string()).hint_if(hint)
}

fn exit_of(error: &StartError) -> u8 {
    match error {
        StartError::Address { .. }
        | StartError::NotLoopback { .. }
        | StartError::PeerNotLoopback { .. }
        | StartError::PeerTls(_)
        | StartError::Setting(_)
        | StartError::Cluster(_)
        | StartError::Join(_) => exit::USAGE,
        _ => exit::FAILURE,
    }
}

/// Where it listens and what to try next, for whoever started it by hand; one line for everybody else.
fn greet(server: &Server, args: &ServeArgs) {
    let address = server.address();
    tracing::info!(name = args.name, data = %args.data_dir.display(), "serving on {address}");
    if !std::io::stdout().is_terminal() {
        return;
    }
    let elsewhere = if address.port() == 2379 { String::new() } else { format!(" --endpoints {address}") };
    let (version, folder) = (env!("CARGO_PKG_VERSION"), args.data_dir.display());
    // A terminal that goes away does not take the server with it.
    let _ = writeln!(
        std::io::stdout(),
        "Tenure {version} serves on {address}, data in {folder}\n\
         Try, in another terminal:\n  \
         tenure kv put greeting hello{elsewhere}\n  \
         tenure lock jobs/nightly{elsewhere} -- sh -c 'echo \"token $TENURE_TOKEN\"; sleep 5'\n  \
         etcdctl --endpoints {address} get greeting\n  \
         curl http://{address}/v1/kv/greeting"
    );
}
