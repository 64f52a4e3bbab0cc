//! What members say to each other: the hello of a connection, and the messages on it.
//!
//! Promises. P1: any bytes are read without panic, and what is read is what was written or a refusal. P2: a hello says whose folder
//! stands behind a connection, so that nobody counts the word of a member whose folder was wiped, swapped or put back.
//! Not promised. That a message arrives, or arrives once or in order: each is one that may be lost, and those that must not be done
//! twice carry the life of the member they are meant for and a number that only rises.
//!
//! A message is one byte that says what it is, and then its fields: numbers as LEB128, byte strings behind their length.

use std::fmt;
use tenure_machine::{MemberId, SessionId, SessionToken};

/// Which connection a message takes. Pieces of snapshots have one of their own, so that they never delay a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    Messages,
    Bulk,
}

/// The first word of each side of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    pub cluster_token: String,
    /// Zero: it has no state yet.
    pub cluster: u64,
    pub member: MemberId,
    pub name: String,
    /// Drawn anew at each start.
    pub boot: u64,
    /// Drawn once for each folder.
    pub storage: [u8; 16],
    /// Rises with each start of the folder.
    pub boots: u64,
    /// The last entry of its log.
    pub last_term: u64,
    pub last_index: u64,
    pub behaviour: u16,
    pub release: String,
    /// Unix time, for a warning only.
    pub wall_ms: u64,
    /// What a new member was given to show; zeros: nothing.
    pub join: [u8; 16],
    /// Where it is dialled, for one that does not know it yet.
    pub address: String,
}

const HELLO_VERSION: u64 = 1;
/// Names and texts in a hello are short.
const TEXT_MAX: usize = 1 << 10;

impl Hello {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, HELLO_VERSION);
        put_bytes(&mut out, self.cluster_token.as_bytes());
        put(&mut out, self.cluster);
        put(&mut out, self.member.0);
        put_bytes(&mut out, self.name.as_bytes());
        put(&mut out, self.boot);
        out.extend_from_slice(&self.storage);
        for n in [self.boots, self.last_term, self.last_index, u64::from(self.behaviour)] {
            put(&mut out, n);
        }
        put_bytes(&mut out, self.release.as_bytes());
        put(&mut out, self.wall_ms);
        out.extend_from_slice(&self.join);
        put_bytes(&mut out, self.address.as_bytes());
        out
    }

    /// Bytes behind what this release knows are a later one's, and are passed over.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let from = &mut &*bytes;
        if take(from)? < HELLO_VERSION {
            return None;
        }
        Some(Self {
            cluster_token: take_text(from)?,
            cluster: take(from)?,
            member: MemberId(take(from)?),
            name: take_text(from)?,
            boot: take(from)?,
            storage: take_array(from)?,
            boots: take(from)?,
            last_term: take(from)?,
            last_index: take(from)?,
            behaviour: u16::try_from(take(from)?).ok()?,
            release: take_text(from)?,
            wall_ms: take(from)?,
            join: take_array(from)?,
            address: take_text(from)?,
        })
    }
}

/// Why a member does not talk to another: the reason, and what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRefusal {
    /// The one that is refused must stop: with this folder it can be no member.
    pub fatal: bool,
    pub why: String,
}

impl PeerRefusal {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![u8::from(self.fatal)];
        put_bytes(&mut out, self.why.as_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let from = &mut &*bytes;
        let fatal = take_byte(from)? != 0;
        Some(Self { fatal, why: take_text(from)? })
    }
}

impl fmt::Display for PeerRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// What a member tells the others about itself now and then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerFacts {
    pub applied: u64,
    pub last_index: u64,
    pub disk_free: u64,
    pub disk_full: bool,
    pub log_bytes: u64,
    pub memory: u64,
    pub alarms: Vec<String>,
}

/// Why a forwarded request was not taken. Nothing of it was or will be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum NotTaken {
    /// Not the leader, or just handing over: to be sent again to whoever leads then.
    Elsewhere = 1,
    Overloaded = 2,
    Memory = 3,
    DiskFull = 4,
    Stopping = 5,
}

impl NotTaken {
    fn of(number: u8) -> Option<Self> {
        [Self::Elsewhere, Self::Overloaded, Self::Memory, Self::DiskFull, Self::Stopping]
            .into_iter()
            .find(|n| *n as u8 == number)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PeerMessage<'a> {
    /// Of the consensus library.
    Raft(&'a [u8]),
    /// Transactions of the sender's callers, as an encoded batch whose origin says where they wait. `to_boot` is the life of the
    /// leader that it is for.
    Forward {
        to_boot: u64,
        batch: &'a [u8],
    },
    NotTaken {
        to_boot: u64,
        number: u64,
        why: NotTaken,
    },
    /// Asks for an index up to which the sender's reads must wait.
    Read {
        to_boot: u64,
        number: u64,
    },
    /// The answer; `None`: not here.
    ReadAt {
        to_boot: u64,
        number: u64,
        index: Option<u64>,
    },
    /// Renewals: the number of the ticket, the session and the incarnation that is meant (0: any).
    Touch {
        to_boot: u64,
        touches: Vec<(u64, SessionId, SessionToken)>,
    },
    Touched {
        to_boot: u64,
        touched: Vec<(u64, Touched)>,
    },
    /// Asks for a piece of a snapshot.
    Pull {
        index: u64,
        offset: u64,
        len: u64,
    },
    Piece {
        index: u64,
        offset: u64,
        bytes: &'a [u8],
    },
    /// The snapshot is not here any more, or cannot be read.
    NoPiece {
        index: u64,
    },
    /// The sender cannot take the snapshot now.
    CannotPull {
        index: u64,
    },
    Facts(PeerFacts),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touched {
    Renewed {
        token: SessionToken,
        ttl_ms: u64,
    },
    Gone,
    /// Nobody here can tell.
    Refused,
}

mod kind {
    pub(super) const RAFT: u8 = 1;
    pub(super) const FORWARD: u8 = 2;
    pub(super) const NOT_TAKEN: u8 = 3;
    pub(super) const READ: u8 = 4;
    pub(super) const READ_AT: u8 = 5;
    pub(super) const TOUCH: u8 = 6;
    pub(super) const TOUCHED: u8 = 7;
    pub(super) const PULL: u8 = 8;
    pub(super) const PIECE: u8 = 9;
    pub(super) const NO_PIECE: u8 = 10;
    pub(super) const CANNOT_PULL: u8 = 11;
    pub(super) const FACTS: u8 = 12;
}

impl<'a> PeerMessage<'a> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Raft(bytes) => {
                out.reserve_exact(1 + bytes.len());
                out.push(kind::RAFT);
                out.extend_from_slice(bytes);
            }
            Self::Forward { to_boot, batch } => {
                out.push(kind::FORWARD);
                put(&mut out, *to_boot);
                out.extend_from_slice(batch);
            }
            Self::NotTaken { to_boot, number, why } => {
                numbers(&mut out, kind::NOT_TAKEN, &[*to_boot, *number]);
                out.push(*why as u8);
            }
            Self::Read { to_boot, number } => numbers(&mut out, kind::READ, &[*to_boot, *number]),
            Self::ReadAt { to_boot, number, index } => {
                numbers(&mut out, kind::READ_AT, &[*to_boot, *number, index.map_or(0, |i| i + 1)]);
            }
            Self::Touch { to_boot, touches } => {
                numbers(&mut out, kind::TOUCH, &[*to_boot, touches.len() as u64]);
                for (number, session, token) in touches {
                    [*number, session.0, *token].iter().for_each(|n| put(&mut out, *n));
                }
            }
            Self::Touched { to_boot, touched } => {
                numbers(&mut out, kind::TOUCHED, &[*to_boot, touched.len() as u64]);
                for (number, what) in touched {
                    put(&mut out, *number);
                    match what {
                        Touched::Renewed { token, ttl_ms } => numbers(&mut out, 1, &[*token, *ttl_ms]),
                        Touched::Gone => out.push(2),
                        Touched::Refused => out.push(3),
                    }
                }
            }
            Self::Pull { index, offset, len } => numbers(&mut out, kind::PULL, &[*index, *offset, *len]),
            Self::Piece { index, offset, bytes } => {
                out.reserve_exact(24 + bytes.len());
                numbers(&mut out, kind::PIECE, &[*index, *offset]);
                out.extend_from_slice(bytes);
            }
            Self::NoPiece { index } => numbers(&mut out, kind::NO_PIECE, &[*index]),
            Self::CannotPull { index } => numbers(&mut out, kind::CANNOT_PULL, &[*index]),
            Self::Facts(facts) => {
                let full = u64::from(facts.disk_full);
                let all = [facts.applied, facts.last_index, facts.disk_free, full, facts.log_bytes, facts.memory];
                numbers(&mut out, kind::FACTS, &all);
                put(&mut out, facts.alarms.len() as u64);
                facts.alarms.iter().for_each(|alarm| put_bytes(&mut out, alarm.as_bytes()));
            }
        }
        out
    }

    pub(crate) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let from = &mut &*bytes;
        let message = match take_byte(from)? {
            kind::RAFT => Self::Raft(std::mem::take(from)),
            kind::FORWARD => Self::Forward { to_boot: take(from)?, batch: std::mem::take(from) },
            kind::NOT_TAKEN => {
                Self::NotTaken { to_boot: take(from)?, number: take(from)?, why: NotTaken::of(take_byte(from)?)? }
            }
            kind::READ => Self::Read { to_boot: take(from)?, number: take(from)? },
            kind::READ_AT => {
                Self::ReadAt { to_boot: take(from)?, number: take(from)?, index: take(from)?.checked_sub(1) }
            }
            kind::TOUCH => Self::Touch {
                to_boot: take(from)?,
                touches: take_list(from, |from| Some((take(from)?, SessionId(take(from)?), take(from)?)))?,
            },
            kind::TOUCHED => Self::Touched {
                to_boot: take(from)?,
                touched: take_list(from, |from| Some((take(from)?, take_touched(from)?)))?,
            },
            kind::PULL => Self::Pull { index: take(from)?, offset: take(from)?, len: take(from)? },
            kind::PIECE => Self::Piece { index: take(from)?, offset: take(from)?, bytes: std::mem::take(from) },
            kind::NO_PIECE => Self::NoPiece { index: take(from)? },
            kind::CANNOT_PULL => Self::CannotPull { index: take(from)? },
            kind::FACTS => Self::Facts(PeerFacts {
                applied: take(from)?,
                last_index: take(from)?,
                disk_free: take(from)?,
                disk_full: take(from)? != 0,
                log_bytes: take(from)?,
                memory: take(from)?,
                alarms: take_list(from, take_text)?,
            }),
            _ => return None,
        };
        from.is_empty().then_some(message)
    }
}

fn take_touched(from: &mut &[u8]) -> Option<Touched> {
    match take_byte(from)? {
        1 => Some(Touched::Renewed { token: take(from)?, ttl_ms: take(from)? }),
        2 => Some(Touched::Gone),
        3 => Some(Touched::Refused),
        _ => None,
    }
}

fn numbers(out: &mut Vec<u8>, kind: u8, numbers: &[u64]) {
    out.push(kind);
    numbers.iter().for_each(|n| put(out, *n));
}

fn put(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take_byte(from: &mut &[u8]) -> Option<u8> {
    let (&byte, rest) = from.split_first()?;
    *from = rest;
    Some(byte)
}

fn take(from: &mut &[u8]) -> Option<u64> {
    let mut n = 0;
    for shift in (0..64).step_by(7) {
        let byte = take_byte(from)?;
        // The tenth byte has room for one bit.
        if shift == 63 && byte > 1 {
            return None;
        }
        n |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
}

fn take_array<const N: usize>(from: &mut &[u8]) -> Option<[u8; N]> {
    let (array, rest) = from.split_first_chunk::<N>()?;
    *from = rest;
    Some(*array)
}

fn take_text(from: &mut &[u8]) -> Option<String> {
    let len = usize::try_from(take(from)?).ok().filter(|len| *len <= TEXT_MAX)?;
    let (text, rest) = from.split_at_checked(len)?;
    *from = rest;
    String::from_utf8(text.to_vec()).ok()
}

fn take_list<T>(from: &mut &[u8], item: impl Fn(&mut &[u8]) -> Option<T>) -> Option<Vec<T>> {
    let len = take(from)?;
    let mut list = Vec::new();
    // Not reserved ahead: the length may lie.
    for _ in 0..len {
        list.push(item(from)?);
    }
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            cluster_token: "t".to_owned(),
            cluster: 300,
            member: MemberId(7),
            name: "n0".to_owned(),
            boot: 9,
            storage: [0xab; 16],
            boots: 2,
            last_term: 3,
            last_index: 400,
            behaviour: 2,
            release: "0.1.0".to_owned(),
            wall_ms: 1,
            join: [0xcd; 16],
            address: "h:1".to_owned(),
        }
    }

    fn messages() -> Vec<PeerMessage<'static>> {
        vec![
            PeerMessage::Raft(b"raft"),
            PeerMessage::Forward { to_boot: 1, batch: b"batch" },
            PeerMessage::NotTaken { to_boot: 1, number: 2, why: NotTaken::Memory },
            PeerMessage::Read { to_boot: 300, number: u64::MAX },
            PeerMessage::ReadAt { to_boot: 1, number: 2, index: Some(0) },
            PeerMessage::ReadAt { to_boot: 1, number: 2, index: None },
            PeerMessage::Touch { to_boot: 1, touches: vec![(1, SessionId(2), 3), (4, SessionId(5), 0)] },
            PeerMessage::Touched {
                to_boot: 1,
                touched: vec![
                    (1, Touched::Renewed { token: 5, ttl_ms: 15_000 }),
                    (2, Touched::Gone),
                    (3, Touched::Refused),
                ],
            },
            PeerMessage::Pull { index: 1, offset: 2, len: 3 },
            PeerMessage::Piece { index: 1, offset: 200, bytes: b"piece" },
            PeerMessage::NoPiece { index: 1 },
            PeerMessage::CannotPull { index: 1 },
            PeerMessage::Facts(PeerFacts {
                applied: 1,
                last_index: 2,
                disk_free: 3,
                disk_full: true,
                log_bytes: 4,
                memory: 5,
                alarms: vec!["hot".to_owned()],
            }),
        ]
    }

    #[test]
    fn messages_are_read_as_they_were_written_and_no_other_bytes_are() {
        for message in messages() {
            let bytes = message.encode();
            assert_eq!(PeerMessage::decode(&bytes), Some(message.clone()));
            // A piece, a batch and a message of the library end where the frame ends.
            let open =
                matches!(message, PeerMessage::Raft(_) | PeerMessage::Forward { .. } | PeerMessage::Piece { .. });
            assert_eq!(PeerMessage::decode(&[&bytes[..], &[0]].concat()).is_none(), !open, "{message:?}");
            for cut in 0..bytes.len() {
                let _ = PeerMessage::decode(&bytes[..cut]);
            }
        }
        assert_eq!(PeerMessage::decode(&[99]), None);
        assert_eq!(PeerMessage::decode(&[]), None);
        let list_that_lies = [kind::TOUCH, 1, 0xff, 0xff, 0xff, 0xff, 0x0f];
        assert_eq!(PeerMessage::decode(&list_that_lies), None);
    }

    #[test]
    fn golden_bytes() {
        let hex = |bytes: Vec<u8>| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(
            hex(hello().encode()),
            "010174ac0207026e3009abababababababababababababababab02039003020\
             5302e312e3001cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd03683a31"
        );
        let all: Vec<String> = messages().iter().map(|m| hex(m.encode())).collect();
        assert_eq!(
            all,
            [
                "0172616674",
                "02016261746368",
                "03010203",
                "04ac02ffffffffffffffffff01",
                "05010201",
                "05010200",
                "060102010203040500",
                "07010301010598750202 0303".replace(' ', "").as_str(),
                "08010203",
                "0901c8017069656365",
                "0a01",
                "0b01",
                "0c0102030104050103686f74",
            ]
        );
    }

    #[test]
    fn a_hello_is_read_back_and_a_later_one_too() {
        assert_eq!(Hello::decode(&hello().encode()), Some(hello()));
        let mut later = hello().encode();
        later[0] = 2;
        later.push(1);
        assert_eq!(Hello::decode(&later), Some(hello()));
        for cut in 0..hello().encode().len() {
            assert_eq!(Hello::decode(&hello().encode()[..cut]), None);
        }
        let refusal = PeerRefusal { fatal: true, why: "no".to_owned() };
        assert_eq!(PeerRefusal::decode(&refusal.encode()), Some(refusal));
    }
}
