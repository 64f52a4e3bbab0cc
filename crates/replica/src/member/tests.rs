use super::*;
use crate::disk::MemoryDisk;
use crate::job::run_job;
use tenure_machine::{
    CounterAdd, CounterOp, JobId, Key, LockAcquire, LockMode, LockOp, LockRelease, NamespaceId, OnExpire, OpReply, Put,
    QueueOp, Receipt, Reply, RequestId, Revision, SessionCreate, SessionFace, SessionId, Space, Span, Wait,
};

/// A member, its folder, its clock, and a worker that runs jobs when told.
pub(super) struct Rig {
    pub(super) disk: MemoryDisk,
    pub(super) member: Member<MemoryDisk>,
    pub(super) now: u64,
    pub(super) out: Effects,
    jobs: VecDeque<Job>,
}

pub(super) fn config(boot: u64) -> Config {
    let mut random = [7; 32];
    random[16..].fill(9);
    Config { disk_reserve_bytes: 0, ..Config::alone(MemberId(1), "n0", boot, random) }
}

/// Small files, so that tests turn them over soon.
pub(super) fn small(boot: u64) -> Config {
    Config { first_segment_bytes: 64 << 10, segment_bytes: 64 << 10, snapshot_log_bytes: 64 << 10, ..config(boot) }
}

pub(super) fn key(name: &str) -> Key {
    Key::new(Space::Keys, NamespaceId::DEFAULT, name.as_bytes())
}

pub(super) fn put(name: &str, value: &[u8]) -> Txn {
    Txn::of(Op::Put(Put {
        key: key(name),
        value: value.into(),
        session: SessionId(0),
        prev: false,
        keep_value: false,
        keep_session: false,
    }))
}

pub(super) fn session(id: u64, ttl_ms: u64) -> SessionCreate {
    SessionCreate {
        id: SessionId(id),
        face: SessionFace::Etcd,
        ttl_ms,
        on_expire: OnExpire::Delete,
        name: "".into(),
        metadata: Vec::new(),
        alias: None,
        secret: None,
    }
}

pub(super) fn acquire(session: u64, wait: Wait) -> Txn {
    Txn::of(Op::LockAcquire(LockAcquire {
        name: b"l"[..].into(),
        session: SessionId(session),
        create: None,
        owner: [][..].into(),
        mode: LockMode::Exclusive,
        wait,
    }))
}

/// A lone member has nobody to talk to.
pub(super) fn nobody(to: MemberId, _: Lane, _: Vec<u8>) {
    panic!("a message to {to}")
}

impl Rig {
    pub(super) fn new(config: Config) -> Self {
        Self::on(MemoryDisk::new(), config)
    }

    /// Opens and elects.
    pub(super) fn on(disk: MemoryDisk, config: Config) -> Self {
        let member = Member::open(disk.clone(), config, Millis(0)).unwrap();
        let mut rig = Self { disk, member, now: 0, out: Effects::default(), jobs: VecDeque::new() };
        rig.poll();
        assert!(rig.member.is_leader());
        rig
    }

    pub(super) fn poll(&mut self) -> Vec<(Ticket, Answer)> {
        self.member.poll(Millis(self.now), &mut self.out, &mut nobody).unwrap();
        self.jobs.extend(self.out.jobs.drain(..));
        self.out.changes.clear();
        std::mem::take(&mut self.out.answers)
    }

    /// Lets time pass as the driver would: it polls when it is told to.
    pub(super) fn pass(&mut self, ms: u64) -> Vec<(Ticket, Answer)> {
        let end = self.now + ms;
        let mut answers = Vec::new();
        loop {
            answers.extend(self.poll());
            let wake = self.out.wake_at.unwrap().0.max(self.now + 1);
            if wake > end {
                break;
            }
            self.now = wake;
        }
        self.now = end;
        answers.extend(self.poll());
        answers
    }

    fn work(&mut self) {
        while let Some(job) = self.jobs.pop_front() {
            let done = run_job(&mut self.disk, job);
            self.member.job_done(done);
            self.poll();
        }
    }

    fn run(&mut self, txn: Txn) -> Reply {
        let ticket = self.member.submit(txn).unwrap();
        for (t, answer) in self.poll() {
            if t == ticket {
                let Answer::Done(reply) = answer else { panic!("{answer:?}") };
                return reply;
            }
        }
        panic!("no answer in one poll")
    }

    fn ok(&mut self, txn: Txn) -> Vec<OpReply> {
        self.run(txn).result.unwrap().results
    }

    pub(super) fn value(&self, name: &str) -> Option<Vec<u8>> {
        self.member.machine().get(&key(name)).map(|r| r.value().to_vec())
    }

    fn newest_segment(&self) -> String {
        self.disk.names().into_iter().rfind(|n| n.starts_with("log-")).unwrap()
    }

    /// What a crash of the machine leaves.
    pub(super) fn crash(&self) -> MemoryDisk {
        let disk = self.disk.copy();
        disk.crash();
        disk
    }
}

#[test]
fn a_lone_member_does_all_of_a_write_in_one_poll_with_one_write_and_one_sync() {
    let mut rig = Rig::new(config(1));
    assert_ne!(rig.member.machine().cluster(), 0);
    assert_eq!(rig.member.machine().issuer(), [9; 16]);
    let before = rig.disk.counts();
    let tickets: Vec<Ticket> = (0..64).map(|i| rig.member.submit(put(&format!("k{i}"), b"v")).unwrap()).collect();
    rig.member.poll(Millis(0), &mut rig.out, &mut nobody).unwrap();
    assert_eq!(rig.out.changes.len(), 64);
    let answered: Vec<Ticket> = rig.out.answers.drain(..).map(|(t, _)| t).collect();
    assert_eq!(answered, tickets);
    assert_eq!(rig.disk.counts(), (before.0 + 1, before.1 + 1));
    let applied = rig.member.status().applied;
    assert_eq!(applied, 3, "the election's entry, the genesis, one batch");
    rig.poll();
    assert_eq!(rig.disk.counts(), (before.0 + 1, before.1 + 1), "reads and idle rounds write nothing");
}

#[test]
fn the_start_of_a_cluster_is_one_sync() {
    let disk = MemoryDisk::new();
    let mut member = Member::open(disk.clone(), config(1), Millis(0)).unwrap();
    let before = disk.counts();
    member.poll(Millis(0), &mut Effects::default(), &mut nobody).unwrap();
    assert!(member.is_leader());
    assert_eq!(disk.counts(), (before.0 + 1, before.1 + 1));
}

#[test]
fn what_was_answered_is_there_after_a_crash_and_again_after_another() {
    let mut rig = Rig::new(config(1));
    for i in 0..20 {
        rig.ok(put(&format!("k{i}"), format!("v{i}").as_bytes()));
        let revision = rig.member.machine().revision();
        let cluster = rig.member.machine().cluster();
        rig = Rig::on(rig.crash(), config(i + 2));
        assert_eq!(rig.member.machine().revision(), revision);
        assert_eq!(rig.member.machine().cluster(), cluster);
    }
    for i in 0..20 {
        assert_eq!(rig.value(&format!("k{i}")), Some(format!("v{i}").into_bytes()));
    }
    let logs = rig.disk.names().iter().filter(|n| n.starts_with("log-")).count();
    assert_eq!(logs, 1, "a short log is copied whole, old files go");
}

#[test]
fn reads_need_no_sync_and_wait_for_nothing() {
    let mut rig = Rig::new(config(1));
    let before = rig.disk.counts();
    let (a, b) = (rig.member.read().unwrap(), rig.member.read().unwrap());
    assert_eq!(rig.poll(), [(a, Answer::ReadReady), (b, Answer::ReadReady)]);
    assert_eq!(rig.disk.counts(), before);
    assert!(rig.member.reads_now());
}

#[test]
fn reads_and_renewals_do_not_wait_for_the_changes_that_come_with_them() {
    let mut rig = Rig::new(config(1));
    rig.ok(Txn::of(Op::SessionCreate(session(5, 10_000))));
    let synced = rig.disk.counts();
    let change = rig.member.submit(put("k", b"v")).unwrap();
    let (renewal, read) = (rig.member.renew(SessionId(5), 0), rig.member.read().unwrap());
    let heard = rig.member.hear(Millis(rig.now), &mut rig.out, &mut nobody).unwrap();
    let answers = std::mem::take(&mut rig.out.answers);
    assert!(answers.contains(&(read, Answer::ReadReady)) && renewed(&answers, renewal) == Some(true), "{answers:?}");
    assert_eq!(rig.disk.counts(), synced, "nothing is written yet");
    rig.member.work(heard, &mut rig.out, &mut nobody).unwrap();
    assert!(matches!(&rig.out.answers[..], [(a, Answer::Done(_))] if *a == change));
}

// Damage and torn writes.

/// A log whose last batch has several records, and where that batch begins.
fn log_with_a_last_batch() -> (MemoryDisk, String, usize, usize) {
    let mut rig = Rig::new(small(1));
    for i in 0..5 {
        rig.ok(put(&format!("k{i}"), &[i; 100]));
    }
    let name = rig.newest_segment();
    let start = end_of_log(&rig);
    rig.ok(put("last", &[9; 600]));
    let end = end_of_log(&rig);
    (rig.disk.copy(), name, start, end)
}

fn end_of_log(rig: &Rig) -> usize {
    let data = rig.disk.edit(&rig.newest_segment(), |d| d.clone()).unwrap();
    data.iter().rposition(|b| *b != 0).unwrap() / 8 * 8 + 8
}

#[test]
fn a_last_batch_torn_anywhere_is_whole_or_absent() {
    let (disk, name, start, end) = log_with_a_last_batch();
    // The last byte that is not zero as the file was before.
    let content = disk.edit(&name, |d| d.iter().rposition(|b| *b != 0)).flatten().unwrap();
    for cut in start..=end {
        // Nothing after the cut reached the disk; then, everything but one sector did.
        for sector in [None, Some(cut / 512 * 512)] {
            let torn = disk.copy();
            torn.edit(&name, |d| match sector {
                None => d[cut..].fill(0),
                Some(at) => d[at.max(start)..(at + 512).max(start)].fill(0),
            });
            let rig = Rig::on(torn, small(2));
            for i in 0..5u8 {
                assert_eq!(rig.value(&format!("k{i}")), Some(vec![i; 100]), "cut at {cut}");
            }
            let last = rig.value("last");
            assert!(last.is_none() || last == Some(vec![9; 600]), "cut at {cut}");
            assert!(sector.is_some() || last.is_some() == (cut > content), "cut at {cut}");
        }
    }
}

#[test]
fn a_flip_in_what_is_known_to_be_synced_is_damage_with_its_place() {
    let (disk, name, start, _) = log_with_a_last_batch();
    for byte in crate::record::HEADER_BYTES..start {
        for bit in [byte % 8, (byte + 3) % 8] {
            let flipped = disk.copy();
            let padding = flipped.edit(&name, |d| {
                d[byte] ^= 1 << bit;
                d[byte] == 1 << bit
            });
            match Member::open(flipped, small(2), Millis(0)) {
                Err(OpenError::Damaged { file, offset, .. }) => {
                    assert_eq!(file, name);
                    assert!(
                        offset as usize <= byte && byte < offset as usize + 1024,
                        "flip at {byte}, told at {offset}"
                    );
                }
                // The bytes that fill a record up to the next place mean nothing and are never read.
                Ok(_) => assert_eq!(padding, Some(true), "flip at {byte}"),
                Err(other) => panic!("{other}"),
            }
        }
    }
    for byte in (0..10).chain(12..16) {
        let flipped = disk.copy();
        flipped.edit(&name, |d| d[byte] ^= 1);
        let error = Member::open(flipped, config(2), Millis(0)).err().unwrap();
        assert!(matches!(error, OpenError::Damaged { .. } | OpenError::OtherFormat { .. }), "{error}");
    }
}

#[test]
fn once_the_log_was_quiet_a_flip_in_the_last_batch_is_damage_too() {
    let mut rig = Rig::new(config(1));
    rig.ok(put("k", b"v"));
    let at = end_of_log(&rig) - 8;
    let flipped = |disk: &MemoryDisk, name: &str| {
        let disk = disk.copy();
        disk.edit(name, |d| d[at] ^= 1);
        Member::open(disk, config(2), Millis(0)).map(|m| m.status())
    };
    let name = rig.newest_segment();
    let torn = flipped(&rig.disk, &name).unwrap();
    assert!(matches!(torn.alarms[..], [Alarm::TornTail { .. }]), "before the mark it looks torn, and is told");
    rig.pass(QUIET_MS + 1);
    assert!(matches!(flipped(&rig.disk, &name), Err(OpenError::Damaged { .. })));
    let syncs = rig.disk.counts();
    rig.pass(2_000);
    assert_eq!(rig.disk.counts(), syncs, "one mark, then silence");
}

#[test]
fn what_stands_behind_a_cut_does_not_come_back() {
    let (disk, name, start, end) = log_with_a_last_batch();
    // Two batches; the first of them is torn, the second is whole: neither was answered as long as neither was synced.
    let both = {
        let mut rig = Rig::on(disk.copy(), config(2));
        let name = rig.newest_segment();
        let from = end_of_log(&rig);
        rig.ok(put("next", b"1"));
        (rig.disk.copy(), name, from)
    };
    drop((name, start, end));
    let (disk, name, from) = both;
    disk.edit(&name, |d| d[from + 40] ^= 0xff);
    let rig = Rig::on(disk, config(3));
    assert_eq!(rig.value("next"), None);
    // Started again with the bytes of the old segment still in a recycled file.
    let rig = Rig::on(rig.crash(), config(4));
    assert_eq!(rig.value("next"), None);
    assert_eq!(rig.value("last"), Some(vec![9; 600]));
}

#[test]
fn a_crash_at_any_moment_of_the_recovery_loses_nothing() {
    let (disk, name, ..) = log_with_a_last_batch();
    let segment = disk.edit(&name, |d| d.clone()).unwrap();
    // The fresh segment as a crash could leave it: without its header, with a torn one, with records that are cut.
    let mut after = disk.copy();
    Member::open(after.clone(), config(2), Millis(0)).unwrap();
    let fresh = after.list().unwrap().into_iter().rfind(|n| n.starts_with("log-")).unwrap();
    let whole = after.edit(&fresh, |d| d.clone()).unwrap();
    assert_ne!(fresh, name);
    for cut in [0, 1, 100, 4095, 4096, 4097, 5000] {
        let mut torn = disk.copy();
        torn.create(&fresh, whole.len() as u64).unwrap();
        let mut bytes = whole.clone();
        bytes[..cut.min(4096)].fill(0);
        bytes[4096 + cut..].fill(0);
        torn.write(&fresh, 0, &bytes).unwrap();
        if cut == 0 {
            // The header is there, so by our order so are the records.
            torn.write(&fresh, 0, &whole).unwrap();
        }
        assert_eq!(torn.edit(&name, |d| d.clone()), Some(segment.clone()));
        let rig = Rig::on(torn, config(3));
        assert_eq!(rig.value("last"), Some(vec![9; 600]), "cut {cut}");
    }
}

#[test]
fn segments_turn_over_are_recycled_and_read_back_whole() {
    let mut rig = Rig::new(small(1));
    for i in 0..400u32 {
        rig.ok(put(&format!("k{}", i % 50), &i.to_le_bytes().repeat(256)));
        rig.work();
        if i % 97 == 0 {
            rig = Rig::on(rig.crash(), small(u64::from(i) + 2));
        }
    }
    let status = rig.member.status();
    assert!(status.first_index > 1 && status.snapshot_index >= status.first_index, "{status:?}");
    let names = rig.disk.names();
    assert_eq!(names.iter().filter(|n| n.starts_with("snapshot-")).count(), 2, "{names:?}");
    assert!(names.iter().filter(|n| n.starts_with("log-")).count() < 8, "{names:?}");
    let rig = Rig::on(rig.crash(), small(9999));
    for i in 350..400u32 {
        assert_eq!(rig.value(&format!("k{}", i % 50)), Some(i.to_le_bytes().repeat(256)));
    }
}

#[test]
fn a_damaged_snapshot_is_told_and_the_older_one_serves() {
    let mut rig = Rig::new(small(1));
    for i in 0..300u32 {
        rig.ok(put(&format!("k{}", i % 50), &i.to_le_bytes().repeat(256)));
        rig.work();
    }
    let newest = rig.disk.names().into_iter().rfind(|n| n.starts_with("snapshot-")).unwrap();
    rig.disk.edit(&newest, |d| d[200] ^= 1);
    let revision = rig.member.machine().revision();
    let rig = Rig::on(rig.crash(), small(2));
    assert_eq!(rig.member.machine().revision(), revision);
    assert!(
        rig.member.status().alarms.iter().any(|a| matches!(a, Alarm::SnapshotDamaged { file, .. } if *file == newest))
    );
    // Both gone: the log alone does not reach back, so nothing is served.
    let disk = rig.crash();
    for name in disk.names().into_iter().filter(|n| n.starts_with("snapshot-")) {
        disk.edit(&name, |d| d.truncate(100));
    }
    let error = Member::open(disk, small(3), Millis(0)).err().unwrap();
    assert!(matches!(&error, OpenError::Damaged { file, offset: 55.., .. } if *file == newest), "{error}");
    let text = error.to_string();
    for part in [&newest, "no older snapshot is whole", "log-", "the log begins at entry", "a whole copy of the folder"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_log_without_any_header_is_named_precisely() {
    let mut rig = Rig::new(config(1));
    rig.ok(put("k", b"v"));
    let segment = rig.newest_segment();
    let refused = |disk: MemoryDisk| Member::open(disk, config(2), Millis(0)).err().unwrap().to_string();
    let disk = rig.crash();
    disk.edit(&segment, |b| b[..4096].fill(0));
    let text = refused(disk);
    assert!(text.contains(&format!("{segment} at byte 0: the header")), "{text}");
    let mut disk = rig.crash();
    disk.remove(&segment).unwrap();
    let text = refused(disk);
    assert!(text.contains("identity at byte 0") && text.contains("no log is left"), "{text}");
}

#[test]
fn a_missing_segment_is_damage() {
    let mut rig = Rig::new(Config { snapshot_log_bytes: 1 << 40, ..small(1) });
    for i in 0..300u32 {
        rig.ok(put(&format!("k{i}"), &[1; 1000]));
        rig.work();
    }
    let logs: Vec<String> = rig.disk.names().into_iter().filter(|n| n.starts_with("log-")).collect();
    assert!(logs.len() > 3);
    for gone in &logs[..3] {
        let mut disk = rig.disk.copy();
        disk.remove(gone).unwrap();
        let names = disk.names();
        let error = Member::open(disk.clone(), small(2), Millis(0)).err().unwrap();
        assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
        assert_eq!(disk.names(), names, "a refused folder is left as it is");
    }
}

#[test]
fn folders_of_others_are_refused_by_name() {
    let rig = Rig::new(config(1));
    let open = |config| Member::open(rig.disk.copy(), config, Millis(0)).err().unwrap().to_string();
    let other = open(Config { cluster_token: "blue".to_owned(), ..config(2) });
    assert_eq!(other, "the data folder belongs to the cluster `tenure`, this member was started for `blue`");
    let other = open(Config { member: MemberId(4), ..config(2) });
    assert_eq!(other, "the data folder belongs to member `n0` (1), this one was started as `n0` (4)");

    let mut strange = MemoryDisk::new();
    strange.create("db", 10).unwrap();
    let error = Member::open(strange, config(1), Millis(0)).err().unwrap().to_string();
    assert_eq!(
        error,
        "the data folder is of another format: db: there is no identity file beside it; choose an empty folder"
    );

    let mut lost = rig.disk.copy();
    lost.remove("identity").unwrap();
    let error = Member::open(lost, config(1), Millis(0)).err().unwrap().to_string();
    assert!(error.ends_with("it holds entries, but the identity file is missing"), "{error}");

    // A segment of another folder in the place of ours.
    let mut random = [1; 32];
    random[0] = 2;
    let other = Rig::new(Config { random, ..config(1) });
    let mixed = rig.disk.copy();
    let foreign = other.disk.edit(&other.newest_segment(), |d| d.clone()).unwrap();
    mixed.edit(&rig.newest_segment(), |d| *d = foreign);
    let error = Member::open(mixed, config(1), Millis(0)).err().unwrap().to_string();
    assert!(error.ends_with("it belongs to the folder of another member"), "{error}");
}

#[test]
fn an_interrupted_first_start_is_begun_anew() {
    let disk = MemoryDisk::new();
    Member::open(disk.clone(), config(1), Millis(0)).unwrap();
    let mut torn = disk.copy();
    torn.remove("identity").unwrap();
    torn.create("identity.tmp", 3).unwrap();
    Rig::on(torn, config(2));
}

// Faults of the disk.

#[test]
fn a_failed_sync_is_the_end_of_the_member() {
    let mut rig = Rig::new(config(1));
    rig.member.submit(put("k", b"v")).unwrap();
    rig.disk.fail_syncs(true);
    let fault = rig.member.poll(Millis(1), &mut rig.out, &mut nobody).unwrap_err();
    assert!(matches!(fault, Fault::Disk { doing: "sync", .. }), "{fault}");
    assert!(rig.out.answers.is_empty(), "nothing is answered");
    rig.disk.fail_syncs(false);
    assert!(
        matches!(rig.member.poll(Millis(2), &mut rig.out, &mut nobody), Err(Fault::Stopped)),
        "it is not tried again"
    );
    assert_eq!(rig.member.submit(put("k", b"v")), Err(Refusal::Stopping));
}

#[test]
fn a_full_disk_refuses_growth_before_the_log_fails_and_recovers_by_itself() {
    let mut rig = Rig::new(Config { disk_reserve_bytes: 1 << 20, ..config(1) });
    let done = Txn { request: Some(RequestId::Uuid([7; 16])), ..put("k", b"v") };
    rig.ok(done.clone());
    rig.disk.set_capacity(3 << 19);
    rig.pass(DISK_EVERY_MS);
    assert_eq!(rig.member.submit(put("l", b"v")), Err(Refusal::DiskFull));
    assert!(rig.run(done).replayed, "what was done is answered as it was");
    // Work that is under way can be ended.
    let receipt = || Receipt { id: JobId { revision: 1, index: 0 }, token: Revision(1) };
    let release =
        LockRelease { name: b"l".as_slice().into(), session: SessionId(1), token: Revision(1), owner: Box::default() };
    assert!(only_frees(&Txn::of(QueueOp::Release(receipt()).into())));
    assert!(only_frees(&Txn::of(LockOp::Release(release).into())));
    let add = CounterAdd { name: b"c".as_slice().into(), delta: 1, min: None, max: None };
    assert!(!only_frees(&Txn::of(CounterOp::Add(add).into())));
    assert!(rig.member.status().alarms.iter().any(|a| matches!(a, Alarm::DiskFull { .. })));
    rig.disk.set_capacity(1 << 30);
    rig.pass(DISK_EVERY_MS);
    rig.ok(put("l", b"v"));
    assert_eq!(rig.member.status().alarms, []);
}

/// Writes 256 KiB at a time within one look at the disk, `at_once` in one poll, until it is refused. Gives how many were acknowledged.
fn overrun(rig: &mut Rig, at_once: usize) -> usize {
    let mut acknowledged = 0;
    for i in 0.. {
        let tickets: Vec<_> =
            (0..at_once).map(|j| rig.member.submit(put(&format!("k{i}-{j}"), &[1; 256 << 10]))).collect();
        let answers = rig.poll();
        acknowledged += answers.iter().filter(|(_, a)| matches!(a, Answer::Done(_))).count();
        if let Some(refusal) = tickets.into_iter().find_map(Result::err) {
            assert_eq!(refusal, Refusal::DiskFull);
            return acknowledged;
        }
    }
    unreachable!()
}

#[test]
fn a_disk_faster_than_the_looks_at_it_is_not_overrun() {
    for at_once in [1, 100] {
        for with_jobs in [false, true] {
            let mut rig = Rig::new(Config { disk_reserve_bytes: 1 << 20, snapshot_log_bytes: 1 << 20, ..small(1) });
            rig.disk.set_capacity(16 << 20);
            rig.pass(DISK_EVERY_MS);
            let mut acknowledged = 0;
            // All in one millisecond. Jobs take room too.
            for _ in 0..5 {
                acknowledged += overrun(&mut rig, at_once);
                if with_jobs {
                    rig.work();
                }
            }
            // The state is in the log, and with jobs perhaps in one snapshot and a half besides.
            let least = if with_jobs { 20 } else { 50 };
            assert!((least..64).contains(&acknowledged), "{acknowledged}");
            let free = rig.disk.clone().free_bytes().unwrap();
            assert!(free >= 256 << 10, "{free} bytes are left for what frees");
            let disk = rig.crash();
            // Whatever no later word proves is copied at a start: here all of it may have come in one batch.
            disk.set_capacity(u64::MAX);
            let rig = Rig::on(disk, small(2));
            assert_eq!(rig.member.machine().counts().keys, acknowledged as u64);
        }
    }
}

#[test]
fn a_full_disk_still_takes_what_frees() {
    let mut rig = Rig::new(Config { disk_reserve_bytes: 64 << 20, ..config(1) });
    rig.ok(put("k", b"v"));
    rig.disk.set_capacity(32 << 20);
    rig.pass(DISK_EVERY_MS);
    assert_eq!(rig.member.submit(put("l", b"v")), Err(Refusal::DiskFull));
    rig.ok(Txn::of(Op::Delete(tenure_machine::Delete { span: Span::one(key("k")), prev: false })));
    assert_eq!(rig.value("k"), None);
}

#[test]
fn a_failed_snapshot_is_told_tried_again_and_never_half_used() {
    let mut rig = Rig::new(small(1));
    for i in 0..100u32 {
        rig.ok(put(&format!("k{i}"), &[1; 1000]));
    }
    assert!(rig.member.status().snapshot_running);
    rig.disk.set_capacity(1);
    rig.work();
    assert!(rig.member.status().alarms.iter().any(|a| matches!(a, Alarm::JobFailed { .. })));
    assert!(!rig.disk.names().iter().any(|n| n.starts_with("snapshot-")));
    rig.disk.set_capacity(u64::MAX);
    rig.pass(RETRY_MS + 1);
    rig.work();
    rig.pass(1);
    rig.work();
    assert!(rig.disk.names().iter().any(|n| n.starts_with("snapshot-")));
    assert_eq!(rig.member.status().alarms, []);
}

#[test]
fn a_snapshot_holds_what_the_largest_request_makes() {
    let large = |boot| Config { max_request_bytes: 64 << 20, ..config(boot) };
    let mut rig = Rig::new(large(1));
    // Small records in front, so that the largest begins in a block that is nearly full.
    for i in 0..100 {
        rig.ok(put(&format!("a{i}"), &[1; 1200]));
    }
    let value = vec![7; (64 << 20) - 1000];
    rig.ok(put("b", &value));
    rig.pass(1_000);
    while !rig.jobs.is_empty() {
        rig.work();
        rig.pass(1);
    }
    let status = rig.member.status();
    assert!(status.snapshot_index > 0 && status.alarms.is_empty(), "{status:?}");
    let rig = Rig::on(rig.crash(), large(2));
    assert_eq!(rig.member.status().alarms, []);
    assert!(rig.value("b") == Some(value));
}

// Sessions.

fn renewed(answers: &[(Ticket, Answer)], ticket: Ticket) -> Option<bool> {
    answers.iter().find(|(t, _)| *t == ticket).map(|(_, a)| match a {
        Answer::Renewed(result) => result.is_ok(),
        other => panic!("{other:?}"),
    })
}

#[test]
fn a_session_lives_while_it_is_renewed_and_ends_by_an_entry() {
    let mut rig = Rig::new(config(1));
    rig.ok(Txn::of(Op::SessionCreate(session(5, 2_000))));
    for _ in 0..5 {
        rig.pass(1_500);
        let ticket = rig.member.renew(SessionId(5), 0);
        let answers = rig.poll();
        assert_eq!(renewed(&answers, ticket), Some(true));
    }
    rig.pass(1_999);
    assert!(rig.member.machine().session(SessionId(5)).is_some());
    assert_eq!(rig.member.remaining_ms(SessionId(5), Millis(rig.now)), Some(1));
    rig.pass(1);
    assert!(rig.member.machine().session(SessionId(5)).is_none());
    let ticket = rig.member.renew(SessionId(5), 0);
    let answers = rig.poll();
    assert_eq!(renewed(&answers, ticket), Some(false));
}

#[test]
fn a_renewal_that_arrives_before_the_deadline_is_seen_wins() {
    let mut rig = Rig::new(config(1));
    rig.ok(Txn::of(Op::SessionCreate(session(5, 2_000))));
    rig.pass(1_900);
    let ticket = rig.member.renew(SessionId(5), 0);
    rig.now += 400;
    let answers = rig.poll();
    assert_eq!(renewed(&answers, ticket), Some(true));
    assert!(rig.member.machine().session(SessionId(5)).is_some());
}

#[test]
fn a_suspended_server_expires_nobody_early() {
    let mut rig = Rig::new(config(1));
    rig.ok(Txn::of(Op::SessionCreate(session(5, 2_000))));
    let stamp = rig.member.machine().stamp();
    rig.pass(500);
    rig.now += 3_600_000;
    rig.poll();
    assert!(rig.member.machine().session(SessionId(5)).is_some());
    assert_eq!(rig.member.status().gaps, 1);
    rig.pass(1_499);
    assert!(rig.member.machine().session(SessionId(5)).is_some(), "the rest of its time is its own");
    rig.pass(1);
    assert!(rig.member.machine().session(SessionId(5)).is_none());
    assert_eq!(rig.member.machine().stamp(), stamp.plus(2_000), "log time stood still too");
}

#[test]
fn a_new_leader_gives_the_whole_time_or_what_a_checkpoint_left() {
    let mut rig = Rig::new(config(1));
    rig.ok(Txn::of(Op::SessionCreate(session(5, 700_000))));
    rig.ok(Txn::of(Op::SessionCreate(session(6, 2_000))));
    rig.pass(1_000);
    let mut rig = Rig::on(rig.crash(), config(2));
    assert_eq!(rig.member.remaining_ms(SessionId(6), Millis(0)), Some(2_000));
    assert_eq!(rig.member.remaining_ms(SessionId(5), Millis(0)), Some(700_000));
    rig.pass(300_000);
    let rig = Rig::on(rig.crash(), config(3));
    assert_eq!(rig.member.remaining_ms(SessionId(5), Millis(0)), Some(400_000), "as the checkpoint says");
    let mut rig = rig;
    let ticket = rig.member.renew(SessionId(5), 0);
    let answers = rig.pass(1);
    assert_eq!(renewed(&answers, ticket), Some(true));
    let rig = Rig::on(rig.crash(), config(4));
    assert_eq!(
        rig.member.remaining_ms(SessionId(5), Millis(0)),
        Some(700_000),
        "the clearing was on disk before the answer"
    );
}

#[test]
fn expiries_share_polls_with_other_work() {
    let mut rig = Rig::new(config(1));
    let sessions = 4 * DUE_MAX as u64;
    for i in 0..sessions {
        rig.member.submit(Txn::of(Op::SessionCreate(session(100 + i, 1_000)))).unwrap();
    }
    rig.poll();
    rig.pass(999);
    assert_eq!(rig.member.machine().counts().sessions, sessions);
    rig.now += 1;
    rig.poll();
    assert_eq!(rig.member.machine().counts().sessions, sessions - DUE_MAX as u64);
    assert_eq!(rig.out.wake_at, Some(Millis(rig.now)), "more is due");
    rig.ok(put("k", b"v"));
    rig.poll();
    rig.poll();
    assert_eq!(rig.member.machine().counts().sessions, 0);
}

// Log time and waits.

#[test]
fn a_wait_ends_by_an_entry_that_only_stamps() {
    let mut rig = Rig::new(config(1));
    for id in [5, 6] {
        rig.ok(Txn::of(Op::SessionCreate(session(id, 60_000))));
    }
    rig.ok(acquire(5, Wait::None));
    let waiting = rig.member.submit(acquire(6, Wait::Ms(7_000))).unwrap();
    // It found no company; the wait counts from its entry.
    assert_eq!(rig.pass(RIDE_MS), []);
    let index = rig.member.status().applied;
    assert_eq!(rig.pass(6_999), []);
    assert_eq!(rig.member.status().applied, index + 1, "stamped once on the way, after five seconds");
    let answers = rig.pass(1);
    let [(ticket, Answer::Done(reply))] = &answers[..] else { panic!("{answers:?}") };
    assert_eq!(*ticket, waiting);
    assert!(matches!(reply.result, Err(Rejection::TimeoutWaiting { waited_ms: 7_000, .. })), "{reply:?}");
}

#[test]
fn log_time_goes_on_from_where_the_log_ends() {
    let mut rig = Rig::new(config(1));
    rig.pass(400);
    rig.ok(put("a", b"1"));
    assert_eq!(rig.member.machine().stamp(), LogTime(400));
    rig.pass(900);
    let mut rig = Rig::on(rig.crash(), config(2));
    rig.pass(50);
    rig.ok(put("a", b"2"));
    assert_eq!(rig.member.machine().stamp(), LogTime(450), "neither back nor over the time that was not served");
}

#[test]
fn an_idle_member_hardly_writes() {
    let mut rig = Rig::new(config(1));
    let index = rig.member.status().applied;
    rig.pass(299_000);
    assert_eq!(rig.member.status().applied, index);
    rig.pass(2_000);
    assert_eq!(rig.member.status().applied, index + 1);
}

#[test]
fn history_is_compacted_by_age() {
    let keep = crate::config::AutoCompact { keep_ms: 60_000, keep_revisions: 5, history_share_percent: 25 };
    let mut rig = Rig::new(Config { autocompact: Some(keep), ..config(1) });
    for i in 0..50u8 {
        rig.ok(put("k", &[i]));
        rig.pass(10_000);
    }
    assert!(rig.member.machine().compacted().0 > 1, "{:?}", rig.member.machine().compacted());
}

// Tickets and limits.

#[test]
fn two_lives_never_answer_each_others_tickets() {
    let mut rig = Rig::new(config(1));
    for id in [5, 6] {
        rig.ok(Txn::of(Op::SessionCreate(session(id, 60_000))));
    }
    rig.ok(acquire(5, Wait::None));
    let waiting = rig.member.submit(acquire(6, Wait::Forever)).unwrap();
    assert_eq!(rig.poll(), []);
    // The wait is in the state; the next life has callers with the same numbers.
    let mut rig = Rig::on(rig.crash(), config(2));
    let mut other = Vec::new();
    for i in 0..8 {
        other.push(rig.member.submit(put(&format!("k{i}"), b"v")).unwrap());
    }
    assert!(other.iter().any(|t| t.number == waiting.number));
    assert_eq!(rig.poll().len(), 8);
    let end = rig.member.submit(Txn::of(Op::SessionEnd { session: SessionId(5), token: None })).unwrap();
    let answers = rig.poll();
    assert_eq!(answers.iter().map(|(t, _)| *t).collect::<Vec<_>>(), [end], "the grant is told to nobody");
}

#[test]
fn a_caller_that_went_away_gets_no_answer() {
    let mut rig = Rig::new(config(1));
    let ticket = rig.member.submit(put("k", b"v")).unwrap();
    rig.member.cancel_ticket(ticket);
    assert_eq!(rig.poll(), []);
    assert_eq!(rig.value("k"), Some(b"v".to_vec()));
}

#[test]
fn limits_refuse_and_large_batches_are_cut_in_one_sync() {
    let mut rig = Rig::new(Config { max_queued: 100, max_batch_bytes: 10_000, ..config(1) });
    assert!(matches!(rig.member.submit(put("k", &vec![0; 2 << 20])), Err(Refusal::TooLarge { .. })));
    for i in 0..100 {
        rig.member.submit(put(&format!("k{i}"), &[1; 1000])).unwrap();
    }
    assert_eq!(rig.member.submit(put("k", b"v")), Err(Refusal::Overloaded));
    let (applied, syncs) = (rig.member.status().applied, rig.disk.counts().1);
    assert_eq!(rig.poll().len(), 100);
    assert!(rig.member.status().applied > applied + 5);
    assert_eq!(rig.disk.counts().1, syncs + 1);
}

#[test]
fn a_stopped_member_refuses_and_leaves_a_marked_log() {
    let mut rig = Rig::new(config(1));
    let ticket = rig.member.submit(put("k", b"v")).unwrap();
    rig.member.stop(Millis(1), &mut rig.out, &mut nobody).unwrap();
    assert_eq!(rig.out.answers[0].0, ticket);
    assert_eq!(rig.member.submit(put("k", b"v")), Err(Refusal::Stopping));
    assert!(matches!(rig.member.read(), Err(Refusal::Stopping)));
    let at = end_of_log(&rig) - 8;
    rig.disk.edit(&rig.newest_segment(), |d| d[at - 64] ^= 1);
    assert!(matches!(Member::open(rig.disk.copy(), config(2), Millis(0)), Err(OpenError::Damaged { .. })));
}

#[test]
fn a_member_can_move_to_the_thread_that_owns_it() {
    fn sendable<T: Send>(_: &T) {}
    sendable(&Rig::new(config(1)).member);
}

/// One sync for each hand-over of a contended lock: whoever only joins the queue does not have one of its own in front of the next release.
#[test]
fn an_acquire_that_must_wait_rides_along() {
    let mut rig = Rig::new(config(1));
    for id in [1, 2, 3] {
        rig.member.submit(Txn::of(Op::SessionCreate(session(id, 60_000)))).unwrap();
    }
    rig.member.submit(acquire(1, Wait::None)).unwrap();
    assert_eq!(rig.poll().len(), 4);
    let index = |rig: &Rig| rig.member.status().last_index;
    let before = index(&rig);
    rig.member.submit(acquire(2, Wait::Forever)).unwrap();
    assert!(rig.poll().is_empty());
    assert_eq!(index(&rig), before, "alone it waits for company");
    rig.member.submit(put("k", b"v")).unwrap();
    assert_eq!(rig.poll().len(), 1, "the put is answered at once");
    assert_eq!(index(&rig), before + 1, "both are in one entry");

    let alone = rig.member.submit(acquire(3, Wait::Ms(50))).unwrap();
    assert!(rig.poll().is_empty());
    let wake = rig.out.wake_at.unwrap().0;
    assert!(wake <= rig.now + RIDE_MS, "the driver is told to come back");
    rig.pass(RIDE_MS);
    assert_eq!(index(&rig), before + 2, "without company it goes alone");
    let answers = rig.pass(200);
    let timed_out = answers.iter().find(|(ticket, _)| *ticket == alone).map(|(_, answer)| answer);
    assert!(
        matches!(timed_out, Some(Answer::Done(Reply { result: Err(Rejection::TimeoutWaiting { .. }), .. }))),
        "its deadline stands: {timed_out:?}"
    );
}
