//! `tenure service`: register, find and follow instances of services, by hand and around a command.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tenure_client::{Health, Registering, Registry, ServiceCheck, ServiceInstance, ServiceInstances, ServiceSummary};
use tokio::signal::unix::{SignalKind, signal};

use crate::common::{Common, Failure, Output, OutputArg, duration, exit, print_table};

#[derive(Debug, Args)]
pub(crate) struct ServiceArgs {
    #[command(subcommand)]
    command: ServiceCommand,
}

#[derive(Debug, Subcommand)]
enum ServiceCommand {
    /// Register an instance; a session, heartbeats or probes tell how it is
    Register {
        service: String,
        /// Which instance, such as host and port
        instance: String,
        /// Where callers reach it
        #[arg(long, value_name = "HOST")]
        address: String,
        #[command(flatten)]
        spec: Box<Spec>,
        /// It goes with this session
        #[arg(long, default_value = "0", hide_default_value = true)]
        session: u64,
        /// It must send a heartbeat at least this often
        #[arg(long, value_parser = duration, value_name = "DURATION", conflicts_with_all = ["http", "tcp", "grpc"])]
        ttl: Option<Duration>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Take an instance out
    Deregister {
        #[command(flatten)]
        of: Of,
    },
    /// Tell that an instance with a TTL lives, and how it is
    Heartbeat {
        #[command(flatten)]
        of: Of,
        #[arg(long, value_enum, default_value = "passing")]
        health: Told,
        /// Why, for people
        #[arg(long, default_value = "")]
        why: String,
    },
    /// Send no new callers to an instance
    Drain {
        #[command(flatten)]
        of: Of,
    },
    /// Send callers to a drained instance again
    Undrain {
        #[command(flatten)]
        of: Of,
    },
    /// Keep instances in answers when more than this share turns critical together; 0 is never
    Guard {
        service: String,
        #[arg(value_parser = clap::value_parser!(u32).range(0..=100))]
        percent: u32,
    },
    /// List services
    List {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show the instances of a service: those to call
    #[command(visible_alias = "find")]
    Get {
        service: String,
        #[command(flatten)]
        filter: Filter,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show the instances of a service, now and at every change
    Watch {
        service: String,
        #[command(flatten)]
        filter: Filter,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Register an instance while a command runs
    ///
    /// It is taken out before a signal to stop is passed on, and when the command has ended. Without a check, heartbeats are sent for it.
    Run {
        service: String,
        /// Which instance; the name of this machine and the port unless told otherwise
        #[arg(long)]
        instance: Option<String>,
        /// Where callers reach it
        #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
        address: String,
        #[command(flatten)]
        spec: Box<Spec>,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

/// What an instance says of itself.
#[derive(Debug, Args)]
struct Spec {
    #[arg(long, default_value = "0", hide_default_value = true)]
    port: u16,
    /// A word to filter by
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// Anything else that callers want to know
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    meta: Vec<(String, String)>,
    /// Its share of the callers beside that of the others
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=65535))]
    weight: u32,
    /// Probe: a GET of this path answers 2xx
    #[arg(long, value_name = "PATH", conflicts_with_all = ["tcp", "grpc"])]
    http: Option<String>,
    /// Probe: a connection opens
    #[arg(long, conflicts_with = "grpc")]
    tcp: bool,
    /// Probe: grpc.health.v1 says that this service is serving; none is the server as a whole
    #[arg(long, value_name = "SERVICE", num_args = 0..=1, default_missing_value = "")]
    grpc: Option<String>,
    /// Probe another port than that of the instance
    #[arg(long, value_name = "PORT")]
    check_port: Option<u16>,
    /// Probe this often [default: 10s]
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    interval: Option<Duration>,
    /// Wait so long for the answer to a probe [default: 5s]
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    timeout: Option<Duration>,
    /// So many failures one after another make it critical [default: 3]
    #[arg(long)]
    failures: Option<u32>,
    /// So many successes one after another end that [default: 1]
    #[arg(long)]
    successes: Option<u32>,
    /// Deregister it after it was critical for so long
    #[arg(long, value_parser = duration, value_name = "DURATION", default_value = "10m")]
    deregister_after: Duration,
    /// Take the place of the registration with this token, whoever it is of
    #[arg(long, value_name = "TOKEN", default_value = "0", hide_default_value = true)]
    replace: u64,
}

/// One registered instance.
#[derive(Debug, Args)]
struct Of {
    service: String,
    instance: String,
    /// Only this registration
    #[arg(long, default_value = "0", hide_default_value = true)]
    token: u64,
}

#[derive(Debug, Args)]
struct Filter {
    /// Only those with this tag; several: with all of them
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// Only those of this health; several: of one of them
    #[arg(long, value_enum, conflicts_with = "all")]
    health: Vec<Told>,
    /// Whatever their health
    #[arg(long, short)]
    all: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Told {
    Passing,
    Warning,
    Critical,
    Draining,
}

impl From<Told> for Health {
    fn from(told: Told) -> Self {
        match told {
            Told::Passing => Self::Passing,
            Told::Warning => Self::Warning,
            Told::Critical => Self::Critical,
            Told::Draining => Self::Draining,
        }
    }
}

pub(crate) async fn run(common: &Common, args: ServiceArgs) -> anyhow::Result<ExitCode> {
    let registry = common.client()?.registry();
    match args.command {
        ServiceCommand::Register { service, instance, address, spec, session, ttl, output } => {
            let mut registering = registry.register(service, instance, address, spec.port).session_id(session);
            match (spec.check()?, ttl) {
                (Some(check), _) => registering = registering.check(check),
                (None, Some(ttl)) => registering = registering.check(ServiceCheck::ttl(ttl)),
                (None, None) if session == 0 => return Err(no_check().into()),
                (None, None) => {}
            }
            register(spec.describe(registering), output.output).await?;
        }
        ServiceCommand::Deregister { of: Of { service, instance, token } } => {
            if !registry.deregister(&service, &instance, token).await.map_err(failure)? {
                return Err(Failure::new(exit::NOT_FOUND, format!("`{service}` has no instance `{instance}`")).into());
            }
        }
        ServiceCommand::Heartbeat { of: Of { service, instance, token }, health, why } => {
            out!("{}", registry.heartbeat(service, instance, token, health.into(), why).await.map_err(failure)?);
        }
        ServiceCommand::Drain { of: Of { service, instance, token } } => {
            out!("{}", registry.drain(service, instance, token).await.map_err(failure)?);
        }
        ServiceCommand::Undrain { of: Of { service, instance, token } } => {
            out!("{}", registry.undrain(service, instance, token).await.map_err(failure)?);
        }
        ServiceCommand::Guard { service, percent } => registry.guard(service, percent).await.map_err(failure)?,
        ServiceCommand::List { output } => {
            print_services(&registry.services().await.map_err(failure)?, output.output);
        }
        ServiceCommand::Get { service, filter, output } => {
            let mut finding = registry.find(service);
            finding = filter.tags.into_iter().fold(finding, |finding, tag| finding.tag(tag));
            finding = filter.health.into_iter().fold(finding, |finding, health| finding.health(health.into()));
            let finding = if filter.all { finding.all() } else { finding };
            print_instances(&finding.await.map_err(failure)?, output.output);
        }
        ServiceCommand::Watch { service, filter, output } => watch(&registry, service, filter, output.output).await?,
        ServiceCommand::Run { service, instance, address, spec, command } => {
            return run_command(&registry, service, instance, address, *spec, &command).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a refusal means here is not what it means for a lock.
fn failure(error: tenure_client::Error) -> Failure {
    let hint = match error.code() {
        Some(tenure_client::Code::Held) => Some("its owner lives; --replace TOKEN takes its place"),
        Some(tenure_client::Code::Fenced) => {
            Some("`tenure service get SERVICE --all` shows the registration that is current")
        }
        _ => None,
    };
    Failure::from(error).hint_if(hint)
}

fn no_check() -> Failure {
    Failure::usage("nothing would tell that the instance is gone")
        .hint("give --ttl, --http, --tcp, --grpc or --session")
}

impl Spec {
    fn check(&self) -> Result<Option<ServiceCheck>, Failure> {
        let check = match (&self.http, self.tcp, &self.grpc) {
            (Some(path), ..) => Some(ServiceCheck::http(path)),
            (None, true, _) => Some(ServiceCheck::tcp()),
            (None, false, Some(service)) => Some(ServiceCheck::grpc(service)),
            (None, false, None) => None,
        };
        let Some(mut check) = check else {
            let is_told = self.check_port.is_some() || self.interval.is_some() || self.timeout.is_some();
            if is_told || self.failures.is_some() || self.successes.is_some() {
                return Err(Failure::usage("nothing is probed: give --http, --tcp or --grpc"));
            }
            return Ok(None);
        };
        if let Some(port) = self.check_port {
            check = check.port(port);
        }
        if let Some(interval) = self.interval {
            check = check.interval(interval);
        }
        if let Some(timeout) = self.timeout {
            check = check.timeout(timeout);
        }
        check = check.failures_before_critical(self.failures.unwrap_or(0));
        Ok(Some(check.success_before_passing(self.successes.unwrap_or(0))))
    }

    fn describe<'a>(&self, mut registering: Registering<'a>) -> Registering<'a> {
        for tag in &self.tags {
            registering = registering.tag(tag);
        }
        for (key, value) in &self.meta {
            registering = registering.meta(key, value);
        }
        registering.weight(self.weight).deregister_critical_after(self.deregister_after).replace(self.replace)
    }
}

async fn register(registering: Registering<'_>, output: Output) -> Result<(), Failure> {
    let registered = registering.await.map_err(failure)?;
    registered.leave_on_drop();
    match output {
        Output::Json => out!("{}", json!({ "token": registered.token().to_string() })),
        Output::Table => out!("registered (token {})", registered.token()),
    }
    Ok(())
}

async fn watch(registry: &Registry, service: String, filter: Filter, output: Output) -> Result<(), Failure> {
    let mut following = registry.follow(service);
    following = filter.tags.into_iter().fold(following, |following, tag| following.tag(tag));
    following = filter.health.into_iter().fold(following, |following, health| following.health(health.into()));
    let following = if filter.all { following.all() } else { following };
    let mut cache = following.await.map_err(failure)?;
    loop {
        print_instances(&cache.now(), output);
        tokio::select! {
            () = cache.changed() => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
        if output == Output::Table {
            out!();
        }
    }
}

async fn run_command(
    registry: &Registry,
    service: String,
    instance: Option<String>,
    address: String,
    spec: Spec,
    command: &[OsString],
) -> anyhow::Result<ExitCode> {
    let instance = instance.unwrap_or_else(|| format!("{}:{}", hostname(), spec.port));
    let mut registering = registry.register(service, instance, address, spec.port);
    if let Some(check) = spec.check()? {
        registering = registering.check(check);
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let Some((program, rest)) = command.split_first() else { return Err(no_check().into()) };
    let registered = spec.describe(registering).await.map_err(failure)?;
    let spawned = tokio::process::Command::new(program)
        .args(rest)
        .env("TENURE_SERVICE_TOKEN", registered.token().to_string())
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            registered.deregister().await.map_err(failure)?;
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let code = if missing { exit::NO_SUCH_COMMAND } else { exit::NOT_EXECUTABLE };
            return Err(Failure::new(code, format!("cannot run {}: {error}", program.display())).into());
        }
    };
    let mut registered = Some(registered);
    loop {
        let signal = tokio::select! {
            status = child.wait() => {
                let status = status?;
                if let Some(registered) = registered.take() {
                    told(registered.deregister().await);
                }
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(exit::FAILURE)));
            }
            _ = terminate.recv() => Signal::TERM,
            _ = interrupt.recv() => Signal::INT,
        };
        // Callers go elsewhere first.
        if let Some(registered) = registered.take() {
            told(registered.deregister().await);
        }
        if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            // It may have ended in this moment, which is all that was wanted.
            let _ = kill_process(pid, signal);
        }
    }
}

/// The command goes on, or has ended, whatever became of this.
fn told(result: Result<(), tenure_client::Error>) {
    if let Err(error) = result {
        err!("warning: the instance was not deregistered: {error}");
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn print_services(services: &[ServiceSummary], output: Output) {
    if output == Output::Json {
        out!("{}", Value::from(services.iter().map(service_document).collect::<Vec<_>>()));
        return;
    }
    let row = |one: &ServiceSummary| {
        let guard = match (one.guard_percent, one.guarded) {
            (0, _) => "-".to_owned(),
            (percent, false) => format!("{percent}%"),
            (percent, true) => format!("{percent}%, ON"),
        };
        let counts = [one.passing, one.warning, one.critical, one.draining].map(|count| count.to_string());
        [vec![one.service.clone()], counts.to_vec(), vec![guard]].concat()
    };
    let rows: Vec<_> = services.iter().map(row).collect();
    print_table(&["SERVICE", "PASSING", "WARNING", "CRITICAL", "DRAINING", "GUARD"], &rows);
}

fn print_instances(found: &ServiceInstances, output: Output) {
    if output == Output::Json {
        let instances: Vec<_> = found.instances.iter().map(document).collect();
        out!("{}", json!({ "index": found.index.to_string(), "guarded": found.guarded, "instances": instances }));
        return;
    }
    let rows: Vec<_> = found.instances.iter().map(row).collect();
    print_table(&["INSTANCE", "ADDRESS", "HEALTH", "WEIGHT", "TAGS", "TOKEN", "WHY"], &rows);
    if found.guarded {
        out!("the guard is on: too many turned critical together, so they are kept");
    }
}

fn row(one: &ServiceInstance) -> Vec<String> {
    let health = if one.kept { format!("{}, kept", one.health) } else { one.health.to_string() };
    vec![
        one.instance.clone(),
        one.authority(),
        health,
        one.weight.to_string(),
        one.tags.join(","),
        one.token.to_string(),
        one.why.clone(),
    ]
}

/// 64-bit numbers are text in JSON, as on the HTTP face.
fn document(one: &ServiceInstance) -> Value {
    json!({
        "instance": one.instance,
        "token": one.token.to_string(),
        "address": one.address,
        "port": one.port,
        "tags": one.tags,
        "meta": one.meta,
        "weight": one.weight,
        "health": one.health.to_string(),
        "why": one.why,
        "kept": one.kept,
        "session": one.session.to_string(),
        "revision": one.revision.to_string(),
    })
}

fn service_document(one: &ServiceSummary) -> Value {
    json!({
        "service": one.service,
        "index": one.index.to_string(),
        "passing": one.passing,
        "warning": one.warning,
        "critical": one.critical,
        "draining": one.draining,
        "guard_percent": one.guard_percent,
        "guarded": one.guarded,
    })
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}
