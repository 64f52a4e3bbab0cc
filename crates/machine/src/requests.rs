//! Remembered requests: a retry is answered with the first answer, never run again.
//!
//! Promises. Q1: the same principal, id and request get the first answer for ten minutes of log time after it was given, or for
//! the life of the session under which the id was made, or as long as its series is used (and ten minutes more) unless the caller said that
//! it has the answer; another request under that id is refused. Q2: nothing is forgotten
//! early: where the table is full, new ids are refused before they run. Q3: an acknowledged or ended id is never run a second
//! time under its session or series.
//! Not promised. Large bodies: above `BODY_BYTES_MAX` the outcome is kept and the body is not (and an answer that only repeats the state, as the
//! replay of an idempotency record does, is not kept at all: the retry reads the state again). And nothing survives a session: who
//! makes one anew under an id that was used before starts its numbers anew too (ids are random unless the caller chose one).
//! Relies on. Log time never goes back. `apply.rs` tells of every ended session.

use crate::codec::{DecodeError, Reader, Write, name};
use crate::command::RequestId;
use crate::native::{Refusal, RefusalCode};
use crate::reply::{OpReply, Rejection, Reply, TxnReply};
use crate::snapmap::SnapMap;
use crate::types::*;
use crate::waits::WaiterNumber;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The fact of a refusal that leaves open what became of the request.
const ANSWER: &str = "answer";
const FORGOTTEN: &str = "forgotten";

/// How long the answer to a one-shot request is kept, in log time. Clients stop retrying at half of it.
pub(crate) const KEPT_MS: u64 = 10 * 60 * 1000;
/// Encoded answers above this are kept as their outcome alone.
const BODY_BYTES_MAX: usize = 16 << 10;
/// Old answers dropped at an entry beside two for each of its transactions, so that no single entry pays for all; and as many of series, each
/// of which counts with its requests.
const DROPPED_PER_ENTRY: usize = 256;

/// A one-shot id belongs to who made it.
pub(crate) type OneShot = (Box<str>, [u8; 16]);
/// An id under a session.
pub(crate) type Numbered = (SessionId, u64);
/// A series belongs to who draws it.
pub(crate) type SeriesId = (u64, Box<str>);

/// Requests that one caller numbers, without a session.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    /// Its name in the table of its requests.
    number: u64,
    /// Answers below this were received.
    acked: u64,
    /// When something was asked or answered under it last, to a second.
    used: LogTime,
    /// How many of its requests are kept.
    open: u64,
}

/// A request of a series: the number of the series, and its own.
pub(crate) type InSeries = (u64, u64);

/// What is known of one request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Remembered {
    digest: [u8; 16],
    state: State,
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    /// It waits for a lock; the answer comes later.
    Waiting(WaiterNumber),
    Answered {
        at: LogTime,
        /// The order of answers, by which one-shot requests are dropped.
        order: u64,
        reply: Box<[u8]>,
    },
}

/// What the table says about a request before it runs.
#[derive(Debug, PartialEq)]
pub(crate) enum Seen {
    /// It may run.
    New,
    /// It ran, with this answer.
    Answered(Reply),
    /// It is this waiter.
    Waiting(WaiterNumber),
    /// It must not run.
    Refused(Rejection),
}

/// A remembered request with its slots, beside principal and reply.
const REMEMBERED_BYTES: usize = 160;
/// One acknowledged number in its table.
const ACKED_BYTES: u64 = 32;
/// A series without its requests, in its table and in the order of use.
const SERIES_BYTES: u64 = 200;
/// The use of a series is noted again after so long only.
const USED_AGAIN_MS: u64 = 1000;
/// The format version of a stored request.
const REMEMBERED_FORMAT: u8 = 1;

pub(crate) struct Requests {
    pub(crate) one_shot: SnapMap<OneShot, Remembered>,
    pub(crate) numbered: SnapMap<Numbered, Remembered>,
    /// Sequence numbers below these are acknowledged, by session.
    pub(crate) acked: SnapMap<SessionId, u64>,
    pub(crate) next_order: u64,
    /// One-shot requests by the order of their answers; one that is not in the table under this order any more is skipped.
    drop_order: VecDeque<(u64, OneShot)>,
    pub(crate) series: SnapMap<SeriesId, Series>,
    pub(crate) in_series: SnapMap<InSeries, Remembered>,
    /// All series by when they were used last.
    by_use: BTreeSet<(LogTime, SeriesId)>,
    /// How many ids of each session are kept.
    counts: BTreeMap<SessionId, u64>,
    bytes: u64,
}

impl Requests {
    pub(crate) fn new() -> Self {
        Self {
            one_shot: SnapMap::new(),
            numbered: SnapMap::new(),
            acked: SnapMap::new(),
            next_order: 1,
            drop_order: VecDeque::new(),
            series: SnapMap::new(),
            in_series: SnapMap::new(),
            by_use: BTreeSet::new(),
            counts: BTreeMap::new(),
            bytes: 0,
        }
    }

    pub(crate) fn len(&self) -> u64 {
        (self.one_shot.len() + self.numbered.len() + self.in_series.len()) as u64
    }

    pub(crate) fn memory(&self) -> u64 {
        self.bytes
    }

    /// Drops one-shot answers whose time is over, a bounded number per entry.
    pub(crate) fn drop_old(&mut self, now: LogTime, txns: usize) {
        for _ in 0..DROPPED_PER_ENTRY + 2 * txns {
            if !self.drop_oldest(now) {
                break;
            }
        }
        let mut left = DROPPED_PER_ENTRY + 2 * txns;
        while left > 0
            && let Some(dropped) = self.drop_unused(now)
        {
            left = left.saturating_sub(1 + dropped);
        }
    }

    /// Drops the series that was not used for longest, if its time is over, and tells how many of its requests went with it; one under which
    /// somebody still waits gets as much again.
    fn drop_unused(&mut self, now: LogTime) -> Option<usize> {
        let (used, id) = self.by_use.first().filter(|(used, _)| used.plus(KEPT_MS + USED_AGAIN_MS) <= now)?;
        let (used, id) = (*used, id.clone());
        let series = self.series.get(&id).cloned()?;
        let its = || self.in_series.range((series.number, 0)..=(series.number, u64::MAX));
        if its().any(|(_, r)| r.waiter().is_some()) {
            self.use_series(&id, used, now);
            return Some(0);
        }
        let all: Vec<InSeries> = its().map(|(at, _)| *at).collect();
        let dropped = all.len();
        all.into_iter().for_each(|at| self.forget_in_series(at));
        self.series.remove(&id);
        self.by_use.remove(&(used, id.clone()));
        self.bytes -= series_bytes(&id);
        Some(dropped)
    }

    /// Drops the oldest answer if its time is over.
    fn drop_oldest(&mut self, now: LogTime) -> bool {
        let Some(id) = self.oldest().filter(|(_, at)| at.plus(KEPT_MS) <= now).map(|(id, _)| id.clone()) else {
            return false;
        };
        self.drop_order.pop_front();
        self.set_one_shot(id, None);
        true
    }

    /// The oldest answer. What left the table out of turn is skipped without counting, so that a loaded table, which has
    /// no such gaps, drops the same at the same entry.
    fn oldest(&mut self) -> Option<(&OneShot, LogTime)> {
        while let Some((order, id)) = self.drop_order.front() {
            match self.one_shot.get(id).and_then(Remembered::answered) {
                Some((at, kept)) if kept == *order => return self.drop_order.front().map(|(_, id)| (id, at)),
                _ => drop(self.drop_order.pop_front()),
            }
        }
        None
    }

    /// Looks a one-shot request up before it runs.
    pub(crate) fn see_one_shot(
        &mut self,
        principal: &str,
        uuid: [u8; 16],
        digest: [u8; 16],
        now: LogTime,
        max: u64,
    ) -> Seen {
        let id = (Box::from(principal), uuid);
        match self.one_shot.get(&id) {
            Some(r) if !r.is_over(now) => return r.seen(digest),
            // Its time is over and its turn to be dropped has not come: for every question it is gone.
            Some(_) => self.set_one_shot(id, None),
            None => {}
        }
        self.make_room(now, max).map_or_else(Seen::Refused, |()| Seen::New)
    }

    fn kept(&self) -> u64 {
        (self.one_shot.len() + self.series.len()) as u64
    }

    /// Makes a place for another one-shot request or series, if only by forgetting what is old.
    fn make_room(&mut self, now: LogTime, max: u64) -> Result<(), Rejection> {
        while self.kept() >= max {
            if !self.drop_oldest(now) && self.drop_unused(now).is_none() {
                return Err(Rejection::RateLimited { what: name::ONE_SHOT_REQUESTS, limit: max });
            }
        }
        Ok(())
    }

    /// Looks a request of a series up before it runs, and forgets what the caller has acknowledged. `max`: open requests of a series, and
    /// one-shot requests and series in all.
    pub(crate) fn see_in_series(
        &mut self,
        principal: &str,
        series: u64,
        (seq, acked_below): (u64, u64),
        digest: [u8; 16],
        now: LogTime,
        max: [u64; 2],
    ) -> Seen {
        let id: SeriesId = (series, principal.into());
        let Some(found) = self.series.get_mut(&id) else {
            if let Err(full) = self.make_room(now, max[1]) {
                return Seen::Refused(full);
            }
            if seq < acked_below {
                return Seen::Refused(acknowledged(seq, series));
            }
            let number = self.next_order;
            self.next_order += 1;
            self.add_series(id, Series { number, acked: acked_below, used: now, open: 0 });
            return Seen::New;
        };
        let (number, used, before) = (found.number, found.used, found.acked);
        found.acked = before.max(acked_below);
        let acked = found.acked;
        if acked > before {
            let old: Vec<InSeries> =
                self.in_series.range((number, before)..(number, acked)).map(|(at, _)| *at).collect();
            if let Some(found) = self.series.get_mut(&id) {
                found.open -= old.len() as u64;
            }
            old.into_iter().for_each(|at| self.forget_in_series(at));
        }
        self.use_series(&id, used, now);
        match self.in_series.get(&(number, seq)) {
            Some(r) => r.seen(digest),
            // Its answer was received, so this is a straggler of the network. To run it would be to run it twice.
            None if seq < acked => Seen::Refused(acknowledged(seq, series)),
            None if self.series.get(&id).is_some_and(|s| s.open >= max[0]) => {
                Seen::Refused(Rejection::RateLimited { what: name::SESSION_REQUESTS, limit: max[0] })
            }
            None => Seen::New,
        }
    }

    fn use_series(&mut self, id: &SeriesId, used: LogTime, now: LogTime) {
        if used.plus(USED_AGAIN_MS) > now {
            return;
        }
        if let Some(series) = self.series.get_mut(id) {
            series.used = now;
            self.by_use.remove(&(used, id.clone()));
            self.by_use.insert((now, id.clone()));
        }
    }

    fn add_series(&mut self, id: SeriesId, series: Series) {
        self.bytes += series_bytes(&id);
        self.by_use.insert((series.used, id.clone()));
        self.series.insert(id, series);
    }

    /// Sets what is known of a request of a series, unless the series is gone.
    fn set_in_series(&mut self, principal: &str, series: u64, seq: u64, new: Option<Remembered>) {
        let id: SeriesId = (series, principal.into());
        let Some(found) = self.series.get_mut(&id) else { return };
        let (at, used) = ((found.number, seq), found.used);
        let (added, answered) = (u64::from(new.is_some()), new.as_ref().and_then(Remembered::answered));
        self.bytes += new.as_ref().map_or(0, Remembered::bytes);
        let old = match new {
            Some(new) => self.in_series.insert(at, new),
            None => self.in_series.remove(&at),
        };
        found.open = found.open + added - u64::from(old.is_some());
        self.bytes -= old.as_ref().map_or(0, Remembered::bytes);
        if let Some((now, _)) = answered {
            self.use_series(&id, used, now);
        }
    }

    fn forget_in_series(&mut self, at: InSeries) {
        self.bytes -= self.in_series.remove(&at).as_ref().map_or(0, Remembered::bytes);
    }

    /// Looks a request of a live session up before it runs, and forgets what the session has acknowledged.
    pub(crate) fn see_numbered(
        &mut self,
        session: SessionId,
        seq: u64,
        acked_below: u64,
        digest: [u8; 16],
        max: u64,
    ) -> Seen {
        let acked = self.acknowledge(session, acked_below);
        if seq < acked {
            // Its answer was received, so this is a straggler of the network. To run it would be to run it twice.
            let why = format!("request {seq} of session {session} was acknowledged, its answer is forgotten");
            return Seen::Refused(forgotten(RefusalCode::Invalid, why).into());
        }
        if let Some(r) = self.numbered.get(&(session, seq)) {
            return r.seen(digest);
        }
        if self.counts.get(&session).is_some_and(|count| *count >= max) {
            return Seen::Refused(Rejection::RateLimited { what: name::SESSION_REQUESTS, limit: max });
        }
        Seen::New
    }

    /// The answer that is kept for a request, without running or forgetting anything. `None`: it is not known, or it waits.
    pub(crate) fn find(&self, principal: &str, request: &RequestId, digest: [u8; 16], now: LogTime) -> Option<Seen> {
        let is_one_shot = matches!(request, RequestId::Uuid(_));
        self.known(principal, request).filter(|r| !is_one_shot || !r.is_over(now)).map(|r| r.seen(digest))
    }

    /// What is known of a request, also where its time is over.
    fn known(&self, principal: &str, request: &RequestId) -> Option<&Remembered> {
        match request {
            RequestId::Uuid(uuid) => self.one_shot.get(&(principal.into(), *uuid)),
            RequestId::Session { session, seq, .. } => self.numbered.get(&(*session, *seq)),
            RequestId::Series { series, seq, .. } => {
                let number = self.series.get(&(*series, principal.into()))?.number;
                self.in_series.get(&(number, *seq))
            }
        }
    }

    /// Sets what is known of a request; `None`: a retry of it will run anew.
    fn set(&mut self, principal: &str, request: &RequestId, new: Option<Remembered>) {
        match request {
            RequestId::Uuid(uuid) => self.set_one_shot((principal.into(), *uuid), new),
            RequestId::Session { session, seq, .. } => self.set_numbered((*session, *seq), new),
            RequestId::Series { series, seq, .. } => self.set_in_series(principal, *series, *seq, new),
        }
    }

    fn acknowledge(&mut self, session: SessionId, acked_below: u64) -> u64 {
        let before = self.acked.get(&session).copied().unwrap_or(0);
        if acked_below <= before {
            return before;
        }
        if self.acked.insert(session, acked_below).is_none() {
            self.bytes += ACKED_BYTES;
        }
        let old: Vec<Numbered> =
            self.numbered.range((session, before)..(session, acked_below)).map(|(id, _)| *id).collect();
        for id in old {
            self.set_numbered(id, None);
        }
        acked_below
    }

    /// Keeps the answer of a request, if a later retry could ask for it.
    pub(crate) fn answer(
        &mut self,
        principal: &str,
        request: &RequestId,
        digest: [u8; 16],
        reply: &Reply,
        now: LogTime,
    ) {
        let Some(reply) = retained(reply) else { return self.set(principal, request, None) };
        let order = self.next_order;
        self.next_order += 1;
        self.set(principal, request, Some(Remembered { digest, state: State::Answered { at: now, order, reply } }));
    }

    /// Notes that a request has become a waiter.
    pub(crate) fn wait(&mut self, principal: &str, request: &RequestId, digest: [u8; 16], waiter: WaiterNumber) {
        self.set(principal, request, Some(Remembered { digest, state: State::Waiting(waiter) }));
    }

    /// Keeps the answer that a waiter got, unless its caller has acknowledged it or its session is gone.
    pub(crate) fn answer_waiter(
        &mut self,
        principal: &str,
        request: &RequestId,
        waiter: WaiterNumber,
        reply: &Reply,
        now: LogTime,
    ) {
        if let Some(r) = self.known(principal, request).filter(|r| r.waiter() == Some(waiter)) {
            let digest = r.digest;
            self.answer(principal, request, digest, reply, now);
        }
    }

    /// Forgets everything under a session that has ended.
    pub(crate) fn forget_session(&mut self, session: SessionId) {
        if self.acked.remove(&session).is_some() {
            self.bytes -= ACKED_BYTES;
        }
        let ids: Vec<Numbered> = self.numbered.range((session, 0)..=(session, u64::MAX)).map(|(id, _)| *id).collect();
        for id in ids {
            self.set_numbered(id, None);
        }
    }

    fn set_one_shot(&mut self, id: OneShot, new: Option<Remembered>) {
        if let Some((_, order)) = new.as_ref().and_then(Remembered::answered) {
            self.drop_order.push_back((order, id.clone()));
        }
        let principal = 2 * id.0.len() as u64;
        self.bytes += new.as_ref().map_or(0, |r| r.bytes() + principal);
        let old = match new {
            Some(new) => self.one_shot.insert(id, new),
            None => self.one_shot.remove(&id),
        };
        self.bytes -= old.as_ref().map_or(0, |r| r.bytes() + principal);
    }

    fn set_numbered(&mut self, id: Numbered, new: Option<Remembered>) {
        self.bytes += new.as_ref().map_or(0, Remembered::bytes);
        let added = u64::from(new.is_some());
        let old = match new {
            Some(new) => self.numbered.insert(id, new),
            None => self.numbered.remove(&id),
        };
        self.bytes -= old.as_ref().map_or(0, Remembered::bytes);
        let count = self.counts.entry(id.0).or_default();
        *count = *count + added - u64::from(old.is_some());
        if *count == 0 {
            self.counts.remove(&id.0);
        }
    }
}

fn acknowledged(seq: u64, series: u64) -> Rejection {
    let why = format!("request {seq} of series {series:x} was acknowledged, its answer is forgotten");
    forgotten(RefusalCode::Invalid, why).into()
}

/// Of a request that may have been done: its answer is gone, and nobody can tell it again.
fn forgotten(code: RefusalCode, why: String) -> Refusal {
    Refusal::new(code, why).fact(ANSWER, FORGOTTEN)
}

/// Of a request under a session that has ended.
pub fn forgotten_with(session: SessionId) -> Rejection {
    let why = format!("session {session} has ended, and with it what was known of its requests");
    forgotten(RefusalCode::SessionExpired, why).fact("session", session).into()
}

impl Rejection {
    /// Whether the request may have been done, before its answer was forgotten. Every other refusal says that it was not.
    pub fn leaves_open(&self) -> bool {
        let Self::Refused(refusal) = self else { return false };
        refusal.facts.iter().any(|(name, value)| (&**name, &**value) == (ANSWER, FORGOTTEN))
    }
}

fn series_bytes(id: &SeriesId) -> u64 {
    SERIES_BYTES + 2 * id.1.len() as u64
}

impl Remembered {
    fn bytes(&self) -> u64 {
        let reply = match &self.state {
            State::Waiting(_) => 0,
            State::Answered { reply, .. } => reply.len(),
        };
        (REMEMBERED_BYTES + reply) as u64
    }

    fn is_over(&self, now: LogTime) -> bool {
        self.answered().is_some_and(|(at, _)| at.plus(KEPT_MS) <= now)
    }

    /// When it was answered, and its place in the order of answers.
    fn answered(&self) -> Option<(LogTime, u64)> {
        match self.state {
            State::Answered { at, order, .. } => Some((at, order)),
            State::Waiting(_) => None,
        }
    }

    fn seen(&self, digest: [u8; 16]) -> Seen {
        if digest != self.digest {
            return Seen::Refused(Rejection::Mismatch);
        }
        match &self.state {
            State::Waiting(number) => Seen::Waiting(*number),
            State::Answered { reply, .. } => {
                let reply =
                    Reply::decode(reply).expect("a remembered reply was encoded here or checked when it was loaded");
                Seen::Answered(Reply { replayed: true, ..reply })
            }
        }
    }

    /// The waiter that it is.
    pub(crate) fn waiter(&self) -> Option<WaiterNumber> {
        match self.state {
            State::Waiting(number) => Some(number),
            State::Answered { .. } => None,
        }
    }
}

/// The bytes of an answer that are kept: all, or just its outcome. `None`: it is too large and only said what the state has, so a retry that runs
/// anew is told the same.
fn retained(reply: &Reply) -> Option<Box<[u8]>> {
    let mut bytes = Vec::new();
    reply.encode(&mut bytes);
    if bytes.len() > BODY_BYTES_MAX
        && let Ok(whole) = &reply.result
    {
        if let [only] = &whole.results[..]
            && only.repeats_state()
        {
            return None;
        }
        let outcome = TxnReply { succeeded: whole.succeeded, results: vec![OpReply::ResultNotRetained] };
        bytes.clear();
        Reply { result: Ok(outcome), revision: reply.revision, replayed: reply.replayed }.encode(&mut bytes);
    }
    Some(bytes.into())
}

/// Appends what is known of a request as snapshots store it.
pub(crate) fn write(b: &mut Vec<u8>, remembered: &Remembered) {
    b.push(REMEMBERED_FORMAT);
    b.extend_from_slice(&remembered.digest);
    match &remembered.state {
        State::Waiting(number) => {
            b.flag(false);
            b.varint(*number);
        }
        State::Answered { at, order, reply } => {
            b.flag(true);
            b.varint(at.0);
            b.varint(*order);
            b.bytes(reply);
        }
    }
}

pub(crate) fn write_series(b: &mut Vec<u8>, (series, principal): &SeriesId, known: &Series) {
    b.varint(*series);
    b.bytes(principal.as_bytes());
    b.varint(known.number);
    b.varint(known.acked);
    b.varint(known.used.0);
}

pub(crate) fn read_series(r: &mut Reader<'_>) -> Result<(SeriesId, Series), DecodeError> {
    const WHAT: &str = "a series of requests";
    let id = (r.varint(WHAT)?, r.text(WHAT)?);
    let (number, acked, used) = (r.varint(WHAT)?, r.varint(WHAT)?, LogTime(r.varint(WHAT)?));
    Ok((id, Series { number, acked, used, open: 0 }))
}

pub(crate) fn read(r: &mut Reader<'_>) -> Result<Remembered, DecodeError> {
    const WHAT: &str = "a remembered request";
    let format = r.byte(WHAT)?;
    if format != REMEMBERED_FORMAT {
        return Err(DecodeError::UnknownFormat { what: WHAT, format });
    }
    let digest = r.array(WHAT)?;
    let state = if r.flag(WHAT)? {
        let (at, order, reply) = (LogTime(r.varint(WHAT)?), r.varint(WHAT)?, r.boxed(WHAT)?);
        Reply::decode(&reply)?;
        State::Answered { at, order, reply }
    } else {
        State::Waiting(r.varint(WHAT)?)
    };
    Ok(Remembered { digest, state })
}

/// Loading.
impl Requests {
    pub(crate) fn load_one_shot(&mut self, id: OneShot, remembered: Remembered) {
        self.set_one_shot(id, Some(remembered));
    }

    pub(crate) fn load_numbered(&mut self, id: Numbered, remembered: Remembered) {
        self.set_numbered(id, Some(remembered));
    }

    pub(crate) fn load_acked(&mut self, session: SessionId, below: u64) {
        self.acked.insert(session, below);
        self.bytes += ACKED_BYTES;
    }

    pub(crate) fn load_series(&mut self, id: SeriesId, series: Series) {
        self.add_series(id, series);
    }

    pub(crate) fn load_in_series(&mut self, at: InSeries, remembered: Remembered) {
        self.bytes += remembered.bytes();
        self.in_series.insert(at, remembered);
    }

    /// Brings what is rebuilt into the order it had.
    pub(crate) fn finish_load(&mut self) {
        self.drop_order.make_contiguous().sort_unstable_by_key(|(order, _)| *order);
        let mut open: BTreeMap<u64, u64> = BTreeMap::new();
        self.in_series.iter().for_each(|((number, _), _)| *open.entry(*number).or_default() += 1);
        let ids: Vec<SeriesId> = self.series.iter().map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Some(series) = self.series.get_mut(&id) {
                series.open = open.get(&series.number).copied().unwrap_or_default();
            }
        }
    }
}
