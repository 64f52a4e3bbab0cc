//! The table of members: who belongs to the cluster, where it is found, and what its folder was when it last started.
//!
//! Promises. G1: an id is never used twice: a removed member stays in the table for ever as removed. G2: of the live members
//! no two have the same name, and no two the same peer address unless one replaces the other. G3: the last voter cannot be removed
//! or replaced, nor the last one that has come while others never did. G4: a folder that is not the one that a member first
//! came with, or that is older than the cluster has seen it, is refused by its registration. G5: a member whose
//! release does not know the behaviour version of the cluster is refused, and the version is not raised above what any
//! live voter, or any learner that has come, has said that it knows.
//! Not promised. That the members follow the table: the leader brings the configuration of the consensus in line with it, one change
//! at a time (`Machine::member_wanted` says what each should be). Until then a voter here may be no voter there.
//! Relies on. A member draws a storage id for each new folder and counts its starts there, durably, before it registers.
//!
//! Operations on members stand alone in their transaction, take no revision and give no change. They are remembered
//! like all others, and enter the running checksum.
//!
//! What is told about `seen` is the highest log index that a member was known to have in its log. It lives here so that a folder that was put
//! back can be told from one that is merely behind, by whoever leads then.

use crate::codec::{self, DecodeError, Reader, Write, name};
use crate::command::{MemberRole, Op};
use crate::reply::{MemberRecord, Rejection};
use crate::types::*;
use std::collections::BTreeMap;

/// Members that are not removed. A consensus group of more would be slow; learners count too.
pub const MEMBERS_MAX: u64 = 32;
/// Bytes of a name, an address or a URL, and a release.
const TEXT_BYTES_MAX: usize = 512;
/// URLs for clients of one member.
const CLIENTS_MAX: usize = 8;
/// A record in the table, beside its texts.
const MEMBER_BYTES: usize = 320;
/// The format versions of a stored record and of the section of a snapshot.
const RECORD_FORMAT: u8 = 1;
const SECTION_FORMAT: u8 = 1;

/// All records, those of removed members included.
pub(crate) struct Members {
    records: BTreeMap<MemberId, MemberRecord>,
    version: u64,
    bytes: u64,
}

fn bytes_of(record: &MemberRecord) -> u64 {
    let clients: usize = record.clients.iter().map(|c| c.len() + 16).sum();
    (MEMBER_BYTES + record.name.len() + record.peer.len() + record.release.len() + clients) as u64
}

impl Members {
    pub(crate) fn new() -> Self {
        Self { records: BTreeMap::new(), version: 0, bytes: 0 }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &MemberRecord> {
        self.records.values()
    }

    pub(crate) fn get(&self, id: MemberId) -> Option<&MemberRecord> {
        self.records.get(&id)
    }

    /// Counts changes of the table; those of `seen` alone do not count.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn memory(&self) -> u64 {
        self.bytes
    }

    /// Carries out an operation on members. `behaviour` is the version that the cluster follows.
    pub(crate) fn change(&mut self, op: &Op, behaviour: u16) -> Result<MemberRecord, Rejection> {
        let record = match op {
            Op::MemberAdd { id, name, peer, role, replaces, join } => self.added(MemberRecord {
                id: *id,
                name: name.clone(),
                peer: peer.clone(),
                clients: Vec::new(),
                role: *role,
                replaces: *replaces,
                storage: [0; 16],
                boots: 0,
                seen: Index(0),
                behaviour: 0,
                release: "".into(),
                join: *join,
            })?,
            Op::MemberPromote { id } => self.promoted(*id)?,
            Op::MemberRemove { id } => self.removed(*id)?,
            Op::MemberUpdate { id, peer } => self.updated(*id, peer)?,
            Op::MemberRegister { id, storage, boots, peer, clients, behaviour: able, release } => {
                let before = self.live(*id)?;
                let told = MemberRecord {
                    storage: *storage,
                    boots: *boots,
                    peer: if peer.is_empty() { before.peer.clone() } else { peer.clone() },
                    clients: clients.clone(),
                    behaviour: *able,
                    release: release.clone(),
                    ..before.clone()
                };
                self.check_told(before, &told, behaviour)?;
                told
            }
            Op::MemberSeen { id, index } => {
                let record = self.live(*id)?;
                MemberRecord { seen: record.seen.max(*index), ..record.clone() }
            }
            _ => return Err(invalid("not an operation on members")),
        };
        self.set(record.clone());
        Ok(record)
    }

    fn added(&self, new: MemberRecord) -> Result<MemberRecord, Rejection> {
        if new.id == MemberId(0) || new.role == MemberRole::Removed {
            return Err(invalid("a new member has an id, and is a learner or a voter"));
        }
        check_text("the name of a member", &new.name, 1)?;
        check_text("the peer address of a member", &new.peer, 1)?;
        if let Some(there) = self.get(new.id) {
            return Err(exists(there));
        }
        self.check_unlike(&new)?;
        if let Some(old) = new.replaces {
            self.check_replace(&new, old)?;
        }
        if self.all().filter(|m| m.is_live()).count() as u64 >= MEMBERS_MAX {
            return Err(Rejection::Quota { what: name::MEMBERS, limit: MEMBERS_MAX });
        }
        Ok(new)
    }

    fn check_replace(&self, new: &MemberRecord, old: MemberId) -> Result<(), Rejection> {
        let gone = self.live(old)?;
        if new.role != MemberRole::Voter {
            return Err(invalid("only a new voter replaces a member"));
        }
        if let Some(other) = self.all().find(|m| m.is_live() && m.replaces == Some(old)) {
            return Err(invalid(format!("member {} is being replaced by {}", label(gone), label(other))));
        }
        self.check_not_last(gone, "replaced")
    }

    fn promoted(&self, id: MemberId) -> Result<MemberRecord, Rejection> {
        let record = self.live(id)?;
        if record.role == MemberRole::Voter {
            return Err(invalid(format!("member {} is a voter: only a learner can be promoted", label(record))));
        }
        Ok(MemberRecord { role: MemberRole::Voter, ..record.clone() })
    }

    /// What is left is the tombstone: URLs are of no use any more.
    fn removed(&self, id: MemberId) -> Result<MemberRecord, Rejection> {
        let record = self.live(id)?;
        self.check_not_last(record, "removed")?;
        Ok(MemberRecord { role: MemberRole::Removed, clients: Vec::new(), ..record.clone() })
    }

    fn updated(&self, id: MemberId, peer: &str) -> Result<MemberRecord, Rejection> {
        let record = MemberRecord { peer: peer.into(), ..self.live(id)?.clone() };
        check_text("the peer address of a member", peer, 1)?;
        self.check_unlike(&record)?;
        Ok(record)
    }

    fn check_told(&self, before: &MemberRecord, told: &MemberRecord, behaviour: u16) -> Result<(), Rejection> {
        check_text("the peer address of a member", &told.peer, 1)?;
        check_text("the release of a member", &told.release, 0)?;
        told.clients.iter().try_for_each(|url| check_text("a URL of a member", url, 1))?;
        if told.clients.len() > CLIENTS_MAX {
            return Err(invalid(format!("a member has at most {CLIENTS_MAX} URLs for clients")));
        }
        if !told.has_come() {
            return Err(invalid("the data folder of a member has a storage id"));
        }
        if before.has_come() && before.storage != told.storage {
            return Err(Rejection::OtherStorage { id: told.id });
        }
        if told.boots < before.boots {
            return Err(Rejection::RolledBack { id: told.id, boots: told.boots, recorded: before.boots });
        }
        if told.behaviour < behaviour {
            return Err(invalid(format!(
                "the cluster follows behaviour version {behaviour}, the release of member {} knows up to {}: run a newer release",
                label(before),
                told.behaviour
            )));
        }
        self.check_unlike(told)
    }

    /// A voter that never came cannot keep a cluster alive, so it does not count where the one that goes has come.
    fn check_not_last(&self, record: &MemberRecord, how: &str) -> Result<(), Rejection> {
        let others = || self.all().filter(|m| m.role == MemberRole::Voter && m.id != record.id);
        if record.role != MemberRole::Voter || others().any(|m| m.has_come() || !record.has_come()) {
            return Ok(());
        }
        let why = if others().next().is_none() { "the only voter" } else { "the only voter that has come" };
        Err(invalid(format!("member {} is {why}, so it cannot be {how}: add another first", label(record))))
    }

    /// Why the behaviour version cannot be raised to `to` yet.
    pub(crate) fn check_behaviour(&self, to: u16) -> Result<(), Rejection> {
        let unable =
            self.all().find(|m| m.is_live() && m.behaviour < to && (m.has_come() || m.role == MemberRole::Voter));
        let Some(member) = unable else { return Ok(()) };
        Err(invalid(format!(
            "member {} knows behaviour versions up to {}, so the cluster cannot be raised to {to}",
            label(member),
            member.behaviour
        )))
    }

    /// Forgets everything: this state becomes the beginning of another group of members.
    pub(crate) fn clear(&mut self) {
        self.records.clear();
        self.bytes = 0;
        self.version += 1;
    }

    fn live(&self, id: MemberId) -> Result<&MemberRecord, Rejection> {
        match self.get(id) {
            None => {
                let name = format!("{:016x}", id.0).into_bytes().into();
                Err(Rejection::NotFound { what: name::MEMBER, name })
            }
            Some(record) if !record.is_live() => Err(Rejection::MemberRemoved { id }),
            Some(record) => Ok(record),
        }
    }

    /// No other live member has its name or its peer address. Where one replaces the other they may share the address: a
    /// dead machine is often replaced by one that answers there.
    fn check_unlike(&self, record: &MemberRecord) -> Result<(), Rejection> {
        let in_the_way = self.all().filter(|m| m.is_live() && m.id != record.id).find(|m| {
            let related = m.replaces == Some(record.id) || record.replaces == Some(m.id);
            m.name == record.name || (m.peer == record.peer && !related)
        });
        in_the_way.map_or(Ok(()), |there| Err(exists(there)))
    }

    fn set(&mut self, record: MemberRecord) {
        self.bytes += bytes_of(&record);
        let (id, seen) = (record.id, record.seen);
        let before = self.records.insert(id, record);
        self.bytes -= before.as_ref().map_or(0, bytes_of);
        let same = before.is_some_and(|before| self.records.get(&id) == Some(&MemberRecord { seen, ..before }));
        self.version += u64::from(!same);
    }

    /// What a snapshot holds: nothing for a table that was never changed, as in folders from before there was one.
    pub(crate) fn section(&self) -> Vec<u8> {
        if self.version == 0 {
            return Vec::new();
        }
        let mut b = vec![SECTION_FORMAT];
        b.varint(self.version);
        b.varint(self.records.len() as u64);
        self.all().for_each(|record| write(&mut b, record));
        b
    }

    pub(crate) fn load(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        const WHAT: &str = "the members";
        check_format(r, WHAT, SECTION_FORMAT)?;
        let mut members = Self::new();
        // One that was never changed is not written.
        let version = r.varint(WHAT)?;
        if version == 0 {
            return Err(DecodeError::Malformed { what: WHAT });
        }
        for record in r.list(WHAT, read)? {
            // In order, and each once.
            if members.records.last_key_value().is_some_and(|(last, _)| *last >= record.id) {
                return Err(DecodeError::Malformed { what: WHAT });
            }
            members.set(record);
        }
        members.version = version;
        Ok(members)
    }
}

/// For doors and for the leader.
impl crate::Machine {
    /// Every member that ever was, in the order of ids; removed ones stay.
    pub fn members(&self) -> impl Iterator<Item = &MemberRecord> {
        self.members.all()
    }

    pub fn member(&self, id: MemberId) -> Option<&MemberRecord> {
        self.members.get(id)
    }

    /// Counts changes of the table, in the state. What `Op::MemberSeen` raises does not count.
    pub fn members_version(&self) -> u64 {
        self.members.version()
    }

    /// What a member should be in the configuration, given who votes in it: its role, but gone once the one that replaces
    /// it votes. (The leader then takes it out of the table too, by `Op::MemberRemove`.)
    pub fn member_wanted(&self, id: MemberId, votes: impl Fn(MemberId) -> bool) -> MemberRole {
        let replaced = self.members().any(|m| m.replaces == Some(id) && m.role == MemberRole::Voter && votes(m.id));
        match self.member(id) {
            Some(record) if !replaced => record.role,
            _ => MemberRole::Removed,
        }
    }
}

/// How a member is named to people.
fn label(record: &MemberRecord) -> String {
    format!("`{}` ({:016x})", record.name, record.id.0)
}

fn exists(there: &MemberRecord) -> Rejection {
    let (name, peer) = (there.name.clone(), there.peer.clone());
    Rejection::MemberExists { id: there.id, name, peer, removed: !there.is_live() }
}

fn invalid(why: impl Into<Box<str>>) -> Rejection {
    Rejection::Invalid { why: why.into() }
}

fn check_text(what: &str, text: &str, min: usize) -> Result<(), Rejection> {
    if (min..=TEXT_BYTES_MAX).contains(&text.len()) {
        return Ok(());
    }
    Err(invalid(format!("{what} has {min} to {TEXT_BYTES_MAX} bytes")))
}

fn check_format(r: &mut Reader<'_>, what: &'static str, known: u8) -> Result<(), DecodeError> {
    let format = r.byte(what)?;
    if format == known { Ok(()) } else { Err(DecodeError::UnknownFormat { what, format }) }
}

/// Appends one record, as replies and snapshots store it.
pub(crate) fn write(b: &mut Vec<u8>, record: &MemberRecord) {
    b.push(RECORD_FORMAT);
    b.varint(record.id.0);
    b.bytes(record.name.as_bytes());
    b.bytes(record.peer.as_bytes());
    b.list(&record.clients, |b, url| b.bytes(url.as_bytes()));
    codec::write_role(b, record.role);
    b.option(record.replaces, |b, id| b.varint(id.0));
    b.extend_from_slice(&record.storage);
    b.varint(record.boots);
    b.varint(record.seen.0);
    b.varint(u64::from(record.behaviour));
    b.bytes(record.release.as_bytes());
    b.extend_from_slice(&record.join);
}

pub(crate) fn read(r: &mut Reader<'_>) -> Result<MemberRecord, DecodeError> {
    const WHAT: &str = "a member";
    check_format(r, WHAT, RECORD_FORMAT)?;
    Ok(MemberRecord {
        id: MemberId(r.varint(WHAT)?),
        name: r.text(WHAT)?,
        peer: r.text(WHAT)?,
        clients: r.list(WHAT, |r| r.text(WHAT))?,
        role: codec::read_role(r)?,
        replaces: r.option(WHAT, |r| Ok(MemberId(r.varint(WHAT)?)))?,
        storage: r.array(WHAT)?,
        boots: r.varint(WHAT)?,
        seen: Index(r.varint(WHAT)?),
        behaviour: u16::try_from(r.varint(WHAT)?).map_err(|_| DecodeError::Malformed { what: WHAT })?,
        release: r.text(WHAT)?,
        join: r.array(WHAT)?,
    })
}
