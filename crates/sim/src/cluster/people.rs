//! The clients of a cluster: each talks to one member until that one does not answer, and then to another.
//!
//! What they ask for is drawn as for a single member (`crate::client`), with writes that compare what was read before and stale reads
//! added. A session is counted as lost by the client's own clock, whatever the members say.

use super::native::{Asker, Focus};
use crate::client::{self, Client, What};
use crate::oracle::ledger::{Intent, value};
use crate::random::Random;
use std::collections::BTreeMap;
use tenure_machine::*;

/// One client, and the member that it talks to.
pub(super) struct Person {
    pub(super) state: Client,
    pub(super) native: super::native::Given,
    pub(super) node: usize,
    /// What it read last: the number of the version, and who wrote it.
    pub(super) read: BTreeMap<Vec<u8>, (Revision, Option<u64>)>,
}

/// What a call is for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Client(What),
    /// An operation of a native primitive.
    Native,
    /// A read that may be old.
    Stale,
    /// A write of one key if it is still as it was read, by the number of its version.
    Swap {
        key: Key,
        was: Option<u64>,
    },
    Admin(Change),
}

/// A change of the members.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Change {
    Add { id: MemberId, name: String, secret: [u8; 16] },
    Promote,
    Remove,
}

/// One thing that somebody wants, over all its tries.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) number: u64,
    /// Nobody: the operator, or a probe.
    pub(super) person: Option<usize>,
    pub(super) kind: Kind,
    pub(super) txn: Txn,
    pub(super) node: usize,
    /// Step and moment of the first try.
    pub(super) began: u64,
    pub(super) sent_us: u64,
    /// What had been acknowledged to anybody by then.
    pub(super) revision_before: u64,
    pub(super) token_before: Option<Revision>,
    pub(super) attempts: u32,
    /// The newest try has no answer yet.
    pub(super) open: bool,
    /// An earlier try may have been done.
    pub(super) unknown: bool,
}

impl Call {
    /// Nothing that matters later comes of it.
    pub(super) fn leaves_nothing(&self) -> bool {
        matches!(self.kind, Kind::Stale | Kind::Client(What::Read | What::Renew { .. }))
    }

    /// How long the client waits for an answer.
    pub(super) fn patience_us(&self, random: &mut Random) -> u64 {
        let wait_ms = match (&self.kind, self.txn.then.first()) {
            (Kind::Client(What::Renew { .. }), _) => return random.between(300_000, 700_000),
            (_, Some(Op::LockAcquire(LockAcquire { wait: Wait::Ms(ms), .. }))) => *ms,
            (_, Some(Op::LockAcquire(LockAcquire { wait: Wait::Forever, .. }))) => 6_000,
            _ => super::native::wait_ms(&self.txn),
        };
        (wait_ms + random.between(300, 3_000)) * 1_000
    }

    /// It may take as long as it likes to be answered.
    pub(super) fn waits(&self) -> bool {
        let lock = matches!(self.txn.then.first(), Some(Op::LockAcquire(a)) if a.wait != Wait::None);
        lock || super::native::wait_ms(&self.txn) > 0
    }
}

/// What a client knows of the others.
pub(super) struct Around {
    pub(super) newest: u64,
    pub(super) native: Focus,
    pub(super) sessions: Vec<SessionId>,
    pub(super) schedules: Vec<(Box<[u8]>, Revision)>,
}

/// Draws the next thing that a client does.
pub(super) fn draw(
    number: u64,
    index: usize,
    person: &Person,
    around: &Around,
    random: &mut Random,
) -> (Kind, Txn, Intent) {
    let newest = around.newest;
    let session = person.state.session.map(|(id, ..)| id);
    let (sessions, schedules) = (&around.sessions, &around.schedules);
    let asker = Asker { number, index, session, given: &person.native, sessions, schedules };
    if let Some(txn) = super::native::draw(around.native, &asker, random) {
        return (Kind::Native, txn, Intent::default());
    }
    match random.below(12) {
        0 => (Kind::Stale, Txn::default(), Intent::default()),
        1 | 2 if !person.read.is_empty() => {
            let keys: Vec<&Vec<u8>> = person.read.keys().collect();
            let key = Key::from_bytes(keys[random.index(keys.len())]);
            let (version, was) = person.read[key.as_bytes()];
            swap(number, key, version, was)
        }
        _ => {
            let (what, mut txn, intent) = client::draw(number, index, &person.state, newest, random);
            // One whose answer a snapshot skips finds its grant by its own owner's name.
            if let Some(Op::LockAcquire(acquire)) = txn.then.first_mut()
                && random.coin()
            {
                acquire.owner = format!("call {number}").into_bytes().into();
            }
            (Kind::Client(what), txn, intent)
        }
    }
}

fn swap(number: u64, key: Key, version: Revision, was: Option<u64>) -> (Kind, Txn, Intent) {
    let target = CompareTarget::ModRevision(version.0 as i64);
    let compare = Compare { span: Span::one(key.clone()), relation: Relation::Equal, target };
    let mut txn = Txn::of(write(number, key.clone(), false));
    txn.compares.push(compare);
    txn.otherwise.push(Op::Range(Range::of(client::read_spans())));
    let intent = Intent { puts: vec![key.clone()], optional: true, ..Intent::default() };
    (Kind::Swap { key, was }, txn, intent)
}

pub(super) fn write(number: u64, key: Key, prev: bool) -> Op {
    let value = value(number, 10);
    Op::Put(Put { key, value, session: SessionId(0), prev, keep_value: false, keep_session: false })
}
