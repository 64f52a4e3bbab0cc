//! What the commands share: where the server is, how to print, and how a failure becomes words and an exit code.
//!
//! Exit codes are a contract that scripts rely on; the table is [`exit`]. A failure is one line that starts with `error:`, then,
//! where there is something to do about it, one that starts with `hint:`. Both go to standard error.
//!
//! Nothing here fails because nobody reads it: `out!` ends the process quietly when the reader of standard output has gone, as `head` does to what it
//! reads, and `err!` goes on, for a command may be watched over or a job be in work.

use std::fmt;
use std::io::{ErrorKind, Read as _, StdoutLock, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use tenure_client::{Client, ClientOptions, Code, Error, Outcome};

/// A line to standard output, of a command that only prints.
macro_rules! out {
    () => { $crate::common::print_line(format_args!("")) };
    ($($text:tt)*) => { $crate::common::print_line(format_args!($($text)*)) };
}

/// A line to standard error, if somebody reads it.
macro_rules! err {
    ($($text:tt)*) => { $crate::common::tell_line(format_args!($($text)*)) };
}

/// Standard output, of a command that only prints: the process ends when its reader has gone. What was asked for has been done by then.
pub(crate) struct Stdout(StdoutLock<'static>);

pub(crate) fn stdout() -> Stdout {
    Stdout(std::io::stdout().lock())
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        end_if_unread(self.0.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        end_if_unread(self.0.flush())
    }
}

fn end_if_unread<T>(written: std::io::Result<T>) -> std::io::Result<T> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written,
    }
}

pub(crate) fn print_line(text: fmt::Arguments<'_>) {
    if let Err(error) = writeln!(stdout(), "{text}") {
        print_failure(&format!("standard output: {error}"), None);
        std::process::exit(exit::FAILURE.into());
    }
}

pub(crate) fn tell_line(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Exit codes of the command's own failures, by the error codes of the protocol.
pub(crate) mod exit {
    /// Anything without a number of its own; also a conflict as `flock -n` and `-w` tell it.
    pub(crate) const FAILURE: u8 = 1;
    pub(crate) const CONFLICT: u8 = 10;
    pub(crate) const DEADLOCK: u8 = 11;
    pub(crate) const FENCED: u8 = 12;
    pub(crate) const SESSION_EXPIRED: u8 = 13;
    pub(crate) const IN_FLIGHT: u8 = 14;
    pub(crate) const MISMATCH: u8 = 15;
    pub(crate) const NEEDS_RECONCILE: u8 = 16;
    pub(crate) const COMPACTED: u8 = 17;
    pub(crate) const QUOTA: u8 = 18;
    pub(crate) const NOT_FOUND: u8 = 19;
    pub(crate) const CANCELLED: u8 = 20;
    /// It has run, and its result was too large to be kept.
    pub(crate) const NOT_RETAINED: u8 = 21;
    /// Wrong use: flags, names, sizes (EX_USAGE).
    pub(crate) const USAGE: u8 = 64;
    /// A backup is damaged, or of another format (EX_DATAERR).
    pub(crate) const DAMAGED: u8 = 65;
    /// The server cannot be reached, or has no majority (EX_UNAVAILABLE).
    pub(crate) const UNAVAILABLE: u8 = 69;
    /// The lock was lost while the command ran.
    pub(crate) const LOST: u8 = 76;
    pub(crate) const DENIED: u8 = 77;
    /// The command was found but could not be started, as a shell tells it.
    pub(crate) const NOT_EXECUTABLE: u8 = 126;
    /// There is no such command, as a shell tells it.
    pub(crate) const NO_SUCH_COMMAND: u8 = 127;
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Table,
    /// One JSON document.
    Json,
}

/// Connection flags, named as etcdctl's so that scripts carry over.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Common {
    /// Members to talk to, as host:port, comma separated
    #[arg(
        long,
        env = "TENURE_ENDPOINTS",
        global = true,
        value_delimiter = ',',
        default_value = "127.0.0.1:2379",
        value_name = "HOST:PORT,..."
    )]
    pub(crate) endpoints: Vec<String>,
    /// How long one request may take in all, retries included
    #[arg(
        long,
        env = "TENURE_COMMAND_TIMEOUT",
        global = true,
        default_value = "5s",
        value_name = "DURATION",
        value_parser = duration
    )]
    pub(crate) command_timeout: Duration,
}

/// `-o json`. Flattened into each command that prints an answer; not global, because `tenure lock -o` is flock's `--close`.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct OutputArg {
    /// How to print answers
    #[arg(long, short = 'o', value_enum, default_value = "table", value_name = "FORMAT")]
    pub(crate) output: Output,
}

impl Common {
    /// A client for these endpoints. It dials when it is first used, so an unreachable server is told by the first call.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        let options = ClientOptions::default().timeout(self.command_timeout);
        Client::with_options(&self.endpoints, options).map_err(Failure::from)
    }
}

/// A failure of the command itself: what happened, what to do about it, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: u8,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: u8, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(exit::USAGE, message)
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What is known better here; else it keeps the hint that it has.
    #[must_use]
    pub(crate) fn hint_if(self, hint: Option<&str>) -> Self {
        match hint {
            Some(hint) => self.hint(hint),
            None => self,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { exit: exit_of(&error), message: error.to_string(), hint: hint_for(&error) }
    }
}

/// The exit code of a client error.
pub(crate) fn exit_of(error: &Error) -> u8 {
    match error {
        Error::Refused(problem) => exit_of_code(problem.code),
        Error::Unknown { .. } | Error::NotApplied { .. } | Error::Unavailable { .. } => exit::UNAVAILABLE,
        Error::Lost(_) => exit::LOST,
        Error::Invalid(_) => exit::USAGE,
        Error::Protocol(_) => exit::FAILURE,
    }
}

fn exit_of_code(code: Code) -> u8 {
    match code {
        Code::Held | Code::TimeoutWaiting => exit::FAILURE,
        Code::Conflict | Code::Duplicate => exit::CONFLICT,
        Code::Deadlock => exit::DEADLOCK,
        Code::Fenced => exit::FENCED,
        Code::SessionExpired => exit::SESSION_EXPIRED,
        Code::InFlight => exit::IN_FLIGHT,
        Code::Mismatch => exit::MISMATCH,
        Code::NeedsReconcile => exit::NEEDS_RECONCILE,
        Code::Compacted => exit::COMPACTED,
        Code::Quota | Code::RateLimited => exit::QUOTA,
        Code::NoQuorum => exit::UNAVAILABLE,
        Code::TooLarge | Code::Invalid => exit::USAGE,
        Code::Unauthenticated | Code::Denied => exit::DENIED,
        Code::NotFound => exit::NOT_FOUND,
        Code::Cancelled => exit::CANCELLED,
        Code::ResultNotRetained => exit::NOT_RETAINED,
        // `Other`, and what a newer service may say.
        _ => exit::FAILURE,
    }
}

fn hint_for(error: &Error) -> Option<String> {
    let hint = match error {
        Error::Unavailable { .. } => {
            "is `tenure serve` running there? --endpoints or TENURE_ENDPOINTS say where to look"
        }
        Error::Unknown { .. } => "the change may or may not have happened: read before you try again",
        Error::Refused(problem) => match problem.code {
            Code::Fenced => {
                "what this token was granted for is over, or was never granted: repeating with it never succeeds"
            }
            Code::Held | Code::TimeoutWaiting => "wait longer with --wait, or ask `tenure session list` who is alive",
            Code::SessionExpired => "if it was yours, what it held is free now: make a new session and start over",
            Code::Compacted => "start again from a fresh read",
            Code::NoQuorum if problem.outcome == Outcome::Unknown => {
                "the change may or may not have happened: read before you try again"
            }
            Code::NoQuorum => "nothing was changed; try again when a majority of the members is back",
            Code::Mismatch => "use a new request id for a different request",
            _ => return None,
        },
        _ => return None,
    };
    Some(hint.to_owned())
}

/// Of a request that carried the token of a lock.
pub(crate) fn fenced_by_lock(error: Error) -> Failure {
    let hint = error.problem().filter(|problem| problem.code == Code::Fenced).map(|problem| match problem.holder {
        Some(_) => {
            "another owner has taken over since: stop, and let whoever holds the lock now do the work. Repeating with this token never succeeds"
        }
        None => {
            "the lock was lost or freed since this token was granted: stop, and take it anew. Repeating with this token never succeeds"
        }
    });
    Failure::from(error).hint_if(hint)
}

/// Prints a failure and gives its exit code. Errors that are no [`Failure`] get the code of the client error they hold, else 1.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        print_failure(&failure.message, failure.hint.as_deref());
        return ExitCode::from(failure.exit);
    }
    if let Some(client) = error.downcast_ref::<Error>() {
        print_failure(&client.to_string(), hint_for(client).as_deref());
        return ExitCode::from(exit_of(client));
    }
    print_failure(&format!("{error:#}"), None);
    ExitCode::from(exit::FAILURE)
}

/// Prints an error and a hint to standard error.
pub(crate) fn print_failure(message: &str, hint: Option<&str>) {
    err!("error: {message}");
    if let Some(hint) = hint {
        err!("hint: {hint}");
    }
}

/// A length of time in JSON; the longest there is where it is too long for that.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Reads a duration such as `15s`, `500ms`, `1m30s`, `2h`, or a plain number of seconds as `flock -w` takes it. Anything below a millisecond but zero
/// is a millisecond: it is sent in whole ones, and zero often means something else.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration: write 15s, 500ms, 1m30s or a number of seconds");
    let time = |seconds: f64| {
        let time = Duration::try_from_secs_f64(seconds).ok()?;
        Some(if seconds > 0.0 { time.max(Duration::from_millis(1)) } else { time })
    };
    if let Ok(seconds) = text.parse::<f64>() {
        return time(seconds).ok_or_else(wrong);
    }
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|at| *at > 0).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let factor = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3_600.0,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        total = time(number * factor).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
        rest = tail;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// A name with a value.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// What is to be stored: the argument, or standard input for `-`.
pub(crate) fn payload(text: String) -> std::io::Result<Vec<u8>> {
    if text != "-" {
        return Ok(text.into_bytes());
    }
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes rows under their headings in columns as wide as their widest cell.
pub(crate) fn print_table(headings: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
            .max(headings[column].len())
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        out!("{}", padded.join("  ").trim_end());
    };
    line(headings.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_exit() {
        let table = include_str!("../../../tests/errors.txt");
        for row in table.lines().filter(|line| !line.starts_with('#')) {
            let row: Vec<_> = row.split_whitespace().collect();
            let [code, .., exit, _] = row[..] else { panic!("a row of the table: {row:?}") };
            assert_eq!(exit_of_code(Code::from_name(code)).to_string(), exit, "{code}");
        }
        assert_eq!(exit_of_code(Code::Other), exit::FAILURE);
    }

    #[test]
    fn durations_are_read_as_people_and_flock_write_them() {
        assert_eq!(duration("15s"), Ok(Duration::from_secs(15)));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2.5"), Ok(Duration::from_millis(2_500)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(
            duration("0.5ms"),
            Ok(Duration::from_millis(1)),
            "it never becomes zero, which means something else"
        );
        assert_eq!(duration("0.0000000001"), Ok(Duration::from_millis(1)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        let much = "18446744073709550000s";
        for wrong in ["", "s", "15x", "-1", "1s2", "soon", "nan", &format!("{much}{much}")] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
