//! Active checks: probes the registered instances over HTTP, TCP and gRPC, and proposes what became of their health.
//!
//! Promises. K1: one member probes, the leader; its leadership is the lease. What it proposes names its term and the registration, so what a
//! member finds that leads no more, or of a registration that is over, changes nothing. Its successor takes over within `LOOK_EVERY` of leading, and
//! counts failures and successes anew. K2: only transitions are proposed. K3: at most `PROBES_MAX` run at once, each ends with its timeout, an
//! instance has one at a time, and what an instance answers is read up to a bound. K4: probes are spread over their intervals.
//! Not promised. That a probe starts in time when more are due than may run: they wait in the order in which they became due.
//! Relies on. Whoever may register an instance decides where members connect to: an address and a port, with one of three requests that read.
//! `--no-active-checks` ends that.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;
use tenure_machine::{
    ActiveCheck, Check, Health, InstanceRef, NamespaceId, Probe, Probed, ProbedInstance, RegistryOp, Revision, Txn,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tonic_health::pb;

use crate::Context;
use crate::rpc::{FRAME_HEAD, frame_message};

const LOOK_EVERY: Duration = Duration::from_millis(200);
const PROBES_MAX: usize = 256;
/// Instances that one look at the state takes.
const PAGE: usize = 1_000;
/// A proposal whose answer did not show in the state by then is made again.
const PROPOSE_AGAIN: Duration = Duration::from_secs(5);
/// What is read of an answer over HTTP to find its status.
const HEAD_BYTES_MAX: usize = 4 << 10;
/// What is read of an answer over gRPC.
const ANSWER_BYTES_MAX: usize = 4 << 10;
const HEALTH_PATH: &str = "http://health/grpc.health.v1.Health/Check";

/// Namespace, service, instance.
type Name = (NamespaceId, Box<str>, Box<str>);

/// What one probe found: passing or warning, or why not.
type Found = Result<Health, String>;

/// One probe that has ended.
struct Ended {
    name: Name,
    token: Revision,
    /// Of the leadership that began it.
    term: u64,
    found: Found,
}

/// One instance as this member probes it.
struct Target {
    token: Revision,
    address: Box<str>,
    port: u16,
    check: ActiveCheck,
    /// As the state has it.
    health: Health,
    why: Box<str>,
    failures: u32,
    successes: u32,
    proposed: Option<(Health, Instant)>,
    due: Instant,
}

/// Everything that this member probes now.
struct Runner {
    context: Context,
    targets: HashMap<Name, Target>,
    /// By when, those that do not run.
    due: BTreeSet<(Instant, Name)>,
    /// The term under which this member leads.
    term: Option<u64>,
    version: Option<u64>,
    places: Arc<Semaphore>,
    found: mpsc::UnboundedSender<Ended>,
}

/// Probes while this member leads. Ends with the server.
pub(crate) async fn run(context: Context) {
    let (found, mut results) = mpsc::unbounded_channel();
    let mut runner = Runner {
        context,
        targets: HashMap::new(),
        due: BTreeSet::new(),
        term: None,
        version: None,
        places: Arc::new(Semaphore::new(PROBES_MAX)),
        found,
    };
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {
                if runner.context.is_stopping() {
                    return;
                }
                runner.look().await;
            }
            // The runner holds a sender itself, so there is always a result to come.
            Some(ended) = results.recv() => runner.note(ended),
        }
        runner.start_due();
    }
}

impl Runner {
    /// Learns whether this member leads, and what there is to probe. A query that is refused leaves all as it is: what is found is judged by its
    /// term in any case.
    async fn look(&mut self) {
        let look = |view: &crate::driver::View<'_>| {
            let term = view.member.is_leader().then(|| view.member.leader().1);
            (term, view.machine.probes_version())
        };
        let Ok((term, version)) = self.context.query(true, look).await else { return };
        if term != self.term {
            self.term = term;
            self.version = None;
            self.targets.clear();
            self.due.clear();
        }
        if term.is_some() && self.version != Some(version) && self.read().await {
            self.version = Some(version);
        }
    }

    /// Reads everything that is to be probed; false when that was refused.
    async fn read(&mut self) -> bool {
        let mut present = BTreeSet::new();
        let mut last: Option<ProbedInstance> = None;
        loop {
            let after = last.take();
            let look = move |view: &crate::driver::View<'_>| view.machine.probed_instances(after.as_ref(), PAGE);
            let Ok(page) = self.context.query(true, look).await else { return false };
            let is_last = page.len() < PAGE;
            last = page.last().cloned();
            for one in page {
                let name = (one.namespace, one.service.clone(), one.id.clone());
                present.insert(name.clone());
                self.learn(name, &one);
            }
            if is_last {
                break;
            }
        }
        self.targets.retain(|name, target| {
            let stays = present.contains(name);
            if !stays {
                self.due.remove(&(target.due, name.clone()));
            }
            stays
        });
        true
    }

    fn learn(&mut self, name: Name, one: &ProbedInstance) {
        let Check::Active(check) = &one.instance.spec.check else { return };
        let (health, why) = (one.instance.checked, one.instance.why.clone());
        if let Some(target) = self.targets.get_mut(&name).filter(|target| target.token == one.instance.token) {
            if (target.health, &target.why) != (health, &why) {
                (target.health, target.why, target.proposed) = (health, why, None);
            }
            return;
        }
        // One that is down is looked at soon, so that it comes up soon; whatever is up has been looked at.
        let spread = if health == Health::Critical { check.interval_ms.min(500) } else { check.interval_ms };
        let due = Instant::now() + Duration::from_millis(jitter(&name, one.instance.token.0) % spread.max(1));
        let port = if check.port == 0 { one.instance.spec.port } else { check.port };
        let target = Target {
            token: one.instance.token,
            address: one.instance.spec.address.clone(),
            port: u16::try_from(port).unwrap_or(0),
            check: check.clone(),
            health,
            why,
            failures: 0,
            successes: 0,
            proposed: None,
            due,
        };
        if let Some(old) = self.targets.insert(name.clone(), target) {
            self.due.remove(&(old.due, name.clone()));
        }
        self.due.insert((due, name));
    }

    fn start_due(&mut self) {
        let Some(term) = self.term else { return };
        let now = Instant::now();
        while let Some((due, name)) = self.due.first().filter(|(due, _)| *due <= now).cloned() {
            let Ok(place) = self.places.clone().try_acquire_owned() else { return };
            self.due.remove(&(due, name.clone()));
            let Some(target) = self.targets.get(&name) else { continue };
            let (address, port, check) = (target.address.clone(), target.port, target.check.clone());
            let (token, found) = (target.token, self.found.clone());
            tokio::spawn(async move {
                let ended = Ended { found: probe(&address, port, &check).await, name, token, term };
                drop(place);
                // The runner is gone when the server stops.
                let _ = found.send(ended);
            });
        }
    }

    /// Counts what a probe found, and proposes the health that follows.
    fn note(&mut self, Ended { name, token, term, found }: Ended) {
        // What another leadership of this member began is not its turn in this one: that is due already.
        if self.term != Some(term) {
            return;
        }
        let Some(target) = self.targets.get_mut(&name).filter(|target| target.token == token) else { return };
        let spread = target.check.interval_ms / 10;
        let less = jitter(&name, u64::from(target.failures + target.successes) ^ token.0) % spread.max(1);
        target.due = Instant::now() + Duration::from_millis(target.check.interval_ms - less);
        self.due.insert((target.due, name.clone()));
        let Some((health, why)) = target.judge(found) else { return };
        target.proposed = Some((health, Instant::now()));
        let (namespace, service, instance) = name;
        tracing::debug!(%service, %instance, ?health, why, "a probe changes a health");
        let of = InstanceRef { service, instance, token };
        let op = RegistryOp::Probed(Probed { of, term, health, why: why.into() });
        self.context.write_detached(Txn { namespace, ..Txn::of(op.into()) });
    }
}

impl Target {
    /// The health that is to be proposed, and why.
    fn judge(&mut self, found: Found) -> Option<(Health, String)> {
        let (health, why) = match found {
            Ok(health) => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                if self.health == Health::Critical && self.successes < self.check.success_before_passing {
                    return None;
                }
                (health, if health == Health::Warning { "it asks for less work".to_owned() } else { String::new() })
            }
            Err(why) => {
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                if self.failures < self.check.failures_before_critical {
                    return None;
                }
                (Health::Critical, why)
            }
        };
        // Why an instance is critical stays as it was found first, but for one that was never probed.
        let is_told = self.health == health && !self.is_new();
        let is_proposed = self.proposed.as_ref().is_some_and(|(p, at)| *p == health && at.elapsed() < PROPOSE_AGAIN);
        (!is_told && !is_proposed).then_some((health, why))
    }

    fn is_new(&self) -> bool {
        self.health == Health::Critical && &*self.why == tenure_machine::NOT_CHECKED
    }
}

/// A number that differs between instances and, with `salt`, between turns, so that probes do not fall together.
fn jitter((namespace, service, id): &Name, salt: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in namespace.0.to_le_bytes().into_iter().chain(service.bytes()).chain([0]).chain(id.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash >> 16
}

/// Runs one probe, within its timeout.
async fn probe(address: &str, port: u16, check: &ActiveCheck) -> Found {
    let within = Duration::from_millis(check.timeout_ms);
    let probing = async {
        let stream = TcpStream::connect((address, port)).await.map_err(|error| format!("{address}:{port}: {error}"))?;
        match &check.probe {
            Probe::Tcp => Ok(Health::Passing),
            Probe::Http(path) => http(stream, address, port, path).await,
            Probe::Grpc(service) => grpc(stream, service).await,
        }
    };
    let late = |_| Err(format!("{address}:{port}: no answer within {} ms", check.timeout_ms));
    timeout(within, probing).await.unwrap_or_else(late)
}

async fn http(mut stream: TcpStream, address: &str, port: u16, path: &str) -> Found {
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: tenure-check/{}\r\nAccept: */*\r\nConnection: close\r\n\r\n",
        env!("CARGO_PKG_VERSION")
    );
    let failed = |error: std::io::Error| format!("HTTP: {error}");
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut head = BytesMut::with_capacity(512);
    while !head.contains(&b'\n') {
        if head.len() >= HEAD_BYTES_MAX || stream.read_buf(&mut head).await.map_err(failed)? == 0 {
            return Err("HTTP: the answer has no status line".to_owned());
        }
    }
    status_health(&head).ok_or("HTTP: the answer has no status line")?
}

/// The health that a status line tells; `None` if it is none.
fn status_health(head: &[u8]) -> Option<Found> {
    let line = std::str::from_utf8(head.split(|byte| *byte == b'\n').next()?).ok()?;
    let (version, rest) = line.trim_end().split_once(' ')?;
    let status: u16 = rest.get(..3)?.parse().ok()?;
    if !version.starts_with("HTTP/1.") {
        return None;
    }
    Some(match status {
        200..=299 => Ok(Health::Passing),
        429 => Ok(Health::Warning),
        _ => Err(format!("HTTP status {}", rest.get(..80).unwrap_or(rest))),
    })
}

async fn grpc(stream: TcpStream, service: &str) -> Found {
    let failed = |error: h2::Error| format!("gRPC: {error}");
    let (client, connection) = h2::client::handshake(stream).await.map_err(failed)?;
    let asking = async {
        let mut client = client.ready().await.map_err(failed)?;
        let request = http::Request::post(HEALTH_PATH)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .map_err(|error| error.to_string())?;
        let (response, mut body) = client.send_request(request, false).map_err(failed)?;
        let mut message = BytesMut::new();
        frame_message(&pb::HealthCheckRequest { service: service.to_owned() }, &mut message);
        body.send_data(message.freeze(), true).map_err(failed)?;
        answer(response.await.map_err(failed)?).await
    };
    // The connection moves only while it is polled; its end is no answer.
    tokio::select! {
        biased;
        found = asking => found,
        ended = connection => Err(ended.map_or_else(failed, |()| "gRPC: the connection was closed".to_owned())),
    }
}

async fn answer(response: http::Response<h2::RecvStream>) -> Found {
    let failed = |error: h2::Error| format!("gRPC: {error}");
    if !response.status().is_success() {
        return Err(format!("gRPC: HTTP status {}", response.status()));
    }
    let (head, mut body) = response.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(failed)?;
        let _ = body.flow_control().release_capacity(data.len());
        if bytes.len() + data.len() > ANSWER_BYTES_MAX {
            return Err("gRPC: the answer is too long".to_owned());
        }
        bytes.put_slice(&data);
    }
    let trailers = body.trailers().await.map_err(failed)?.unwrap_or_default();
    let said = |name| trailers.get(name).or_else(|| head.headers.get(name)).and_then(|value| value.to_str().ok());
    match said("grpc-status") {
        Some("0") => serving(&bytes.freeze()),
        Some("5") => Err("gRPC: the service is not known there".to_owned()),
        Some("12") => Err("gRPC: grpc.health.v1 is not served there".to_owned()),
        code => Err(format!("gRPC: status {} {}", code.unwrap_or("missing"), said("grpc-message").unwrap_or_default())),
    }
}

fn serving(framed: &Bytes) -> Found {
    use pb::health_check_response::ServingStatus;
    let message = framed.get(FRAME_HEAD..).unwrap_or_default();
    let answer = pb::HealthCheckResponse::decode(message).map_err(|_| "gRPC: the answer is no health")?;
    match ServingStatus::try_from(answer.status) {
        Ok(ServingStatus::Serving) => Ok(Health::Passing),
        Ok(status) => Err(format!("gRPC: {}", status.as_str_name())),
        Err(_) => Err(format!("gRPC: health {}", answer.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(health: Health, why: &str) -> Target {
        Target {
            token: Revision(2),
            address: "127.0.0.1".into(),
            port: 1,
            check: ActiveCheck {
                probe: Probe::Tcp,
                port: 0,
                interval_ms: 1_000,
                timeout_ms: 100,
                failures_before_critical: 3,
                success_before_passing: 2,
            },
            health,
            why: why.into(),
            failures: 0,
            successes: 0,
            proposed: None,
            due: Instant::now(),
        }
    }

    #[tokio::test]
    async fn k2_only_transitions_are_proposed() {
        let mut up = target(Health::Passing, "");
        let failed = || Err("refused".to_owned());
        assert_eq!(up.judge(Ok(Health::Passing)), None);
        assert_eq!(up.judge(failed()), None);
        assert_eq!(up.judge(failed()), None);
        // A success in between begins the count anew.
        assert_eq!(up.judge(Ok(Health::Passing)), None);
        assert_eq!((up.judge(failed()), up.judge(failed())), (None, None));
        assert_eq!(up.judge(failed()), Some((Health::Critical, "refused".to_owned())));
        let mut down = target(Health::Critical, "refused");
        assert_eq!(down.judge(Ok(Health::Passing)), None);
        assert_eq!(down.judge(Ok(Health::Passing)), Some((Health::Passing, String::new())));
        down.health = Health::Passing;
        assert!(matches!(down.judge(Ok(Health::Warning)), Some((Health::Warning, _))));
    }

    #[tokio::test]
    async fn an_instance_that_never_was_up_is_told_why_once() {
        let mut new = target(Health::Critical, tenure_machine::NOT_CHECKED);
        let failed = || Err("refused".to_owned());
        assert_eq!((new.judge(failed()), new.judge(failed())), (None, None));
        assert_eq!(new.judge(failed()), Some((Health::Critical, "refused".to_owned())));
        new.why = "refused".into();
        assert_eq!(new.judge(Err("no route".to_owned())), None);
    }

    /// A member that leads again is told what it began when it led before.
    #[tokio::test]
    async fn a_probe_of_before_gives_no_second_turn() {
        let address = ([127, 0, 0, 1], 1).into();
        let settings = Arc::new(crate::settings(&crate::Config::default(), address));
        let (handle, _queue) = crate::driver::Handle::unserved(8);
        let (found, mut results) = mpsc::unbounded_channel();
        let mut runner = Runner {
            context: Context { peers: Arc::default(), handle, settings },
            targets: HashMap::new(),
            due: BTreeSet::new(),
            term: Some(1),
            version: None,
            places: Arc::new(Semaphore::new(1)),
            found,
        };
        let learn = |runner: &mut Runner| {
            let (name, target) = ((NamespaceId::DEFAULT, "web".into(), "a".into()), target(Health::Passing, ""));
            runner.due.insert((target.due, name.clone()));
            runner.targets.insert(name, target);
        };
        learn(&mut runner);
        runner.start_due();
        assert!(runner.due.is_empty());
        runner.targets.clear();
        runner.term = Some(3);
        learn(&mut runner);
        runner.note(results.recv().await.unwrap());
        assert_eq!(runner.due.len(), 1);
        // One of now does.
        runner.start_due();
        runner.note(results.recv().await.unwrap());
        assert_eq!(runner.due.len(), 1);
    }

    #[test]
    fn status_lines() {
        let check =
            |line: &str, expected: Option<Found>| assert_eq!(status_health(line.as_bytes()), expected, "{line}");
        check("HTTP/1.1 200 OK\r\n", Some(Ok(Health::Passing)));
        check("HTTP/1.0 204\r\n", Some(Ok(Health::Passing)));
        check("HTTP/1.1 429 Too Many Requests\r\n", Some(Ok(Health::Warning)));
        check("HTTP/1.1 302 Found\r\n", Some(Err("HTTP status 302 Found".to_owned())));
        check("HTTP/2 200\r\n", None);
        check("SSH-2.0-OpenSSH\r\n", None);
        check("HTTP/1.1 abc\r\n", None);
    }
}
