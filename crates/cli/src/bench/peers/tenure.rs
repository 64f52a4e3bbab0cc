//! The same work on Tenure, by its own Rust client, a connection for each caller.

use super::super::load::{Client as Load, Numbers, Target, closed_loop};
use super::super::measure::Figures;
use super::clients::JOB_BYTES;
use anyhow::{Context as _, Result, bail};
use std::time::Duration;
use tenure_client::{Begun, Client, Delivery, Idempotent, NewJob, Queue, StoredResult};

struct Worker {
    queue: Queue,
    job: Vec<u8>,
    /// Acknowledged together with the next receive, as a worker's loop does it.
    done: Option<Delivery>,
    together: bool,
}

impl Load for Worker {
    async fn operate(&mut self) -> Result<()> {
        let enqueue = self.queue.enqueue(NewJob::new(self.job.clone()));
        let mut receive = self.queue.receive().wait(Duration::from_secs(5));
        if let Some(done) = self.done.take() {
            receive = receive.ack(&done);
        }
        let jobs = if self.together {
            tokio::try_join!(enqueue, receive)?.1
        } else {
            enqueue.await?;
            receive.await?
        };
        self.done = Some(jobs.into_iter().next().context("no job came")?);
        Ok(())
    }
}

/// Enqueue, and receive with the ack of the job before: two commits one after the other, or `together` in one.
pub(crate) async fn queue(target: &Target, together: bool) -> Result<Figures> {
    let mut workers = Vec::new();
    for i in 0..target.clients {
        let queue = Client::connect([target.endpoint(i)]).await?.queue("jobs");
        workers.push(Worker { queue, job: Numbers::new(i as u64 + 1).bytes(JOB_BYTES), done: None, together });
    }
    closed_loop(target, workers).await
}

struct Asker {
    idempotent: Idempotent,
    caller: usize,
    asked: u64,
    result: StoredResult,
}

impl Load for Asker {
    async fn operate(&mut self) -> Result<()> {
        self.asked += 1;
        let key = format!("bench/{}/{:012}", self.caller, self.asked);
        let Begun::Granted(attempt) = self.idempotent.begin(&key).await? else { bail!("the key is new") };
        attempt.complete(&self.result).await?;
        Ok(())
    }
}

/// Begin and complete of a new key: two commits, which the peers' insert does in one. `shared`: over one connection.
pub(crate) async fn once(target: &Target, shared: bool) -> Result<Figures> {
    let mut askers = Vec::new();
    let first = Client::connect([target.endpoint(0)]).await?;
    for i in 0..target.clients {
        let client = if shared { first.clone() } else { Client::connect([target.endpoint(i)]).await? };
        let idempotent = client.idempotent("bench");
        let result = StoredResult::new(Numbers::new(i as u64 + 1).bytes(JOB_BYTES));
        askers.push(Asker { idempotent, caller: i, asked: 0, result });
    }
    closed_loop(target, askers).await
}

/// So many jobs in one queue, a hundred to a commit.
pub(super) async fn enqueue(endpoint: &str, jobs: u64) -> Result<()> {
    let queue = Client::connect([endpoint]).await?.queue("jobs");
    shared_out(jobs / 100, 16, move |n| {
        let queue = queue.clone();
        async move {
            let mut numbers = Numbers::new(n + 1);
            queue.enqueue_all((0..100).map(|_| NewJob::new(numbers.bytes(JOB_BYTES)))).await?;
            Ok(())
        }
    })
    .await
}

/// So many records with a result.
pub(super) async fn complete(endpoint: &str, records: u64) -> Result<()> {
    let idempotent = Client::connect([endpoint]).await?.idempotent("bench");
    shared_out(records, 256, move |n| {
        let idempotent = idempotent.clone();
        async move {
            let key = format!("bench/{n:012}");
            let Begun::Granted(attempt) = idempotent.begin(&key).await? else { bail!("the key is new") };
            attempt.complete(&StoredResult::new(Numbers::new(n + 1).bytes(JOB_BYTES))).await?;
            Ok(())
        }
    })
    .await
}

/// Does `work` for each number below `count`, so many at a time.
async fn shared_out<F, R>(count: u64, at_a_time: u64, work: F) -> Result<()>
where
    F: Fn(u64) -> R + Clone + Send + 'static,
    R: Future<Output = Result<()>> + Send,
{
    let mut tasks = tokio::task::JoinSet::new();
    for first in 0..at_a_time {
        let work = work.clone();
        tasks.spawn(async move {
            for n in (first..count).step_by(at_a_time as usize) {
                work(n).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}
