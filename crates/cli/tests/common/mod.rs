//! A server process for tests: the real binary on a free loopback port with a folder of its own. Both end with the test.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub(crate) const TENURE: &str = env!("CARGO_BIN_EXE_tenure");

/// An address that nobody else gets. It is below the ports that the system gives by itself: one of those would soon be given again, to a connection or to
/// a server of another test.
pub(crate) fn free_address() -> String {
    const PORTS: std::ops::Range<u32> = 10_000..30_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let is_free = |port: &u32| TcpListener::bind(format!("127.0.0.1:{port}")).is_ok();
    let count = PORTS.end - PORTS.start;
    let next = || {
        PORTS.start + std::process::id().wrapping_mul(97).wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % count
    };
    let port = std::iter::repeat_with(next).take(count as usize).find(is_free).expect("some port is free");
    format!("127.0.0.1:{port}")
}

pub(crate) fn wait_for(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !ready() {
        assert!(Instant::now() < until, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) struct Server {
    process: Child,
    pub(crate) address: String,
    pub(crate) data: PathBuf,
    pub(crate) folder: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        Self::start_in(folder, data, flags)
    }

    pub(crate) fn start_in(folder: tempfile::TempDir, data: PathBuf, flags: &[&str]) -> Self {
        let mut server = Self::begin_in(folder, data, flags);
        server.await_ready();
        server
    }

    /// One of several, which is ready only with the others.
    pub(crate) fn begin(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        Self::begin_in(folder, data, flags)
    }

    fn begin_in(folder: tempfile::TempDir, data: PathBuf, flags: &[&str]) -> Self {
        let address = free_address();
        let process = spawn(&address, &data, folder.path(), flags);
        Self { process, address, data, folder }
    }

    pub(crate) fn await_ready(&mut self) {
        let until = Instant::now() + Duration::from_secs(20);
        while !http(&self.address, "GET", "/readyz", "", b"").is_ok_and(|answer| answer.status == 200) {
            let ended = self.process.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended: {ended:?}\n{}", self.log());
            assert!(Instant::now() < until, "the server did not get ready\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGTERM, which must end in success, and the folder is free.
    pub(crate) fn stop(&mut self) {
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        let status = self.process.wait().unwrap();
        assert!(status.success(), "a clean stop: {status}\n{}", self.log());
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// The same folder and address again.
    pub(crate) fn start_again(&mut self, flags: &[&str]) {
        self.begin_again(flags);
        self.await_ready();
    }

    pub(crate) fn begin_again(&mut self, flags: &[&str]) {
        self.process = spawn(&self.address, &self.data, self.folder.path(), flags);
    }

    /// Waits until it has ended by itself, and gives the exit code and what it wrote.
    pub(crate) fn await_end(&mut self) -> (i32, String) {
        let until = Instant::now() + Duration::from_secs(20);
        let code = loop {
            match self.process.try_wait().unwrap() {
                Some(status) => break status.code(),
                None => assert!(Instant::now() < until, "it goes on, and should have ended\n{}", self.log()),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        (code.unwrap_or(-1), self.log())
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    /// What it wrote to standard error, in all of its lives.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    pub(crate) fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    pub(crate) fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Answer {
        http(&self.address, "POST", path, "content-type: application/json\r\n", body.as_ref()).unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        http(&self.address, "GET", path, "", b"").unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(address: &str, data: &Path, folder: &Path, flags: &[&str]) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).unwrap();
    Command::new(TENURE)
        .args(["serve", "--listen", address, "--data-dir"])
        .arg(data)
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// What a command printed, and its exit code.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) fn tenure(endpoints: &str, args: &[&str]) -> Said {
    tenure_fed(endpoints, args, "")
}

pub(crate) fn tenure_fed(endpoints: &str, args: &[&str], input: &str) -> Said {
    let mut process = Command::new(TENURE)
        .args(args)
        .env("TENURE_ENDPOINTS", endpoints)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = process.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
}

pub(crate) fn ok(endpoints: &str, args: &[&str]) -> String {
    let said = tenure(endpoints, args);
    assert_eq!(said.code, 0, "{args:?}: {}{}", said.out, said.err);
    said.out
}

pub(crate) fn json(endpoints: &str, args: &[&str]) -> Value {
    let text = ok(endpoints, &[args, &["-o", "json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?} printed no JSON ({e}): {text}"))
}

/// What `tenure serve` says when it does not start: exit code and standard error.
pub(crate) fn refused(data: &Path, flags: &[&str]) -> (i32, String) {
    let address = free_address();
    let mut command = Command::new(TENURE);
    command.args(["serve", "--data-dir"]).arg(data);
    if !flags.contains(&"--listen") {
        command.args(["--listen", &address]);
    }
    ended(command.args(flags))
}

/// Runs a command that must end by itself within ten seconds.
pub(crate) fn ended(command: &mut Command) -> (i32, String) {
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            process.kill().unwrap();
            process.wait().unwrap();
            panic!("it went on running, but should have refused: {command:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut text = String::new();
    process.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (status.code().unwrap_or(-1), text)
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// One HTTP/1.1 request on a connection of its own. `headers` are whole lines.
pub(crate) fn http(address: &str, method: &str, path: &str, headers: &str, body: &[u8]) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes())?;
    // A server may refuse a large body from its head and close: what it said is still to be read.
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| std::io::Error::other(format!("no HTTP answer: {text:?}")))?;
    Ok(Answer { status, body: body.to_owned() })
}
