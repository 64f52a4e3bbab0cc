//! One member of Tenure with everything around it: sockets, disk, clock, the driver's thread and the doors.
//!
//! Promises. V1: `Server::start` returns once a lone member answers: an entry of its own term is applied; a member of a group answers
//! `/readyz` when it does. V2: what the doors acknowledge is
//! applied and, unless `fsync` is off, on disk. V3: every refusal to start is one sentence that says what to do. V4: `stop` answers what
//! is under way, or tells it as unknown, and leaves the folder closed.
//! Not promised. Two servers on one folder: the second is refused.
//! Leaves out. TLS and authentication of clients: the member is reachable only where its operator lets it be.
//!
//! A call's way: the front (`front/`) gives bytes to a service (`etcd/`, `native/`), which makes a transaction or a read of them and
//! hands it to the driver (`driver.rs`); the driver owns the member, carries its effects out, and answers in batches.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod backup;
mod calendar;
mod checks;
mod disk_fs;
mod driver;
pub mod etcd;
mod follow;
pub mod front;
mod health;
mod join_token;
pub mod metrics;
mod native;
mod openapi;
pub mod pages;
// Nothing calls it yet.
mod peers;
pub mod rpc;
mod schedules;
mod span_index;
mod status;
pub mod transcode;
mod turns;
mod watch_hub;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tenure_machine::{Limit, MemberId, MemoryLimits, Op, Txn};
use tenure_replica::{AutoCompact, Join, Member};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinHandle;

pub use crate::disk_fs::FolderError;
use crate::disk_fs::FsDisk;
pub use crate::driver::Ending;
use crate::driver::{Driver, DriverConfig, Failure, Handle, PeerDoor};
use crate::front::{Front, FrontConfig};
pub use crate::pages::{ETCD_CLUSTER_VERSION, ETCD_VERSION};
pub use crate::peers::TlsFiles;
use crate::peers::{PeerTls, Peers};

/// What clusters are called whose operator gave them no name.
const DEFAULT_CLUSTER_TOKEN: &str = "tenure-cluster";
/// etcd's allowance above the request limit for a message as it arrives.
const MESSAGE_OVERHEAD_BYTES: usize = 512 << 10;
/// A limit that was refused is proposed again after this.
const PROPOSE_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// Everything that `serve` can be told.
#[derive(Clone, Debug)]
pub struct Config {
    pub name: String,
    pub data_dir: PathBuf,
    /// Where clients connect; port 0 lets the system choose.
    pub listen: String,
    /// What clients are told to connect to; the listen address if `None`.
    pub advertise: Option<String>,
    /// Where the other members connect; listened on once there are some.
    pub peer_listen: String,
    /// Certificates for the connections with other members.
    pub peer_tls: Option<TlsFiles>,
    /// What `tenure member add` printed: this is a new member of a running cluster.
    pub join: Option<String>,
    /// `name=host:port` of every member, with or without a scheme. Empty: this one alone.
    pub cluster: Vec<String>,
    /// Separates clusters that were started with equal flags.
    pub cluster_token: String,
    /// Listen beyond loopback although nothing authenticates clients.
    pub insecure: bool,
    pub memory_soft_limit: u64,
    pub memory_hard_limit: u64,
    pub max_request_bytes: u64,
    pub max_txn_ops: u64,
    /// Streams that watch or observe, of all clients of this member; those of etcd apart.
    pub max_watch_streams: u64,
    pub tick: Duration,
    pub election_timeout: Duration,
    pub heartbeat: Duration,
    /// A snapshot is taken after so much log.
    pub snapshot_log_bytes: u64,
    /// Writes are refused while the disk has less free space.
    pub disk_reserve: u64,
    /// Off: acknowledged writes are lost with the machine.
    pub fsync: bool,
    /// History is kept at least so long, and at least so many revisions, while it takes at most this share of the memory.
    pub history: Duration,
    pub history_revisions: u64,
    pub history_share_percent: u64,
    pub watch_progress_interval: Duration,
    /// Probe registered instances, wherever they say that they are, while this member leads.
    pub active_checks: bool,
    pub front: FrontConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "n0".to_owned(),
            data_dir: PathBuf::from("tenure-data"),
            listen: "127.0.0.1:2379".to_owned(),
            advertise: None,
            peer_listen: "127.0.0.1:2380".to_owned(),
            peer_tls: None,
            join: None,
            cluster: Vec::new(),
            cluster_token: DEFAULT_CLUSTER_TOKEN.to_owned(),
            insecure: false,
            memory_soft_limit: 3 << 30,
            memory_hard_limit: 4 << 30,
            max_request_bytes: 1536 << 10,
            max_txn_ops: 128,
            max_watch_streams: 20_000,
            tick: Duration::from_millis(100),
            election_timeout: Duration::from_millis(1000),
            heartbeat: Duration::from_millis(100),
            snapshot_log_bytes: 256 << 20,
            disk_reserve: 64 << 20,
            fsync: true,
            history: Duration::from_secs(3600),
            history_revisions: 10_000,
            history_share_percent: 25,
            watch_progress_interval: Duration::from_secs(600),
            active_checks: true,
            front: FrontConfig::default(),
        }
    }
}

/// Why a server did not start. Each is a sentence for its operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("`{address}` is not an address to listen on: {why}")]
    Address { address: String, why: String },
    #[error("{address} is in use: another server listens there, or has just stopped")]
    AddressInUse { address: SocketAddr },
    #[error("cannot listen on {address}: {error}")]
    Listen { address: SocketAddr, error: io::Error },
    #[error(
        "{address} can be reached from other machines and nothing authenticates clients: listen on 127.0.0.1, or give --insecure"
    )]
    NotLoopback { address: SocketAddr },
    #[error(
        "{address} can be reached from other machines and nothing authenticates members: give --peer-cert, --peer-key and --peer-ca, or --insecure"
    )]
    PeerNotLoopback { address: SocketAddr },
    #[error("--cluster: {0}")]
    Cluster(String),
    #[error("--join: {0}")]
    Join(String),
    #[error("the certificates for other members cannot be used: {0}")]
    PeerTls(String),
    #[error("{0}")]
    Setting(String),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error("{0}")]
    Member(#[from] tenure_replica::OpenError),
    #[error(transparent)]
    Front(#[from] front::FrontError),
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    #[error("the member stopped while it started: {0}")]
    Fault(String),
}

/// A running member.
pub struct Server {
    address: SocketAddr,
    driver: Arc<Driver>,
    peers: Arc<OnceLock<Peers>>,
    /// Proposals of the start, and the way to other members.
    tasks: Vec<JoinHandle<()>>,
    stop_front: Mutex<Option<oneshot::Sender<()>>>,
    front: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

/// What every service needs.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) peers: Arc<OnceLock<Peers>>,
    pub(crate) handle: Handle,
    pub(crate) settings: Arc<Settings>,
}

impl std::ops::Deref for Context {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

/// The place of an open stream or long poll that watches, given back when it ends.
pub(crate) struct StreamPlace(Arc<Settings>);

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.watch_streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Context {
    /// A place among what watches through whichever door: each may hold some megabytes for a slow reader. Every door refuses in its own words.
    pub(crate) fn stream_place(&self) -> Result<StreamPlace, native::Refused> {
        let place = StreamPlace(self.settings.clone());
        let before = self.settings.watch_streams.fetch_add(1, Ordering::Relaxed);
        let max = self.settings.max_watch_streams;
        if before < max { Ok(place) } else { Err(Box::new(status::too_many_streams(max))) }
    }

    pub(crate) fn watch_streams(&self) -> usize {
        self.settings.watch_streams.load(Ordering::Relaxed)
    }
}

/// The part of the configuration that services read, with what was found out at the start.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) client_urls: Vec<String>,
    pub(crate) peer_urls: Vec<String>,
    pub(crate) data_dir: PathBuf,
    pub(crate) max_request_bytes: usize,
    pub(crate) max_txn_ops: usize,
    max_watch_streams: usize,
    /// How many there are now.
    watch_streams: AtomicUsize,
    pub(crate) memory_hard_limit: u64,
    /// The smallest TTL of an etcd lease, in seconds.
    pub(crate) min_lease_ttl: i64,
    /// The smallest TTL of a native session.
    pub(crate) min_session_ttl_ms: u64,
    pub(crate) started: std::time::Instant,
}

impl Server {
    /// Starts a member and waits until it answers. Needs a tokio runtime.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        check(&config)?;
        let address = resolve(&config.listen)?;
        if !address.ip().is_loopback() && !config.insecure {
            return Err(StartError::NotLoopback { address });
        }
        let listener = TcpListener::bind(address).await.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => StartError::AddressInUse { address },
            _ => StartError::Listen { address, error },
        })?;
        let address = listener.local_addr().map_err(|error| StartError::Listen { address, error })?;
        let mut disk = FsDisk::open(&config.data_dir, config.fsync)?;
        let member_config = member_config(&config, &mut disk, address)?;
        let tls = config.peer_tls.clone().map(PeerTls::load).transpose().map_err(StartError::PeerTls)?;
        let peer_listener = match member_config.peers.len() > 1 || member_config.join.is_some() {
            true => Some(listen_for_peers(&config).await?),
            false => None,
        };
        let opened = disk.clone();
        // Reading a folder may take seconds; the runtime goes on meanwhile.
        let opening = tokio::task::spawn_blocking(move || Member::open(opened, member_config, driver::now()));
        let member = opening.await.map_err(|error| StartError::Fault(error.to_string()))??;
        let is_alone = member.status().voters.len() == 1 && member.status().members.len() <= 1;
        let (ready, is_ready) = oneshot::channel();
        let peers = Arc::new(OnceLock::new());
        let wanted = tokio::sync::watch::Sender::new(Vec::new());
        let door = PeerDoor { peers: peers.clone(), wanted: wanted.clone() };
        let driver = Driver::start(member, disk, driver_config(&config), door, ready).map_err(StartError::Thread)?;
        let driver = Arc::new(driver);
        let connecting = keep_peers(config.clone(), peer_listener, tls, peers.clone(), wanted, driver.handle.clone());
        let mut tasks = vec![tokio::spawn(connecting)];
        let settings = Arc::new(settings(&config, address));
        let context = Context { peers: peers.clone(), handle: driver.handle.clone(), settings };
        if is_alone {
            tokio::select! {
                Ok(()) = is_ready => {}
                ending = driver.ended() => return Err(StartError::Fault(ending.to_string())),
            }
            if let Err(failure) = propose_limits(&context, &config).await {
                tracing::warn!(?failure, "the limit of operations per transaction could not be set");
            }
        } else {
            // Whoever is one of several says at once that it lives, and later that it is ready.
            let (context, config) = (context.clone(), config.clone());
            tasks.push(tokio::spawn(async move {
                if is_ready.await.is_err() {
                    return;
                }
                // Who leads may change just now.
                while let Err(failure) = propose_limits(&context, &config).await {
                    tracing::debug!(?failure, "the limit of operations per transaction is proposed again");
                    tokio::time::sleep(PROPOSE_AGAIN).await;
                }
            }));
        }
        if config.active_checks {
            tasks.push(tokio::spawn(checks::run(context.clone())));
        }
        tasks.push(tokio::spawn(schedules::run(context.clone())));
        let mut router = rpc::Router::new();
        etcd::mount(&mut router, &context);
        native::mount(&mut router, &context);
        let mut front_config = config.front.clone();
        front_config.message_bytes_max = config.max_request_bytes as usize + MESSAGE_OVERHEAD_BYTES;
        let front = Front::new(router, Arc::new(health::MemberHealth::new(context)), front_config)?;
        let (stop_front, stopped) = oneshot::channel::<()>();
        let front = tokio::spawn(async move {
            let stop = async {
                let _ = stopped.await;
            };
            front.serve(listener, stop).await
        });
        let (stop_front, front) = (Mutex::new(Some(stop_front)), Mutex::new(Some(front)));
        Ok(Self { address, driver, peers, tasks, stop_front, front })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends when the member has stopped by itself, which it does only for a fault.
    pub async fn wait(&self) -> Ending {
        self.driver.ended().await
    }

    /// Lets calls finish, then closes the folder. May be called again.
    pub async fn stop(&self) {
        // Leadership goes first: whoever comes with the next request finds a leader.
        self.driver.begin_stop().await;
        if let Some(stop) = self.stop_front.lock().await.take() {
            let _ = stop.send(());
        }
        self.driver.handle.end_streams().await;
        if let Some(front) = self.front.lock().await.take() {
            match front.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the front ended badly"),
                Err(error) => tracing::warn!(%error, "the front ended badly"),
            }
        }
        if let Ending::Fault(why) = self.driver.stop().await {
            tracing::error!(why, "the member had stopped");
        }
        self.tasks.iter().for_each(JoinHandle::abort);
        if let Some(peers) = self.peers.get() {
            peers.stop().await;
        }
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Fault(why) => f.write_str(why),
        }
    }
}

fn check(config: &Config) -> Result<(), StartError> {
    let wrong = |why: &str| Err(StartError::Setting(why.to_owned()));
    if config.memory_soft_limit > config.memory_hard_limit {
        return wrong("the soft memory limit is above the hard one: raise --memory-hard-limit");
    }
    if config.tick.is_zero() || config.election_timeout < config.heartbeat * 2 || config.heartbeat < config.tick {
        return wrong("the election timeout must be at least two heartbeats, and a heartbeat at least one tick");
    }
    if config.max_request_bytes == 0 || config.max_request_bytes > 64 << 20 {
        return wrong("--max-request-bytes must be between 1 and 64MiB");
    }
    if config.max_txn_ops == 0 {
        return wrong("--max-txn-ops must be at least 1");
    }
    if config.max_watch_streams == 0 {
        return wrong("--max-watch-streams must be at least 1");
    }
    match &config.join {
        Some(token) => drop(join_token::JoinToken::decode(token).map_err(StartError::Join)?),
        None => drop(static_members(config)?),
    }
    if config.cluster.len() > 1 || config.join.is_some() {
        peer_listen_address(config)?;
    }
    Ok(())
}

fn resolve(listen: &str) -> Result<SocketAddr, StartError> {
    let wrong = |why: String| StartError::Address { address: listen.to_owned(), why };
    let mut found = plain(listen).to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    found.next().ok_or_else(|| wrong("the name has no address".to_owned()))
}

/// An address without a scheme before it.
pub(crate) fn plain(address: &str) -> &str {
    address.strip_prefix("http://").or_else(|| address.strip_prefix("https://")).unwrap_or(address)
}

/// The members of a static start: id, name and address.
fn static_members(config: &Config) -> Result<Vec<(MemberId, String, String)>, StartError> {
    let wrong = |why: String| StartError::Cluster(why);
    let mut members: Vec<(MemberId, String, String)> = Vec::new();
    for entry in &config.cluster {
        let (name, address) = entry
            .split_once('=')
            .ok_or_else(|| wrong(format!("`{entry}` is no member: write name=host:port, separated by commas")))?;
        let address = plain(address);
        if name.is_empty() || address.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
            return Err(wrong(format!("`{entry}` is no member: write name=host:port")));
        }
        if members.iter().any(|(_, known, at)| known == name || at == address) {
            return Err(wrong(format!("`{entry}` has the name or the address of another member")));
        }
        members.push((member_id(name, &config.cluster_token), name.to_owned(), address.to_owned()));
    }
    if members.is_empty() {
        let own = plain(&config.peer_listen).to_owned();
        members.push((member_id(&config.name, &config.cluster_token), config.name.clone(), own));
    }
    if !members.iter().any(|(_, name, _)| *name == config.name) {
        return Err(wrong(format!("this member's name `{}` is not in the list: give it with --name", config.name)));
    }
    Ok(members)
}

fn peer_listen_address(config: &Config) -> Result<SocketAddr, StartError> {
    let address = resolve(&config.peer_listen)?;
    if !address.ip().is_loopback() && config.peer_tls.is_none() && !config.insecure {
        return Err(StartError::PeerNotLoopback { address });
    }
    Ok(address)
}

async fn listen_for_peers(config: &Config) -> Result<TcpListener, StartError> {
    let address = peer_listen_address(config)?;
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::AddressInUse { address },
        _ => StartError::Listen { address, error },
    })
}

/// Connects to the members that there are, and listens for them from when there are some: a lone member needs no second port.
async fn keep_peers(
    config: Config,
    listener: Option<TcpListener>,
    tls: Option<PeerTls>,
    cell: Arc<OnceLock<Peers>>,
    wanted: tokio::sync::watch::Sender<Vec<(MemberId, String, String)>>,
    handle: Handle,
) {
    let mut wanted = wanted.subscribe();
    let listener = match listener {
        Some(listener) => listener,
        None => {
            if wanted.wait_for(|peers| !peers.is_empty()).await.is_err() {
                return;
            }
            loop {
                match listen_for_peers(&config).await {
                    Ok(listener) => break listener,
                    Err(error) => tracing::error!("other members cannot connect: {error}; trying again"),
                }
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        }
    };
    let peers = Peers::start(listener, tls, handle.tell_peer_event());
    let peers = cell.get_or_init(|| peers).clone();
    loop {
        let list = wanted.borrow_and_update().clone();
        peers.set_peers(list);
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

/// Who this member is and with whom, as flags, join token and folder say.
struct Belonging {
    cluster_token: String,
    own: MemberId,
    /// This member, and in a static start the others.
    peers: Vec<(MemberId, String, String)>,
    join: Option<Join>,
}

fn belonging(config: &Config, disk: &mut FsDisk) -> Result<Belonging, StartError> {
    let known = tenure_replica::owner_of(disk, &config.name)?;
    let own_address = plain(&config.peer_listen).to_owned();
    if let Some(text) = &config.join {
        let token = join_token::JoinToken::decode(text).map_err(StartError::Join)?;
        if token.name != config.name {
            let why = format!("the token is for a member called `{}`: start it with --name {0}", token.name);
            return Err(StartError::Join(why));
        }
        let address = if token.peer.is_empty() { own_address } else { token.peer.clone() };
        let peers = vec![(token.member, config.name.clone(), address)];
        let join = Some(token.join());
        return Ok(Belonging { cluster_token: token.cluster_token, own: token.member, peers, join });
    }
    let members = static_members(config)?;
    let own = member_id(&config.name, &config.cluster_token);
    let mut cluster_token = config.cluster_token.clone();
    match known {
        // A folder keeps the id that it was made with; who the others are is in its state.
        Some((id, token)) if id != own => {
            if cluster_token == DEFAULT_CLUSTER_TOKEN {
                cluster_token = token;
            }
            let peers = vec![(id, config.name.clone(), own_address)];
            Ok(Belonging { cluster_token, own: id, peers, join: None })
        }
        _ => Ok(Belonging { cluster_token, own, peers: members, join: None }),
    }
}

fn member_config(
    config: &Config,
    disk: &mut FsDisk,
    address: SocketAddr,
) -> Result<tenure_replica::Config, StartError> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(StartError::Random)?;
    let number = |random: &[u8]| random.iter().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
    let mut more = [0; 16];
    getrandom::fill(&mut more).map_err(StartError::Random)?;
    let ticks = |length: Duration| (length.as_millis() / config.tick.as_millis()).max(1);
    let Belonging { cluster_token, own, peers, join } = belonging(config, disk)?;
    Ok(tenure_replica::Config {
        cluster_token,
        peers,
        join,
        clients: vec![client_url(config, address)],
        tick_ms: config.tick.as_millis() as u64,
        election_ticks: ticks(config.election_timeout) as _,
        heartbeat_ticks: ticks(config.heartbeat) as _,
        seed: number(&more[..8]),
        snapshot_log_bytes: config.snapshot_log_bytes,
        disk_reserve_bytes: config.disk_reserve,
        // The doors judge the size as it arrived; stored keys are a little longer.
        max_request_bytes: (config.max_request_bytes as usize + MESSAGE_OVERHEAD_BYTES).min(64 << 20),
        memory: MemoryLimits { soft: config.memory_soft_limit, hard: config.memory_hard_limit },
        autocompact: Some(AutoCompact {
            keep_ms: config.history.as_millis() as u64,
            keep_revisions: config.history_revisions,
            history_share_percent: config.history_share_percent,
        }),
        ..tenure_replica::Config::alone(own, &config.name, number(&more[8..]), random)
    })
}

fn client_url(config: &Config, address: SocketAddr) -> String {
    let advertised = config.advertise.clone().unwrap_or_else(|| address.to_string());
    if advertised.contains("://") { advertised } else { format!("http://{advertised}") }
}

/// An id that follows from name and token, so that every member of a static start computes the same (FNV-1a; never zero).
fn member_id(name: &str, token: &str) -> MemberId {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in token.bytes().chain([0]).chain(name.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    MemberId((hash >> 1).max(1))
}

fn driver_config(config: &Config) -> DriverConfig {
    DriverConfig {
        fragment_bytes: config.max_request_bytes as usize + MESSAGE_OVERHEAD_BYTES,
        watch_progress_ms: config.watch_progress_interval.as_millis() as u64,
    }
}

fn settings(config: &Config, address: SocketAddr) -> Settings {
    let election_ms = config.election_timeout.as_millis() as u64;
    Settings {
        name: config.name.clone(),
        client_urls: vec![client_url(config, address)],
        peer_urls: vec![format!(
            "{}://{}",
            if config.peer_tls.is_some() { "https" } else { "http" },
            plain(&config.peer_listen)
        )],
        data_dir: config.data_dir.clone(),
        max_request_bytes: config.max_request_bytes as usize,
        max_txn_ops: config.max_txn_ops as usize,
        max_watch_streams: config.max_watch_streams as usize,
        watch_streams: AtomicUsize::new(0),
        memory_hard_limit: config.memory_hard_limit,
        // One and a half election timeouts, in whole seconds.
        min_lease_ttl: (election_ms * 3 / 2).div_ceil(1000).max(1) as i64,
        min_session_ttl_ms: (election_ms * 3 / 2).max(1000),
        started: std::time::Instant::now(),
    }
}

/// Limits that apply reads are state: a flag that differs proposes its value.
async fn propose_limits(context: &Context, config: &Config) -> Result<(), Failure> {
    let wanted = config.max_txn_ops;
    if context.query(true, |view| view.machine.limit(Limit::TxnOps)).await? != wanted {
        context.write(Txn::of(Op::SetLimit { limit: Limit::TxnOps, value: wanted })).await?;
    }
    Ok(())
}
