//! The peers' servers, as Debian packages them, each started alone in a temporary folder with the strictest durability that it has.

use super::super::peer::{Folder, free_port};
use anyhow::{Context as _, Result, bail, ensure};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Which peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// `synchronous_commit` is on, as it is by default.
    Postgres,
    /// `appendfsync always`.
    Redis,
    /// `-f 0`: a sync for each write.
    Beanstalkd,
    /// JetStream on disk. It cannot sync per write.
    Nats,
}

impl Engine {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Postgres => "PostgreSQL",
            Self::Redis => "Redis",
            Self::Beanstalkd => "beanstalkd",
            Self::Nats => "NATS (no fsync)",
        }
    }

    /// Whether what it acknowledges survives the loss of power.
    pub(crate) fn is_durable(self) -> bool {
        self != Self::Nats
    }

    fn program(self) -> Result<PathBuf> {
        let name = match self {
            Self::Postgres => "postgres",
            Self::Redis => "redis-server",
            Self::Beanstalkd => "beanstalkd",
            Self::Nats => "nats-server",
        };
        find(name).with_context(|| {
            format!("{name} is not installed: apt-get install postgresql redis-server beanstalkd nats-server")
        })
    }
}

/// In the folders of PATH, those of the system, and where Debian keeps the programs of PostgreSQL.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let postgres = versions.map(|version| version.path().join("bin"));
    let system = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let mut folders = postgres.chain(std::env::split_paths(&path)).chain(system);
    folders.find_map(|folder| Some(folder.join(name)).filter(|file| file.is_file()))
}

/// A running peer; killed and its folder removed at the end.
pub(crate) struct Server {
    pub(crate) engine: Engine,
    pub(crate) port: u16,
    child: Child,
    _folder: Folder,
}

impl Drop for Server {
    fn drop(&mut self) {
        // The workers of a PostgreSQL end by themselves when their parent is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    pub(crate) async fn start(engine: Engine) -> Result<Self> {
        let program = engine.program()?;
        let folder = Folder::new(engine.name().split(' ').next().unwrap_or_default())?;
        let port = free_port()?;
        let data = folder.path().join("data");
        std::fs::create_dir(&data)?;
        let mut command = Command::new(&program);
        match engine {
            Engine::Postgres => postgres(&mut command, &program, &folder, &data, port)?,
            Engine::Redis => {
                command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "yes"]);
                command.args(["--appendfsync", "always", "--loglevel", "warning"]).arg("--dir").arg(&data);
            }
            Engine::Beanstalkd => {
                command.args(["-l", "127.0.0.1", "-p", &port.to_string(), "-f", "0"]).arg("-b").arg(&data);
            }
            Engine::Nats => {
                command.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js"]).arg("-sd").arg(&data);
            }
        }
        let log = std::fs::File::create(folder.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        let mut server = Self { engine, port, child, _folder: folder };
        server.wait_until_it_listens().await?;
        Ok(server)
    }

    async fn wait_until_it_listens(&mut self) -> Result<()> {
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at once: {status}", self.engine.name());
            }
            ensure!(began.elapsed() < Duration::from_secs(20), "{} does not listen", self.engine.name());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The process and its children, such as the backends of a PostgreSQL, as they are now.
    pub(crate) fn pids(&self) -> Result<Vec<u32>> {
        let parent = self.child.id();
        let mut pids = vec![parent];
        for entry in std::fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if parent_of(pid) == Some(parent) {
                pids.push(pid);
            }
        }
        Ok(pids)
    }
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

/// A cluster of its own, owned by `nobody` where this runs as root, whom PostgreSQL refuses.
fn postgres(command: &mut Command, program: &Path, folder: &Folder, data: &Path, port: u16) -> Result<()> {
    const NOBODY: u32 = 65_534;
    let is_root = rustix::process::geteuid().is_root();
    let mut init = Command::new(program.with_file_name("initdb"));
    if is_root {
        for path in [folder.path(), data] {
            std::os::unix::fs::chown(path, Some(NOBODY), None)?;
        }
        init.uid(NOBODY);
        command.uid(NOBODY);
    }
    init.args(["-U", "bench", "-A", "trust", "-E", "UTF8", "--no-locale", "-D"]).arg(data).current_dir(data);
    let done = init.stdin(Stdio::null()).output().context("initdb")?;
    ensure!(done.status.success(), "initdb failed: {}", String::from_utf8_lossy(&done.stderr));
    command.arg("-D").arg(data).args(["-h", "127.0.0.1", "-p", &port.to_string(), "-k"]).arg(data);
    command.args(["-c", "max_connections=300", "-c", "shared_buffers=256MB"]).current_dir(data);
    Ok(())
}
