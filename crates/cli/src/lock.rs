//! `tenure lock NAME -- command`: runs a command only while its lock is held.
//!
//! Promises. The command starts only under a grant, with the fencing token in its environment. When the lease cannot be renewed, its process
//! group is warned before the local deadline and killed at it, whether or not the server can be asked; a supervisor that was frozen kills
//! before it does anything else. If the supervisor itself is killed, the kernel kills the command (Linux).
//! Not promised. A machine that was frozen as a whole runs the command for a moment before the supervisor gets to kill it, and a
//! process that leaves the group is out of reach. So let the write carry the token: `tenure kv put KEY VALUE --require-lock NAME:TOKEN`.
//!
//! One plain thread, the warden, starts the command, owns every signal to it and looks at the clock; it depends on no async task.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{ExitCode, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use clap::{Args, ValueEnum};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde_json::{Value, json};
use tenure_client::{BootTime, Code, Error, LockGuard, LockInfo, LockMode, OnDeadlock, Session};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::common::{Common, Failure, Output, duration, exit, millis, print_failure, print_table};

/// The longest time that the warden sleeps. Timers stand still while the machine is suspended, so this is how late a kill may be then.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long freeing the lock of a command that has ended may hold up its exit code.
pub(crate) const GOODBYE: Duration = Duration::from_secs(2);

/// flags as flock(1), where it has them
#[derive(Debug, Args)]
#[command(
    after_help = "The command's environment: TENURE_LOCK, TENURE_TOKEN, TENURE_SLOTS, TENURE_SESSION, TENURE_DEADLINE_MS, TENURE_ENDPOINTS,\n\
and for scripts written for others: ETCD_LOCK_KEY, ETCD_LOCK_REV, CONSUL_LOCK_HELD.\n\n\
Exit code: the command's own, or 128 + the signal that ended it; 1 (-E) when the lock is held by another;\n\
76 (--lost-code) when the lock was lost while the command ran; 69 when no server can be reached; 64 wrong use;\n\
126, 127 when the command cannot be started.\n\n\
Without a command: --show tells who holds it, who waits and what happened; --force-release takes it away; --resize changes its permits.\n\n\
Examples: tenure lock nightly-report --wait 5m -- ./report.sh\n\
          tenure lock gpu --permits 1 --of 4 -- ./train.sh    ($TENURE_SLOTS says which)\n\
          tenure lock nightly-report --show\n\
          tenure lock nightly-report --force-release --token 812 --reason 'its machine burns'"
)]
pub(crate) struct LockArgs {
    /// Name of the lock
    name: String,
    /// The lock ends this long after the last sign of life
    #[arg(long, default_value = "15s", value_name = "DURATION", value_parser = duration)]
    ttl: Duration,
    /// Wait at most this long for the lock
    #[arg(
        long,
        short = 'w',
        visible_alias = "timeout",
        default_value = "30s",
        value_name = "DURATION",
        value_parser = duration,
        conflicts_with = "nonblock"
    )]
    wait: Duration,
    /// Do not wait: fail at once if another holds it
    #[arg(long, short = 'n', visible_alias = "nb")]
    nonblock: bool,
    /// Hold it beside other readers
    #[arg(long, short = 's', conflicts_with = "exclusive")]
    shared: bool,
    /// Take so many of its permits (needs --of)
    #[arg(long, value_name = "K", requires = "of", conflicts_with_all = ["shared", "exclusive"])]
    permits: Option<u32>,
    /// How many permits the lock has; fixed by the first who asks
    #[arg(long, value_name = "N", requires = "permits")]
    of: Option<u32>,
    /// Be served before all who wait with a lower priority
    #[arg(long, value_name = "NUMBER", default_value_t = 0, allow_negative_numbers = true, hide_default_value = true)]
    priority: i32,
    /// Who asks, for the search for deadlocks and for people [default: this process alone]
    #[arg(long, value_name = "NAME")]
    owner: Option<String>,
    /// If the lock is lost, keep it from everybody but the same --owner for so long, at most 60s
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    lock_delay: Option<Duration>,
    /// Keep the lock for so long, though the command ends sooner
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    min_hold: Option<Duration>,
    /// Whose wait ends where owners would wait for one another for ever
    #[arg(long, value_enum, default_value = "newcomer", value_name = "POLICY")]
    on_deadlock: Victim,
    /// Show who holds the lock, who waits, and what happened to it
    #[arg(long, conflicts_with_all = ["force_release", "resize", "command"])]
    show: bool,
    /// Take the lock away from whoever holds it under --token
    #[arg(long, requires = "token", requires = "reason", conflicts_with_all = ["resize", "command"])]
    force_release: bool,
    /// The token of the grant to take away
    #[arg(long, requires = "force_release")]
    token: Option<u64>,
    /// Why it is taken away; kept among the events of the lock
    #[arg(long, requires = "force_release")]
    reason: Option<String>,
    /// Change how many permits the lock has
    #[arg(long, value_name = "N", conflicts_with = "command")]
    resize: Option<u32>,
    /// How to print answers to these
    #[arg(long, value_enum, default_value = "table", value_name = "FORMAT")]
    output: Output,
    /// Hold it alone, which is the default
    #[arg(long, short = 'x')]
    exclusive: bool,
    /// Exit code when another holds the lock
    #[arg(long, short = 'E', value_name = "CODE", default_value_t = exit::FAILURE)]
    conflict_exit_code: u8,
    /// Exit code when the lock was lost while the command ran
    #[arg(long, visible_alias = "lost-exit-code", value_name = "CODE", default_value_t = exit::LOST)]
    lost_code: u8,
    /// How long before the deadline a command whose lock cannot be renewed is warned [default: a tenth of the ttl, at least 200ms]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    grace: Option<Duration>,
    /// The signal of that warning
    #[arg(long, value_enum, default_value = "term", value_name = "SIGNAL")]
    warn_signal: WarnSignal,
    /// Free the lock when the command itself ends, though processes it started may still run
    #[arg(long, short = 'o')]
    close: bool,
    /// Let the command use the terminal: it stays in the terminal's process group, and only it is stopped on loss, not what it started
    #[arg(long)]
    foreground: bool,
    /// Set in the process that becomes the command: the supervisor's process id
    #[arg(long, hide = true, value_name = "PID")]
    child_of: Option<i32>,
    /// The command and its arguments
    #[arg(last = true, required_unless_present_any = ["show", "force_release", "resize"], value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Victim {
    /// The one that asks
    Newcomer,
    /// The one with the lowest priority
    Lowest,
    /// The one that has held or waited for the shortest time
    Youngest,
}

impl Victim {
    fn policy(self) -> OnDeadlock {
        match self {
            Self::Newcomer => OnDeadlock::Newcomer,
            Self::Lowest => OnDeadlock::LowestPriority,
            Self::Youngest => OnDeadlock::Youngest,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum WarnSignal {
    Term,
    Int,
    Hup,
    Quit,
    Usr1,
    Usr2,
}

impl WarnSignal {
    pub(crate) fn number(self) -> Signal {
        match self {
            Self::Term => Signal::TERM,
            Self::Int => Signal::INT,
            Self::Hup => Signal::HUP,
            Self::Quit => Signal::QUIT,
            Self::Usr1 => Signal::USR1,
            Self::Usr2 => Signal::USR2,
        }
    }
}

pub(crate) async fn run(common: &Common, args: LockArgs) -> anyhow::Result<ExitCode> {
    if let Some(supervisor) = args.child_of {
        return Err(become_command(supervisor, &args.command).into());
    }
    check(&args)?;
    if args.command.is_empty() {
        administer(common, &args).await?;
        return Ok(ExitCode::SUCCESS);
    }
    // Before anything is asked for, so that no signal finds a lock without a supervisor.
    let mut signals = Signals::catch()?;
    let client = common.client()?;
    let session = client
        .session()
        .ttl(args.ttl)
        .name(format!("tenure lock {}", args.name))
        .metadata("host", hostname())
        .metadata("pid", std::process::id().to_string())
        .metadata("command", brief(&args.command))
        .await
        .map_err(Failure::from)?;
    let guard = tokio::select! {
        guard = acquire(&session, &args) => guard,
        signal = signals.next_deadly() => {
            end(session).await;
            return Ok(ExitCode::from(128 + u8::try_from(signal.as_raw()).unwrap_or(0)));
        }
    };
    match guard {
        Ok(guard) => supervise(common, &args, guard, signals).await,
        Err(failure) => {
            end(session).await;
            Err(failure.into())
        }
    }
}

fn check(args: &LockArgs) -> Result<(), Failure> {
    if let (Some(permits), Some(of)) = (args.permits, args.of)
        && !(1..=of.min(10_000)).contains(&permits)
    {
        return Err(Failure::usage("--permits is 1 to --of, and --of is at most 10,000"));
    }
    if args.lock_delay.is_some_and(|delay| delay > Duration::from_secs(60)) {
        return Err(Failure::usage("--lock-delay is at most 60s"));
    }
    if args.name.is_empty() || args.name.len() > 1_024 {
        return Err(Failure::usage("the name of a lock has 1 to 1,024 bytes"));
    }
    if args.ttl < Duration::from_secs(1) {
        return Err(Failure::usage(
            "--ttl is at least 1s: a shorter lease would be lost at every hiccup of the machine",
        ));
    }
    if args.grace.is_some_and(|grace| grace > args.ttl / 2) {
        return Err(Failure::usage("--grace is at most half of --ttl")
            .hint("a command that needs longer to stop needs a longer --ttl"));
    }
    Ok(())
}

async fn acquire(session: &Session, args: &LockArgs) -> Result<LockGuard, Failure> {
    let mut acquire = session.lock(&args.name).priority(args.priority).on_deadlock(args.on_deadlock.policy());
    if args.shared {
        acquire = acquire.shared();
    }
    if let (Some(permits), Some(of)) = (args.permits, args.of) {
        acquire = acquire.permits(permits, of);
    }
    if let Some(owner) = &args.owner {
        acquire = acquire.owner(owner);
    }
    acquire = acquire.lock_delay(args.lock_delay.unwrap_or_default()).min_hold(args.min_hold.unwrap_or_default());
    let acquire = if args.nonblock || args.wait.is_zero() { acquire } else { acquire.wait(args.wait) };
    acquire.await.map_err(|error| match error.code() {
        Some(Code::Held | Code::TimeoutWaiting) => held(args, &error),
        _ => Failure::from(error),
    })
}

fn held(args: &LockArgs, error: &Error) -> Failure {
    let failure = Failure::new(args.conflict_exit_code, error.to_string());
    let holder = error.problem().and_then(|problem| problem.holder.as_ref());
    let who = holder.map(|holder| format!("`tenure session get {}` tells who holds it", holder.session));
    let wait = if args.nonblock { "--wait 30s waits for it" } else { "--wait sets how long to wait" };
    failure.hint(who.map_or_else(|| wait.to_owned(), |who| format!("{who}; {wait}")))
}

/// What is done with a lock without holding it.
async fn administer(common: &Common, args: &LockArgs) -> Result<(), Failure> {
    let client = common.client().map_err(|error| Failure::usage(error.to_string()))?;
    if let (Some(token), Some(reason)) = (args.token, &args.reason) {
        let taken = client.force_release(&args.name, token, reason).await.map_err(|error| {
            let other = (error.code() == Some(Code::Fenced))
                .then(|| format!("`tenure lock {} --show` tells who holds it, under which token", args.name));
            Failure::from(error).hint_if(other.as_deref())
        })?;
        match args.output {
            Output::Json => out!("{}", json!({ "name": args.name, "token": token.to_string(), "taken": taken })),
            Output::Table => out!("took lock `{}` away from {taken} under token {token}", args.name),
        }
        return Ok(());
    }
    if let Some(permits) = args.resize {
        let before = client.resize_lock(&args.name, permits).await?;
        match args.output {
            Output::Json => out!("{}", json!({ "name": args.name, "of": permits, "before": before })),
            Output::Table => out!("lock `{}` has {permits} permits, {before} before", args.name),
        }
        return Ok(());
    }
    let info = client.lock_info(&args.name).await?;
    match args.output {
        Output::Json => out!("{}", document(&info)),
        Output::Table => print_lock(&info),
    }
    Ok(())
}

fn mode_name(mode: LockMode) -> &'static str {
    match mode {
        LockMode::Exclusive => "exclusive",
        LockMode::Shared => "shared",
        LockMode::Permits => "permits",
    }
}

fn print_lock(info: &LockInfo) {
    let free = if info.permits > 0 {
        format!(", {} of {} permits free", info.permits_free, info.permits)
    } else {
        String::new()
    };
    out!("lock `{}`: held by {}{free}, {} waiting", info.name, info.holder_count, info.waiter_count);
    let holders = info.holders.iter().map(|holder| {
        let for_ = if holder.kept.is_zero() { seconds(holder.held) } else { format!("kept {}", seconds(holder.kept)) };
        let slots: Vec<String> = holder.slots.iter().map(u32::to_string).collect();
        let mode = mode_name(holder.mode).to_owned();
        let (token, session) = (holder.token.to_string(), holder.session.to_string());
        let ttl = seconds(holder.remaining);
        vec![token, mode, slots.join(" "), session, holder.owner.clone(), holder.session_name.clone(), for_, ttl]
    });
    let holders: Vec<_> = holders.collect();
    if !holders.is_empty() {
        print_table(&["TOKEN", "MODE", "SLOTS", "SESSION", "OWNER", "NAME", "HELD", "TTL LEFT"], &holders);
    }
    let waiters = info.waiters.iter().map(|waiter| {
        let mode = mode_name(waiter.mode).to_owned();
        let (place, session) = (waiter.position.to_string(), waiter.session.to_string());
        vec![place, mode, session, waiter.owner.clone(), waiter.priority.to_string(), seconds(waiter.waited)]
    });
    let waiters: Vec<_> = waiters.collect();
    if !waiters.is_empty() {
        print_table(&["PLACE", "MODE", "SESSION", "OWNER", "PRIORITY", "WAITED"], &waiters);
    }
    let events = info.events.iter().map(|event| {
        let (ago, token, session) = (seconds(event.ago), event.token.to_string(), event.session.to_string());
        vec![ago, event.kind.clone(), token, session, event.owner.clone(), seconds(event.after), event.detail.clone()]
    });
    let events: Vec<_> = events.collect();
    if !events.is_empty() {
        print_table(&["AGO", "EVENT", "TOKEN", "SESSION", "OWNER", "AFTER", "DETAIL"], &events);
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1}s", time.as_secs_f64())
}

fn document(info: &LockInfo) -> Value {
    let holders = info.holders.iter().map(|holder| {
        json!({
            "token": holder.token.to_string(),
            "session": holder.session.to_string(),
            "owner": holder.owner,
            "mode": mode_name(holder.mode),
            "slots": holder.slots,
            "depth": holder.depth,
            "held_ms": millis(holder.held),
            "kept_ms": millis(holder.kept),
            "remaining_ms": millis(holder.remaining),
            "session_name": holder.session_name,
            "metadata": holder.metadata,
        })
    });
    let waiters = info.waiters.iter().map(|waiter| {
        json!({
            "position": waiter.position,
            "session": waiter.session.to_string(),
            "owner": waiter.owner,
            "mode": mode_name(waiter.mode),
            "priority": waiter.priority,
            "waited_ms": millis(waiter.waited),
        })
    });
    let events = info.events.iter().map(|event| {
        json!({
            "kind": event.kind,
            "ago_ms": millis(event.ago),
            "token": event.token.to_string(),
            "session": event.session.to_string(),
            "owner": event.owner,
            "after_ms": millis(event.after),
            "detail": event.detail,
        })
    });
    json!({
        "name": info.name,
        "permits": info.permits,
        "permits_free": info.permits_free,
        "holder_count": info.holder_count,
        "holders": holders.collect::<Vec<_>>(),
        "waiter_count": info.waiter_count,
        "waiters": waiters.collect::<Vec<_>>(),
        "events": events.collect::<Vec<_>>(),
    })
}

/// How a command is watched over while a session lives.
pub(crate) struct Supervision {
    pub(crate) session: Session,
    /// How long before the deadline a command whose session cannot be renewed is warned.
    pub(crate) grace: Duration,
    pub(crate) warning: Signal,
    pub(crate) foreground: bool,
    /// Until the processes that the command leaves behind have ended too.
    pub(crate) hold_for_group: bool,
}

/// The grace that nobody named: a tenth of the ttl, at least 200 ms.
pub(crate) fn usual_grace(session: &Session) -> Duration {
    (session.ttl() / 10).max(Duration::from_millis(200))
}

/// Runs a command of [`tied`] under a warden, and passes signals on to it.
pub(crate) async fn run_supervised(
    supervision: Supervision,
    command: std::process::Command,
    signals: &mut Signals,
) -> anyhow::Result<Ended> {
    let (events, inbox) = channel();
    let watch = Watch { supervision, events: events.clone(), inbox };
    let (done, mut ended) = tokio::sync::oneshot::channel();
    // Not a thread of the runtime's pool: the kernel kills the command when the thread that started it ends.
    std::thread::Builder::new().name("warden".to_owned()).spawn(move || done.send(watch.run(command)))?;
    loop {
        tokio::select! {
            ended = &mut ended => break ended?,
            signal = signals.next() => {
                // The warden has gone only if it is about to answer.
                let _ = events.send(Event::Signal(signal));
            }
        }
    }
}

/// Runs the command under the lock and frees it afterwards.
async fn supervise(
    common: &Common,
    args: &LockArgs,
    guard: LockGuard,
    mut signals: Signals,
) -> anyhow::Result<ExitCode> {
    let session = guard.session();
    let supervision = Supervision {
        session: session.clone(),
        grace: args.grace.unwrap_or_else(|| usual_grace(session)),
        warning: args.warn_signal.number(),
        foreground: args.foreground,
        hold_for_group: !args.close && !args.foreground,
    };
    let command = command(common, args, &guard)?;
    let ended = run_supervised(supervision, command, &mut signals).await?;
    conclude(args, guard, ended).await
}

/// Frees the lock and tells what happened.
async fn conclude(args: &LockArgs, guard: LockGuard, ended: Ended) -> anyhow::Result<ExitCode> {
    let (name, token, session) = (guard.name().to_owned(), guard.token(), guard.session().clone());
    if let Some(why) = ended.stopped {
        drop(guard);
        // Only a courtesy to those who wait: the command is gone, so the lock may go now.
        end(session).await;
        print_failure(
            &format!("lock `{name}` was lost while the command ran (token {token}): {why}"),
            Some(
                "the command was stopped; whoever holds the lock now has a higher token, and writes that carry this one are refused",
            ),
        );
        return Ok(ExitCode::from(args.lost_code));
    }
    let released = timeout(GOODBYE, guard.release()).await;
    end(session).await;
    match released {
        Ok(Err(error))
            if matches!(error, Error::Lost(_)) || matches!(error.code(), Some(Code::Fenced | Code::SessionExpired)) =>
        {
            print_failure(
                &format!("lock `{name}` was lost before the command ended (token {token}): {error}"),
                Some(
                    "another may have run beside its last moments: check what it wrote, and let writes carry the token",
                ),
            );
            return Ok(ExitCode::from(args.lost_code));
        }
        Ok(Err(error)) => err!("warning: the lock was not freed ({error}); it ends with its ttl"),
        Err(_) => err!("warning: the lock was not freed (no answer); it ends with its ttl"),
        Ok(Ok(())) => {}
    }
    Ok(ExitCode::from(code_of(ended.status)))
}

pub(crate) async fn end(session: Session) {
    // If this does not get through, the ttl does it.
    let _ = timeout(GOODBYE, session.end()).await;
}

pub(crate) fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(exit::FAILURE)
}

/// The command, to be started by way of this program so that it dies with its supervisor.
pub(crate) fn tied(words: &[OsString], foreground: bool) -> Result<std::process::Command, Failure> {
    let (program, rest) = words.split_first().ok_or_else(|| Failure::usage("there is no command to run"))?;
    let mut command = if cfg!(target_os = "linux") {
        // Still this very program after an upgrade has replaced its file.
        let mut command = std::process::Command::new("/proc/self/exe");
        command.arg0("tenure").args(["lock", "--child-of", &std::process::id().to_string(), "child", "--"]).args(words);
        command
    } else {
        let mut command = std::process::Command::new(program);
        command.args(rest);
        command
    };
    if !foreground {
        command.process_group(0);
    }
    Ok(command)
}

/// The command with what it may want to know of its lock.
fn command(common: &Common, args: &LockArgs, guard: &LockGuard) -> Result<std::process::Command, Failure> {
    let mut command = tied(&args.command, args.foreground)?;
    let (name, token) = (guard.name(), guard.token().to_string());
    let slots = guard.slots().iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    command
        .env("TENURE_LOCK", name)
        .env("TENURE_TOKEN", &token)
        .env("TENURE_SLOTS", slots)
        .env("TENURE_SESSION", guard.session().id().to_string())
        .env("TENURE_DEADLINE_MS", guard.deadline().unix_ms().to_string())
        .env("TENURE_ENDPOINTS", common.endpoints.join(","))
        .env("ETCD_LOCK_KEY", name)
        .env("ETCD_LOCK_REV", &token)
        .env("CONSUL_LOCK_HELD", "true");
    Ok(command)
}

/// Runs in the child: asks the kernel to be killed when the supervisor dies, then becomes the command. Returns only on failure.
fn become_command(supervisor: i32, command: &[OsString]) -> Failure {
    #[cfg(target_os = "linux")]
    {
        if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
            return Failure::new(exit::FAILURE, format!("cannot tie the command to its supervisor: {error}"));
        }
        // The supervisor may have died before the wish was made.
        if rustix::process::getppid().map(Pid::as_raw_pid) != Some(supervisor) {
            return Failure::new(exit::LOST, "the supervisor of this command has gone");
        }
    }
    let Some((program, rest)) = command.split_first() else {
        return Failure::usage("there is no command to run");
    };
    let error = std::process::Command::new(program).args(rest).exec();
    let code = if error.kind() == std::io::ErrorKind::NotFound { exit::NO_SUCH_COMMAND } else { exit::NOT_EXECUTABLE };
    Failure::new(code, format!("cannot run {}: {error}", program.display()))
}

/// What the warden is told.
enum Event {
    /// The command has ended and waits to be collected.
    Exited,
    /// Somebody sent this to the supervisor.
    Signal(Signal),
}

/// How the command ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// Why it was stopped, if the lease made it so.
    pub(crate) stopped: Option<String>,
}

/// The warden's side: see the head of this file.
struct Watch {
    supervision: Supervision,
    events: Sender<Event>,
    inbox: Receiver<Event>,
}

impl Watch {
    fn run(self, mut command: std::process::Command) -> anyhow::Result<Ended> {
        // Starting takes time too, and there may have been a pause since the grant.
        self.supervision.session.check()?;
        let mut child = command
            .spawn()
            .map_err(|error| Failure::new(exit::NOT_EXECUTABLE, format!("cannot start the command: {error}")))?;
        let pid = Pid::from_child(&child);
        let target = if self.supervision.foreground { Target::Process(pid) } else { Target::Group(pid) };
        let events = self.events.clone();
        std::thread::Builder::new().name("exit".to_owned()).spawn(move || {
            await_exit(pid);
            let _ = events.send(Event::Exited);
        })?;
        let stopped = self.guard(target);
        let status = child.wait()?;
        let stopped = stopped.or_else(|| self.await_group(pid));
        Ok(Ended { status, stopped })
    }

    /// Watches over the running command; tells why it had to be stopped.
    fn guard(&self, target: Target) -> Option<String> {
        let (mut stopped, mut killed) = (None, false);
        loop {
            // First of all, at every turn: after a freeze this is the first thing that happens.
            if !killed && let Err(Error::Lost(reason)) = self.supervision.session.check() {
                target.send(Signal::KILL);
                (stopped, killed) = (Some(reason.to_string()), true);
            }
            let warn_in = self.warn_in();
            if stopped.is_none() && warn_in.is_zero() {
                self.warn(target);
                stopped = Some("the lease could not be renewed and its deadline was near".to_owned());
            }
            match self.inbox.recv_timeout(self.sleep(stopped.is_some())) {
                Ok(Event::Exited) => break,
                Ok(Event::Signal(signal)) if !killed => self.forward(target, signal),
                Ok(Event::Signal(_)) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
        if stopped.is_some() {
            // What the command left behind must not go on either.
            target.send(Signal::KILL);
        }
        stopped
    }

    fn warn_in(&self) -> Duration {
        self.supervision.session.deadline().since(BootTime::now()).saturating_sub(self.supervision.grace)
    }

    fn sleep(&self, warned: bool) -> Duration {
        let until = if warned { self.supervision.session.deadline().since(BootTime::now()) } else { self.warn_in() };
        // Never zero: a state that does not change must not become a busy loop.
        until.clamp(Duration::from_millis(1), LOOK_EVERY)
    }

    fn warn(&self, target: Target) {
        let left = self.supervision.session.deadline().since(BootTime::now());
        target.send(self.supervision.warning);
        // A stopped process acts on no other signal.
        target.send(Signal::CONT);
        tell(format!(
            "warning: the lock cannot be renewed; the command is asked to stop and is killed in {:.1} s",
            left.as_secs_f64()
        ));
    }

    fn forward(&self, target: Target, signal: Signal) {
        target.send(signal);
        if [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT].contains(&signal) {
            // A stopped process would act on it only when somebody continues it.
            target.send(Signal::CONT);
        }
        if signal == Signal::TSTP {
            // As the shell expects of what it stops. Nothing renews the lease now: whoever continues too late finds the command killed.
            let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
        }
    }

    /// Holds the lock until every process that the command left in its group has ended, as an inherited lock of flock(1) would be.
    fn await_group(&self, group: Pid) -> Option<String> {
        let mut told = !self.supervision.hold_for_group;
        while self.supervision.hold_for_group && rustix::process::test_kill_process_group(group).is_ok() {
            if let Err(Error::Lost(reason)) = self.supervision.session.check() {
                Target::Group(group).send(Signal::KILL);
                return Some(reason.to_string());
            }
            match self.inbox.recv_timeout(LOOK_EVERY) {
                Ok(Event::Signal(signal)) => self.forward(Target::Group(group), signal),
                _ if !told => {
                    tell(
                        "the command has ended; its lock is held until the processes it started have ended too (-o does not wait)"
                            .to_owned(),
                    );
                    told = true;
                }
                _ => {}
            }
        }
        None
    }
}

/// A line to standard error from a thread of its own: a pipe that nobody empties must not hold up who watches over a command.
pub(crate) fn tell(line: String) {
    // Without a thread it is left unsaid.
    let _ = std::thread::Builder::new().name("tell".to_owned()).spawn(move || err!("{line}"));
}

/// Whom signals go to.
#[derive(Clone, Copy)]
enum Target {
    Group(Pid),
    Process(Pid),
}

impl Target {
    fn send(self, signal: Signal) {
        // It may have ended in this moment, which is all that was wanted.
        let _ = match self {
            Self::Group(group) => rustix::process::kill_process_group(group, signal),
            Self::Process(pid) => rustix::process::kill_process(pid, signal),
        };
    }
}

/// Waits for the end of the command without collecting it, so that its id cannot become another process's while the warden may still send
/// signals to it.
fn await_exit(pid: Pid) {
    let wait = |options| {
        rustix::process::waitid(WaitId::Pid(pid), options | WaitIdOptions::NOWAIT | WaitIdOptions::EXITED)
            .ok()
            .flatten()
    };
    let first = wait(WaitIdOptions::STOPPED);
    let by_terminal = [Signal::TTIN, Signal::TTOU].map(|signal| Some(signal.as_raw()));
    if let Some(status) = first.filter(|status| status.stopped()) {
        if by_terminal.contains(&status.stopping_signal()) {
            tell(
                "warning: the command was stopped because it wants to use the terminal; --foreground lets it"
                    .to_owned(),
            );
        }
        wait(WaitIdOptions::EXITED);
    }
}

/// The signals that are passed on to the command.
pub(crate) struct Signals {
    sender: tokio::sync::mpsc::Sender<Signal>,
    receiver: tokio::sync::mpsc::Receiver<Signal>,
}

impl Signals {
    const ALL: [Signal; 9] = [
        Signal::TERM,
        Signal::INT,
        Signal::HUP,
        Signal::QUIT,
        Signal::USR1,
        Signal::USR2,
        Signal::TSTP,
        Signal::CONT,
        Signal::WINCH,
    ];

    pub(crate) fn catch() -> std::io::Result<Self> {
        let (sender, receiver) = tokio::sync::mpsc::channel(64);
        for number in Self::ALL {
            let mut stream = signal(SignalKind::from_raw(number.as_raw()))?;
            let sender = sender.clone();
            tokio::spawn(async move { while stream.recv().await.is_some() && sender.send(number).await.is_ok() {} });
        }
        Ok(Self { sender, receiver })
    }

    /// For a signal that nobody sent, and that the command should have all the same.
    pub(crate) fn sender(&self) -> tokio::sync::mpsc::Sender<Signal> {
        self.sender.clone()
    }

    async fn next(&mut self) -> Signal {
        match self.receiver.recv().await {
            Some(signal) => signal,
            None => std::future::pending().await,
        }
    }

    /// The next one that would have ended this program while there is no command yet.
    pub(crate) async fn next_deadly(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            match signal {
                Signal::CONT | Signal::WINCH => {}
                Signal::TSTP => {
                    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
                }
                signal => return signal,
            }
        }
    }
}

pub(crate) fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The beginning of the command line, for people who ask who holds a lock.
pub(crate) fn brief(command: &[OsString]) -> String {
    let words: Vec<_> = command.iter().map(|word| word.to_string_lossy()).collect();
    words.join(" ").chars().take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(code_of(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(code_of(ExitStatus::from_raw(15)), 143);
    }
}
