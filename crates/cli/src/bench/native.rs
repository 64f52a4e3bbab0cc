//! The native API by its own Rust client: all callers of an endpoint share one connection, and the client puts their requests together by itself.

use super::load::{Client as Load, Numbers, Target, closed_loop, key};
use super::measure::Figures;
use anyhow::{Context as _, Result};
use bytes::Bytes;
use std::time::Duration;
use tenure_client::{Client, Session};

/// A connection to each endpoint; a caller uses the one of its turn.
async fn connect(target: &Target) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for endpoint in &target.endpoints {
        clients.push(Client::connect([endpoint]).await?);
    }
    Ok(clients)
}

struct PutCaller {
    client: Client,
    numbers: Numbers,
    keys: u64,
    value: Bytes,
}

impl Load for PutCaller {
    async fn operate(&mut self) -> Result<()> {
        self.client.put(key(self.numbers.next() % self.keys), self.value.clone()).await?;
        Ok(())
    }
}

/// Puts, each with a request id as the client gives it.
pub(crate) async fn put(target: &Target) -> Result<Figures> {
    let clients = connect(target).await?;
    let callers = (0..target.clients)
        .map(|i| {
            let mut numbers = Numbers::new(i as u64 + 1);
            let value = numbers.bytes(target.value_bytes).into();
            PutCaller { client: clients[i % clients.len()].clone(), numbers, keys: target.keys, value }
        })
        .collect();
    closed_loop(target, callers).await
}

struct GetCaller {
    client: Client,
    numbers: Numbers,
    keys: u64,
}

impl Load for GetCaller {
    async fn operate(&mut self) -> Result<()> {
        self.client.get(key(self.numbers.next() % self.keys)).await?.context("a key is missing")?;
        Ok(())
    }
}

/// Linearizable gets.
pub(crate) async fn get(target: &Target) -> Result<Figures> {
    let clients = connect(target).await?;
    let callers = (0..target.clients)
        .map(|i| GetCaller {
            client: clients[i % clients.len()].clone(),
            numbers: Numbers::new(i as u64 + 1),
            keys: target.keys,
        })
        .collect();
    closed_loop(target, callers).await
}

struct LockCaller {
    // Ends the session when it is dropped, so it lives as long as the caller.
    session: Session,
    name: String,
}

impl Load for LockCaller {
    async fn operate(&mut self) -> Result<()> {
        let guard = self.session.lock(&self.name).wait(Duration::from_secs(60)).await?;
        guard.release().await?;
        Ok(())
    }
}

/// Acquire and release, a session and a connection for each caller; `shared`: all contend for one name.
pub(crate) async fn lock(target: &Target, shared: bool) -> Result<Figures> {
    let mut callers = Vec::new();
    for i in 0..target.clients {
        let client = Client::connect([target.endpoint(i)]).await?;
        let session = client.session().ttl(Duration::from_secs(60)).await?;
        let name = if shared { "bench/hot".to_owned() } else { format!("bench/own{i}") };
        callers.push(LockCaller { session, name });
    }
    closed_loop(target, callers).await
}
