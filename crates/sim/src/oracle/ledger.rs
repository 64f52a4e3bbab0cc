//! Every commit that anybody saw, and whether it is still there, whole, under its number, and the work of one call.
//!
//! Promises. A commit that left the member (as a change or by an acknowledgement) is compared with what a recovered member
//! holds, byte for byte. A commit that appears at a recovery must be all of one call whose outcome was open, or the end of a
//! session. Numbers within records are recomputed from a naive map.
//! Not promised. Anything about what was compacted.
//! Relies on. Every value names the call that wrote it (`value`), and every call says beforehand what it will do (`Intent`).

use std::collections::{BTreeMap, BTreeSet};
use tenure_machine::{Change, Key, Record, SessionId, Span};

/// What a call will do if it is done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Intent {
    pub puts: Vec<Key>,
    pub deletes: Vec<Span>,
    /// It may do nothing and still be done: its compares may fail, its keys may be missing.
    pub optional: bool,
    /// A refusal was acknowledged: it must never be found done.
    pub refused: bool,
    /// The revision of its commit, once known.
    pub revision: Option<u64>,
}

impl Intent {
    fn changes_keys(&self) -> bool {
        !self.puts.is_empty() || !self.deletes.is_empty()
    }
}

/// The value that a call writes: its number first.
pub fn value(call: u64, padding: usize) -> Box<[u8]> {
    let mut bytes = call.to_be_bytes().to_vec();
    bytes.extend(std::iter::repeat_n(b'.', padding));
    bytes.into()
}

/// The call that wrote a record.
pub fn writer(record: &Record) -> Option<u64> {
    let bytes = record.value().get(..8)?;
    bytes.try_into().ok().map(u64::from_be_bytes)
}

#[derive(Default)]
pub struct Ledger {
    commits: BTreeMap<u64, Vec<Record>>,
    state: BTreeMap<Key, Record>,
    intents: BTreeMap<u64, Intent>,
    newest: u64,
    promises: BTreeMap<u64, u64>,
    /// The highest revision that an acknowledgement told.
    acknowledged: u64,
    pub recovered_unknown: u64,
}

impl Ledger {
    pub fn newest(&self) -> u64 {
        self.newest
    }

    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    pub fn state(&self) -> &BTreeMap<Key, Record> {
        &self.state
    }

    pub fn intend(&mut self, call: u64, intent: Intent) {
        self.intents.insert(call, intent);
    }

    pub fn intent(&self, call: u64) -> Option<&Intent> {
        self.intents.get(&call)
    }

    /// Changes of the key space as they left a running member, in order.
    pub fn note(&mut self, changes: &[Change]) -> Result<(), String> {
        self.add_all(changes.iter().map(|c| (c.record.clone(), c.before.clone())).collect())
    }

    /// Changes as any one member of a cluster gave them: what is new is noted, what is old must be what another gave.
    pub fn observe(&mut self, changes: &[Change]) -> Result<(), String> {
        let (old, new): (Vec<_>, Vec<_>) =
            changes.iter().cloned().partition(|c| c.record.mod_revision().0 <= self.newest);
        let mut told: BTreeMap<u64, Vec<Record>> = BTreeMap::new();
        for change in old {
            told.entry(change.record.mod_revision().0).or_default().push(change.record);
        }
        for (revision, records) in told {
            let known = self.commits.get(&revision);
            if known != Some(&records) {
                return Err(format!("commit {revision} is {records:?} here and was {known:?} elsewhere"));
            }
        }
        self.note(&new)
    }

    /// Whether this was the newest version of its key at `revision`.
    pub fn stood(&self, record: &Record, revision: u64) -> bool {
        let made = record.mod_revision().0;
        let is = |r: &&Record| r.key() == record.key();
        made <= revision
            && self.commits.get(&made).is_some_and(|c| c.contains(record))
            && !self.commits.range(made + 1..revision + 1).any(|(_, c)| c.iter().any(|r| is(&r)))
    }

    /// What a member that has just recovered holds above `compacted`, and its revision.
    pub fn recovered(&mut self, records: Vec<Record>, compacted: u64, revision: u64) -> Result<(), String> {
        if revision < self.newest.max(self.acknowledged) {
            return Err(format!(
                "revision {revision} after a recovery, {} had been seen",
                self.newest.max(self.acknowledged)
            ));
        }
        let (old, new): (Vec<_>, Vec<_>) = records.into_iter().partition(|r| r.mod_revision().0 <= self.newest);
        let mut found: BTreeMap<u64, Vec<Record>> = BTreeMap::new();
        for record in old {
            found.entry(record.mod_revision().0).or_default().push(record);
        }
        for (revision, records) in self.commits.range(compacted + 1..) {
            if found.remove(revision).as_ref() != Some(records) {
                return Err(format!("commit {revision} was {records:?} and is not there any more as it was"));
            }
        }
        found.retain(|&revision, _| revision > compacted);
        if let Some((revision, records)) = found.first_key_value() {
            return Err(format!("commit {revision} appeared in the past: {records:?}"));
        }
        self.recovered_unknown += new.len() as u64;
        self.add_all(new.into_iter().map(|r| (r, None)).collect())
    }

    /// Records with what was told to be there before, cut into commits.
    fn add_all(&mut self, changes: Vec<(Record, Option<Record>)>) -> Result<(), String> {
        let mut commit: Vec<Record> = Vec::new();
        for (record, told) in changes {
            if commit.first().is_some_and(|first| first.mod_revision() != record.mod_revision()) {
                self.add(std::mem::take(&mut commit))?;
            }
            // No commit of the clients touches a key twice, so the state before the commit is what was there.
            let before = self.state.get(&Key::from_bytes(record.key()));
            if told.is_some() && before != told.as_ref() {
                return Err(format!("change {record:?} says that {told:?} was there before, it was {before:?}"));
            }
            commit.push(record);
        }
        if commit.is_empty() { Ok(()) } else { self.add(commit) }
    }

    fn add(&mut self, commit: Vec<Record>) -> Result<(), String> {
        let revision = commit[0].mod_revision().0;
        if revision <= self.newest {
            return Err(format!("commit {revision} came after commit {}", self.newest));
        }
        let mut keys = BTreeSet::new();
        for record in &commit {
            self.check_numbers(record)?;
            if !keys.insert(record.key().to_vec()) {
                return Err(format!("commit {revision} changes {record:?} twice"));
            }
        }
        self.check_author(revision, &commit)?;
        for record in &commit {
            let key = Key::from_bytes(record.key());
            match record.is_tombstone() {
                true => self.state.remove(&key),
                false => self.state.insert(key, record.clone()),
            };
        }
        self.newest = revision;
        self.commits.insert(revision, commit);
        Ok(())
    }

    /// What somebody was told must be what happens.
    fn check_promise(&self, call: u64, revision: u64) -> Result<(), String> {
        match self.promises.get(&call) {
            Some(&told) if told != revision => Err(format!("call {call} was told {told} and is done at {revision}")),
            _ => Ok(()),
        }
    }

    fn check_numbers(&self, record: &Record) -> Result<(), String> {
        let (meta, before) = (record.meta(), self.state.get(&Key::from_bytes(record.key())).map(Record::meta));
        let (created, version) = before.map_or((meta.mod_revision, 1), |b| (b.create_revision, b.version + 1));
        let right = match record.is_tombstone() {
            true => before.is_some() && meta.version == 0,
            false => meta.create_revision == created && meta.version == version,
        };
        if right { Ok(()) } else { Err(format!("{record:?} has {meta:?} after {before:?}")) }
    }

    /// A commit is the whole work of one call, or takes what one session owned.
    fn check_author(&mut self, revision: u64, commit: &[Record]) -> Result<(), String> {
        let Some(call) = commit.iter().find(|r| !r.is_tombstone()).and_then(writer) else {
            return self.check_deletion(revision, commit);
        };
        let Some(intent) = self.intents.get(&call) else {
            // A session that ends by `release` rewrites its keys without their owner.
            return self.check_release(revision, commit);
        };
        if intent.revision.is_some() && self.is_release(commit) {
            return Ok(());
        }
        if let Some(first) = intent.revision {
            return Err(format!("call {call} was done at {first} and again at {revision}"));
        }
        if intent.refused {
            return Err(format!("call {call} was refused and is done at {revision}"));
        }
        self.check_promise(call, revision)?;
        let wanted: BTreeSet<&[u8]> = intent.puts.iter().map(Key::as_bytes).collect();
        let put: BTreeSet<&[u8]> = commit.iter().filter(|r| !r.is_tombstone()).map(Record::key).collect();
        if put != wanted || commit.iter().any(|r| !r.is_tombstone() && writer(r) != Some(call)) {
            return Err(format!("commit {revision} is not the whole of call {call}: {commit:?}"));
        }
        if tombstones(commit) != self.live_in(&intent.deletes) {
            return Err(format!("commit {revision} of call {call} deletes other keys than its spans held: {commit:?}"));
        }
        self.intents.entry(call).and_modify(|i| i.revision = Some(revision));
        Ok(())
    }

    fn check_deletion(&mut self, revision: u64, commit: &[Record]) -> Result<(), String> {
        let gone = tombstones(commit);
        let owners: BTreeSet<SessionId> =
            commit.iter().filter_map(|r| self.state.get(&Key::from_bytes(r.key()))).map(|r| r.meta().owner).collect();
        let of_one_session = owners.len() == 1 && !owners.contains(&SessionId(0));
        if of_one_session {
            let owner = owners.first().copied().unwrap_or_default();
            let all: BTreeSet<Vec<u8>> = self
                .state
                .iter()
                .filter(|(_, r)| r.meta().owner == owner)
                .map(|(k, _)| k.as_bytes().to_vec())
                .collect();
            if all == gone {
                return Ok(());
            }
        }
        let fits =
            |i: &Intent| !i.refused && i.revision.is_none() && i.puts.is_empty() && self.live_in(&i.deletes) == gone;
        if self.intents.values().any(|i| i.changes_keys() && fits(i)) {
            return Ok(());
        }
        Err(format!("commit {revision} deletes what no open call asked for as a whole: {commit:?}"))
    }

    fn is_release(&self, commit: &[Record]) -> bool {
        commit.iter().all(|r| {
            let before = self.state.get(&Key::from_bytes(r.key()));
            !r.is_tombstone()
                && before.is_some_and(|b| {
                    b.value() == r.value() && b.meta().owner != r.meta().owner && r.meta().owner.0 == 0
                })
        })
    }

    fn check_release(&self, revision: u64, commit: &[Record]) -> Result<(), String> {
        if self.is_release(commit) { Ok(()) } else { Err(format!("commit {revision} is nobody's: {commit:?}")) }
    }

    fn live_in(&self, spans: &[Span]) -> BTreeSet<Vec<u8>> {
        let keys = self.state.keys().map(Key::as_bytes);
        keys.filter(|k| spans.iter().any(|s| s.contains(k))).map(<[u8]>::to_vec).collect()
    }

    /// A call was acknowledged as done at `revision`; `fresh` if it is not the remembered answer of an earlier try.
    pub fn acknowledge(&mut self, call: u64, revision: u64, did: bool) -> Result<(), String> {
        self.acknowledged = self.acknowledged.max(revision);
        let Some(intent) = self.intents.get_mut(&call) else { return Ok(()) };
        if !did || !intent.changes_keys() {
            return match intent.revision {
                Some(at) if !did => Err(format!("call {call} says that it did nothing and is done at {at}")),
                _ => {
                    intent.refused |= !did;
                    Ok(())
                }
            };
        }
        match (self.commits.get(&revision), intent.revision) {
            (Some(_), Some(at)) if at == revision => Ok(()),
            (Some(_), None) if intent.puts.is_empty() => {
                intent.revision = Some(revision);
                Ok(())
            }
            (_, at) => Err(format!("call {call} was acknowledged at {revision} and is done at {at:?}")),
        }
    }

    /// Somebody was told that the call is done at `revision`, on nobody's word.
    pub fn promise(&mut self, call: u64, revision: u64) {
        self.promises.insert(call, revision);
        self.acknowledged = self.acknowledged.max(revision);
    }

    /// The outcome of an open call is settled by a recovery: what is not there now must never appear. Gives whether it is there,
    /// and nothing where that cannot be told from keys.
    pub fn seal(&mut self, call: u64) -> Option<bool> {
        let intent = self.intents.get_mut(&call)?;
        if intent.puts.is_empty() {
            return None;
        }
        intent.refused |= intent.revision.is_none();
        Some(intent.revision.is_some())
    }

    /// A call was refused for good.
    pub fn refuse(&mut self, call: u64) -> Result<(), String> {
        self.acknowledge(call, 0, false)
    }

    pub fn forget_below(&mut self, compacted: u64) {
        self.commits = self.commits.split_off(&(compacted + 1));
    }
}

fn tombstones(commit: &[Record]) -> BTreeSet<Vec<u8>> {
    commit.iter().filter(|r| r.is_tombstone()).map(|r| r.key().to_vec()).collect()
}
