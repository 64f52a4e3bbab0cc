//! The peers' clients: as little as each workload needs, a connection for each caller.

use super::super::load::{Client, Numbers};
use super::servers::Server;
use anyhow::{Context as _, Result, bail, ensure};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

/// Bytes of a job.
pub(crate) const JOB_BYTES: usize = 256;
/// How long a peer's lock lives at most.
const LOCK_MS: u64 = 10_000;

/// A line protocol over TCP.
struct Line<S = TcpStream> {
    stream: BufReader<S>,
    line: Vec<u8>,
}

impl Line {
    async fn connect(server: &Server) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", server.port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), line: Vec::new() })
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.get_mut().write_all(bytes).await?)
    }
}

impl<S: AsyncRead + Unpin> Line<S> {
    /// The next line, without its end.
    async fn line(&mut self) -> Result<&str> {
        self.line.clear();
        ensure!(self.stream.read_until(b'\n', &mut self.line).await? > 0, "the server closed the connection");
        Ok(std::str::from_utf8(&self.line)?.trim_end())
    }

    /// So many bytes and the end of line behind them.
    async fn body(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut body = vec![0; len + 2];
        self.stream.read_exact(&mut body).await?;
        body.truncate(len);
        Ok(body)
    }
}

// ---- Redis ----

/// A connection that speaks RESP.
struct Redis<S = TcpStream>(Line<S>);

#[derive(Debug)]
enum Resp {
    Nil,
    Number(i64),
    Text(Vec<u8>),
    List(Vec<Resp>),
}

fn resp_call(b: &mut Vec<u8>, words: &[&[u8]]) {
    b.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        b.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        b.extend_from_slice(word);
        b.extend_from_slice(b"\r\n");
    }
}

impl Redis {
    async fn call(&mut self, words: &[&[u8]]) -> Result<Resp> {
        let mut b = Vec::new();
        resp_call(&mut b, words);
        self.0.send(&b).await?;
        self.answer().await
    }
}

impl<S: AsyncRead + Unpin + Send> Redis<S> {
    async fn answer(&mut self) -> Result<Resp> {
        let line = self.0.line().await?.to_owned();
        let (kind, rest) = line.split_at_checked(1).context("an empty answer")?;
        Ok(match kind {
            "+" => Resp::Text(rest.into()),
            ":" => Resp::Number(rest.parse()?),
            "$" => match rest.parse::<i64>()? {
                -1 => Resp::Nil,
                len => Resp::Text(self.0.body(len as usize).await?),
            },
            "*" => match rest.parse::<i64>()? {
                -1 => Resp::Nil,
                len => {
                    let mut list = Vec::new();
                    for _ in 0..len {
                        list.push(Box::pin(self.answer()).await?);
                    }
                    Resp::List(list)
                }
            },
            _ => bail!("Redis says {line}"),
        })
    }
}

/// A stream with a consumer group: XADD, XREADGROUP, XACK with XDEL.
pub(crate) struct RedisQueue {
    redis: Redis,
    consumer: String,
    job: Vec<u8>,
}

impl RedisQueue {
    pub(crate) async fn connect(server: &Server, i: usize) -> Result<Self> {
        let mut redis = Redis(Line::connect(server).await?);
        // The second worker is told that the group is there.
        let _ = redis.call(&[b"XGROUP", b"CREATE", b"jobs", b"g", b"$", b"MKSTREAM"]).await;
        Ok(Self { redis, consumer: format!("c{i}"), job: Numbers::new(i as u64 + 1).bytes(JOB_BYTES) })
    }
}

impl RedisQueue {
    fn add(&self, b: &mut Vec<u8>) {
        resp_call(b, &[b"XADD", b"jobs", b"*", b"p", &self.job]);
    }

    fn read(&self, b: &mut Vec<u8>) {
        let group: [&[u8]; 4] = [b"XREADGROUP", b"GROUP", b"g", self.consumer.as_bytes()];
        let what: [&[u8]; 7] = [b"COUNT", b"1", b"BLOCK", b"5000", b"STREAMS", b"jobs", b">"];
        resp_call(b, &[&group[..], &what].concat());
    }

    fn done(b: &mut Vec<u8>, id: &[u8]) {
        resp_call(b, &[b"XACK", b"jobs", b"g", id]);
        resp_call(b, &[b"XDEL", b"jobs", id]);
    }

    async fn added(&mut self) -> Result<()> {
        ensure!(matches!(self.redis.answer().await?, Resp::Text(_)), "the job was not added");
        Ok(())
    }

    async fn got(&mut self) -> Result<Vec<u8>> {
        let got = self.redis.answer().await?;
        Ok(first_id(&got).context("no job came")?.to_vec())
    }

    async fn acknowledged(&mut self) -> Result<()> {
        for _ in 0..2 {
            ensure!(matches!(self.redis.answer().await?, Resp::Number(1)), "the job was not acknowledged");
        }
        Ok(())
    }
}

impl Client for RedisQueue {
    async fn operate(&mut self) -> Result<()> {
        let mut b = Vec::new();
        self.add(&mut b);
        self.redis.0.send(&b).await?;
        self.added().await?;
        b.clear();
        self.read(&mut b);
        self.redis.0.send(&b).await?;
        let id = self.got().await?;
        b.clear();
        Self::done(&mut b, &id);
        self.redis.0.send(&b).await?;
        self.acknowledged().await
    }
}

/// A worker that sends the ack of the job before, a new job and the next receive in one write.
pub(crate) struct Together<Q> {
    queue: Q,
    done: Option<Vec<u8>>,
}

impl<Q> Together<Q> {
    pub(crate) fn new(queue: Q) -> Self {
        Self { queue, done: None }
    }
}

impl Client for Together<RedisQueue> {
    async fn operate(&mut self) -> Result<()> {
        let mut b = Vec::new();
        let done = self.done.take();
        if let Some(id) = &done {
            RedisQueue::done(&mut b, id);
        }
        self.queue.add(&mut b);
        self.queue.read(&mut b);
        self.queue.redis.0.send(&b).await?;
        if done.is_some() {
            self.queue.acknowledged().await?;
        }
        self.queue.added().await?;
        self.done = Some(self.queue.got().await?);
        Ok(())
    }
}

/// The id in `[[stream, [[id, fields]]]]`.
fn first_id(answer: &Resp) -> Option<&[u8]> {
    let Resp::List(streams) = answer else { return None };
    let Resp::List(stream) = streams.first()? else { return None };
    let Resp::List(entries) = stream.get(1)? else { return None };
    let Resp::List(entry) = entries.first()? else { return None };
    let Resp::Text(id) = entry.first()? else { return None };
    Some(id)
}

/// SET NX GET: inserts, or returns what is there. Each key is asked for twice.
pub(crate) struct RedisOnce {
    redis: Redis,
    keys: Keys,
    value: Vec<u8>,
}

impl RedisOnce {
    pub(crate) async fn connect(server: &Server, i: usize) -> Result<Self> {
        let value = Numbers::new(i as u64 + 1).bytes(JOB_BYTES);
        Ok(Self { redis: Redis(Line::connect(server).await?), keys: Keys::new(i), value })
    }
}

impl Client for RedisOnce {
    async fn operate(&mut self) -> Result<()> {
        let (key, is_first) = self.keys.next();
        let got = self.redis.call(&[b"SET", key.as_bytes(), &self.value, b"NX", b"GET", b"EX", b"86400"]).await?;
        ensure!(matches!(got, Resp::Nil) == is_first, "the key was not as expected");
        Ok(())
    }
}

/// One connection for many callers: what they ask for while a write is under way leaves in the next one.
#[derive(Clone)]
pub(crate) struct RedisShared(mpsc::UnboundedSender<(Vec<u8>, oneshot::Sender<Resp>)>);

impl RedisShared {
    pub(crate) async fn connect(server: &Server) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", server.port)).await?;
        stream.set_nodelay(true)?;
        let (read, mut write) = stream.into_split();
        let (calls, mut queue) = mpsc::unbounded_channel::<(Vec<u8>, oneshot::Sender<Resp>)>();
        let (asked, mut answers) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(first) = queue.recv().await {
                let mut b = Vec::new();
                let mut next = Some(first);
                while let Some((call, answer)) = next {
                    b.extend_from_slice(&call);
                    let _ = asked.send(answer);
                    next = queue.try_recv().ok();
                }
                write.write_all(&b).await?;
            }
            anyhow::Ok(())
        });
        tokio::spawn(async move {
            let mut redis = Redis(Line { stream: BufReader::new(read), line: Vec::new() });
            while let Some(answer) = answers.recv().await {
                let _ = answer.send(redis.answer().await?);
            }
            anyhow::Ok(())
        });
        Ok(Self(calls))
    }
}

/// As `RedisOnce`.
pub(crate) struct RedisSharedOnce {
    shared: RedisShared,
    keys: Keys,
    value: Vec<u8>,
}

impl RedisSharedOnce {
    pub(crate) fn new(shared: RedisShared, i: usize) -> Self {
        Self { shared, keys: Keys::new(i), value: Numbers::new(i as u64 + 1).bytes(JOB_BYTES) }
    }
}

impl Client for RedisSharedOnce {
    async fn operate(&mut self) -> Result<()> {
        let (key, is_first) = self.keys.next();
        let (mut call, (answer, answered)) = (Vec::new(), oneshot::channel());
        resp_call(&mut call, &[b"SET", key.as_bytes(), &self.value, b"NX", b"GET", b"EX", b"86400"]);
        self.shared.0.send((call, answer)).ok().context("the connection is gone")?;
        ensure!(matches!(answered.await?, Resp::Nil) == is_first, "the key was not as expected");
        Ok(())
    }
}

/// A stream of jobs, or keys with results, a thousand to a write.
pub(super) async fn fill_redis(server: &Server, things: u64, stream: bool) -> Result<()> {
    let mut redis = Redis(Line::connect(server).await?);
    for thousand in 0..things / 1000 {
        let (mut b, mut numbers) = (Vec::new(), Numbers::new(thousand + 1));
        for n in 0..1000 {
            let (key, bytes) = (format!("bench/{:012}", thousand * 1000 + n), numbers.bytes(JOB_BYTES));
            match stream {
                true => resp_call(&mut b, &[b"XADD", b"jobs", b"*", b"p", &bytes]),
                false => resp_call(&mut b, &[b"SET", key.as_bytes(), &bytes, b"NX", b"EX", b"86400"]),
            }
        }
        redis.0.send(&b).await?;
        for _ in 0..1000 {
            ensure!(matches!(redis.answer().await?, Resp::Text(_)), "Redis took no more");
        }
    }
    Ok(())
}

/// Keys, each given twice in a row, of one caller.
pub(crate) struct Keys {
    caller: usize,
    asked: u64,
}

impl Keys {
    pub(crate) fn new(caller: usize) -> Self {
        Self { caller, asked: 0 }
    }

    /// The key, and whether it is asked for the first time.
    pub(crate) fn next(&mut self) -> (String, bool) {
        let key = format!("bench/{}/{:012}", self.caller, self.asked / 2);
        self.asked += 1;
        (key, self.asked % 2 == 1)
    }
}

/// SET NX PX, tried again after 1 to 9 ms; released by compare and delete.
pub(crate) struct RedisLock {
    redis: Redis,
    numbers: Numbers,
    owner: String,
}

impl RedisLock {
    pub(crate) async fn connect(server: &Server, i: usize) -> Result<Self> {
        let (numbers, owner) = (Numbers::new(i as u64 + 1), format!("owner-{i}"));
        Ok(Self { redis: Redis(Line::connect(server).await?), numbers, owner })
    }
}

impl Client for RedisLock {
    async fn operate(&mut self) -> Result<()> {
        let ttl = LOCK_MS.to_string();
        loop {
            let taken = self.redis.call(&[b"SET", b"hot", self.owner.as_bytes(), b"NX", b"PX", ttl.as_bytes()]).await?;
            if !matches!(taken, Resp::Nil) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1 + self.numbers.next() % 9)).await;
        }
        let script = b"if redis.call('get',KEYS[1])==ARGV[1] then return redis.call('del',KEYS[1]) end return 0";
        let freed = self.redis.call(&[b"EVAL", script, b"1", b"hot", self.owner.as_bytes()]).await?;
        ensure!(matches!(freed, Resp::Number(1)), "the lock was lost");
        Ok(())
    }
}

// ---- beanstalkd ----

/// put, reserve, delete.
pub(crate) struct BeanstalkQueue {
    line: Line,
    job: Vec<u8>,
}

impl BeanstalkQueue {
    pub(crate) async fn connect(server: &Server, i: usize) -> Result<Self> {
        Ok(Self { line: Line::connect(server).await?, job: Numbers::new(i as u64 + 1).bytes(JOB_BYTES) })
    }
}

impl BeanstalkQueue {
    fn put(&self, b: &mut Vec<u8>) {
        b.extend_from_slice(format!("put 1024 0 60 {}\r\n", self.job.len()).as_bytes());
        b.extend_from_slice(&self.job);
        b.extend_from_slice(b"\r\n");
    }

    const RESERVE: &[u8] = b"reserve-with-timeout 5\r\n";

    fn delete(b: &mut Vec<u8>, id: &[u8]) {
        b.extend_from_slice(b"delete ");
        b.extend_from_slice(id);
        b.extend_from_slice(b"\r\n");
    }

    async fn inserted(&mut self) -> Result<()> {
        ensure!(self.line.line().await?.starts_with("INSERTED"), "not inserted");
        Ok(())
    }

    async fn reserved(&mut self) -> Result<Vec<u8>> {
        let reserved = self.line.line().await?.to_owned();
        let words: Vec<&str> = reserved.split(' ').collect();
        let ["RESERVED", id, len] = words[..] else { bail!("beanstalkd says {reserved}") };
        self.line.body(len.parse()?).await?;
        Ok(id.as_bytes().to_vec())
    }

    async fn deleted(&mut self) -> Result<()> {
        ensure!(self.line.line().await? == "DELETED", "not deleted");
        Ok(())
    }
}

impl Client for BeanstalkQueue {
    async fn operate(&mut self) -> Result<()> {
        let mut b = Vec::new();
        self.put(&mut b);
        self.line.send(&b).await?;
        self.inserted().await?;
        self.line.send(Self::RESERVE).await?;
        let id = self.reserved().await?;
        b.clear();
        Self::delete(&mut b, &id);
        self.line.send(&b).await?;
        self.deleted().await
    }
}

impl Client for Together<BeanstalkQueue> {
    async fn operate(&mut self) -> Result<()> {
        let mut b = Vec::new();
        let done = self.done.take();
        if let Some(id) = &done {
            BeanstalkQueue::delete(&mut b, id);
        }
        self.queue.put(&mut b);
        b.extend_from_slice(BeanstalkQueue::RESERVE);
        self.queue.line.send(&b).await?;
        if done.is_some() {
            self.queue.deleted().await?;
        }
        self.queue.inserted().await?;
        self.done = Some(self.queue.reserved().await?);
        Ok(())
    }
}

// ---- NATS ----

/// A work-queue stream and a durable pull consumer: publish, next, acknowledge with an answer.
pub(crate) struct NatsQueue {
    line: Line,
    inbox: String,
    job: Vec<u8>,
}

impl NatsQueue {
    pub(crate) async fn connect(server: &Server, i: usize) -> Result<Self> {
        let mut line = Line::connect(server).await?;
        line.line().await?;
        let inbox = format!("_INBOX.{i}");
        line.send(format!("CONNECT {{\"verbose\":false,\"pedantic\":false}}\r\nSUB {inbox} 1\r\n").as_bytes()).await?;
        let mut queue = Self { line, inbox, job: Numbers::new(i as u64 + 1).bytes(JOB_BYTES) };
        let stream = r#"{"name":"JOBS","subjects":["jobs"],"retention":"workqueue","storage":"file"}"#;
        queue.request("$JS.API.STREAM.CREATE.JOBS", stream.as_bytes()).await?;
        let consumer =
            r#"{"stream_name":"JOBS","config":{"durable_name":"w","ack_policy":"explicit","max_ack_pending":10000}}"#;
        queue.request("$JS.API.CONSUMER.DURABLE.CREATE.JOBS.w", consumer.as_bytes()).await?;
        Ok(queue)
    }

    /// Publishes and waits for the one answer: its subject to answer to, and its body.
    async fn request(&mut self, subject: &str, body: &[u8]) -> Result<(String, Vec<u8>)> {
        let mut b = format!("PUB {subject} {} {}\r\n", self.inbox, body.len()).into_bytes();
        b.extend_from_slice(body);
        b.extend_from_slice(b"\r\n");
        self.line.send(&b).await?;
        loop {
            let line = self.line.line().await?.to_owned();
            if line == "PING" {
                self.line.send(b"PONG\r\n").await?;
                continue;
            }
            let words: Vec<&str> = line.split(' ').collect();
            let (reply, len) = match words[..] {
                ["MSG", _, _, len] => ("", len),
                ["MSG", _, _, reply, len] => (reply, len),
                ["INFO", ..] => continue,
                _ => bail!("NATS says {line}"),
            };
            let reply = reply.to_owned();
            let body = self.line.body(len.parse()?).await?;
            return Ok((reply, body));
        }
    }
}

impl Client for NatsQueue {
    async fn operate(&mut self) -> Result<()> {
        let job = self.job.clone();
        let (_, published) = self.request("jobs", &job).await?;
        ensure!(!String::from_utf8_lossy(&published).contains("error"), "not stored");
        let (ack, body) =
            self.request("$JS.API.CONSUMER.MSG.NEXT.JOBS.w", br#"{"batch":1,"expires":5000000000}"#).await?;
        ensure!(body.len() == JOB_BYTES, "no job came");
        self.request(&ack, b"+ACK").await?;
        Ok(())
    }
}

// ---- PostgreSQL ----

async fn postgres(server: &Server) -> Result<tokio_postgres::Client> {
    let address = format!("host=127.0.0.1 port={} user=bench dbname=postgres", server.port);
    // It takes connections a moment after it listens.
    for _ in 0..200 {
        if let Ok((client, connection)) = tokio_postgres::connect(&address, tokio_postgres::NoTls).await {
            tokio::spawn(connection);
            return Ok(client);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("PostgreSQL takes no connection")
}

/// The tables; once for each server.
pub(crate) async fn prepare_postgres(server: &Server) -> Result<()> {
    let tables = "create table jobs (id bigserial primary key, payload bytea not null);
        create table once (key text primary key, result bytea not null)";
    Ok(postgres(server).await?.batch_execute(tables).await?)
}

/// One commit to insert; one to take a job with SKIP LOCKED and delete it.
pub(crate) struct PostgresQueue {
    client: tokio_postgres::Client,
    insert: tokio_postgres::Statement,
    take: tokio_postgres::Statement,
    job: Vec<u8>,
}

impl PostgresQueue {
    pub(crate) async fn connect(server: &Server, i: usize) -> Result<Self> {
        let client = postgres(server).await?;
        let insert = client.prepare("insert into jobs (payload) values ($1)").await?;
        let take = client
            .prepare(
                "delete from jobs where id = (select id from jobs order by id for update skip locked limit 1) \
                 returning payload",
            )
            .await?;
        Ok(Self { client, insert, take, job: Numbers::new(i as u64 + 1).bytes(JOB_BYTES) })
    }
}

impl Client for PostgresQueue {
    async fn operate(&mut self) -> Result<()> {
        self.client.execute(&self.insert, &[&self.job]).await?;
        // Another worker may hold the only job that is left at this moment.
        while self.client.query_opt(&self.take, &[]).await?.is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

/// INSERT ON CONFLICT DO NOTHING, then SELECT where it was there. Each key is asked for twice.
pub(crate) struct PostgresOnce {
    client: tokio_postgres::Client,
    insert: tokio_postgres::Statement,
    select: tokio_postgres::Statement,
    keys: Keys,
    value: Vec<u8>,
}

impl PostgresOnce {
    pub(crate) async fn connect(server: &Server, i: usize) -> Result<Self> {
        let client = postgres(server).await?;
        let insert = client.prepare("insert into once values ($1, $2) on conflict do nothing").await?;
        let select = client.prepare("select result from once where key = $1").await?;
        let value = Numbers::new(i as u64 + 1).bytes(JOB_BYTES);
        Ok(Self { client, insert, select, keys: Keys::new(i), value })
    }
}

impl Client for PostgresOnce {
    async fn operate(&mut self) -> Result<()> {
        let (key, is_first) = self.keys.next();
        let made = self.client.execute(&self.insert, &[&key, &self.value]).await?;
        ensure!((made == 1) == is_first, "the key was not as expected");
        if made == 0 {
            self.client.query_one(&self.select, &[&key]).await?;
        }
        Ok(())
    }
}

/// An advisory lock of the connection: in memory only.
pub(crate) struct PostgresLock {
    client: tokio_postgres::Client,
    lock: tokio_postgres::Statement,
    unlock: tokio_postgres::Statement,
}

impl PostgresLock {
    pub(crate) async fn connect(server: &Server) -> Result<Self> {
        let client = postgres(server).await?;
        let lock = client.prepare("select pg_advisory_lock(7)").await?;
        let unlock = client.prepare("select pg_advisory_unlock(7)").await?;
        Ok(Self { client, lock, unlock })
    }
}

impl Client for PostgresLock {
    async fn operate(&mut self) -> Result<()> {
        self.client.query_one(&self.lock, &[]).await?;
        let freed: bool = self.client.query_one(&self.unlock, &[]).await?.get(0);
        ensure!(freed, "the lock was not held");
        Ok(())
    }
}
