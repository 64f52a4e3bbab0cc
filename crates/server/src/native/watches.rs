//! Watches: changes of keys and of the things of every primitive, as a stream and as a long poll.
//!
//! Promises. W1: every change once, in order; `resume` of any answer goes on right behind it, inside a revision too. W2: what a snapshot tells and
//! the changes behind it leave nothing out; at SYNCED they are the state at one revision. W3: what is no longer kept is told: COMPACTED of keys,
//! RESYNC_REQUIRED of the ring. W4: a long poll's `resume` never goes back.
//! Relies on. `follow.rs` for everything but the words.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::BytesMut;
use tenure_machine::{Change, Key, Record, Revision, Space, Span, kind_of};
use tenure_wire::tenure::v1;
use v1::watch_reply::Type;

use super::{Refused, decoded, either, full_header, namespace, refusal, refuse, sessions, shown, text_or_bytes};
use crate::Context;
use crate::driver::Failure;
use crate::follow::{Followed, Follower, behind, things};
use crate::rpc::{Call, Code, Incoming, Outgoing, Router, Status, frame_message};
use crate::status::{self as words, Kind};

const BOOKMARK_DEFAULT_MS: u64 = 5_000;
const BOOKMARK_MS: std::ops::RangeInclusive<u64> = 100..=600_000;
const POLL_MAX_MS: u64 = 20_000;
const KEY_BYTES_MAX: usize = 64 << 10;
/// Things of a snapshot that one visit to the driver gathers.
const PAGE: usize = 1_000;
/// One buffer of answers is handed on when it has so many bytes.
const BUFFER_BYTES: usize = 64 << 10;
/// One answer to a long poll is cut after so many events, behind a whole revision.
const POLL_EVENTS: usize = 1_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    let own = context.clone();
    router.stream("/tenure.v1.Watches/Watch", move |call, incoming, outgoing| {
        watch(own.clone(), call, incoming, outgoing)
    });
    sessions::native_unary(router, context, "/tenure.v1.Watches/Poll", poll);
}

/// Up to where everything was told: a change, or a whole revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    revision: u64,
    /// Of the change within its revision; `WHOLE` behind all of them.
    index: u64,
}

const WHOLE: u64 = 1 << 32;

impl Place {
    fn behind(revision: Revision) -> Self {
        Self { revision: revision.0, index: WHOLE }
    }

    fn of(record: &Record) -> Self {
        let meta = record.meta();
        Self { revision: meta.mod_revision.0, index: meta.index.into() }
    }

    fn parse(text: &str) -> Option<Self> {
        let (revision, index) = match text.split_once('.') {
            Some((revision, index)) => (revision, index.parse::<u32>().ok()?.into()),
            None => (text, WHOLE),
        };
        Some(Self { revision: revision.parse().ok().filter(|&revision| revision < u64::MAX)?, index })
    }

    /// The first revision of which something may be missing.
    fn next(self) -> Revision {
        Revision(if self.index == WHOLE { self.revision + 1 } else { self.revision })
    }

    fn text(self) -> String {
        if self.index == WHOLE { self.revision.to_string() } else { format!("{}.{}", self.revision, self.index) }
    }
}

/// A request that was read.
struct Wanted {
    span: Span,
    is_keys: bool,
    /// Absent: from now on.
    after: Option<Place>,
    snapshot: bool,
    prev: bool,
    quiet: Duration,
}

impl Wanted {
    fn read(request: &v1::WatchRequest) -> Result<Self, Refused> {
        let namespace = namespace(&request.namespace)?;
        let is_keys = matches!(request.kind.as_str(), "" | "key");
        let span = if is_keys { keys(namespace, request)? } else { of_kind(namespace, request)? };
        if request.snapshot && request.revision > 0 {
            return Err(refuse("snapshot", "a snapshot is of now: it begins at no other revision"));
        }
        // A browser that reconnects asks for the same address again and tells beside it where it was.
        let after = match (request.revision, request.resume.as_str()) {
            (0, "") => None,
            (revision, "") => Some(Place::behind(Revision(revision - 1))),
            (_, resume) => {
                let wrong =
                    || refuse("resume", "a place is `<revision>.<index>` or `<revision>`, as an answer told it");
                Some(Place::parse(resume).ok_or_else(wrong)?)
            }
        };
        let quiet_ms = if request.bookmark_ms == 0 { BOOKMARK_DEFAULT_MS } else { request.bookmark_ms };
        if !BOOKMARK_MS.contains(&quiet_ms) {
            return Err(refuse("bookmark_ms", "bookmarks come every 100 to 600000 ms"));
        }
        let quiet = Duration::from_millis(quiet_ms);
        Ok(Self { span, is_keys, after, snapshot: request.snapshot, prev: request.prev, quiet })
    }
}

impl Wanted {
    fn follower(&self, context: &Context, after: Place) -> Follower {
        Follower::new(&context.handle, self.span.clone(), after.next(), self.quiet)
    }
}

fn keys(namespace: tenure_machine::NamespaceId, request: &v1::WatchRequest) -> Result<Span, Refused> {
    if !request.name.is_empty() {
        return Err(refuse("name", "keys are named by `key`"));
    }
    let key = either("key", &request.key, &request.key_bytes)?;
    let end = either("end", &request.end, &request.end_bytes)?;
    if key.len().max(end.len()) > KEY_BYTES_MAX {
        return Err(refuse("key", format!("a key has at most {KEY_BYTES_MAX} bytes")));
    }
    let start = Key::new(Space::Keys, namespace, key);
    match (request.prefix, end) {
        (true, []) => Ok(Span { end: Some(behind(&start)), start }),
        (true, _) => Err(refuse("end", "a prefix has no end")),
        (false, []) if key.is_empty() => Err(refuse("key", "no key is given, and no prefix")),
        (false, []) => Ok(Span::one(start)),
        (false, end) if end <= key => Err(refuse("end", "the range is empty")),
        (false, end) => Ok(Span { start, end: Some(Key::new(Space::Keys, namespace, end)) }),
    }
}

fn of_kind(namespace: tenure_machine::NamespaceId, request: &v1::WatchRequest) -> Result<Span, Refused> {
    let has_key = !request.key.is_empty() || !request.key_bytes.is_empty();
    if has_key || !request.end.is_empty() || !request.end_bytes.is_empty() {
        return Err(refuse("key", "things of a kind are named by `name`, alone or as a prefix"));
    }
    if request.name.len() > KEY_BYTES_MAX {
        return Err(refuse("name", format!("a name has at most {KEY_BYTES_MAX} bytes")));
    }
    if request.kind == "any" {
        if !request.name.is_empty() {
            return Err(refuse("name", "things of any kind have no name in common"));
        }
        let start = Key::new(Space::Native, namespace, b"");
        return Ok(Span { end: Some(Key::end_of(Space::Native, namespace)), start });
    }
    let letter = shown::letter(&request.kind)?;
    if request.name.is_empty() && !request.prefix {
        return Err(refuse("name", "no name is given, and no prefix"));
    }
    let name = shown::stored_name(letter, &request.name, request.prefix)?;
    Ok(things(namespace, letter, &name, request.prefix))
}

async fn watch(context: Context, _: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    let Some(message) = incoming.next().await else { return Err(Status::invalid_argument("no request came")) };
    let request: v1::WatchRequest = decoded(message?).map_err(refusal)?;
    let wanted = Wanted::read(&request).map_err(refusal)?;
    let _place = context.stream_place().map_err(refusal)?;
    let run = async {
        let mut sender = Sender { outgoing: &outgoing, buffer: BytesMut::new() };
        stream(&context, wanted, &mut sender).await
    };
    tokio::select! {
        ended = run => ended,
        () = outgoing.closed() => Err(cancelled()),
    }
}

fn cancelled() -> Status {
    Status::new(Code::Cancelled, "the caller no longer listens")
}

fn failed(failure: &Failure) -> Status {
    refusal(Box::new(words::native_failure(failure, Kind::Read)))
}

/// Answers on their way, several to a buffer.
struct Sender<'a> {
    outgoing: &'a Outgoing,
    buffer: BytesMut,
}

impl Sender<'_> {
    async fn put(&mut self, reply: &v1::WatchReply) -> Result<(), Status> {
        frame_message(reply, &mut self.buffer);
        if self.buffer.len() >= BUFFER_BYTES { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Status> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.outgoing.send_framed(self.buffer.split().freeze()).await.map_err(|_| cancelled())
    }
}

async fn stream(context: &Context, wanted: Wanted, sender: &mut Sender<'_>) -> Result<(), Status> {
    let mut from = wanted.after;
    loop {
        let lowest = follow(context, &wanted, from, sender).await?;
        // What comes next is gone. Of keys that is an error, for history is compacted on purpose; of the ring an answer, for it is only so long.
        if wanted.is_keys && !wanted.snapshot {
            return Err(compacted(lowest));
        }
        let mut resync = resync(lowest);
        if wanted.snapshot {
            // A snapshot follows. Who loses it goes on from where it was, which leads here again: not behind what it was never told.
            resync.resume.clear();
        }
        sender.put(&resync).await?;
        sender.flush().await?;
        if !wanted.snapshot {
            return Ok(());
        }
        from = None;
    }
}

/// Tells everything behind a place, or from now on; returns the lowest revision that is kept if what comes next is not.
async fn follow(
    context: &Context,
    wanted: &Wanted,
    from: Option<Place>,
    sender: &mut Sender<'_>,
) -> Result<Revision, Status> {
    let (mut after, mut follower, mut first) = match from {
        None if wanted.snapshot => match snapshot(context, wanted, sender).await? {
            (_, _, Some(lowest)) => return Ok(lowest),
            (after, follower, None) => (after, follower, None),
        },
        from => {
            let after = begin(context, from).await?;
            let mut follower = wanted.follower(context, after);
            // A start that is no longer kept is refused before anything is told.
            let first = follower.try_next().await.map_err(|failure| failed(&failure))?;
            if let Some(Followed::Gone(lowest)) = first {
                return Ok(lowest);
            }
            sender.put(&note(Type::Bookmark, after)).await?;
            sender.flush().await?;
            (after, follower, first)
        }
    };
    loop {
        let followed = match first.take() {
            Some(followed) => followed,
            None => follower.next().await.map_err(|failure| failed(&failure))?,
        };
        match followed {
            Followed::Changes(changes) => {
                for change in changes.iter().filter(|change| Place::of(&change.record) > after) {
                    sender.put(&told(change, wanted.prev)).await?;
                }
                after = changes.last().map_or(after, |last| after.max(Place::of(&last.record)));
            }
            Followed::Through(revision) => {
                after = after.max(Place::behind(revision));
                sender.put(&note(Type::Bookmark, after)).await?;
            }
            Followed::Gone(lowest) => return Ok(lowest),
        }
        sender.flush().await?;
    }
}

/// Where a watch begins that names no place: behind what is committed now, by a read index.
async fn begin(context: &Context, after: Option<Place>) -> Result<Place, Status> {
    if let Some(after) = after {
        return Ok(after);
    }
    let now = context.query(false, |view| view.machine.revision()).await;
    Ok(Place::behind(now.map_err(|failure| failed(&failure))?))
}

/// What there is, then what changed while it was told, up to the revision at which both together are the state. None of it has a place to go on
/// from: who loses the stream in the middle takes the snapshot again. The last part is the lowest revision kept, should it be above what comes next.
async fn snapshot(
    context: &Context,
    wanted: &Wanted,
    sender: &mut Sender<'_>,
) -> Result<(Place, Follower, Option<Revision>), Status> {
    let mut page = page(context, wanted, None).await?;
    let start = Place::behind(page.revision);
    let (mut follower, mut after) = (wanted.follower(context, start), start);
    loop {
        for record in &page.records {
            sender.put(&there(record, page.revision)).await?;
        }
        sender.flush().await?;
        after = after.max(Place::behind(page.revision));
        let Some(next) = page.next else { break };
        page = self::page(context, wanted, Some((start, next))).await?;
    }
    // Things have no history to page through: what changed between the pages is told behind them. It is here, for the pages have seen it.
    while after > start {
        match follower.try_next().await.map_err(|failure| failed(&failure))? {
            Some(Followed::Changes(changes)) => {
                for change in &changes {
                    sender.put(&v1::WatchReply { resume: String::new(), ..told(change, wanted.prev) }).await?;
                    after = after.max(Place::behind(change.record.mod_revision()));
                }
            }
            Some(Followed::Through(revision)) => after = after.max(Place::behind(revision)),
            Some(Followed::Gone(lowest)) => return Ok((after, follower, Some(lowest))),
            None => break,
        }
    }
    sender.put(&note(Type::Synced, after)).await?;
    sender.flush().await?;
    Ok((after, follower, None))
}

struct Page {
    records: Vec<Record>,
    revision: Revision,
    next: Option<Key>,
}

/// A page of what there is. The first is of now, by a read index; those of keys that follow are of its revision, those of things of their own.
async fn page(context: &Context, wanted: &Wanted, on: Option<(Place, Key)>) -> Result<Page, Status> {
    let (span, is_keys, is_first) = (wanted.span.clone(), wanted.is_keys, on.is_none());
    let page = move |view: &crate::driver::View<'_>| {
        let machine = view.machine;
        let (pinned, after) =
            on.map_or((machine.revision(), None), |(start, key)| (Revision(start.revision), Some(key)));
        if !is_keys {
            let (records, next) = machine.native_slice(&span, after.as_ref(), PAGE);
            return Ok(Page { records, revision: machine.revision(), next });
        }
        if pinned < machine.compacted() {
            return Err(machine.compacted());
        }
        let (records, next) = machine.range_slice(&span, pinned, after.as_ref(), PAGE);
        Ok(Page { records, revision: pinned, next })
    };
    let page = context.query(!is_first, page).await.map_err(|failure| failed(&failure))?;
    page.map_err(compacted)
}

fn compacted(lowest: Revision) -> Status {
    let rejection = tenure_machine::Rejection::Compacted { lowest };
    refusal(Box::new(words::native_rejection(&rejection, Kind::Read, tenure_machine::LogTime(0))))
}

fn resync(lowest: Revision) -> v1::WatchReply {
    // Who goes on without a snapshot goes on from there, knowing it.
    v1::WatchReply { from: lowest.0, ..note(Type::ResyncRequired, before(lowest)) }
}

fn before(lowest: Revision) -> Place {
    Place::behind(Revision(lowest.0.saturating_sub(1)))
}

fn note(kind: Type, place: Place) -> v1::WatchReply {
    v1::WatchReply { r#type: kind.into(), revision: place.revision, resume: place.text(), ..Default::default() }
}

/// One thing of a snapshot.
fn there(record: &Record, at: Revision) -> v1::WatchReply {
    let known = record.mod_revision();
    let revision = if known == Revision(0) { at.0 } else { known.0 };
    described(v1::WatchReply { r#type: Type::Snapshot.into(), revision, ..Default::default() }, record)
}

fn told(change: &Change, with_prev: bool) -> v1::WatchReply {
    let meta = change.record.meta();
    let reply = v1::WatchReply {
        r#type: if meta.tombstone { Type::Delete } else { Type::Put }.into(),
        revision: meta.mod_revision.0,
        index: meta.index,
        resume: Place::of(&change.record).text(),
        ..Default::default()
    };
    let mut reply = described(reply, &change.record);
    if let Some(before) = change.before.as_ref().filter(|_| with_prev) {
        match kind_of_native(before) {
            Some(_) => reply.prev_facts = shown::facts(before),
            None => reply.prev = Some(super::record(before)),
        }
    }
    reply
}

fn kind_of_native(record: &Record) -> Option<u8> {
    if record.key().first() == Some(&(Space::Native as u8)) { kind_of(record.key()) } else { None }
}

fn described(mut reply: v1::WatchReply, record: &Record) -> v1::WatchReply {
    let Some(letter) = kind_of_native(record) else {
        reply.record = Some(super::record(record));
        return reply;
    };
    reply.kind = shown::kind(letter).to_owned();
    let name: &[u8] = record.name().get(1..).unwrap_or_default();
    (reply.name, reply.name_bytes) = text_or_bytes(&shown::told_name(letter, name));
    reply.facts = if record.is_tombstone() { BTreeMap::new() } else { shown::facts(record) };
    reply
}

async fn poll(context: Context, request: v1::WatchPollRequest) -> Result<v1::WatchPollReply, Refused> {
    let wait = match request.wait_ms {
        0 => POLL_MAX_MS,
        ms if ms > POLL_MAX_MS => return Err(refuse("wait_ms", format!("a poll waits at most {POLL_MAX_MS} ms"))),
        ms => ms,
    };
    let request = v1::WatchRequest {
        key: request.key,
        key_bytes: request.key_bytes,
        end: request.end,
        end_bytes: request.end_bytes,
        prefix: request.prefix,
        kind: request.kind,
        name: request.name,
        revision: request.revision,
        resume: request.resume,
        snapshot: request.snapshot,
        prev: request.prev,
        bookmark_ms: 0,
        namespace: request.namespace,
    };
    let mut wanted = Wanted::read(&request)?;
    wanted.quiet = Duration::from_millis(wait);
    let _place = context.stream_place()?;
    let refused = |status: Status| status.problem.unwrap_or_else(|| refuse("watch", status.message));
    let (events, after) = polled(&context, &wanted).await.map_err(refused)?;
    Ok(v1::WatchPollReply { header: full_header(&context, Revision(after.revision)), events, resume: after.text() })
}

async fn polled(context: &Context, wanted: &Wanted) -> Result<(Vec<v1::WatchReply>, Place), Status> {
    let Some(after) = wanted.after else {
        return if wanted.snapshot {
            polled_snapshot(context, wanted).await
        } else {
            Ok((Vec::new(), begin(context, None).await?))
        };
    };
    let mut follower = wanted.follower(context, after);
    loop {
        match follower.next().await.map_err(|failure| failed(&failure))? {
            Followed::Changes(changes) => {
                let mut new =
                    changes.iter().filter(|change| Place::of(&change.record) > after).take(POLL_EVENTS).peekable();
                // The rest of a revision that was told whole is none.
                if new.peek().is_none() {
                    continue;
                }
                let events: Vec<_> = new.map(|change| (Place::of(&change.record), told(change, wanted.prev))).collect();
                let after = events.last().map_or(after, |(place, _)| *place);
                return Ok((events.into_iter().map(|(_, event)| event).collect(), after));
            }
            Followed::Through(revision) => return Ok((Vec::new(), after.max(Place::behind(revision)))),
            Followed::Gone(lowest) if wanted.is_keys => return Err(compacted(lowest)),
            Followed::Gone(lowest) => return Ok((vec![resync(lowest)], after.max(before(lowest)))),
        }
    }
}

async fn polled_snapshot(context: &Context, wanted: &Wanted) -> Result<(Vec<v1::WatchReply>, Place), Status> {
    let page = page(context, wanted, None).await?;
    if page.next.is_some() {
        let why = format!("a snapshot by poll has at most {PAGE} things: name a longer prefix, or stream");
        return Err(refusal(Box::new(words::too_many(why, PAGE))));
    }
    let there = page.records.iter().map(|record| there(record, page.revision)).collect();
    Ok((there, Place::behind(page.revision)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_told() {
        for text in ["0", "7", "7.0", "7.12"] {
            assert_eq!(Place::parse(text).unwrap().text(), text);
        }
        assert!(Place::parse("7.12") < Place::parse("7") && Place::parse("7") < Place::parse("8.0"));
        for wrong in ["", "x", "7.", ".7", "7.x", "-1", "18446744073709551615", "7.4294967296"] {
            assert_eq!(Place::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Place::parse("7.3").unwrap().next(), Revision(7));
        assert_eq!(Place::parse("7").unwrap().next(), Revision(8));
    }
}
