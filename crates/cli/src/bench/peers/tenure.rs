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
