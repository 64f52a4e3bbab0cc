//! The servers that are measured: started on free ports of loopback with temporary folders, stopped by their id.

use super::load::PUT;
use super::measure::rss_mib;
use super::rpc::Rpc;
use anyhow::{Context as _, Result, bail};
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

/// A running server. Dropping it kills the process and removes its folder.
pub(crate) struct Peer {
    child: Child,
    kind: Kind,
    program: PathBuf,
    folder: Folder,
    port: u16,
    peer_port: u16,
    /// From the start of the process to the first acknowledged write.
    pub(crate) first_write: Duration,
}

impl Peer {
    pub(crate) async fn start(kind: Kind, programs: &Programs) -> Result<Self> {
        let program = match kind {
            Kind::Tenure => programs.tenure.clone(),
            Kind::Etcd => programs.etcd.clone(),
        };
        let folder = Folder::new(kind.name())?;
        let (port, peer_port) = (free_port()?, free_port()?);
        let (child, first_write) = launch(kind, &program, folder.path(), (port, peer_port), &[]).await?;
        Ok(Self { child, kind, program, folder, port, peer_port, first_write })
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
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
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).context("the process id")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.child.wait()?;
        let ports = (self.port, self.peer_port);
        let (child, first_write) = launch(self.kind, &self.program, self.folder.path(), ports, flags).await?;
        (self.child, self.first_write) = (child, first_write);
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn launch(
    kind: Kind,
    program: &Path,
    folder: &Path,
    (port, peer_port): (u16, u16),
    flags: &[&str],
) -> Result<(Child, Duration)> {
    let mut command = Command::new(program);
    let data = folder.join("data").display().to_string();
    match kind {
        Kind::Tenure => command.args(["serve", "--data-dir", &data, "--listen", &format!("127.0.0.1:{port}")]),
        Kind::Etcd => {
            let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
            command.args(["--data-dir", &data, "--listen-client-urls", &client, "--advertise-client-urls", &client]);
            command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
            command.args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"]);
            command.args(["--quota-backend-bytes", "8589934592"])
        }
    };
    command.args(flags);
    let log = std::fs::File::create(folder.join("log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let began = Instant::now();
    let mut child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
    loop {
        if let Some(status) = child.try_wait()? {
            let said = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
            bail!("{} ended with {status}:\n{said}", kind.name());
        }
        if first_write(&format!("127.0.0.1:{port}")).await.is_ok() {
            return Ok((child, began.elapsed()));
        }
        if began.elapsed() > Duration::from_secs(60) {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{} took no write within a minute", kind.name());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn first_write(endpoint: &str) -> Result<()> {
    let mut rpc = Rpc::connect(endpoint).await?;
    let put = pb::PutRequest { key: "bench-first".into(), value: "1".into(), ..Default::default() };
    let call = rpc.unary::<pb::PutResponse>(PUT, &put);
    tokio::time::timeout(Duration::from_secs(2), call).await??;
    Ok(())
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
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
