//! Whose folder this is: a small text file, written when the folder was made and never again.
//!
//! Promises. I1: a folder of another format, cluster or member is refused with a sentence that says which. I2: the storage id is
//! drawn once per folder, so a wiped folder is another one. I3: the file is written last when a folder is made, so a folder
//! that has it also has a log.
//! Not promised. That a copy of the folder is noticed.

use crate::disk::Disk;
use crate::fault::OpenError;
use tenure_machine::MemberId;

pub(crate) const FILE: &str = "identity";
pub(crate) const TEMPORARY: &str = "identity.tmp";
/// With which number of a start the folder was turned away last.
pub(crate) const TURNED_AWAY: &str = "turned-away";
const FIRST_LINE: &str = "tenure member folder, format ";
const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// What the flags of a static start call the cluster.
    pub(crate) cluster: String,
    pub(crate) member: u64,
    /// What people call the member. Nothing rests on it: the id is who it is.
    pub(crate) name: String,
    pub(crate) storage: [u8; 16],
}

/// The member that a folder is of, if it is one of this name: its id and the token of its cluster. A folder keeps what it was made with, so
/// a member that once joined by a token needs none to start again.
pub fn owner_of(disk: &mut dyn Disk, name: &str) -> Result<Option<(MemberId, String)>, OpenError> {
    let io = |doing| move |error| OpenError::Io { doing, file: FILE.to_owned(), error };
    if !disk.list().map_err(io("list the folder of"))?.iter().any(|name| name == FILE) {
        return Ok(None);
    }
    let bytes = disk.read(FILE, 0, 1 << 16).map_err(io("read"))?;
    let found = Written::read(&bytes)?;
    Ok((found.name == name.escape_default().to_string()).then_some((MemberId(found.member), found.cluster)))
}

/// The file as it is written: with texts escaped.
struct Written {
    cluster: String,
    member: u64,
    name: String,
    storage: [u8; 16],
}

impl Written {
    fn read(bytes: &[u8]) -> Result<Self, OpenError> {
        let other = |why: &str| OpenError::OtherFormat { file: FILE.to_owned(), why: why.to_owned() };
        let text = std::str::from_utf8(bytes).map_err(|_| other("it is not text"))?;
        let mut lines = text.lines();
        let format = lines
            .next()
            .and_then(|l| l.strip_prefix(FIRST_LINE))
            .ok_or_else(|| other("it does not begin as ours does"))?;
        if format != FORMAT.to_string() {
            return Err(other(&format!("format {format}, this release reads format {FORMAT}")));
        }
        let mut field =
            |name: &str| lines.next().and_then(|l| l.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        let damaged = || OpenError::Damaged {
            file: FILE.to_owned(),
            offset: 0,
            why: "its lines or its checksum are wrong".to_owned(),
        };
        let (cluster, member) = (field("cluster").ok_or_else(damaged)?, field("member").ok_or_else(damaged)?);
        let name = field("name").ok_or_else(damaged)?;
        let storage = field("storage").as_deref().and_then(unhex).ok_or_else(damaged)?;
        let crc = field("crc32c").and_then(|s| u32::from_str_radix(&s, 16).ok()).ok_or_else(damaged)?;
        // The checksum is the last line; the cluster's name may hold the same word.
        let body = text.rfind("\ncrc32c ").ok_or_else(damaged)? + 1;
        if crc32c::crc32c(&bytes[..body]) != crc {
            return Err(damaged());
        }
        let member = member.parse().map_err(|_| damaged())?;
        Ok(Self { cluster, member, name, storage })
    }
}

impl Identity {
    /// Six lines; the last is the CRC32C of those before it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let storage: String = self.storage.iter().map(|b| format!("{b:02x}")).collect();
        let mut text = format!(
            "{FIRST_LINE}{FORMAT}\ncluster {}\nmember {}\nname {}\nstorage {storage}\n",
            self.cluster.escape_default(),
            self.member,
            self.name.escape_default()
        );
        let crc = crc32c::crc32c(text.as_bytes());
        text.push_str(&format!("crc32c {crc:08x}\n"));
        text.into_bytes()
    }

    /// Compares the file with who this member is, and gives what it says.
    pub(crate) fn check(bytes: &[u8], cluster: &str, member: u64, name: &str) -> Result<Self, OpenError> {
        let found = Written::read(bytes)?;
        if found.cluster != cluster.escape_default().to_string() {
            return Err(OpenError::OtherCluster { found: found.cluster, wanted: cluster.to_owned() });
        }
        if found.member != member {
            return Err(OpenError::OtherMember {
                found: found.member,
                found_name: found.name,
                wanted: member,
                wanted_name: name.to_owned(),
            });
        }
        let storage = found.storage;
        Ok(Self { cluster: cluster.to_owned(), member, name: name.to_owned(), storage })
    }

    pub(crate) fn store(&self, disk: &mut dyn Disk) -> Result<(), OpenError> {
        put(disk, FILE, &self.encode()).map_err(|(doing, error)| OpenError::Io { doing, file: FILE.to_owned(), error })
    }

    /// Where the checksums of this folder's records start, so that bytes of another folder, or bytes a client chose, do not pass.
    pub(crate) fn seed(&self) -> u32 {
        crc32c::crc32c(&self.storage)
    }

    /// The cluster as eight bytes, for headers.
    pub(crate) fn cluster_mark(&self) -> u64 {
        // FNV-1a: only tells names apart, nothing rests on it.
        self.cluster.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// A small file, whole or not at all.
fn put(disk: &mut dyn Disk, name: &str, bytes: &[u8]) -> Result<(), (&'static str, std::io::Error)> {
    let step = |doing| move |error| (doing, error);
    disk.create(TEMPORARY, 0).map_err(step("create"))?;
    disk.write(TEMPORARY, 0, bytes).map_err(step("write"))?;
    disk.sync(TEMPORARY).map_err(step("sync"))?;
    disk.rename(TEMPORARY, name).map_err(step("rename"))?;
    disk.sync_folder().map_err(step("sync the folder of"))
}

/// Notes that the start of this number was turned away. The next ones keep to it until the folder is taken again: an older copy would
/// otherwise pass for a newer one by being started often enough.
pub(crate) fn turned_away(disk: &mut dyn Disk, boots: u64) -> Result<(), std::io::Error> {
    let mut bytes = boots.to_le_bytes().to_vec();
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    put(disk, TURNED_AWAY, &bytes).map_err(|(_, error)| error)
}

/// The number of the start that was turned away, if the last one that was judged was.
pub(crate) fn was_turned_away(disk: &mut dyn Disk, names: &[String]) -> Result<Option<u64>, OpenError> {
    if !names.iter().any(|name| name == TURNED_AWAY) {
        return Ok(None);
    }
    let io = |error| OpenError::Io { doing: "read", file: TURNED_AWAY.to_owned(), error };
    let bytes = disk.read(TURNED_AWAY, 0, 12).map_err(io)?;
    let damaged = || OpenError::Damaged {
        file: TURNED_AWAY.to_owned(),
        offset: 0,
        why: "its length or its checksum is wrong".to_owned(),
    };
    let (boots, crc) = bytes.split_at_checked(8).ok_or_else(damaged)?;
    if crc32c::crc32c(boots).to_le_bytes() != crc {
        return Err(damaged());
    }
    boots.try_into().map(u64::from_le_bytes).map(Some).map_err(|_| damaged())
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { cluster: "n0=a\nb".to_owned(), member: 7, name: "n 0".to_owned(), storage: [0xab; 16] }
    }

    #[test]
    fn golden_bytes() {
        let text = String::from_utf8(identity().encode()).unwrap();
        assert_eq!(
            text,
            "tenure member folder, format 1\ncluster n0=a\\nb\nmember 7\nname n 0\nstorage abababababababababababababababab\ncrc32c 51fcb159\n"
        );
        assert_eq!(Identity::check(text.as_bytes(), "n0=a\nb", 7, "n 0").unwrap(), identity());
    }

    #[test]
    fn another_folder_is_refused_by_name() {
        let bytes = identity().encode();
        let refused =
            |bytes: &[u8], cluster, member| Identity::check(bytes, cluster, member, "n1").unwrap_err().to_string();
        assert_eq!(
            refused(&bytes, "other", 7),
            "the data folder belongs to the cluster `n0=a\\nb`, this member was started for `other`"
        );
        assert_eq!(
            refused(&bytes, "n0=a\nb", 8),
            "the data folder belongs to member `n 0` (7), this one was started as `n1` (8)"
        );
        let newer = String::from_utf8(bytes.clone()).unwrap().replace("format 1", "format 2");
        assert_eq!(
            refused(newer.as_bytes(), "n0=a\nb", 7),
            "the data folder is of another format: identity: format 2, this release reads format 1"
        );
        for at in FIRST_LINE.len() + 2..bytes.len() - 1 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(Identity::check(&flipped, "n0=a\nb", 7, "n 0").is_err(), "flip at {at}");
        }
    }
}
