//! The peers' clients: as little as each workload needs, a connection for each caller.

use super::super::load::{Client, Numbers};
use super::servers::Server;
use anyhow::{Context as _, Result, bail, ensure};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// Bytes of a job.
pub(crate) const JOB_BYTES: usize = 256;
/// How long a peer's lock lives at most.
const LOCK_MS: u64 = 10_000;

/// A line protocol over TCP.
struct Line {
    stream: BufReader<TcpStream>,
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
struct Redis(Line);

#[derive(Debug)]
enum Resp {
    Nil,
    Number(i64),
    Text(Vec<u8>),
    List(Vec<Resp>),
}

impl Redis {
    async fn call(&mut self, words: &[&[u8]]) -> Result<Resp> {
        let mut b = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            b.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            b.extend_from_slice(word);
            b.extend_from_slice(b"\r\n");
        }
        self.0.send(&b).await?;
        self.answer().await
    }

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

impl Client for RedisQueue {
    async fn operate(&mut self) -> Result<()> {
        self.redis.call(&[b"XADD", b"jobs", b"*", b"p", &self.job]).await?;
        let read: [&[u8]; 11] = [
            b"XREADGROUP",
            b"GROUP",
            b"g",
            self.consumer.as_bytes(),
            b"COUNT",
            b"1",
            b"BLOCK",
            b"5000",
            b"STREAMS",
            b"jobs",
            b">",
        ];
        let got = self.redis.call(&read).await?;
        let id = first_id(&got).context("no job came")?.to_vec();
        // Both in one write, as a pipelining client sends them.
        let mut both = Vec::new();
        for words in [&[&b"XACK"[..], b"jobs", b"g", &id][..], &[b"XDEL", b"jobs", &id]] {
            both.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
            for word in words {
                both.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
                both.extend_from_slice(word);
                both.extend_from_slice(b"\r\n");
            }
        }
        self.redis.0.send(&both).await?;
        for _ in 0..2 {
            ensure!(matches!(self.redis.answer().await?, Resp::Number(1)), "the job was not acknowledged");
        }
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

impl Client for BeanstalkQueue {
    async fn operate(&mut self) -> Result<()> {
        let mut put = format!("put 1024 0 60 {}\r\n", self.job.len()).into_bytes();
        put.extend_from_slice(&self.job);
        put.extend_from_slice(b"\r\n");
        self.line.send(&put).await?;
        ensure!(self.line.line().await?.starts_with("INSERTED"), "not inserted");
        self.line.send(b"reserve-with-timeout 5\r\n").await?;
        let reserved = self.line.line().await?.to_owned();
        let words: Vec<&str> = reserved.split(' ').collect();
        let ["RESERVED", id, len] = words[..] else { bail!("beanstalkd says {reserved}") };
        self.line.body(len.parse()?).await?;
        self.line.send(format!("delete {id}\r\n").as_bytes()).await?;
        ensure!(self.line.line().await? == "DELETED", "not deleted");
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
