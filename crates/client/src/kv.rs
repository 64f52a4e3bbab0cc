//! Keys: read, write, delete, lists and transactions, each as a small builder that is carried out by `.await`.
//!
//! Promises. Reads are linearizable unless `stale` is asked for. A change with [`LockProof`]s happens only if every one of those locks
//! is held under exactly that token at the commit: the check and the change are one step.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Reply;
use tenure_wire::tenure::v1::request::Call;

use crate::client::{Client, mismatched};
use crate::error::{Error, found};
use crate::lock::LockGuard;
use crate::session::Session;

pub(crate) type Answering<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// Has a call that was made ready carried out when it is awaited.
macro_rules! carried_out {
    ($name:ident<'a> => $reply:ty, $run:ident) => {
        impl<'a> ::std::future::IntoFuture for $name<'a> {
            type Output = Result<$reply, $crate::error::Error>;
            type IntoFuture = $crate::kv::Answering<'a, $reply>;

            fn into_future(self) -> Self::IntoFuture {
                Box::pin(self.$run())
            }
        }
    };
}
pub(crate) use carried_out;

/// A key with its value at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Bytes,
    /// Its value; empty where only keys were asked for.
    pub value: Bytes,
    /// Revision of the commit that made the key, since it last did not exist.
    pub create_revision: u64,
    /// Revision of its last change.
    pub mod_revision: u64,
    /// Changes since the key was made, the first counted as 1.
    pub version: u64,
    /// The session that the key ends with, or 0.
    pub session: u64,
}

impl Record {
    /// The key, if it is text.
    #[must_use]
    pub fn key_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.key).ok()
    }

    /// The value, if it is text.
    #[must_use]
    pub fn value_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.value).ok()
    }
}

/// Answers carry text in one field and other bytes in another; at most one is filled.
fn either(text: String, bytes: Bytes) -> Bytes {
    if text.is_empty() { bytes } else { text.into() }
}

impl From<v1::Record> for Record {
    fn from(record: v1::Record) -> Self {
        Self {
            key: either(record.key, record.key_bytes),
            value: either(record.value, record.value_bytes),
            create_revision: record.create_revision,
            mod_revision: record.mod_revision,
            version: record.version,
            session: record.session,
        }
    }
}

/// Proof of ownership that a change carries: this lock, held under this token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockProof {
    /// The name of the lock.
    pub name: String,
    /// The fencing token of the grant.
    pub token: u64,
}

impl From<&LockGuard> for LockProof {
    fn from(guard: &LockGuard) -> Self {
        Self { name: guard.name().to_owned(), token: guard.token() }
    }
}

impl<N: Into<String>> From<(N, u64)> for LockProof {
    fn from((name, token): (N, u64)) -> Self {
        Self { name: name.into(), token }
    }
}

impl From<LockProof> for v1::RequireLock {
    fn from(proof: LockProof) -> Self {
        Self { name: proof.name, token: proof.token }
    }
}

fn revision(header: Option<v1::Header>) -> (u64, bool) {
    header.map_or((0, false), |header| (header.revision, header.replayed))
}

fn absent(absent: bool) -> Option<v1::Expect> {
    Some(v1::Expect { fact: Some(v1::expect::Fact::Absent(absent)) })
}

fn expect_version(version: u64) -> Option<v1::Expect> {
    Some(v1::Expect { fact: Some(v1::expect::Fact::Version(version)) })
}

fn expect_mod_revision(revision: u64) -> Option<v1::Expect> {
    Some(v1::Expect { fact: Some(v1::expect::Fact::ModRevision(revision)) })
}

fn expect_value(value: Bytes) -> Option<v1::Expect> {
    Some(v1::Expect { fact: Some(v1::expect::Fact::ValueBytes(value)) })
}

impl Client {
    /// Reads one key; `None` if there is no such key.
    #[must_use = "nothing is read before .await"]
    pub fn get(&self, key: impl Into<Bytes>) -> Get<'_> {
        let request = v1::GetRequest { key_bytes: key.into(), namespace: self.namespace(), ..Default::default() };
        Get { client: self, request }
    }

    /// Writes one key.
    #[must_use = "nothing is written before .await"]
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Put<'_> {
        let request = v1::PutRequest {
            key_bytes: key.into(),
            value_bytes: value.into(),
            namespace: self.namespace(),
            ..Default::default()
        };
        Put { client: self, request, under: None }
    }

    /// Deletes one key, or a range with [`Delete::prefix`] or [`Delete::until`]. Deleting nothing succeeds.
    #[must_use = "nothing is deleted before .await"]
    pub fn delete(&self, key: impl Into<Bytes>) -> Delete<'_> {
        let request = v1::DeleteRequest { key_bytes: key.into(), namespace: self.namespace(), ..Default::default() };
        Delete { client: self, request, under: None }
    }

    /// Reads keys in order, from this one on.
    #[must_use = "nothing is read before .await"]
    pub fn range(&self, from: impl Into<Bytes>) -> Range<'_> {
        let request = v1::RangeRequest { key_bytes: from.into(), namespace: self.namespace(), ..Default::default() };
        Range { client: self, request }
    }

    /// A transaction: compares, then one of two lists of operations, in one commit.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// use tenure_client::{Compare, Op};
    /// let reply = client
    ///     .txn()
    ///     .when(Compare::version("seat/12").equals(0))
    ///     .then(Op::put("seat/12", "alice"))
    ///     .otherwise(Op::get("seat/12"))
    ///     .await?;
    /// println!("{}", if reply.succeeded { "booked" } else { "taken" });
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing happens before .await"]
    pub fn txn(&self) -> Txn<'_> {
        Txn { client: self, request: v1::TxnRequest { namespace: self.namespace(), ..Default::default() }, under: None }
    }

    /// Runs a change under a request id of its own, or of the session that it names.
    async fn keyed(
        &self,
        what: &'static str,
        under: Option<&Session>,
        call: impl FnOnce(v1::RequestMeta) -> Call,
    ) -> Result<Reply, Error> {
        // The number stays open until the last try is over: whoever drops the future early will not send it again either.
        let id = self.request_id_under(under)?;
        self.call(self.plan(what, true), call(id.meta())).await
    }
}

/// A read of one key; see [`Client::get`].
#[derive(Clone, Debug)]
pub struct Get<'a> {
    client: &'a Client,
    request: v1::GetRequest,
}

impl Get<'_> {
    /// Reads the past: the key as it was at this revision.
    #[must_use]
    pub fn at(mut self, revision: u64) -> Self {
        self.request.revision = revision;
        self
    }

    /// Takes the answer of any member, which may be behind.
    #[must_use]
    pub fn stale(mut self) -> Self {
        self.request.stale = true;
        self
    }

    async fn run(self) -> Result<Option<Record>, Error> {
        let reply = self.client.call(self.client.plan("get", false), Call::Get(self.request)).await;
        found(reply.and_then(|reply| match reply {
            Reply::Get(reply) => Ok(reply.record.map(Record::from)),
            _ => Err(mismatched("get")),
        }))
    }
}

carried_out!(Get<'a> => Option<Record>, run);

/// A write of one key; see [`Client::put`].
#[derive(Clone, Debug)]
pub struct Put<'a> {
    client: &'a Client,
    request: v1::PutRequest,
    under: Option<Session>,
}

/// What a write gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutReply {
    /// The revision of the commit, which is the key's new `mod_revision`.
    pub revision: u64,
    /// The key as it was, if asked for and there was one.
    pub prev: Option<Record>,
    /// An earlier try of this call did it; its answer had been lost.
    pub replayed: bool,
}

impl Put<'_> {
    /// Lets the key end with this session.
    #[must_use]
    pub fn session(mut self, session: u64) -> Self {
        self.request.session = session;
        self
    }

    /// Only while this lock is held under this token; else refused as [`Code::Fenced`](crate::Code::Fenced).
    #[must_use]
    pub fn require_lock(mut self, proof: impl Into<LockProof>) -> Self {
        self.request.require_locks.push(proof.into().into());
        self
    }

    /// Only if there is no such key; else refused as [`Code::Conflict`](crate::Code::Conflict) with what is there.
    #[must_use]
    pub fn expect_absent(mut self) -> Self {
        self.request.expect = absent(true);
        self
    }

    /// Only if the key has this version.
    #[must_use]
    pub fn expect_version(mut self, version: u64) -> Self {
        self.request.expect = expect_version(version);
        self
    }

    /// Only if the key was last changed at this revision.
    #[must_use]
    pub fn expect_mod_revision(mut self, revision: u64) -> Self {
        self.request.expect = expect_mod_revision(revision);
        self
    }

    /// Only if the key has this value.
    #[must_use]
    pub fn expect_value(mut self, value: impl Into<Bytes>) -> Self {
        self.request.expect = expect_value(value.into());
        self
    }

    /// Returns the key as it was.
    #[must_use]
    pub fn prev(mut self) -> Self {
        self.request.prev = true;
        self
    }

    /// Names the request by its place in the order of this session instead of a random id, which is cheaper for the service to
    /// remember. If the session ends before the answer arrives, the outcome can no longer be told.
    #[must_use]
    pub fn under(mut self, session: &Session) -> Self {
        self.under = Some(session.clone());
        self
    }

    async fn run(self) -> Result<PutReply, Error> {
        let Self { client, mut request, under } = self;
        let named = |meta| {
            request.request = Some(meta);
            Call::Put(request)
        };
        let Reply::Put(reply) = client.keyed("put", under.as_ref(), named).await? else {
            return Err(mismatched("put"));
        };
        let (revision, replayed) = revision(reply.header);
        Ok(PutReply { revision, replayed, prev: reply.prev.map(Record::from) })
    }
}

carried_out!(Put<'a> => PutReply, run);

/// A deletion; see [`Client::delete`].
#[derive(Clone, Debug)]
pub struct Delete<'a> {
    client: &'a Client,
    request: v1::DeleteRequest,
    under: Option<Session>,
}

/// What a deletion gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteReply {
    /// The revision of the commit, or the current one where nothing was deleted.
    pub revision: u64,
    /// How many keys were deleted.
    pub deleted: u64,
    /// The keys as they were, if asked for.
    pub prev: Vec<Record>,
    /// An earlier try of this call did it; its answer had been lost.
    pub replayed: bool,
}

impl Delete<'_> {
    /// Every key that begins with the one given, which may be empty.
    #[must_use]
    pub fn prefix(mut self) -> Self {
        self.request.prefix = true;
        self
    }

    /// Up to this key, not included.
    #[must_use]
    pub fn until(mut self, end: impl Into<Bytes>) -> Self {
        self.request.end_bytes = end.into();
        self
    }

    /// Only while this lock is held under this token; else refused as [`Code::Fenced`](crate::Code::Fenced).
    #[must_use]
    pub fn require_lock(mut self, proof: impl Into<LockProof>) -> Self {
        self.request.require_locks.push(proof.into().into());
        self
    }

    /// Only if the key has this version; for one key.
    #[must_use]
    pub fn expect_version(mut self, version: u64) -> Self {
        self.request.expect = expect_version(version);
        self
    }

    /// Only if the key was last changed at this revision; for one key.
    #[must_use]
    pub fn expect_mod_revision(mut self, revision: u64) -> Self {
        self.request.expect = expect_mod_revision(revision);
        self
    }

    /// Returns the keys as they were.
    #[must_use]
    pub fn prev(mut self) -> Self {
        self.request.prev = true;
        self
    }

    /// Names the request by its place in the order of this session; see [`Put::under`].
    #[must_use]
    pub fn under(mut self, session: &Session) -> Self {
        self.under = Some(session.clone());
        self
    }

    async fn run(self) -> Result<DeleteReply, Error> {
        let Self { client, mut request, under } = self;
        let named = |meta| {
            request.request = Some(meta);
            Call::Delete(request)
        };
        let Reply::Delete(reply) = client.keyed("delete", under.as_ref(), named).await? else {
            return Err(mismatched("delete"));
        };
        Ok(reply.into())
    }
}

carried_out!(Delete<'a> => DeleteReply, run);

impl From<v1::DeleteReply> for DeleteReply {
    fn from(reply: v1::DeleteReply) -> Self {
        let (revision, replayed) = revision(reply.header);
        Self { revision, replayed, deleted: reply.deleted, prev: reply.prev.into_iter().map(Record::from).collect() }
    }
}

/// A read of keys in order; see [`Client::range`].
#[derive(Clone, Debug)]
pub struct Range<'a> {
    client: &'a Client,
    request: v1::RangeRequest,
}

/// One page of keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeReply {
    /// The newest revision that the read saw. A watch from the next one on continues it without a gap.
    pub revision: u64,
    /// The keys, in order.
    pub records: Vec<Record>,
    /// Keys in the whole range, whatever the page.
    pub count: u64,
    /// Where the next page begins; empty when there is no more.
    pub next: Bytes,
    /// Of a read that may be [`stale`](Range::stale): how old it is at most, the way of the answer apart; `None` if nobody knows,
    /// because the member was in touch with no other since it started. Zero of other reads.
    pub age: Option<Duration>,
}

impl From<v1::RangeReply> for RangeReply {
    fn from(reply: v1::RangeReply) -> Self {
        let age_ms = reply.header.as_ref().map_or(0, |header| header.stale_ms);
        Self {
            age: Some(age_ms).filter(|ms| *ms != u64::MAX).map(Duration::from_millis),
            revision: revision(reply.header).0,
            records: reply.records.into_iter().map(Record::from).collect(),
            count: reply.count,
            next: reply.next,
        }
    }
}

impl Range<'_> {
    /// Every key that begins with the one given.
    #[must_use]
    pub fn prefix(mut self) -> Self {
        self.request.prefix = true;
        self
    }

    /// Up to this key, not included.
    #[must_use]
    pub fn until(mut self, end: impl Into<Bytes>) -> Self {
        self.request.end_bytes = end.into();
        self
    }

    /// At most this many keys on a page; the service gives 1,000 unless told otherwise.
    #[must_use]
    pub fn limit(mut self, limit: u32) -> Self {
        self.request.limit = limit;
        self
    }

    /// Reads the past: the keys as they were at this revision.
    #[must_use]
    pub fn at(mut self, revision: u64) -> Self {
        self.request.revision = revision;
        self
    }

    /// From the last key to the first.
    #[must_use]
    pub fn descending(mut self) -> Self {
        self.request.descending = true;
        self
    }

    /// Leaves the values out.
    #[must_use]
    pub fn keys_only(mut self) -> Self {
        self.request.keys_only = true;
        self
    }

    /// Only counts.
    #[must_use]
    pub fn count_only(mut self) -> Self {
        self.request.count_only = true;
        self
    }

    /// Takes the answer of any member, which may be behind.
    #[must_use]
    pub fn stale(mut self) -> Self {
        self.request.stale = true;
        self
    }

    /// Reads on behind a page: its `next`.
    #[must_use]
    pub fn resume(mut self, next: Bytes) -> Self {
        self.request.resume = next;
        self
    }

    /// Reads all pages, at the revision that was asked for, or else that of the first.
    ///
    /// # Errors
    /// As a single page; [`Code::Compacted`](crate::Code::Compacted) if the first page's revision is compacted away before the last page is read.
    pub async fn all(self) -> Result<RangeReply, Error> {
        let mut whole = self.clone().run().await?;
        // A page of the past is headed by the revision of now.
        let at = if self.request.revision > 0 { self.request.revision } else { whole.revision };
        while !whole.next.is_empty() {
            let page = self.clone().at(at).resume(whole.next).run().await?;
            whole.records.extend(page.records);
            whole.next = page.next;
        }
        Ok(whole)
    }

    async fn run(self) -> Result<RangeReply, Error> {
        match self.client.call(self.client.plan("range", false), Call::Range(self.request)).await? {
            Reply::Range(reply) => Ok(reply.into()),
            _ => Err(mismatched("range")),
        }
    }
}

carried_out!(Range<'a> => RangeReply, run);

/// A condition of a transaction. A key that does not exist has version and revisions 0.
#[derive(Clone, Debug)]
pub struct Compare {
    wire: v1::Compare,
}

/// What of a key is compared; finished by saying to what.
#[derive(Clone, Debug)]
pub struct Comparing {
    key: Bytes,
    fact: fn(u64) -> v1::compare::Fact,
}

impl Comparing {
    /// The fact is this number.
    #[must_use]
    pub fn equals(self, number: u64) -> Compare {
        self.relation(v1::compare::Relation::Equal, number)
    }

    /// The fact is another number.
    #[must_use]
    pub fn differs_from(self, number: u64) -> Compare {
        self.relation(v1::compare::Relation::NotEqual, number)
    }

    /// The fact is a larger number.
    #[must_use]
    pub fn above(self, number: u64) -> Compare {
        self.relation(v1::compare::Relation::Greater, number)
    }

    /// The fact is a smaller number.
    #[must_use]
    pub fn below(self, number: u64) -> Compare {
        self.relation(v1::compare::Relation::Less, number)
    }

    fn relation(self, relation: v1::compare::Relation, number: u64) -> Compare {
        let wire = v1::Compare {
            key_bytes: self.key,
            relation: relation.into(),
            fact: Some((self.fact)(number)),
            ..Default::default()
        };
        Compare { wire }
    }
}

impl Compare {
    /// Compares the version of a key; 0 where there is none.
    #[must_use]
    pub fn version(key: impl Into<Bytes>) -> Comparing {
        Comparing { key: key.into(), fact: v1::compare::Fact::Version }
    }

    /// Compares the revision that made a key.
    #[must_use]
    pub fn create_revision(key: impl Into<Bytes>) -> Comparing {
        Comparing { key: key.into(), fact: v1::compare::Fact::CreateRevision }
    }

    /// Compares the revision of a key's last change.
    #[must_use]
    pub fn mod_revision(key: impl Into<Bytes>) -> Comparing {
        Comparing { key: key.into(), fact: v1::compare::Fact::ModRevision }
    }

    /// The key has this value. Never true of a key that does not exist.
    #[must_use]
    pub fn value(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        let wire = v1::Compare {
            key_bytes: key.into(),
            fact: Some(v1::compare::Fact::ValueBytes(value.into())),
            ..Default::default()
        };
        Self { wire }
    }
}

impl Compare {
    pub(crate) fn into_wire(self) -> v1::Compare {
        self.wire
    }
}

/// One operation of a transaction.
#[derive(Clone, Debug)]
pub struct Op {
    wire: v1::op::Op,
}

impl Op {
    /// Writes a key.
    #[must_use]
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self::put_with_session(key, value, 0)
    }

    /// Writes a key that ends with this session.
    #[must_use]
    pub fn put_with_session(key: impl Into<Bytes>, value: impl Into<Bytes>, session: u64) -> Self {
        let put = v1::PutRequest { key_bytes: key.into(), value_bytes: value.into(), session, ..Default::default() };
        Self { wire: v1::op::Op::Put(put) }
    }

    /// Deletes a key.
    #[must_use]
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self { wire: v1::op::Op::Delete(v1::DeleteRequest { key_bytes: key.into(), ..Default::default() }) }
    }

    /// Deletes every key that begins so.
    #[must_use]
    pub fn delete_prefix(prefix: impl Into<Bytes>) -> Self {
        let delete = v1::DeleteRequest { key_bytes: prefix.into(), prefix: true, ..Default::default() };
        Self { wire: v1::op::Op::Delete(delete) }
    }

    /// Reads a key.
    #[must_use]
    pub fn get(key: impl Into<Bytes>) -> Self {
        let key: Bytes = key.into();
        // The first key behind it is the key with a zero byte appended.
        let end = [&key[..], &[0]].concat().into();
        Self { wire: v1::op::Op::Range(v1::RangeRequest { key_bytes: key, end_bytes: end, ..Default::default() }) }
    }

    /// Reads every key that begins so.
    #[must_use]
    pub fn range_prefix(prefix: impl Into<Bytes>) -> Self {
        let range = v1::RangeRequest { key_bytes: prefix.into(), prefix: true, ..Default::default() };
        Self { wire: v1::op::Op::Range(range) }
    }

    fn into_wire(self) -> v1::Op {
        v1::Op { op: Some(self.wire) }
    }

    pub(crate) fn into_inner(self) -> v1::op::Op {
        self.wire
    }
}

/// A transaction; see [`Client::txn`].
#[derive(Clone, Debug)]
pub struct Txn<'a> {
    client: &'a Client,
    request: v1::TxnRequest,
    under: Option<Session>,
}

/// What a transaction gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TxnReply {
    /// The revision of the commit, or the current one where nothing was changed.
    pub revision: u64,
    /// Whether every compare held, so that the `then` list ran.
    pub succeeded: bool,
    /// The answers of the list that ran, in its order.
    pub replies: Vec<OpReply>,
    /// An earlier try of this call did it; its answer had been lost.
    pub replayed: bool,
}

/// The answer to one operation of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpReply {
    /// A key was written; this is what it was, if asked for.
    Put(Option<Record>),
    /// This many keys were deleted.
    Deleted(u64),
    /// What was read.
    Range(RangeReply),
    /// The answer of a nested transaction.
    Txn(TxnReply),
}

impl Txn<'_> {
    /// Adds a condition. All of them must hold; none at all holds.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.request.compares.push(compare.wire);
        self
    }

    /// Adds an operation for the case that every condition holds.
    #[must_use]
    pub fn then(mut self, op: Op) -> Self {
        self.request.then.push(op.into_wire());
        self
    }

    /// Adds an operation for the case that a condition does not hold.
    #[must_use]
    pub fn otherwise(mut self, op: Op) -> Self {
        self.request.otherwise.push(op.into_wire());
        self
    }

    /// Neither list runs unless this lock is held under this token; else refused as [`Code::Fenced`](crate::Code::Fenced).
    #[must_use]
    pub fn require_lock(mut self, proof: impl Into<LockProof>) -> Self {
        self.request.require_locks.push(proof.into().into());
        self
    }

    /// Names the request by its place in the order of this session; see [`Put::under`].
    #[must_use]
    pub fn under(mut self, session: &Session) -> Self {
        self.under = Some(session.clone());
        self
    }

    async fn run(self) -> Result<TxnReply, Error> {
        let Self { client, mut request, under } = self;
        let named = |meta| {
            request.request = Some(meta);
            Call::Txn(request)
        };
        match client.keyed("txn", under.as_ref(), named).await? {
            Reply::Txn(reply) => txn_reply(reply),
            _ => Err(mismatched("txn")),
        }
    }
}

carried_out!(Txn<'a> => TxnReply, run);

fn txn_reply(reply: v1::TxnReply) -> Result<TxnReply, Error> {
    let (revision, replayed) = revision(reply.header);
    let replies = reply.replies.into_iter().map(op_reply).collect::<Result<_, _>>()?;
    Ok(TxnReply { revision, replayed, succeeded: reply.succeeded, replies })
}

fn op_reply(reply: v1::OpReply) -> Result<OpReply, Error> {
    use v1::op_reply::Result as Wire;
    Ok(match reply.result {
        Some(Wire::Put(put)) => OpReply::Put(put.prev.map(Record::from)),
        Some(Wire::Delete(delete)) => OpReply::Deleted(delete.deleted),
        Some(Wire::Range(range)) => OpReply::Range(range.into()),
        Some(Wire::Txn(nested)) => OpReply::Txn(txn_reply(nested)?),
        None => return Err(mismatched("txn")),
    })
}
