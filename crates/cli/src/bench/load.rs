//! The workloads. Each is the same closed loop for every endpoint: a client sends, waits for the answer, and sends again.

use super::measure::{Figures, Histogram, Window};
use super::rpc::{Rpc, frame};
use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tenure_wire::etcd::etcdserverpb as pb;
use tenure_wire::etcd::v3lockpb;

pub(crate) const PUT: &str = "/etcdserverpb.KV/Put";
pub(crate) const RANGE: &str = "/etcdserverpb.KV/Range";
pub(crate) const TXN: &str = "/etcdserverpb.KV/Txn";
pub(crate) const DELETE: &str = "/etcdserverpb.KV/DeleteRange";
pub(crate) const GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
pub(crate) const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
pub(crate) const WATCH: &str = "/etcdserverpb.Watch/Watch";
pub(crate) const LOCK: &str = "/v3lockpb.Lock/Lock";
pub(crate) const UNLOCK: &str = "/v3lockpb.Lock/Unlock";

/// Where and how hard.
#[derive(Clone)]
pub(crate) struct Target {
    /// One for each member; the clients are spread evenly over them.
    pub(crate) endpoints: Vec<String>,
    /// The processes whose processor time counts, all together.
    pub(crate) pids: Vec<u32>,
    pub(crate) clients: usize,
    pub(crate) duration: Duration,
    pub(crate) value_bytes: usize,
    pub(crate) keys: u64,
}

impl Target {
    /// The endpoint of the `i`-th client.
    pub(crate) fn endpoint(&self, i: usize) -> &str {
        &self.endpoints[i % self.endpoints.len()]
    }
}

/// A cheap source of numbers (xorshift64*); the same seed gives the same load to each peer.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Bytes that do not compress.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut b = Vec::with_capacity(len + 8);
        while b.len() < len {
            b.extend_from_slice(&self.next().to_le_bytes());
        }
        b.truncate(len);
        b
    }
}

/// The `n`-th key of the benchmark, 24 bytes.
pub(crate) fn key(n: u64) -> String {
    format!("bench/{n:018}")
}

/// What a client does once; it returns when the answer is there.
pub(crate) trait Client: Send + 'static {
    fn operate(&mut self) -> impl Future<Output = Result<()>> + Send;
}

/// Runs every client in a closed loop: a short warm-up, then the measured window.
pub(crate) async fn closed_loop<C: Client>(target: &Target, clients: Vec<C>) -> Result<Figures> {
    Ok(closed_loop_during(target, clients, tokio::time::sleep(target.duration)).await?.0)
}

/// The same, measured for as long as `work` takes.
async fn closed_loop_during<C: Client, T>(
    target: &Target,
    clients: Vec<C>,
    work: impl Future<Output = T>,
) -> Result<(Figures, T)> {
    let measuring = Arc::new(AtomicBool::new(false));
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for mut client in clients {
        let (measuring, stop) = (measuring.clone(), stop.clone());
        tasks.push(tokio::spawn(async move {
            let (mut latencies, mut errors) = (Histogram::new(), 0u64);
            let mut last_error = None;
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                match client.operate().await {
                    Ok(()) if measuring.load(Ordering::Relaxed) => latencies.add(began.elapsed()),
                    Ok(()) => {}
                    Err(e) => {
                        errors += 1;
                        last_error = Some(e);
                        // A refused client must not spin on the processor that the server needs.
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            }
            (latencies, errors, last_error)
        }));
    }
    tokio::time::sleep((target.duration / 5).min(Duration::from_millis(500))).await;
    let window = Window::open(&target.pids)?;
    measuring.store(true, Ordering::Relaxed);
    let done = work.await;
    measuring.store(false, Ordering::Relaxed);
    let mut figures = window.close(Histogram::new(), 0, 0)?;
    stop.store(true, Ordering::Relaxed);
    let (mut least, mut most) = (u64::MAX, 0);
    let mut last = None;
    for task in tasks {
        let (latencies, errors, last_error) = task.await?;
        figures.latencies.merge(&latencies);
        figures.errors += errors;
        least = least.min(latencies.count());
        most = most.max(latencies.count());
        match last_error {
            Some(e) if latencies.count() == 0 => return Err(e.context("a client never got an answer")),
            Some(e) => last = Some(e),
            None => {}
        }
    }
    if let Some(e) = last {
        eprintln!("{} operations failed, the last one by: {e:#}", figures.errors);
    }
    figures.operations = figures.latencies.count();
    figures.fairness = Some((most, least));
    Ok((figures, done))
}

struct PutClient {
    rpc: Rpc,
    numbers: Numbers,
    keys: u64,
    value: Bytes,
}

impl Client for PutClient {
    async fn operate(&mut self) -> Result<()> {
        let request = pb::PutRequest {
            key: key(self.numbers.next() % self.keys).into(),
            value: self.value.clone(),
            ..Default::default()
        };
        self.rpc.unary_bytes(PUT, frame(&request)).await.map(drop)
    }
}

/// Puts over the etcd API, a connection for each client.
pub(crate) async fn put(target: &Target) -> Result<Figures> {
    Ok(put_during(target, tokio::time::sleep(target.duration)).await?.0)
}

/// The same, measured for as long as `work` takes.
pub(crate) async fn put_during<T>(target: &Target, work: impl Future<Output = T>) -> Result<(Figures, T)> {
    let mut clients = Vec::new();
    for i in 0..target.clients {
        let mut numbers = Numbers::new(i as u64 + 1);
        let value = numbers.bytes(target.value_bytes).into();
        clients.push(PutClient { rpc: Rpc::connect(target.endpoint(i)).await?, numbers, keys: target.keys, value });
    }
    closed_loop_during(target, clients, work).await
}

struct GetClient {
    rpc: Rpc,
    numbers: Numbers,
    keys: u64,
}

impl Client for GetClient {
    async fn operate(&mut self) -> Result<()> {
        let request = pb::RangeRequest { key: key(self.numbers.next() % self.keys).into(), ..Default::default() };
        let answer: pb::RangeResponse = self.rpc.unary(RANGE, &request).await?;
        ensure!(answer.kvs.len() == 1, "a key is missing");
        Ok(())
    }
}

/// Linearizable gets over the etcd API; the keys must be there.
pub(crate) async fn get(target: &Target) -> Result<Figures> {
    let mut clients = Vec::new();
    for i in 0..target.clients {
        clients.push(GetClient {
            rpc: Rpc::connect(target.endpoint(i)).await?,
            numbers: Numbers::new(i as u64 + 1),
            keys: target.keys,
        });
    }
    closed_loop(target, clients).await
}

struct RangeClient {
    rpc: Rpc,
    request: Bytes,
}

impl Client for RangeClient {
    async fn operate(&mut self) -> Result<()> {
        self.rpc.unary_bytes(RANGE, self.request.clone()).await.map(drop)
    }
}

/// Ranges of `keys` keys; operations are counted in keys.
pub(crate) async fn range(target: &Target, keys: u64) -> Result<Figures> {
    let request = frame(&pb::RangeRequest { key: key(0).into(), range_end: key(keys).into(), ..Default::default() });
    let mut probe = Rpc::connect(target.endpoint(0)).await?;
    let answer: pb::RangeResponse = probe
        .unary(RANGE, &pb::RangeRequest { key: key(0).into(), range_end: key(keys).into(), ..Default::default() })
        .await?;
    ensure!(answer.kvs.len() as u64 == keys, "the range holds {} keys, not {keys}", answer.kvs.len());
    let mut clients = Vec::new();
    for i in 0..target.clients {
        clients.push(RangeClient { rpc: Rpc::connect(target.endpoint(i)).await?, request: request.clone() });
    }
    let mut figures = closed_loop(target, clients).await?;
    figures.operations *= keys;
    Ok(figures)
}

/// Writes keys `0..keys`, a hundred to a transaction, sixteen transactions at once. Returns the seconds that it took.
pub(crate) async fn fill(endpoint: &str, keys: u64, value_bytes: usize) -> Result<f64> {
    let began = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for i in 0..16 {
        let (next, endpoint) = (next.clone(), endpoint.to_owned());
        tasks.push(tokio::spawn(async move {
            let mut rpc = Rpc::connect(&endpoint).await?;
            let mut numbers = Numbers::new(i + 77);
            loop {
                let from = next.fetch_add(100, Ordering::Relaxed);
                if from >= keys {
                    return anyhow::Ok(());
                }
                let success = (from..keys.min(from + 100))
                    .map(|n| put_op(key(n).into(), numbers.bytes(value_bytes).into(), 0))
                    .collect();
                let _: pb::TxnResponse = rpc.unary(TXN, &pb::TxnRequest { success, ..Default::default() }).await?;
            }
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(began.elapsed().as_secs_f64())
}

fn put_op(key: Bytes, value: Bytes, lease: i64) -> pb::RequestOp {
    let put = pb::PutRequest { key, value, lease, ..Default::default() };
    pb::RequestOp { request: Some(pb::request_op::Request::RequestPut(put)) }
}

/// The lock of etcd's Go package `concurrency`: a key under the lock's prefix, bound to a lease; the lowest create revision owns,
/// everybody else waits for the deletion of the key before its own.
struct RecipeMutex {
    rpc: Rpc,
    prefix: String,
    lease: i64,
}

impl RecipeMutex {
    fn my_key(&self) -> String {
        format!("{}/{:x}", self.prefix, self.lease)
    }

    async fn lock(&mut self) -> Result<()> {
        let mine: Bytes = self.my_key().into();
        let absent = pb::Compare {
            result: pb::compare::CompareResult::Equal as i32,
            target: pb::compare::CompareTarget::Create as i32,
            key: mine.clone(),
            target_union: Some(pb::compare::TargetUnion::CreateRevision(0)),
            ..Default::default()
        };
        let range = |request| pb::RequestOp { request: Some(pb::request_op::Request::RequestRange(request)) };
        let first = pb::RangeRequest {
            key: self.prefix.clone().into(),
            range_end: prefix_end(&self.prefix),
            sort_order: pb::range_request::SortOrder::Ascend as i32,
            sort_target: pb::range_request::SortTarget::Create as i32,
            limit: 1,
            ..Default::default()
        };
        let txn = pb::TxnRequest {
            compare: vec![absent],
            success: vec![put_op(mine.clone(), Bytes::new(), self.lease), range(first.clone())],
            failure: vec![range(pb::RangeRequest { key: mine.clone(), ..Default::default() }), range(first)],
        };
        let answer: pb::TxnResponse = self.rpc.unary(TXN, &txn).await?;
        let mut my_revision = answer.header.as_ref().context("no header")?.revision;
        let ranges: Vec<_> = answer
            .responses
            .iter()
            .filter_map(|r| match &r.response {
                Some(pb::response_op::Response::ResponseRange(r)) => Some(r),
                _ => None,
            })
            .collect();
        if !answer.succeeded {
            my_revision = ranges[0].kvs[0].create_revision;
        }
        let owner = ranges.last().context("no owner range")?;
        if owner.kvs.is_empty() || owner.kvs[0].create_revision == my_revision {
            return Ok(());
        }
        self.wait_for_those_before(my_revision).await?;
        // As the Go client does: the lease may have ended during the wait.
        let answer: pb::RangeResponse =
            self.rpc.unary(RANGE, &pb::RangeRequest { key: mine, ..Default::default() }).await?;
        ensure!(answer.kvs.len() == 1, "the lease ended while waiting");
        Ok(())
    }

    async fn wait_for_those_before(&mut self, my_revision: i64) -> Result<()> {
        loop {
            let last = pb::RangeRequest {
                key: format!("{}/", self.prefix).into(),
                range_end: prefix_end(&format!("{}/", self.prefix)),
                sort_order: pb::range_request::SortOrder::Descend as i32,
                sort_target: pb::range_request::SortTarget::Create as i32,
                limit: 1,
                max_create_revision: my_revision - 1,
                ..Default::default()
            };
            let answer: pb::RangeResponse = self.rpc.unary(RANGE, &last).await?;
            let Some(before) = answer.kvs.first() else { return Ok(()) };
            let from = answer.header.as_ref().context("no header")?.revision;
            self.wait_for_deletion(before.key.clone(), from).await?;
        }
    }

    async fn wait_for_deletion(&mut self, key: Bytes, from: i64) -> Result<()> {
        let mut stream = self.rpc.stream(WATCH).await?;
        stream.send(&create_watch(key, Bytes::new(), from, 0))?;
        while let Some(answer) = stream.receive.next::<pb::WatchResponse>().await? {
            if answer.events.iter().any(|e| e.r#type == 1) {
                return Ok(());
            }
        }
        anyhow::bail!("the watch ended")
    }
}

impl Client for RecipeMutex {
    async fn operate(&mut self) -> Result<()> {
        self.lock().await?;
        let delete = pb::DeleteRangeRequest { key: self.my_key().into(), ..Default::default() };
        let _: pb::DeleteRangeResponse = self.rpc.unary(DELETE, &delete).await?;
        Ok(())
    }
}

/// Acquire and release by the recipe of etcd's Go client; `shared`: all contend for one name.
pub(crate) async fn recipe_mutex(target: &Target, shared: bool) -> Result<Figures> {
    let mut clients = Vec::new();
    for i in 0..target.clients {
        let mut rpc = Rpc::connect(target.endpoint(i)).await?;
        let lease = grant(&mut rpc, 60).await?;
        let prefix = if shared { "bench-mutex/hot".to_owned() } else { format!("bench-mutex/own{i}") };
        clients.push(RecipeMutex { rpc, prefix, lease });
    }
    closed_loop(target, clients).await
}

struct LockRpc {
    rpc: Rpc,
    name: Bytes,
    lease: i64,
}

impl Client for LockRpc {
    async fn operate(&mut self) -> Result<()> {
        let answer: v3lockpb::LockResponse =
            self.rpc.unary(LOCK, &v3lockpb::LockRequest { name: self.name.clone(), lease: self.lease }).await?;
        let _: v3lockpb::UnlockResponse = self.rpc.unary(UNLOCK, &v3lockpb::UnlockRequest { key: answer.key }).await?;
        Ok(())
    }
}

/// Acquire and release by etcd's lock service.
pub(crate) async fn lock_rpc(target: &Target) -> Result<Figures> {
    let mut clients = Vec::new();
    for i in 0..target.clients {
        let mut rpc = Rpc::connect(target.endpoint(i)).await?;
        let lease = grant(&mut rpc, 60).await?;
        clients.push(LockRpc { rpc, name: "bench-lock-rpc".into(), lease });
    }
    closed_loop(target, clients).await
}

pub(crate) async fn grant(rpc: &mut Rpc, ttl_seconds: i64) -> Result<i64> {
    let answer: pb::LeaseGrantResponse = rpc.unary(GRANT, &pb::LeaseGrantRequest { ttl: ttl_seconds, id: 0 }).await?;
    ensure!(answer.error.is_empty(), "the lease was refused: {}", answer.error);
    Ok(answer.id)
}

pub(crate) fn create_watch(key: Bytes, range_end: Bytes, start_revision: i64, watch_id: i64) -> pb::WatchRequest {
    let create = pb::WatchCreateRequest { key, range_end, start_revision, watch_id, ..Default::default() };
    pb::WatchRequest { request_union: Some(pb::watch_request::RequestUnion::CreateRequest(create)) }
}

pub(crate) fn prefix_end(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

/// `watchers` watchers of one key on 100 connections; the next put when all have heard. Operations are delivered events,
/// latencies run from before the put to the delivery.
pub(crate) async fn watch_fan_out(target: &Target, watchers: usize) -> Result<Figures> {
    let connections = 100.min(watchers);
    let heard = Arc::new(AtomicU64::new(0));
    let all_heard = Arc::new(tokio::sync::Notify::new());
    let began = Instant::now();
    // Nanoseconds from `began` to the newest put.
    let sent_at = Arc::new(AtomicU64::new(0));
    let goal = Arc::new(AtomicU64::new(u64::MAX));
    let hot: Bytes = "bench-watch/hot".into();
    let mut tasks = Vec::new();
    let (stop, stopping) = tokio::sync::watch::channel(false);
    for c in 0..connections {
        let mut rpc = Rpc::connect(target.endpoint(c)).await?;
        let mut stream = rpc.stream(WATCH).await?;
        let mine = watchers / connections + usize::from(c < watchers % connections);
        for id in 0..mine {
            stream.send(&create_watch(hot.clone(), Bytes::new(), 0, id as i64 + 1))?;
        }
        let mut created = 0;
        while created < mine {
            let answer: pb::WatchResponse = stream.receive.next().await?.context("the watch ended")?;
            ensure!(answer.created && !answer.canceled, "a watch was refused: {}", answer.cancel_reason);
            created += 1;
        }
        let (heard, all_heard, sent_at, goal, mut stopping) =
            (heard.clone(), all_heard.clone(), sent_at.clone(), goal.clone(), stopping.clone());
        tasks.push(tokio::spawn(async move {
            // The whole stream: without its sending half the server would take the watches for given up.
            let mut stream = stream;
            let mut latencies = Histogram::new();
            loop {
                let message = tokio::select! {
                    m = stream.receive.next_bytes() => m,
                    _ = stopping.changed() => return latencies,
                };
                let Ok(Some(_)) = message else { return latencies };
                let delay = began.elapsed().as_nanos() as u64 - sent_at.load(Ordering::Relaxed);
                latencies.add(Duration::from_nanos(delay));
                if heard.fetch_add(1, Ordering::Relaxed) + 1 >= goal.load(Ordering::Relaxed) {
                    all_heard.notify_one();
                }
            }
        }));
    }
    let mut rpc = Rpc::connect(target.endpoint(0)).await?;
    let value: Bytes = Numbers::new(5).bytes(target.value_bytes).into();
    let window = Window::open(&target.pids)?;
    let mut puts = 0u64;
    while window.elapsed() < target.duration {
        puts += 1;
        goal.store(puts * watchers as u64, Ordering::Relaxed);
        sent_at.store(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
        let request = pb::PutRequest { key: hot.clone(), value: value.clone(), ..Default::default() };
        let _: pb::PutResponse = rpc.unary(PUT, &request).await?;
        while heard.load(Ordering::Relaxed) < puts * watchers as u64 {
            tokio::time::timeout(Duration::from_secs(30), all_heard.notified()).await.context("events were lost")?;
        }
    }
    let operations = heard.load(Ordering::Relaxed);
    let mut figures = window.close(Histogram::new(), operations, 0)?;
    stop.send_replace(true);
    for task in tasks {
        figures.latencies.merge(&task.await?);
    }
    Ok(figures)
}

/// `leases` live leases, each kept alive every 20 s, on a few streams. Operations are keep-alives answered.
pub(crate) async fn leases(target: &Target, leases: u64, ttl_seconds: i64) -> Result<Figures> {
    let streams = 16;
    let answered = Arc::new(AtomicU64::new(0));
    let lost = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    let ready = Arc::new(tokio::sync::Barrier::new(streams + 1));
    for s in 0..streams as u64 {
        let (endpoint, answered, lost, stop, ready) =
            (target.endpoint(s as usize).to_owned(), answered.clone(), lost.clone(), stop.clone(), ready.clone());
        tasks.push(tokio::spawn(async move {
            let mut rpc = Rpc::connect(&endpoint).await?;
            let mut ids = Vec::new();
            let grants: Vec<_> = (0..leases / streams as u64).collect();
            // Thirty-two grants in flight, so that setting up does not take as long as the measuring.
            for chunk in grants.chunks(32) {
                let mut inflight = tokio::task::JoinSet::new();
                for _ in chunk {
                    let mut rpc = rpc.clone();
                    inflight.spawn(async move { grant(&mut rpc, ttl_seconds).await });
                }
                while let Some(id) = inflight.join_next().await {
                    ids.push(id??);
                }
            }
            let super::rpc::Stream { mut send, mut receive } = rpc.stream(KEEP_ALIVE).await?;
            ready.wait().await;
            let reader = tokio::spawn(async move {
                while let Ok(Some(answer)) = receive.next::<pb::LeaseKeepAliveResponse>().await {
                    answered.fetch_add(1, Ordering::Relaxed);
                    if answer.ttl <= 0 {
                        lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            // Spread over 20 s in steps of 20 ms, the stream's own share of each.
            let per_step = (ids.len() / 1000).max(1);
            let mut next = s as usize * 7 % ids.len().max(1);
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            while !stop.load(Ordering::Relaxed) {
                ticks.tick().await;
                for _ in 0..per_step {
                    next = (next + 1) % ids.len();
                    send.send_data(frame(&pb::LeaseKeepAliveRequest { id: ids[next] }), false)?;
                }
            }
            reader.abort();
            anyhow::Ok(())
        }));
    }
    ready.wait().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = answered.load(Ordering::Relaxed);
    let window = Window::open(&target.pids)?;
    tokio::time::sleep(target.duration).await;
    let operations = answered.load(Ordering::Relaxed) - before;
    let figures = window.close(Histogram::new(), operations, lost.load(Ordering::Relaxed))?;
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await??;
    }
    Ok(figures)
}
