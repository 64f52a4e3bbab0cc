//! Read, change, write back: an update by compare that is tried again when somebody else was first.
//!
//! Promises. Nothing of another is overwritten: every write expects the key as it was when its new value was made. A conflict brings the key as it
//! is, so that no try reads twice. After a few conflicts the key is taken for a hot one, and its updaters queue up at a lock of the service, in the
//! order of their arrival, where each needs one try again; whoever writes without it is still noticed by the compare.
//! The conflicts are counted here and not at the server: a write that lost changes nothing, so the replicated state knows nothing of it.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;

use crate::client::Client;
use crate::error::{Code, Error};
use crate::kv::Record;
use crate::lock::LockGuard;
use crate::requests::jitter;
use crate::session::Session;

/// Conflicts after which the key is taken for a hot one.
const CONFLICTS_MAX: u32 = 4;
/// Tries in all.
const TRIES_MAX: u32 = 40;
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// The longest name of a lock.
const LOCK_NAME_MAX: usize = 1_024;

/// What an update gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Updated {
    /// The key's new `mod_revision`, or that of the last read where nothing was written.
    pub revision: u64,
    /// Whether the key was written.
    pub written: bool,
    /// How often somebody else was first.
    pub conflicts: u32,
    /// The key was hot, so this update waited for its turn at a lock.
    pub locked: bool,
}

impl Client {
    /// Changes a key by what it is: `change` gets the record, or `None` if there is no such key, and returns the new value, or `None` to leave
    /// it as it is. It is called again with the newer record when somebody else was first, so it must do nothing but calculate.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let updated = client
    ///     .update("visits", |record| {
    ///         let visits: u64 = record.and_then(|r| r.value_str()?.parse().ok()).unwrap_or(0);
    ///         Some((visits + 1).to_string().into())
    ///     })
    ///     .await?;
    /// println!("written at {} after {} conflicts", updated.revision, updated.conflicts);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`Client::put`]. [`Code::Conflict`] if somebody else was first forty times. After [`Error::Unknown`] the write may have happened.
    pub async fn update(
        &self,
        key: impl Into<Bytes>,
        change: impl FnMut(Option<&Record>) -> Option<Bytes>,
    ) -> Result<Updated, Error> {
        let key = key.into();
        let mut turn = None;
        let updated = self.update_in_turn(&key, change, &mut turn).await;
        if let Some((session, guard)) = turn {
            // The turn of the next one comes at the latest when the session ends; how this update ended is known already.
            let _ = guard.release().await;
            let _ = session.end().await;
        }
        updated
    }

    async fn update_in_turn(
        &self,
        key: &Bytes,
        mut change: impl FnMut(Option<&Record>) -> Option<Bytes>,
        turn: &mut Option<(Session, LockGuard)>,
    ) -> Result<Updated, Error> {
        let mut updated = Updated::default();
        let mut current = self.get(key.clone()).await?;
        let mut pause = PAUSE_MIN;
        loop {
            let Some(value) = change(current.as_ref()) else {
                updated.revision = current.map_or(0, |record| record.mod_revision);
                return Ok(updated);
            };
            let put = self.put(key.clone(), value);
            let put = match &current {
                Some(record) => put.expect_mod_revision(record.mod_revision),
                None => put.expect_absent(),
            };
            let problem = match put.await {
                Ok(reply) => return Ok(Updated { revision: reply.revision, written: true, ..updated }),
                Err(Error::Refused(problem)) if problem.code == Code::Conflict => problem,
                Err(error) => return Err(error),
            };
            updated.conflicts += 1;
            if updated.conflicts >= TRIES_MAX {
                return Err(Error::Refused(problem));
            }
            current = problem.current;
            if updated.conflicts == CONFLICTS_MAX {
                *turn = self.turn(key).await?;
                updated.locked = turn.is_some();
                // The queue took time, and this key changes often.
                current = self.get(key.clone()).await?;
                continue;
            }
            sleep(pause - pause / 2 * u32::from(jitter()) / 255).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// The turn at a hot key. `None`: the key is too long for the name of a lock, or the turn did not come in time; the compare decides alone.
    async fn turn(&self, key: &Bytes) -> Result<Option<(Session, LockGuard)>, Error> {
        let name = format!("tenure.update/{}", key.escape_ascii());
        if name.len() > LOCK_NAME_MAX {
            return Ok(None);
        }
        let session = self.session().name("update of a hot key").await?;
        match session.lock(name).wait(self.timeout()).await {
            Ok(guard) => Ok(Some((session, guard))),
            Err(error) if error.code() == Some(Code::TimeoutWaiting) => {
                session.end().await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
