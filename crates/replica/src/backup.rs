//! A snapshot file outside of any folder: what it holds, and a folder of a new lone member made of it.
//!
//! Promises. K1: what `Backup::read` gives was read whole: every block has its checksum, and the blocks make a state. K2: the member of a
//! restored folder serves the state of the backup at `Restore::revision`, in a cluster of which it is the only member; what
//! follows of that is with `Machine::restore`. K3: the identity is written last, so a restore that was interrupted leaves a folder that
//! no member starts with. K4: nothing is written into a folder that holds any file.
//! Not promised. That somebody else does not restore the same backup: the two share their issuer unless one is a clone, and only the moments
//! at which they were made keep their tokens apart, for as long as one of them alone serves.

use crate::disk::Disk;
use crate::fault::OpenError;
use crate::identity::Identity;
use crate::log::{Log, Sizes};
use crate::snapshot::{self, LoadError, Meta};
use raft::eraftpb::ConfState;
use sha2::Digest as _;
use std::{fmt, io};
use tenure_machine::{Machine, MemberId, Position, Rejection, Revision};

/// As a new member has them: see `Config`.
const SIZES: Sizes = Sizes { first_segment: 1 << 20, segment: 16 << 20 };
/// 2020-01-01, from which the revisions of restored states are counted.
const EPOCH_UNIX_MS: u64 = 1_577_836_800_000;
const DIGEST_BYTES: usize = 1 << 20;

/// A backup that was read whole.
pub struct Backup {
    pub bytes: u64,
    /// SHA-256 of the file, as other programs compute it.
    pub digest: [u8; 32],
    pub position: Position,
    /// The configuration at that position.
    pub voters: Vec<MemberId>,
    pub learners: Vec<MemberId>,
    pub machine: Machine,
}

/// What the new member is to be.
pub struct Restore {
    pub member: MemberId,
    pub name: String,
    pub cluster_token: String,
    pub revision: Revision,
    /// The ids of the cluster and the issuer of a clone; `None` replaces the cluster of the backup.
    pub identity: Option<(u64, [u8; 16])>,
    /// Drawn by the caller.
    pub storage: [u8; 16],
}

#[derive(Debug)]
pub enum BackupError {
    Unreadable {
        file: String,
        error: io::Error,
    },
    OtherFormat {
        file: String,
        format: u16,
    },
    Damaged {
        file: String,
        offset: u64,
        why: String,
    },
    /// Nothing was written.
    Refused {
        why: String,
    },
    /// The folder holds something already; nothing was written.
    NotEmpty {
        file: String,
    },
    /// A part was written; no member starts with it.
    Folder(OpenError),
}

impl fmt::Display for BackupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { file, error } => write!(f, "{file} cannot be read: {error}"),
            Self::OtherFormat { file, format } => {
                write!(f, "{file} is of format {format}, which this release does not know: use a newer one")
            }
            Self::Damaged { file, offset, why } => {
                write!(f, "{file} is no whole snapshot: damaged at byte {offset}: {why}")
            }
            Self::Refused { why } => f.write_str(why),
            Self::NotEmpty { file } => {
                write!(f, "the folder is not empty ({file} is there): name an empty or a new one")
            }
            Self::Folder(error) => write!(f, "the restored folder is not complete, empty it: {error}"),
        }
    }
}

impl std::error::Error for BackupError {}

/// 2^20 for each second since 2020: more than counting reaches, and more for each later restore. Zero before.
pub fn revision_at(unix_ms: u64) -> Revision {
    let since = u128::from(unix_ms.saturating_sub(EPOCH_UNIX_MS));
    Revision(u64::try_from((since << 20) / 1000).unwrap_or(u64::MAX))
}

impl Backup {
    pub fn read(disk: &mut dyn Disk, file: &str) -> Result<Self, BackupError> {
        let unreadable = |error| BackupError::Unreadable { file: file.to_owned(), error };
        let bytes = disk.len(file).map_err(unreadable)?;
        let (meta, machine) = snapshot::load(disk, file).map_err(|error| match error {
            LoadError::Io(error) => unreadable(error),
            LoadError::Format(format) => BackupError::OtherFormat { file: file.to_owned(), format },
            LoadError::Damaged { offset, why } => BackupError::Damaged { file: file.to_owned(), offset, why },
        })?;
        let digest = digest(disk, file, bytes).map_err(unreadable)?;
        let ids = |ids: &[u64]| ids.iter().copied().map(MemberId).collect();
        let (voters, learners) = (ids(&meta.conf.1.voters), ids(&meta.conf.1.learners));
        Ok(Self { bytes, digest, position: machine.position(), voters, learners, machine })
    }

    /// Makes the folder of a lone member. Gives where its log begins.
    pub fn restore(mut self, folder: &mut dyn Disk, restore: &Restore) -> Result<Position, BackupError> {
        let names = folder.list().map_err(|error| BackupError::Unreadable { file: ".".to_owned(), error })?;
        if let Some(file) = names.into_iter().next() {
            return Err(BackupError::NotEmpty { file });
        }
        let position = self.machine.restore(restore.revision, restore.identity).map_err(refused)?;
        write_folder(folder, &mut self.machine, position, restore).map_err(BackupError::Folder)?;
        Ok(position)
    }
}

fn refused(rejection: Rejection) -> BackupError {
    let why = match rejection {
        Rejection::Invalid { why } => why.into(),
        other => other.to_string(),
    };
    BackupError::Refused { why }
}

fn digest(disk: &mut dyn Disk, file: &str, bytes: u64) -> io::Result<[u8; 32]> {
    let mut sum = sha2::Sha256::new();
    let mut at = 0;
    while at < bytes {
        let piece = disk.read(file, at, DIGEST_BYTES)?;
        if piece.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read"));
        }
        at += piece.len() as u64;
        sum.update(&piece);
    }
    Ok(sum.finalize().into())
}

/// The state, the log behind it, and last the identity, which makes the folder one of a member.
fn write_folder(
    folder: &mut dyn Disk,
    machine: &mut Machine,
    position: Position,
    restore: &Restore,
) -> Result<(), OpenError> {
    let identity = Identity {
        cluster: restore.cluster_token.clone(),
        member: restore.member.0,
        name: restore.name.clone(),
        storage: restore.storage,
    };
    let conf = ConfState::from((vec![restore.member.0], Vec::new()));
    let (index, term) = (position.index.0, position.term.0);
    write_snapshot(folder, machine, Meta { cluster: machine.cluster(), index, term, conf: (index, conf.clone()) })?;
    Log::create_behind(folder, &identity, SIZES, conf, (index, term))?;
    identity.store(folder)
}

fn write_snapshot(folder: &mut dyn Disk, machine: &mut Machine, meta: Meta) -> Result<(), OpenError> {
    let (file, name) = (snapshot::TEMPORARY, snapshot::file(meta.index));
    let io = |doing| move |error| OpenError::Io { doing, file: file.to_owned(), error };
    folder.create(file, 0).map_err(io("create"))?;
    let mut writer = snapshot::Writer::new(meta);
    machine.snapshot_begin();
    while let Some(block) = machine.snapshot_next(snapshot::BLOCK_BYTES) {
        let (offset, bytes) = writer.block(&block).map_err(|len| OpenError::Config {
            why: format!("the state has a part of {len} bytes, more than a snapshot holds"),
        })?;
        folder.write(file, offset, &bytes).map_err(io("write"))?;
    }
    let (offset, bytes) = writer.trailer();
    folder.write(file, offset, &bytes).map_err(io("write"))?;
    folder.sync(file).map_err(io("sync"))?;
    folder.rename(file, &name).and_then(|()| folder.sync_folder()).map_err(io("rename"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Answer, Config, Effects, Member, MemoryDisk, Millis, run_job};
    use tenure_machine::{
        Key, LockAcquire, LockMode, NamespaceId, OnExpire, Op, OpReply, Put, SessionCreate, SessionFace, SessionId,
        Space, Txn, Wait,
    };

    const NS: NamespaceId = NamespaceId::DEFAULT;

    struct Alone {
        disk: MemoryDisk,
        member: Member<MemoryDisk>,
        now: u64,
    }

    impl Alone {
        fn start(disk: MemoryDisk, member: u64) -> Self {
            let peers = vec![(MemberId(member), "n0".to_owned(), "h:1".to_owned())];
            let alone = Config::alone(MemberId(member), "n0", 5 + member, [7; 32]);
            let config = Config { disk_reserve_bytes: 0, peers, ..alone };
            let member = Member::open(disk.clone(), config, Millis(0)).unwrap();
            let mut alone = Self { disk, member, now: 0 };
            alone.poll();
            alone
        }

        fn poll(&mut self) -> Effects {
            let mut out = Effects::default();
            self.now += 1;
            self.member.poll(Millis(self.now), &mut out, &mut |_, _, _| {}).unwrap();
            for job in out.jobs.drain(..) {
                let done = run_job(&mut self.disk, job);
                self.member.job_done(done);
            }
            out
        }

        fn run(&mut self, op: Op) -> (u64, OpReply) {
            let ticket = self.member.submit(Txn::of(op)).unwrap();
            let out = self.poll();
            let answer = out.answers.into_iter().find(|(t, _)| *t == ticket);
            let Some((_, Answer::Done(reply))) = answer else { panic!("{answer:?}") };
            (reply.revision.0, reply.result.unwrap().results.pop().unwrap())
        }

        fn put(&mut self, name: &str) -> u64 {
            let key = Key::new(Space::Keys, NS, name.as_bytes());
            let (value, session) = (b"v"[..].into(), SessionId(0));
            self.run(Op::Put(Put { key, value, session, prev: false, keep_value: false, keep_session: false })).0
        }

        fn lock(&mut self, name: &str, session: u64) -> u64 {
            let acquire = LockAcquire {
                name: name.as_bytes().into(),
                session: SessionId(session),
                create: None,
                owner: [][..].into(),
                mode: LockMode::Exclusive,
                wait: Wait::None,
            };
            match self.run(Op::LockAcquire(acquire)).1 {
                OpReply::LockGranted(grant) => grant.token.0,
                other => panic!("{other:?}"),
            }
        }

        fn backup(&mut self) -> String {
            let index = self.member.want_snapshot();
            for _ in 0..20 {
                self.poll();
            }
            assert!(self.member.status().snapshot_index >= index);
            snapshot::file(self.member.status().snapshot_index)
        }
    }

    /// A key, a session and a lock that it holds; and how far it had counted.
    fn saved() -> (MemoryDisk, String, u64) {
        let mut old = Alone::start(MemoryDisk::new(), 1);
        old.run(Op::SessionCreate(SessionCreate {
            id: SessionId(9),
            face: SessionFace::Native,
            ttl_ms: 60_000,
            on_expire: OnExpire::Delete,
            name: "".into(),
            metadata: Vec::new(),
            alias: None,
            secret: None,
        }));
        old.put("k");
        let token = old.lock("held", 9);
        let file = old.backup();
        (old.disk, file, token)
    }

    fn restore(revision: u64, identity: Option<(u64, [u8; 16])>) -> Restore {
        Restore {
            member: MemberId(2),
            name: "n0".to_owned(),
            cluster_token: "tenure".to_owned(),
            revision: Revision(revision),
            identity,
            storage: [3; 16],
        }
    }

    #[test]
    fn the_state_goes_on_at_the_revision_in_a_cluster_of_one_through_restarts() {
        let (mut disk, file, token) = saved();
        let backup = Backup::read(&mut disk, &file).unwrap();
        assert_eq!(
            (backup.voters.as_slice(), backup.machine.member(MemberId(1)).is_some()),
            (&[MemberId(1)][..], true)
        );
        let issuer = backup.machine.issuer();
        let mut folder = MemoryDisk::new();
        let position = backup.restore(&mut folder, &restore(1 << 40, None)).unwrap();
        assert!(position.index.0 >= 1 << 40);
        let mut tokens = vec![token];
        for round in 0..3u64 {
            let mut new = Alone::start(folder.clone(), 2);
            assert!(new.member.is_leader());
            let machine = new.member.machine();
            assert_eq!((machine.issuer(), machine.compacted()), (issuer, Revision(1 << 40)));
            let held = machine.lock(NS, b"held").unwrap().holder.unwrap();
            assert_eq!(held.token.0, token, "who held it holds it");
            assert_eq!(machine.session(SessionId(9)).unwrap().ttl_ms, 60_000);
            assert!(machine.get(&Key::new(Space::Keys, NS, b"k")).is_some());
            assert!(machine.member(MemberId(1)).is_none(), "nobody of the old cluster is one of the new");
            tokens.push(new.lock(&format!("new{round}"), 9));
            assert_eq!(new.member.status().voters, [MemberId(2)]);
            new.put(&format!("k{round}"));
            if round == 1 {
                new.backup();
            }
        }
        assert!(tokens[1] > 1 << 40 && tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    }

    #[test]
    fn one_backup_twice_gives_no_token_twice() {
        let (mut disk, file, _) = saved();
        let mut given = Vec::new();
        for moment in [1_700_000_000_000, 1_700_000_000_001] {
            let mut folder = MemoryDisk::new();
            let revision = revision_at(moment).0;
            Backup::read(&mut disk, &file).unwrap().restore(&mut folder, &restore(revision, None)).unwrap();
            let mut new = Alone::start(folder, 2);
            given.extend((0..100).map(|i| new.lock(&format!("l{i}"), 9)));
        }
        assert!(given.is_sorted_by(|a, b| a < b), "{given:?}");
        let mut folder = MemoryDisk::new();
        let clone = restore(revision_at(1_700_000_000_002).0, Some((77, [8; 16])));
        Backup::read(&mut disk, &file).unwrap().restore(&mut folder, &clone).unwrap();
        let new = Alone::start(folder, 2);
        assert_eq!((new.member.machine().cluster(), new.member.machine().issuer()), (77, [8; 16]));
    }

    #[test]
    fn what_must_not_be_restored_is_refused_and_writes_nothing() {
        let (mut disk, file, _) = saved();
        let backup = |disk: &mut MemoryDisk| Backup::read(disk, &file);
        let mut folder = MemoryDisk::new();
        let low = backup(&mut disk).unwrap().machine.revision().0;
        let error = backup(&mut disk).unwrap().restore(&mut folder, &restore(low, None)).unwrap_err();
        assert!(matches!(&error, BackupError::Refused { why } if why.contains("above")), "{error}");
        assert!(folder.names().is_empty());
        folder.create("notes", 0).unwrap();
        let error = backup(&mut disk).unwrap().restore(&mut folder, &restore(1 << 40, None)).unwrap_err();
        assert!(matches!(&error, BackupError::NotEmpty { file } if file == "notes"), "{error}");
        let len = disk.edit(&file, |b| b.len()).unwrap();
        for at in [0, 30, len / 2, len - 1] {
            let mut damaged = disk.copy();
            damaged.edit(&file, |b| b[at] ^= 4);
            let error = Backup::read(&mut damaged, &file).err().unwrap();
            assert!(matches!(error, BackupError::Damaged { .. }), "byte {at}: {error}");
        }
        disk.edit(&file, |b| b.truncate(len - 9));
        let error = Backup::read(&mut disk, &file).err().unwrap();
        assert!(error.to_string().contains("the file ends before"), "{error}");
    }

    #[test]
    fn a_restore_that_stops_at_any_step_leaves_nothing_that_starts() {
        let (mut disk, file, _) = saved();
        let mut whole = MemoryDisk::new();
        Backup::read(&mut disk, &file).unwrap().restore(&mut whole, &restore(1 << 40, None)).unwrap();
        let without = whole.copy();
        without.clone().remove("identity").unwrap();
        let config = || Config::alone(MemberId(2), "n0", 1, [7; 32]);
        let error = Member::open(without.clone(), config(), Millis(0)).err().unwrap();
        assert!(error.to_string().contains("a snapshot alone"), "{error}");
        assert_eq!(without.names().len(), whole.names().len() - 1, "nothing was deleted");
        Member::open(whole, config(), Millis(0)).unwrap();
    }

    #[test]
    fn revisions_by_the_clock() {
        assert_eq!(revision_at(EPOCH_UNIX_MS), Revision(0));
        assert_eq!(revision_at(EPOCH_UNIX_MS - 1), Revision(0));
        assert_eq!(revision_at(EPOCH_UNIX_MS + 3_500), Revision(7 << 19));
        // 2292-01-01.
        assert!(revision_at(8_583_840_000_000).0 < 1 << 53);
    }
}
