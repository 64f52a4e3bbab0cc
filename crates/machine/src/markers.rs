//! Effect markers: what was done once is not done again.
//!
//! Promises. K1: a marker is put at most once; every later asker is told who did it and when, and runs nothing. K2: an effect outside of this
//! service is claimed before and confirmed after it, under a token; at most one claim lives, and every token but the newest is refused as
//! fenced. K3: a claim that died is never silently done again: its policy says whether the next asker may (`Retry`), is told that it is
//! done perhaps (`Skip`), or is refused until somebody decides (`Ask`). Until somebody else was granted it the dead claim may still confirm.
//! K4: a marker is kept at least as long as the longest retention that any asker was promised, in log time; only a deletion, which is
//! kept as an event, ends it earlier. K5: fields in any order are one marker: [`marker_name`] is the key.
//! Not promised. That an outside effect happens exactly once: between it and its confirmation only the effect's own store can tell, by the
//! key that a claim is given, which stays the same over the attempts.
//! Relies on. Log time for leases and retention; sessions tell of their end in the commit that ends them.

use crate::apply::{Commit, Machine, invalid};
use crate::codec;
use crate::coded::{coded_enum, coded_struct};
use crate::native::{Refusal, RefusalCode};
use crate::objects::{Lived, ObjectKey};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::Waiter;
use std::fmt::Write as _;

/// Bytes of a canonical name.
pub const MARKER_NAME_MAX: usize = 1_024;
/// Fields of a marker.
pub const MARKER_FIELDS_MAX: usize = 16;
/// Bytes of what an effect leaves for those who ask later.
pub const MARKER_RESULT_MAX: usize = 4 << 10;
/// Bytes of `by` and of the reason of a deletion.
pub const MARKER_TEXT_MAX: usize = 1_024;
/// The shortest retention that is not for ever.
pub const MARKER_RETENTION_MIN_MS: u64 = 3_600_000;
/// The range of a claim's lease.
pub const MARKER_LEASE_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;
/// Events kept of one marker.
const EVENTS_MAX: usize = 32;
/// How long a deletion is remembered.
const DELETED_KEPT_MS: u64 = 7 * 24 * 3_600_000;
/// The parts of a marker that have no bytes of their own, beyond what every object is counted with.
const MARKER_BYTES: u64 = 96;
const EVENT_BYTES: u64 = 64;

coded_enum! {
    /// What becomes of an effect whose claim died between claiming and confirming.
    #[derive(Copy, Eq)]
    pub enum OnDeath as "a policy" {
        /// The next asker is refused until somebody confirms or deletes it.
        Ask = 1,
        /// The next asker does it again.
        Retry = 2,
        /// The next asker is told that it is done, unconfirmed.
        Skip = 3,
    }
}

coded_enum! {
    /// Where an effect stands.
    #[derive(Copy, Eq)]
    pub enum MarkerState as "a state of a marker" {
        /// Somebody is about to do it, or has just done it.
        Claimed = 1,
        /// Whoever claimed it is gone: it is done or not.
        Unconfirmed = 2,
        Done = 3,
        /// Deleted by somebody; only its events are kept. For every question it is absent.
        Deleted = 4,
    }
}

coded_enum! {
    #[derive(Copy, Eq)]
    pub enum MarkerEventKind as "an event of a marker" {
        ClaimDied = 1,
        TakenOver = 2,
        Released = 3,
        Deleted = 4,
        /// Confirmed after its claim had died.
        ConfirmedLate = 5,
    }
}

coded_struct! {
    /// Something that happened to a marker before it was what it is.
    pub struct MarkerEvent as "an event of a marker" {
        pub kind: MarkerEventKind,
        pub at: LogTime,
        /// The token that it ended.
        pub token: Revision,
        /// Whose that was.
        pub by: Box<str>,
        /// Of a deletion: who asked for it.
        pub principal: Box<str>,
        pub reason: Box<str>,
    }
}

coded_struct! {
    /// An effect that was done, or is being done.
    pub struct Marker as "a marker" {
        pub state: MarkerState,
        /// Revision of the commit that did or claimed it.
        pub token: Revision,
        /// Who did it, as it named itself: a job, a request.
        pub by: Box<str>,
        /// When it came into this state.
        pub at: LogTime,
        /// Claims so far; zero for one that was put without.
        pub attempt: u32,
        /// Revision of the first claim since it was last deleted; zero: there is none.
        pub first: Revision,
        /// How long it is kept after it was done; zero: for ever.
        pub retention_ms: u64,
        /// The end of the claim's lease, or of the retention.
        pub until: Option<LogTime>,
        /// Under whose life the claim stands; zero: under its lease.
        pub session: SessionId,
        pub on_death: OnDeath,
        pub result: Box<[u8]>,
        pub events: Vec<MarkerEvent>,
    }
}

impl Marker {
    /// Whether nobody else may do the effect: it is done, being done, or done perhaps.
    pub fn is_taken(&self) -> bool {
        match self.state {
            MarkerState::Claimed | MarkerState::Done => true,
            MarkerState::Unconfirmed => self.on_death != OnDeath::Retry,
            MarkerState::Deleted => false,
        }
    }

    fn note(&mut self, event: MarkerEvent) {
        if self.events.len() == EVENTS_MAX {
            self.events.remove(0);
        }
        self.events.push(event);
    }

    fn event(&self, kind: MarkerEventKind, at: LogTime) -> MarkerEvent {
        let (principal, reason) = Default::default();
        MarkerEvent { kind, at, token: self.token, by: self.by.clone(), principal, reason }
    }

    /// Keeps it for its retention from now on.
    fn keep_from(&mut self, now: LogTime) {
        self.until = kept_until(now, self.retention_ms);
    }

    /// Whoever claimed it is gone.
    fn die(&mut self, now: LogTime) {
        self.note(self.event(MarkerEventKind::ClaimDied, now));
        self.state = MarkerState::Unconfirmed;
        self.at = now;
        self.session = SessionId(0);
        self.keep_from(now);
        // What waits for a decision does not go away by itself.
        if self.on_death == OnDeath::Ask {
            self.until = None;
        }
    }
}

/// Whoever follows a dead claim keeps the marker for no less than that one asked for.
fn longest_retention(before: Option<&Marker>, asked: u64) -> u64 {
    match before {
        Some(before) if before.state == MarkerState::Unconfirmed => {
            if before.retention_ms == 0 || asked == 0 {
                0
            } else {
                asked.max(before.retention_ms)
            }
        }
        _ => asked,
    }
}

fn kept_until(from: LogTime, retention_ms: u64) -> Option<LogTime> {
    if retention_ms == 0 { None } else { Some(from.plus(retention_ms)) }
}

impl Lived for Marker {
    // One for each effect: watchers of the native space would see little else.
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        let events: u64 = self.events.iter().map(|e| EVENT_BYTES + (e.by.len() + e.reason.len()) as u64).sum();
        MARKER_BYTES + (self.by.len() + self.result.len()) as u64 + events
    }

    fn deadline(&self) -> Option<LogTime> {
        self.until
    }

    fn sessions(&self) -> Vec<SessionId> {
        if self.session == SessionId(0) { Vec::new() } else { vec![self.session] }
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        let now = commit.m.stamp;
        match commit.object::<Self>(key).cloned() {
            Some(mut marker) if marker.state == MarkerState::Claimed => {
                marker.die(now);
                commit.put_object(key, marker);
            }
            _ => commit.remove_object(key),
        }
    }

    fn session_ended(commit: &mut Commit<'_>, key: &ObjectKey, _: SessionId) {
        let now = commit.m.stamp;
        if let Some(mut marker) = commit.object::<Self>(key).cloned() {
            marker.die(now);
            commit.put_object(key, marker);
        }
    }
}

coded_struct! {
    /// An effect inside this service, or one that is already done.
    pub struct MarkOnce as "a marker" {
        /// Canonical.
        pub name: Box<str>,
        pub by: Box<str>,
        /// Zero: for ever.
        pub retention_ms: u64,
        pub result: Box<[u8]>,
    }
}

coded_struct! {
    /// An effect outside of this service is about to be done.
    pub struct MarkerClaim as "a claim" {
        pub name: Box<str>,
        pub by: Box<str>,
        pub retention_ms: u64,
        /// The claim lives as long as this session; zero: as long as its lease.
        pub session: SessionId,
        pub lease_ms: u64,
        pub on_death: OnDeath,
    }
}

coded_struct! {
    /// It was done.
    pub struct MarkerConfirm as "a confirmation" {
        pub name: Box<str>,
        pub token: Revision,
        pub result: Box<[u8]>,
    }
}

coded_struct! {
    /// It was not done, and another may.
    pub struct MarkerRelease as "a release" {
        pub name: Box<str>,
        pub token: Revision,
    }
}

coded_struct! {
    pub struct MarkerDelete as "a deletion" {
        pub name: Box<str>,
        /// Only this incarnation; zero: whatever is there.
        pub token: Revision,
        pub reason: Box<str>,
    }
}

coded_enum! {
    pub enum MarkerOp as "an operation on a marker" {
        /// Puts the marker, or tells who did.
        Once(MarkOnce) = 1,
        /// As the first of the operations that belong to a marker, decided before: the marker must not be there.
        Put(MarkOnce) = 2,
        /// In their place where it was decided that the marker is there: tells who did it.
        Tell(MarkOnce) = 3,
        Claim(MarkerClaim) = 4,
        Confirm(MarkerConfirm) = 5,
        Release(MarkerRelease) = 6,
        Delete(MarkerDelete) = 7,
    }
}

coded_struct! {
    /// Who did it, and when.
    pub struct AlreadyDone as "what was done" {
        pub by: Box<str>,
        pub at: LogTime,
        pub token: Revision,
        pub result: Box<[u8]>,
        /// The claim died and its policy takes it for done: it may not have happened.
        pub unconfirmed: bool,
        /// None: for ever.
        pub until: Option<LogTime>,
    }
}

coded_struct! {
    /// The right to do an outside effect.
    pub struct MarkerGrant as "a grant" {
        pub token: Revision,
        /// The first is 1.
        pub attempt: u32,
        /// Stays the same over all attempts: the key under which the other side can tell them apart from other effects.
        pub key: Box<str>,
    }
}

coded_struct! {
    pub struct Marked as "a mark" {
        pub token: Revision,
        pub until: Option<LogTime>,
    }
}

coded_enum! {
    pub enum MarkerReply as "an answer of a marker" {
        /// It is put, or confirmed.
        Marked(Marked) = 1,
        AlreadyDone(AlreadyDone) = 2,
        Claimed(MarkerGrant) = 3,
        Released = 4,
        /// Whether there was one.
        Deleted(bool) = 5,
    }
}

impl MarkerOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        const THING: u64 = 512;
        match self {
            Self::Once(m) | Self::Put(m) => THING + 2 * m.name.len() as u64 + (m.by.len() + m.result.len()) as u64,
            Self::Claim(c) => THING + 2 * c.name.len() as u64 + c.by.len() as u64,
            // A confirmation ends what is open.
            Self::Tell(_) | Self::Confirm(_) | Self::Release(_) | Self::Delete(_) => 0,
        }
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

impl Machine {
    /// A marker by its canonical name, unless it is not there or deleted.
    pub fn marker(&self, ns: NamespaceId, name: &[u8]) -> Option<&Marker> {
        self.object::<Marker>(ns, name).filter(|marker| marker.state != MarkerState::Deleted)
    }

    /// The key under which the other side can recognize an outside effect, whichever attempt brings it.
    fn effect_key(&self, key: &ObjectKey, first: Revision) -> Box<str> {
        let mut bytes = self.issuer.to_vec();
        bytes.extend_from_slice(&first.0.to_be_bytes());
        bytes.extend_from_slice(key.as_bytes());
        let mut text = String::with_capacity(32);
        for byte in codec::digest(&bytes) {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        text.into()
    }
}

impl Commit<'_> {
    pub(crate) fn marker_op(&mut self, op: &MarkerOp) -> Result<OpReply, Rejection> {
        let reply = match op {
            MarkerOp::Once(mark) => self.marker_once(mark)?,
            MarkerOp::Put(mark) => self.marker_put(mark)?,
            MarkerOp::Tell(mark) => self.marker_tell(mark)?,
            MarkerOp::Claim(claim) => self.marker_claim(claim)?,
            MarkerOp::Confirm(confirm) => self.marker_confirm(confirm)?,
            MarkerOp::Release(release) => self.marker_release(release)?,
            MarkerOp::Delete(delete) => self.marker_delete(delete)?,
        };
        Ok(reply.into())
    }

    fn marker_key(&self, name: &str) -> Result<ObjectKey, Rejection> {
        match canonical_marker_name(name) {
            Ok(canonical) if *canonical == *name => Ok(self.object_key::<Marker>(name.as_bytes())),
            Ok(_) => Err(invalid("the name of the marker is not in its canonical form")),
            Err(why) => Err(invalid(why)),
        }
    }

    fn marker_once(&mut self, mark: &MarkOnce) -> Result<MarkerReply, Rejection> {
        let key = self.marker_key(&mark.name)?;
        let taken = self.object::<Marker>(&key).is_some_and(Marker::is_taken);
        if taken { self.marker_tell(mark) } else { self.marker_put(mark) }
    }

    fn marker_put(&mut self, mark: &MarkOnce) -> Result<MarkerReply, Rejection> {
        let key = self.marker_key(&mark.name)?;
        check_retention(mark.retention_ms)?;
        check_texts(&mark.by, &mark.result)?;
        let before = self.object::<Marker>(&key).cloned();
        if before.as_ref().is_some_and(Marker::is_taken) {
            return Err(touched_twice(&mark.name));
        }
        let token = self.number_once(&key)?;
        let now = self.m.stamp;
        let retention_ms = longest_retention(before.as_ref(), mark.retention_ms);
        let marker = Marker {
            state: MarkerState::Done,
            token,
            by: mark.by.clone(),
            at: now,
            attempt: before.as_ref().map_or(0, |before| before.attempt),
            first: before.as_ref().map_or(Revision(0), |before| before.first),
            retention_ms,
            until: kept_until(now, retention_ms),
            session: SessionId(0),
            on_death: OnDeath::Ask,
            result: mark.result.clone(),
            events: before.map(|before| before.succeeded_at(now)).unwrap_or_default(),
        };
        let until = marker.until;
        self.put_object(&key, marker);
        Ok(MarkerReply::Marked(Marked { token, until }))
    }

    fn marker_tell(&mut self, mark: &MarkOnce) -> Result<MarkerReply, Rejection> {
        let key = self.marker_key(&mark.name)?;
        check_retention(mark.retention_ms)?;
        let marker = match self.object::<Marker>(&key) {
            Some(marker) if marker.is_taken() => marker.clone(),
            _ => return Err(touched_twice(&mark.name)),
        };
        self.marker_told(&key, marker, mark.retention_ms)
    }

    /// The answer of a marker that is there; one that the asker wants to be kept for longer is.
    fn marker_told(
        &mut self,
        key: &ObjectKey,
        mut marker: Marker,
        retention_ms: u64,
    ) -> Result<MarkerReply, Rejection> {
        match marker.state {
            MarkerState::Claimed => return Err(self.in_flight(key, &marker)),
            MarkerState::Unconfirmed if marker.on_death == OnDeath::Ask => {
                return Err(self.needs_reconcile(key, &marker));
            }
            _ => {}
        }
        let longer = marker.retention_ms != 0 && (retention_ms == 0 || retention_ms > marker.retention_ms);
        if longer {
            marker.retention_ms = retention_ms;
            marker.keep_from(marker.at);
            self.put_object(key, marker.clone());
        }
        Ok(MarkerReply::AlreadyDone(AlreadyDone {
            by: marker.by,
            at: marker.at,
            token: marker.token,
            result: marker.result,
            unconfirmed: marker.state == MarkerState::Unconfirmed,
            until: marker.until,
        }))
    }

    fn marker_claim(&mut self, claim: &MarkerClaim) -> Result<MarkerReply, Rejection> {
        let key = self.marker_key(&claim.name)?;
        check_retention(claim.retention_ms)?;
        check_texts(&claim.by, b"")?;
        let before = self.object::<Marker>(&key).cloned();
        if let Some(before) = before.as_ref().filter(|before| before.is_taken()) {
            return self.marker_told(&key, before.clone(), claim.retention_ms);
        }
        let until = self.claim_end(claim)?;
        let token = self.number_once(&key)?;
        let now = self.m.stamp;
        let attempt = before.as_ref().map_or(1, |before| before.attempt.saturating_add(1));
        // A claim that was released may have done a part, so its key stays; a deletion asks for the effect anew.
        let first = before.as_ref().map(|before| before.first).filter(|first| first.0 > 0).unwrap_or(token);
        let marker = Marker {
            state: MarkerState::Claimed,
            token,
            by: claim.by.clone(),
            at: now,
            attempt,
            first,
            retention_ms: longest_retention(before.as_ref(), claim.retention_ms),
            until,
            session: claim.session,
            on_death: claim.on_death,
            result: Box::default(),
            events: before.map(|before| before.succeeded_at(now)).unwrap_or_default(),
        };
        self.put_object(&key, marker);
        let effect = self.m.effect_key(&key, first);
        Ok(MarkerReply::Claimed(MarkerGrant { token, attempt, key: effect }))
    }

    /// When a claim ends by itself, if it is not the session's end that ends it.
    fn claim_end(&self, claim: &MarkerClaim) -> Result<Option<LogTime>, Rejection> {
        if claim.session != SessionId(0) {
            if claim.lease_ms != 0 {
                return Err(invalid("a claim lives under a session or under a lease of its own, not both"));
            }
            self.live_session(claim.session)?;
            self.check_things(claim.session)?;
            return Ok(None);
        }
        if !MARKER_LEASE_MS.contains(&claim.lease_ms) {
            return Err(invalid("the lease of a claim is out of range"));
        }
        Ok(Some(self.m.stamp.plus(claim.lease_ms)))
    }

    fn marker_confirm(&mut self, confirm: &MarkerConfirm) -> Result<MarkerReply, Rejection> {
        let key = self.marker_key(&confirm.name)?;
        check_texts("", &confirm.result)?;
        let mut marker = self.marker_under(&key, confirm.token)?;
        let now = self.m.stamp;
        if marker.state != MarkerState::Done {
            if marker.state == MarkerState::Unconfirmed {
                marker.note(marker.event(MarkerEventKind::ConfirmedLate, now));
            }
            marker.state = MarkerState::Done;
            marker.at = now;
            marker.session = SessionId(0);
            marker.result = confirm.result.clone();
            marker.keep_from(now);
            self.put_object(&key, marker.clone());
        }
        Ok(MarkerReply::Marked(Marked { token: marker.token, until: marker.until }))
    }

    fn marker_release(&mut self, release: &MarkerRelease) -> Result<MarkerReply, Rejection> {
        let key = self.marker_key(&release.name)?;
        let marker = self.marker_under(&key, release.token)?;
        if marker.state == MarkerState::Done {
            return Err(self.superseded(&key, release.token, Some(&marker)));
        }
        self.marker_forget(&key, marker, MarkerEventKind::Released, "");
        Ok(MarkerReply::Released)
    }

    fn marker_delete(&mut self, delete: &MarkerDelete) -> Result<MarkerReply, Rejection> {
        let key = self.marker_key(&delete.name)?;
        if delete.reason.len() > MARKER_TEXT_MAX {
            return Err(invalid("the reason is too long"));
        }
        let found = self.object::<Marker>(&key).filter(|marker| marker.state != MarkerState::Deleted).cloned();
        let Some(marker) = found else { return Ok(MarkerReply::Deleted(false)) };
        if delete.token != Revision(0) && delete.token != marker.token {
            return Err(self.superseded(&key, delete.token, Some(&marker)));
        }
        self.marker_forget(&key, marker, MarkerEventKind::Deleted, &delete.reason);
        Ok(MarkerReply::Deleted(true))
    }

    /// Leaves the events of a marker and nothing else.
    fn marker_forget(&mut self, key: &ObjectKey, mut marker: Marker, kind: MarkerEventKind, reason: &str) {
        let now = self.m.stamp;
        let principal = self.txn.principal.clone();
        marker.note(MarkerEvent { principal, reason: reason.into(), ..marker.event(kind, now) });
        marker.state = MarkerState::Deleted;
        marker.at = now;
        marker.until = Some(now.plus(DELETED_KEPT_MS));
        marker.session = SessionId(0);
        marker.result = Box::default();
        if kind == MarkerEventKind::Deleted {
            (marker.first, marker.attempt) = (Revision(0), 0);
        }
        self.put_object(key, marker);
    }

    /// The marker, if this is its token.
    fn marker_under(&self, key: &ObjectKey, token: Revision) -> Result<Marker, Rejection> {
        match self.object::<Marker>(key) {
            Some(marker) if marker.token == token && marker.state != MarkerState::Deleted => Ok(marker.clone()),
            other => Err(self.superseded(key, token, other)),
        }
    }

    fn superseded(&self, key: &ObjectKey, presented: Revision, now: Option<&Marker>) -> Rejection {
        let name = text(key);
        let why = match now {
            None => format!("token {presented} of marker `{name}` is stale: there is no such marker"),
            Some(marker) => format!(
                "token {presented} of marker `{name}` is stale: it is {} under token {}",
                state_word(marker.state),
                marker.token
            ),
        };
        let refusal = Refusal::new(RefusalCode::Fenced, why).fact("name", &name).fact("presented", presented);
        match now {
            None => refusal.fact("newest", 0).fact("state", "absent").into(),
            Some(marker) => self.marker_facts(refusal.fact("newest", marker.token), marker).into(),
        }
    }

    fn in_flight(&self, key: &ObjectKey, marker: &Marker) -> Rejection {
        let name = text(key);
        let why =
            format!("the effect of marker `{name}` is being done by `{}` under token {}", marker.by, marker.token);
        let left_ms = marker.until.map_or(1_000, |until| until.0.saturating_sub(self.m.stamp.0));
        let refusal = Refusal::new(RefusalCode::InFlight, why).fact("name", &name).fact("token", marker.token);
        self.marker_facts(refusal, marker).retry_after(left_ms.clamp(1, 1_000)).into()
    }

    fn needs_reconcile(&self, key: &ObjectKey, marker: &Marker) -> Rejection {
        let name = text(key);
        let why = format!(
            "`{}` claimed marker `{name}` under token {} and died before it confirmed: find out whether the effect happened, then \
             confirm or delete the marker",
            marker.by, marker.token
        );
        let refusal = Refusal::new(RefusalCode::NeedsReconcile, why).fact("name", &name).fact("token", marker.token);
        self.marker_facts(refusal, marker).into()
    }

    fn marker_facts(&self, refusal: Refusal, marker: &Marker) -> Refusal {
        let refusal = refusal
            .fact("state", state_word(marker.state))
            .fact("by", &marker.by)
            .fact("attempt", marker.attempt)
            .fact("since_ms", self.m.stamp.0.saturating_sub(marker.at.0));
        if marker.session == SessionId(0) { refusal } else { refusal.fact("session", marker.session) }
    }
}

impl Marker {
    /// Its events, when another takes its place.
    fn succeeded_at(mut self, now: LogTime) -> Vec<MarkerEvent> {
        if self.state == MarkerState::Unconfirmed {
            self.note(self.event(MarkerEventKind::TakenOver, now));
        }
        self.events
    }
}

fn text(key: &ObjectKey) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(key.name())
}

/// What a state is called wherever it is told.
pub(crate) fn state_word(state: MarkerState) -> &'static str {
    match state {
        MarkerState::Claimed => "claimed",
        MarkerState::Unconfirmed => "unconfirmed",
        MarkerState::Done => "done",
        MarkerState::Deleted => "deleted",
    }
}

/// What was decided before the first operation no longer holds, by an operation of the same transaction.
fn touched_twice(name: &str) -> Rejection {
    invalid(format!("one transaction touches marker `{name}` once"))
}

fn check_retention(ms: u64) -> Result<(), Rejection> {
    if ms != 0 && ms < MARKER_RETENTION_MIN_MS {
        return Err(invalid("a marker is kept for an hour at least"));
    }
    Ok(())
}

fn check_texts(by: &str, result: &[u8]) -> Result<(), Rejection> {
    if by.len() > MARKER_TEXT_MAX || result.len() > MARKER_RESULT_MAX {
        return Err(invalid("`by` or the result of the marker is too large"));
    }
    Ok(())
}

/// The canonical name of a marker that is written as text: `type=welcome,user=42`, where `%XX` stands for a byte.
pub fn canonical_marker_name(text: &str) -> Result<Box<str>, &'static str> {
    let mut fields = Vec::new();
    for field in text.split(',') {
        let (name, value) = field.split_once('=').ok_or("a marker is a list of fields: name=value,name=value")?;
        fields.push((unescaped(name)?, unescaped(value)?));
    }
    marker_name(fields)
}

/// The canonical name of a marker: its fields sorted by name, with `,`, `=`, `%` and control characters as `%XX`.
pub fn marker_name<T: AsRef<str>>(fields: impl IntoIterator<Item = (T, T)>) -> Result<Box<str>, &'static str> {
    let mut fields: Vec<(T, T)> = fields.into_iter().collect();
    fields.sort_by(|(a, _), (b, _)| a.as_ref().cmp(b.as_ref()));
    if fields.is_empty() || fields.len() > MARKER_FIELDS_MAX {
        return Err("a marker has 1 to 16 fields");
    }
    if fields.windows(2).any(|two| two[0].0.as_ref() == two[1].0.as_ref()) {
        return Err("a field of the marker is given twice");
    }
    let mut out = String::new();
    for (place, (name, value)) in fields.iter().enumerate() {
        if name.as_ref().is_empty() {
            return Err("a field of the marker has no name");
        }
        if place > 0 {
            out.push(',');
        }
        escape(&mut out, name.as_ref());
        out.push('=');
        escape(&mut out, value.as_ref());
    }
    if out.len() > MARKER_NAME_MAX {
        return Err("the name of a marker has at most 1,024 bytes");
    }
    Ok(out.into())
}

fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            ',' | '=' | '%' | '\0'..='\x1f' | '\x7f' => {
                let _ = write!(out, "%{:02X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
}

fn unescaped(text: &str) -> Result<String, &'static str> {
    const WRONG: &str = "in a marker `%` begins the two hexadecimal digits of a byte";
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or(WRONG);
        out.push((digit()? << 4 | digit()?) as u8);
    }
    String::from_utf8(out).map_err(|_| WRONG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_for_the_same_fields() {
        let check = |text: &str, expected: Result<&str, &str>| {
            assert_eq!(canonical_marker_name(text).as_deref(), expected.as_ref().copied(), "{text}");
        };
        check("user=42,type=welcome", Ok("type=welcome,user=42"));
        check("type=welcome,user=42", Ok("type=welcome,user=42"));
        check("a=", Ok("a="));
        // An escaped letter is the letter; what separates stays escaped.
        check("a=%62", Ok("a=b"));
        check("a=x%2cb%3Dy%25", Ok("a=x%2Cb%3Dy%25"));
        check("url=http://x?a=b", Ok("url=http://x?a%3Db"));
        check("a=1,a=2", Err("a field of the marker is given twice"));
        check("welcome", Err("a marker is a list of fields: name=value,name=value"));
        check("", Err("a marker is a list of fields: name=value,name=value"));
        check("=x", Err("a field of the marker has no name"));
        check("a=%4", Err("in a marker `%` begins the two hexadecimal digits of a byte"));
        check("a=%ff", Err("in a marker `%` begins the two hexadecimal digits of a byte"));
        assert!(canonical_marker_name(&format!("a={}", "x".repeat(MARKER_NAME_MAX))).is_err());
        assert_eq!(marker_name([("b", "1,2"), ("a", "é")]).as_deref(), Ok("a=é,b=1%2C2"));
        assert!(marker_name((0..17).map(|n| (n.to_string(), n.to_string()))).is_err());
    }
}
