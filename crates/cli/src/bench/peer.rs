//! The servers that are measured: started on free ports of loopback with temporary folders, stopped by their id.

use super::load::PUT;
use super::measure::rss_mib;
use super::rpc::Rpc;
use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tenure_wire::etcd::etcdserverpb as pb;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Tenure,
    Etcd,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tenure => "tenure",
            Self::Etcd => "etcd",
        }
    }
}

/// The programs of both kinds.
pub(crate) struct Programs {
    pub(crate) tenure: PathBuf,
    pub(crate) etcd: PathBuf,
}

impl Programs {
    fn of(&self, kind: Kind) -> PathBuf {
        match kind {
            Kind::Tenure => self.tenure.clone(),
            Kind::Etcd => self.etcd.clone(),
        }
    }
}

/// What a member is called and where it listens.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) name: String,
    port: u16,
    peer_port: u16,
}

impl Place {
    pub(crate) fn new(number: usize) -> Result<Self> {
        Ok(Self { name: format!("n{number}"), port: free_port()?, peer_port: free_port()? })
    }

    /// Where the other members reach it.
    pub(crate) fn peer(&self) -> String {
        format!("127.0.0.1:{}", self.peer_port)
    }
}

/// The flags by which a member starts with all the others at once.
pub(crate) fn together(kind: Kind, places: &[Place]) -> Vec<String> {
    let members = |scheme: &str| {
        places.iter().map(|p| format!("{}={scheme}{}", p.name, p.peer())).collect::<Vec<String>>().join(",")
    };
    match kind {
        Kind::Tenure if places.len() == 1 => Vec::new(),
        Kind::Tenure => vec!["--cluster".to_owned(), members("")],
        Kind::Etcd => vec!["--initial-cluster".to_owned(), members("http://")],
    }
}

/// A running server. Dropping it kills the process and removes its folder.
pub(crate) struct Peer {
    child: Child,
    kind: Kind,
    program: PathBuf,
    folder: Folder,
    place: Place,
    /// The flags that say which cluster it belongs to.
    membership: Vec<String>,
    started: Instant,
    /// From the start of the process to the first acknowledged write, once that was waited for.
    pub(crate) first_write: Duration,
}

impl Peer {
    /// A cluster of one that takes writes.
    pub(crate) async fn start(kind: Kind, programs: &Programs) -> Result<Self> {
        let place = Place::new(0)?;
        let membership = together(kind, std::slice::from_ref(&place));
        let mut peer = Self::spawn(kind, programs, place, membership)?;
        peer.wait_for_write().await?;
        Ok(peer)
    }

    /// Starts the process and waits for nothing.
    pub(crate) fn spawn(kind: Kind, programs: &Programs, place: Place, membership: Vec<String>) -> Result<Self> {
        let (program, folder) = (programs.of(kind), Folder::new(kind.name())?);
        let (started, first_write) = (Instant::now(), Duration::ZERO);
        let child = launch(kind, &program, folder.path(), &place, &membership)?;
        Ok(Self { child, kind, program, folder, place, membership, started, first_write })
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.place.port)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn rss_mib(&self) -> Result<f64> {
        rss_mib(self.pid())
    }

    /// Stops it with SIGTERM and starts it again on the same folder.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        self.restart_with(&[]).await
    }

    /// The same with more flags.
    pub(crate) async fn restart_with(&mut self, flags: &[&str]) -> Result<()> {
        self.signal(Signal::TERM)?;
        self.wait_for_end().await?;
        self.spawn_again(flags)?;
        self.wait_for_write().await
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).context("the process id")?;
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Waits for the end of the process after a signal.
    pub(crate) async fn wait_for_end(&mut self) -> Result<()> {
        let began = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(began.elapsed() < Duration::from_secs(30), "{} did not end by a signal", self.title());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Starts the process anew on its folder and waits for nothing.
    pub(crate) fn spawn_again(&mut self, flags: &[&str]) -> Result<()> {
        let all: Vec<String> = self.membership.iter().cloned().chain(flags.iter().map(|&f| f.to_owned())).collect();
        self.started = Instant::now();
        self.child = launch(self.kind, &self.program, self.folder.path(), &self.place, &all)?;
        Ok(())
    }

    /// Fails, with what it said, if the process has ended by itself.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let said = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            bail!("{} ended with {status}:\n{}", self.title(), said.trim_end());
        }
        Ok(())
    }

    fn title(&self) -> String {
        format!("{} {}", self.kind.name(), self.place.name)
    }

    pub(crate) async fn wait_for_write(&mut self) -> Result<()> {
        loop {
            self.check()?;
            if first_write(&self.endpoint()).await.is_ok() {
                self.first_write = self.started.elapsed();
                return Ok(());
            }
            ensure!(self.started.elapsed() < Duration::from_secs(60), "{} took no write in a minute", self.title());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(kind: Kind, program: &Path, folder: &Path, place: &Place, flags: &[String]) -> Result<Child> {
    let mut command = Command::new(program);
    let data = folder.join("data").display().to_string();
    let (client, peer) = (format!("127.0.0.1:{}", place.port), place.peer());
    match kind {
        Kind::Tenure => {
            command.args(["serve", "--data-dir", &data, "--listen", &client, "--peer-listen", &peer]);
        }
        Kind::Etcd => {
            let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
            command.args(["--data-dir", &data, "--listen-client-urls", &client, "--advertise-client-urls", &client]);
            command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
            command.args(["--quota-backend-bytes", "8589934592", "--log-level", "error"]);
        }
    }
    command.args(["--name", &place.name]).args(flags);
    let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("starting {}", program.display()))
}

async fn first_write(endpoint: &str) -> Result<()> {
    let mut rpc = Rpc::connect(endpoint).await?;
    let put = pb::PutRequest { key: "bench-first".into(), value: "1".into(), ..Default::default() };
    let call = rpc.unary::<pb::PutResponse>(PUT, &put);
    tokio::time::timeout(Duration::from_secs(2), call).await??;
    Ok(())
}

/// A port below those that the system gives to outgoing connections: one of them could take the port of a server while it is down.
pub(crate) fn free_port() -> Result<u16> {
    for _ in 0..100 {
        let mut random = [0u8; 2];
        getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random bytes: {e}"))?;
        let port = 12_000 + u16::from_le_bytes(random) % 20_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port was found")
}

/// A temporary folder, removed at the end.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let mut random = [0u8; 8];
        getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random bytes: {e}"))?;
        let path = std::env::temp_dir().join(format!("tenure-bench-{name}-{:016x}", u64::from_le_bytes(random)));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
