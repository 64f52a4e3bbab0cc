//! Waiting as state: whoever asked for something that is not to be had yet has a place in a queue that is in the log.
//!
//! Promises. W1: a queue is served by rank, then in the order of arrival; a number of arrival is never used twice. W2: a wait has a deadline or
//! lasts; at the first entry whose stamp reaches the deadline it ends, before the transactions of that entry. W3: the waits of a session end with it.
//! Relies on. `apply.rs` undoes in reverse order what a refused transaction did. Log time never goes back.

use crate::codec::{self, DecodeError, Reader, Write};
use crate::coded::{Coded, coded_enum, coded_struct};
use crate::command::{RequestId, Ticket};
use crate::locks::LockKey;
use crate::native::NativeOp;
use crate::objects::ObjectKey;
use crate::snapmap::SnapMap;
use crate::types::*;
use std::collections::{BTreeMap, BTreeSet};

/// The order of arrival everywhere together; never used twice.
pub(crate) type WaiterNumber = u64;

coded_struct! {
    /// Something that was asked for and neither refused nor given yet.
    pub(crate) struct Waiter as "a waiter" {
        /// In each of these queues it has a place; mostly it is one.
        pub(crate) on: Vec<ObjectKey>,
        /// Lower ones are served first; equal ones in the order of arrival.
        pub(crate) rank: i64,
        /// Zero: it does not depend on a session.
        pub(crate) session: SessionId,
        pub(crate) owner: Box<[u8]>,
        pub(crate) since: LogTime,
        /// `None`: for ever.
        pub(crate) deadline: Option<LogTime>,
        /// Who hears of it: the newest caller that asked with this request id.
        pub(crate) ticket: Ticket,
        pub(crate) principal: Box<str>,
        pub(crate) request: Option<RequestId>,
        /// Which list of the transaction the operation stood in.
        pub(crate) succeeded: bool,
        pub(crate) ask: Ask,
    }
}

coded_enum! {
    /// What it waits for.
    pub(crate) enum Ask as "a wait" {
        /// A lock, exclusively.
        Exclusive = 1,
        /// What this operation asks for, in the namespace of its transaction.
        Native(Box<NativeOp>) = 2,
    }
}

impl Waiter {
    /// What it waits for, where that is one thing.
    pub(crate) fn only(&self) -> Option<&ObjectKey> {
        match &self.on[..] {
            [one] => Some(one),
            _ => None,
        }
    }

    pub(crate) fn owner_key(&self) -> OwnerKey {
        OwnerKey::new(&self.owner, self.session)
    }

    fn bytes(&self) -> u64 {
        let on: usize = self.on.iter().map(|key| key.as_bytes().len() + 64).sum();
        let ask = match &self.ask {
            Ask::Exclusive => 0,
            Ask::Native(op) => op.growth() as usize,
        };
        (WAITER_BYTES + on + ask + 2 * self.owner.len() + self.principal.len()) as u64
    }
}

/// Who waits or holds, for the detection of deadlocks: a named owner, or else the session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum OwnerKey {
    Named(Box<[u8]>),
    Session(SessionId),
}

impl OwnerKey {
    pub(crate) fn new(owner: &[u8], session: SessionId) -> Self {
        if owner.is_empty() { Self::Session(session) } else { Self::Named(owner.into()) }
    }
}

/// A waiter with its slots in the table and the indexes, beside names.
const WAITER_BYTES: usize = 420;
/// The format version of a stored waiter. The first one knew exclusive locks only; it is still read.
const WAITER_FORMAT: u8 = 2;

#[derive(Default)]
struct Queue {
    order: BTreeSet<(i64, WaiterNumber)>,
    owners: BTreeSet<(OwnerKey, WaiterNumber)>,
}

pub(crate) struct Waits {
    pub(crate) table: SnapMap<WaiterNumber, Waiter>,
    pub(crate) next: WaiterNumber,
    // What follows from the table.
    by_session: BTreeSet<(SessionId, WaiterNumber)>,
    by_owner: BTreeSet<(OwnerKey, WaiterNumber)>,
    queues: BTreeMap<ObjectKey, Queue>,
    deadlines: BTreeSet<(LogTime, WaiterNumber)>,
    counts: BTreeMap<SessionId, u64>,
    /// How many wait for several things at once.
    of_several: u64,
    bytes: u64,
}

impl Waits {
    pub(crate) fn new() -> Self {
        Self {
            table: SnapMap::new(),
            next: 1,
            by_session: BTreeSet::new(),
            by_owner: BTreeSet::new(),
            queues: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            counts: BTreeMap::new(),
            of_several: 0,
            bytes: 0,
        }
    }

    pub(crate) fn get(&self, number: WaiterNumber) -> Option<&Waiter> {
        self.table.get(&number)
    }

    /// Puts, replaces or removes a waiter; what was there comes back, and putting it back undoes.
    pub(crate) fn set(&mut self, number: WaiterNumber, waiter: Option<Waiter>) -> Option<Waiter> {
        let old = self.table.remove(&number);
        if let Some(old) = &old {
            self.forget(number, old);
        }
        if let Some(new) = waiter {
            self.note(number, &new);
            self.table.insert(number, new);
        }
        old
    }

    fn forget(&mut self, number: WaiterNumber, old: &Waiter) {
        self.bytes -= old.bytes();
        self.of_several -= u64::from(old.on.len() > 1);
        self.by_session.remove(&(old.session, number));
        self.by_owner.remove(&(old.owner_key(), number));
        if let Some(deadline) = old.deadline {
            self.deadlines.remove(&(deadline, number));
        }
        for key in &old.on {
            if let Some(queue) = self.queues.get_mut(key) {
                queue.order.remove(&(old.rank, number));
                queue.owners.remove(&(old.owner_key(), number));
                if queue.order.is_empty() {
                    self.queues.remove(key);
                }
            }
        }
        if let Some(count) = self.counts.get_mut(&old.session) {
            *count -= old.on.len() as u64;
            if *count == 0 {
                self.counts.remove(&old.session);
            }
        }
    }

    fn note(&mut self, number: WaiterNumber, new: &Waiter) {
        self.bytes += new.bytes();
        self.of_several += u64::from(new.on.len() > 1);
        self.by_session.insert((new.session, number));
        self.by_owner.insert((new.owner_key(), number));
        if let Some(deadline) = new.deadline {
            self.deadlines.insert((deadline, number));
        }
        for key in &new.on {
            let queue = self.queues.entry(key.clone()).or_default();
            queue.order.insert((new.rank, number));
            queue.owners.insert((new.owner_key(), number));
        }
        *self.counts.entry(new.session).or_default() += new.on.len() as u64;
    }

    /// How many wait for it.
    pub(crate) fn len(&self, key: &ObjectKey) -> u64 {
        self.queues.get(key).map_or(0, |q| q.order.len() as u64)
    }

    /// How many places are taken in queues whose names begin with this one and a zero byte.
    pub(crate) fn len_below(&self, key: &ObjectKey) -> u64 {
        self.below(key).map(|(_, queue)| queue.order.len() as u64).sum()
    }

    /// Those queues, in the order in which whoever is next in each came.
    pub(crate) fn places_below(&self, key: &ObjectKey) -> Vec<ObjectKey> {
        let mut places: Vec<_> = self.below(key).map(|(place, queue)| (queue.order.first(), place)).collect();
        places.sort_unstable();
        places.into_iter().map(|(_, place)| place.clone()).collect()
    }

    fn below(&self, key: &ObjectKey) -> impl Iterator<Item = (&ObjectKey, &Queue)> {
        let from = ObjectKey::new(key.kind(), key.namespace(), &[key.name(), b"\0"].concat());
        self.queues.range(from.clone()..).take_while(move |(place, _)| place.as_bytes().starts_with(from.as_bytes()))
    }

    /// Who is next.
    pub(crate) fn head(&self, key: &ObjectKey) -> Option<WaiterNumber> {
        self.queues.get(key)?.order.first().map(|(_, number)| *number)
    }

    /// Who waits for it, in the order in which they are served.
    pub(crate) fn queue(&self, key: &ObjectKey) -> impl DoubleEndedIterator<Item = (WaiterNumber, &Waiter)> {
        let order = self.queues.get(key).into_iter().flat_map(|q| q.order.iter());
        order.filter_map(|(_, number)| Some((*number, self.table.get(number)?)))
    }

    /// Whether whoever came now with this rank would not be the first.
    pub(crate) fn is_someone_ahead(&self, key: &ObjectKey, rank: i64) -> bool {
        self.queues.get(key).and_then(|q| q.order.first()).is_some_and(|(first, _)| *first <= rank)
    }

    /// Whether whoever came now with this rank would go before others.
    pub(crate) fn is_someone_behind(&self, key: &ObjectKey, rank: i64) -> bool {
        self.queues.get(key).and_then(|q| q.order.last()).is_some_and(|(last, _)| *last > rank)
    }

    /// Who waits for it from one place to before another, both as (rank, number).
    pub(crate) fn queue_between(
        &self,
        key: &ObjectKey,
        from: (i64, WaiterNumber),
        to: (i64, WaiterNumber),
    ) -> impl Iterator<Item = (WaiterNumber, &Waiter)> {
        let queue = self.queues.get(key).filter(|_| from < to);
        let order = queue.into_iter().flat_map(move |q| q.order.range(from..to));
        order.filter_map(|(_, number)| Some((*number, self.table.get(number)?)))
    }

    /// Whether some wait for several things at once, so that a queue may have waiters though nobody holds what it is for.
    pub(crate) fn any_of_several(&self) -> bool {
        self.of_several > 0
    }

    /// Whether this owner has a place in the queue.
    pub(crate) fn is_waiting(&self, key: &ObjectKey, owner: &OwnerKey) -> bool {
        let Some(queue) = self.queues.get(key) else { return false };
        queue.owners.range((owner.clone(), 0)..=(owner.clone(), WaiterNumber::MAX)).next().is_some()
    }

    pub(crate) fn of_session(&self, session: SessionId) -> Vec<WaiterNumber> {
        self.by_session.range((session, 0)..=(session, WaiterNumber::MAX)).map(|(_, number)| *number).collect()
    }

    /// Everything that an owner waits for.
    pub(crate) fn of_owner(&self, owner: &OwnerKey) -> Vec<WaiterNumber> {
        let range = (owner.clone(), 0)..=(owner.clone(), WaiterNumber::MAX);
        self.by_owner.range(range).map(|(_, number)| *number).collect()
    }

    /// As a session's limit counts them: as many as it would own.
    pub(crate) fn count(&self, session: SessionId) -> u64 {
        self.counts.get(&session).copied().unwrap_or(0)
    }

    pub(crate) fn next_deadline(&self) -> Option<LogTime> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// The first waiter whose time is over.
    pub(crate) fn due(&self, now: LogTime) -> Option<WaiterNumber> {
        self.deadlines.first().filter(|(deadline, _)| *deadline <= now).map(|(_, number)| *number)
    }

    pub(crate) fn memory(&self) -> u64 {
        self.bytes
    }
}

/// Appends one waiter as snapshots store it.
pub(crate) fn write(b: &mut Vec<u8>, number: WaiterNumber, waiter: &Waiter) {
    b.push(WAITER_FORMAT);
    b.varint(number);
    waiter.write(b);
}

pub(crate) fn read(r: &mut Reader<'_>) -> Result<(WaiterNumber, Waiter), DecodeError> {
    const WHAT: &str = "a waiter";
    match r.byte(WHAT)? {
        1 => read_first_format(r),
        WAITER_FORMAT => {
            let number = r.varint(WHAT)?;
            let waiter = Waiter::read(r, WHAT)?;
            if waiter.on.is_empty() {
                return Err(DecodeError::Malformed { what: WHAT });
            }
            Ok((number, waiter))
        }
        format => Err(DecodeError::UnknownFormat { what: WHAT, format }),
    }
}

fn read_first_format(r: &mut Reader<'_>) -> Result<(WaiterNumber, Waiter), DecodeError> {
    const WHAT: &str = "a waiter";
    let number = r.varint(WHAT)?;
    let waiter = Waiter {
        on: vec![LockKey::from_bytes(r.bytes(WHAT)?)?.object()],
        rank: 0,
        session: SessionId(r.varint(WHAT)?),
        owner: r.boxed(WHAT)?,
        since: LogTime(r.varint(WHAT)?),
        deadline: r.option(WHAT, |r| Ok(LogTime(r.varint(WHAT)?)))?,
        ticket: Ticket::read(r, WHAT)?,
        principal: r.text(WHAT)?,
        request: codec::read_request(r)?,
        succeeded: r.flag(WHAT)?,
        ask: Ask::Exclusive,
    };
    Ok((number, waiter))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of an earlier release has waiters of the first format.
    #[test]
    fn the_first_format_is_read() {
        let hex = "010105000000006cac02016fe80701dc0b0188776655443322110805616c696365020202020202020202020202020202020201010205000000006cac020170e807000188776655443322110905616c6963650001";
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let mut r = Reader::new(&bytes);
        let (number, waiter) = read(&mut r).unwrap();
        assert_eq!((number, &*waiter.owner, waiter.deadline), (1, &b"o"[..], Some(LogTime(1500))));
        assert_eq!((&waiter.on[0], &waiter.ask), (&ObjectKey::new(b'l', NamespaceId(0), b"l"), &Ask::Exclusive));
        let (_, second) = read(&mut r).unwrap();
        assert!(second.deadline.is_none() && r.is_empty());
    }
}
