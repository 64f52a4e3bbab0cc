//! Text scripts: commands above the line `---`, what the machine says below it. `UPDATE=1` rewrites what is below.
//!
//! Each line is one entry of the log; lines between `batch` and `.` are one. `clock +10s` moves log time, `term 2` the term, `as bob` the
//! principal, `in 3` the namespace, `restore 500 clone=9` makes the state the first of another cluster, `reload` puts a snapshot and its loading between two entries (and checks that they agree). An operation
//! is followed by options: `id=u1` (one-shot) or `id=7/1` (session/number, `id=7/1<3` acknowledges those below 3), `guard=NAME:TOKEN`.
//! An answer begins with `[N]` if it is for an earlier line: the Nth operation of the script.

use crate::native;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use tenure_machine::*;

#[test]
fn scripts() {
    run_all("scripts", Script::default);
}

/// The primitives of behaviour version 3, each with scripts of its own prefix; the state begins at that version.
#[test]
fn native_scripts() {
    run_all("scripts/native", Script::native);
}

fn run_all(folder: &str, begin: fn() -> Script) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "txt"));
    files.sort();
    assert!(!files.is_empty(), "the scripts are there");
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with('#'), "{}: the first line says why", file.display());
        let (commands, expected) = text.split_once("---\n").unwrap_or((&text, ""));
        let said = begin().run(commands);
        if said == expected {
            continue;
        }
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&file, format!("{commands}---\n{said}")).unwrap();
        } else {
            wrong.push(format!("{}:\n--- expected\n{expected}--- said\n{said}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[derive(Default)]
pub(crate) struct Script {
    machine: Machine,
    index: u64,
    term: u64,
    clock: u64,
    principal: String,
    namespace: u32,
    tickets: u64,
    batch: Option<Vec<Txn>>,
    /// The checksum after each entry.
    sums: BTreeMap<u64, u64>,
    out: String,
}

impl Script {
    /// At the behaviour version of the native primitives.
    pub(crate) fn native() -> Self {
        let mut script = Self { term: 1, ..Self::default() };
        script.apply(vec![Txn::of(Op::RaiseBehaviour { to: BEHAVIOUR })]);
        script.out.clear();
        script
    }

    pub(crate) fn run(mut self, commands: &str) -> String {
        self.term = 1;
        for line in commands.lines().map(str::trim) {
            if !line.is_empty() && !line.starts_with('#') {
                self.line(line);
            }
        }
        self.out
    }

    fn line(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["clock", ms] => match ms.strip_prefix('-') {
                Some(back) => self.clock -= millis(back),
                None => self.clock += millis(ms.strip_prefix('+').unwrap()),
            },
            ["term", term] => self.term = term.parse().unwrap(),
            ["as", who] => self.principal = who.to_string(),
            ["in", ns] => self.namespace = ns.parse().unwrap(),
            ["batch"] => self.batch = Some(Vec::new()),
            ["."] => {
                let txns = self.batch.take().unwrap();
                self.apply(txns);
            }
            ["restore", revision, rest @ ..] => self.restore(revision, rest.first().copied()),
            ["remembered", ..] => {
                let txn = self.txn(line.strip_prefix("remembered").unwrap());
                let reply = self.machine.remembered(&txn.principal, &txn.request.unwrap(), txn.digest());
                writeln!(self.out, "remembered: {}", reply.map_or("nothing".into(), |r| show_reply(&r))).unwrap();
            }
            ["tick"] => self.apply(Vec::new()),
            ["reload"] => self.reload(),
            ["maintain"] => while self.machine.maintain(1) {},
            ["show", what, rest @ ..] => self.show(what, rest),
            ["read", ..] => self.read(line.strip_prefix("read").unwrap()),
            _ => {
                let txn = self.txn(line);
                match &mut self.batch {
                    Some(batch) => batch.push(txn),
                    None => self.apply(vec![txn]),
                }
            }
        }
    }

    fn apply(&mut self, txns: Vec<Txn>) {
        self.index += 1;
        let first = self.tickets + 1;
        self.tickets += txns.len() as u64;
        let batch = Batch {
            behaviour: self.machine.behaviour(),
            stamp: LogTime(self.clock),
            origin: Origin { member: MemberId(1), boot: 1, first },
            txns,
        };
        let at = Position { index: Index(self.index), term: Term(self.term) };
        let mut out = Applied::default();
        if let Err(fault) = self.machine.apply_encoded(at, &batch.encode(), &mut out) {
            writeln!(self.out, "FAULT {fault}").unwrap();
            return;
        }
        self.sums.insert(self.index, self.machine.checksum());
        for change in &out.changes {
            writeln!(self.out, "  {}", show_change(change)).unwrap();
        }
        for event in &out.sessions {
            if let SessionEvent::ExpiryDropped { id, token } = event {
                writeln!(self.out, "  expiry of session {id} token {token} dropped").unwrap();
            }
        }
        for (ticket, reply) in &out.replies {
            let earlier = if ticket.number < first { format!("[{}] ", ticket.number) } else { String::new() };
            writeln!(self.out, "{earlier}{}", show_reply(reply)).unwrap();
        }
        for number in first..=self.tickets {
            if out.replies.iter().all(|(ticket, _)| ticket.number != number) {
                writeln!(self.out, "[{number}] waits").unwrap();
            }
        }
    }

    fn read(&mut self, line: &str) {
        let txn = self.txn(line);
        let said = match &txn.then[..] {
            [Op::Range(range)] if txn.compares.is_empty() && txn.requires.is_empty() => {
                self.machine.range(range).map(|r| show_op(&OpReply::Range(r)))
            }
            _ => self.machine.read_txn(&txn).map(|r| show_txn(&r)),
        };
        match said {
            Ok(said) => writeln!(self.out, "read: {said}").unwrap(),
            Err(rejection) => writeln!(self.out, "rejected: {rejection}").unwrap(),
        }
    }

    fn restore(&mut self, revision: &str, cluster: Option<&str>) {
        let identity = cluster.map(|c| (c.strip_prefix("clone=").unwrap().parse().unwrap(), [8; 16]));
        match self.machine.restore(Revision(revision.parse().unwrap()), identity) {
            Ok(at) => {
                self.index = at.index.0;
                writeln!(self.out, "restored: the log begins after entry {}", at.index).unwrap();
                // What is kept of it is its snapshot.
                while self.machine.maintain(100) {}
                self.reload();
            }
            Err(rejection) => writeln!(self.out, "rejected: {rejection}").unwrap(),
        }
    }

    fn reload(&mut self) {
        let blocks = snapshot(&mut self.machine, 200);
        let mut loaded = load(&blocks);
        assert_eq!(snapshot(&mut loaded, 200), blocks, "a loaded machine writes the snapshot that it came from");
        assert_eq!(loaded.memory(), self.machine.memory());
        assert_eq!(loaded.counts().sessions, self.machine.counts().sessions);
        self.machine = loaded;
    }

    fn show(&mut self, what: &str, rest: &[&str]) {
        let m = &self.machine;
        let said = match (what, rest) {
            ("session", [id]) => match m.session(SessionId(id.parse().unwrap())) {
                None => format!("no session {id}"),
                Some(s) => format!(
                    "session {} token={} {:?} ttl={}ms {:?} `{}` created={} remaining={:?} keys={} locks={}",
                    s.id, s.token, s.face, s.ttl_ms, s.on_expire, s.name, s.created, s.remaining_ms, s.keys, s.locks
                ),
            },
            ("keys", [id]) => {
                let keys = m.session_keys(SessionId(id.parse().unwrap()));
                let names: Vec<_> = keys.iter().map(|k| k.name().escape_ascii().to_string()).collect();
                format!("session {id} owns [{}]", names.join(" "))
            }
            ("sessions", []) => {
                let ids: Vec<_> = m.sessions(SessionId(0), 100).iter().map(|s| s.id.to_string()).collect();
                format!("sessions [{}]", ids.join(" "))
            }
            ("lock", [name]) => match m.lock(NamespaceId(self.namespace), name.as_bytes()) {
                None => format!("lock {name} is free"),
                Some(info) => show_lock(&info),
            },
            ("locks", rest) => {
                let prefix = rest.first().copied().unwrap_or_default().as_bytes();
                let after = rest.get(1).map(|a| a.as_bytes());
                let names = m.locks(NamespaceId(self.namespace), prefix, after, 100);
                let names: Vec<_> = names.iter().map(|l| l.name.escape_ascii().to_string()).collect();
                format!("locks [{}]", names.join(" "))
            }
            ("members", []) => {
                let members: Vec<_> = m.members().map(|m| format!("\n  {}", show_member(m))).collect();
                format!("members, version {}{}", m.members_version(), members.concat())
            }
            ("cluster", []) => format!("cluster {} issuer {}...", m.cluster(), m.issuer()[0]),
            ("granted", [name, session]) => {
                let grant = m.granted(NamespaceId(self.namespace), name.as_bytes(), id(session), b"");
                format!("granted: {}", grant.map_or("nothing".into(), |g| show_op(&OpReply::LockGranted(g))))
            }
            ("waiting", []) => format!("waiting {:?}", m.waiting_tickets().map(|t| t.number).collect::<Vec<_>>()),
            ("counts", []) => format!("{:?}", m.counts()),
            ("revision", []) => format!("revision {} compacted {}", m.revision(), m.compacted()),
            ("deadline", []) => format!("next deadline {:?}", m.next_deadline().map(|d| d.0)),
            ("limit", [name]) => format!("limit {name} = {}", m.limit(limit(name))),
            ("changes", [space, from]) => {
                let space = if *space == "native" { Space::Native } else { Space::Keys };
                let span =
                    Span { start: Key::from_bytes(&[space as u8]), end: Some(Key::from_bytes(&[space as u8 + 1])) };
                match m.changes(&span, Revision(from.parse().unwrap()), 1 << 20) {
                    Err(rejection) => format!("rejected: {rejection}"),
                    Ok(slice) => {
                        let changes: Vec<_> = slice.changes.iter().map(show_change).collect();
                        format!("changes [{}] next={}", changes.join(", "), slice.next)
                    }
                }
            }
            ("autocompact", [ms, revisions]) => {
                format!("autocompact {:?}", m.autocompact(millis(ms), revisions.parse().unwrap(), 100).map(|r| r.0))
            }
            _ => native::show(m, NamespaceId(self.namespace), what, rest)
                .unwrap_or_else(|| panic!("show {what} {rest:?}")),
        };
        writeln!(self.out, "{said}").unwrap();
    }

    // ---- Commands ----

    fn txn(&self, line: &str) -> Txn {
        let spaced = line.replace(';', " ; ");
        let mut words: Vec<&str> = Vec::new();
        let mut txn =
            Txn { principal: self.principal.as_str().into(), namespace: NamespaceId(self.namespace), ..Txn::default() };
        for word in spaced.split_whitespace() {
            if let Some(id) = word.strip_prefix("id=") {
                txn.request = Some(request(id));
            } else if let Some(guard) = word.strip_prefix("guard=") {
                let (name, token) = guard.split_once(':').unwrap();
                txn.requires
                    .push(RequireLock { name: name.as_bytes().into(), token: Revision(token.parse().unwrap()) });
            } else {
                words.push(word);
            }
        }
        let mut words = words.into_iter().peekable();
        if words.next_if_eq(&"txn").is_some() {
            let sub = self.body(&mut words);
            (txn.compares, txn.then, txn.otherwise) = (sub.compares, sub.then, sub.otherwise);
        } else {
            txn.then = self.ops(&mut words);
        }
        assert!(words.peek().is_none(), "what is `{:?}` in `{line}`", words.collect::<Vec<_>>());
        txn
    }

    fn body<'a>(&self, words: &mut Words<'a, impl Iterator<Item = &'a str>>) -> SubTxn {
        let mut sub = SubTxn { compares: Vec::new(), then: Vec::new(), otherwise: Vec::new() };
        if words.next_if_eq(&"if").is_some() {
            loop {
                sub.compares.push(compare(words.next().unwrap()));
                if words.next_if_eq(&"and").is_none() {
                    break;
                }
            }
        }
        if words.next_if_eq(&"then").is_some() {
            sub.then = self.ops(words);
        }
        if words.next_if_eq(&"else").is_some() {
            sub.otherwise = self.ops(words);
        }
        sub
    }

    fn ops<'a>(&self, words: &mut Words<'a, impl Iterator<Item = &'a str>>) -> Vec<Op> {
        let mut ops = Vec::new();
        loop {
            if words.next_if_eq(&"[").is_some() {
                ops.push(Op::Txn(Box::new(self.body(words))));
                assert_eq!(words.next(), Some("]"));
            } else {
                let mut op = Vec::new();
                if words.peek().is_none_or(|w| ["else", "]"].contains(w)) {
                    return ops;
                }
                while let Some(word) = words.next_if(|w| ![";", "else", "]"].contains(w)) {
                    op.push(word);
                }
                ops.push(self.op(&op));
            }
            if words.next_if_eq(&";").is_none() {
                return ops;
            }
        }
    }

    fn key(&self, name: &str) -> Key {
        let name = if name == "''" { "" } else { name };
        Key::new(Space::Keys, NamespaceId(self.namespace), name.as_bytes())
    }

    fn span(&self, name: &str, end: Option<&&str>) -> Span {
        let end = match end.copied() {
            None => &b""[..],
            Some("*") => &[0],
            Some(end) => end.as_bytes(),
        };
        let name = if name == "''" { "" } else { name };
        Span::etcd(Space::Keys, NamespaceId(self.namespace), name.as_bytes(), end)
    }

    fn op(&self, words: &[&str]) -> Op {
        let verb = words[0];
        let plain: Vec<&str> = words[1..].iter().copied().filter(|w| !w.contains('=')).collect();
        let has = |flag: &str| plain.contains(&flag);
        let option = |name: &str| words[1..].iter().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
        let number = |name: &str| option(name).map_or(0, |n| n.parse::<u64>().unwrap());
        let session = SessionId(number("session"));
        let name = || -> Box<[u8]> { plain[0].trim_matches('\'').as_bytes().into() };
        match verb {
            "put" => {
                let (key, value) = words[1].split_once('=').unwrap();
                let value: Box<[u8]> = match value.strip_prefix("zeros*") {
                    Some(n) => vec![b'0'; n.parse().unwrap()].into(),
                    None => value.as_bytes().into(),
                };
                let (prev, keep_value, keep_session) = (has("prev"), has("keep-value"), has("keep-session"));
                Op::Put(Put { key: self.key(key), value, session, prev, keep_value, keep_session })
            }
            "delete" => {
                let span: Vec<&str> = plain.iter().copied().filter(|w| *w != "prev").collect();
                Op::Delete(Delete { span: self.span(span[0], span.get(1)), prev: has("prev") })
            }
            "get" => {
                let mut range = Range::of(self.span(plain[0], plain.get(1)));
                range.revision = option("rev").map_or(0, |n| n.parse().unwrap());
                range.limit = number("limit") as i64;
                range.count_only = option("count").is_some();
                Op::Range(range)
            }
            "compact" => Op::Compact { revision: plain[0].parse().unwrap() },
            "session" => Op::SessionCreate(create(plain[0], &option, &plain)),
            "end" => Op::SessionEnd { session: id(plain[0]), token: option("token").map(|t| t.parse().unwrap()) },
            "expire" => Op::SessionExpire {
                session: id(plain[0]),
                token: number("token"),
                term: Term(option("term").map_or(self.term, |t| t.parse().unwrap())),
            },
            "checkpoint" => Op::SessionCheckpoint {
                session: id(plain[0]),
                token: number("token"),
                remaining_ms: option("left").map(millis),
            },
            "acquire" => Op::LockAcquire(LockAcquire {
                name: name(),
                session,
                create: option("create").map(|id| create(id, &option, &plain)),
                owner: option("owner").unwrap_or_default().as_bytes().into(),
                mode: LockMode::Exclusive,
                wait: match option("wait") {
                    None => Wait::None,
                    Some("forever") => Wait::Forever,
                    Some(ms) => Wait::Ms(millis(ms)),
                },
            }),
            "release" => Op::LockRelease { name: name(), session, token: Revision(number("token")) },
            "cancel" => Op::LockCancel { name: name(), session, request: option("request").map(request) },
            "genesis" => Op::Genesis { cluster: number("cluster"), issuer: [7; 16] },
            "behaviour" => Op::RaiseBehaviour { to: plain[0].parse().unwrap() },
            "limit" => Op::SetLimit { limit: limit(plain[0]), value: plain[1].parse().unwrap() },
            "checksum" => {
                let at = option("at").map_or(self.machine.position().index.0, |n| n.parse().unwrap());
                let sum = if has("wrong") { 1 } else { self.sums[&at] };
                Op::Checksum { at: Index(at), sum }
            }
            "member" => {
                let id = MemberId(plain[1].parse().unwrap());
                let text = |name: &str| -> Box<str> { option(name).unwrap_or_default().into() };
                let peer = text("peer");
                match plain[0] {
                    "add" => Op::MemberAdd {
                        id,
                        name: text("name"),
                        peer,
                        role: if has("learner") { MemberRole::Learner } else { MemberRole::Voter },
                        replaces: option("replaces").map(|id| MemberId(id.parse().unwrap())),
                        join: [number("join") as u8; 32],
                    },
                    "promote" => Op::MemberPromote { id },
                    "remove" => Op::MemberRemove { id },
                    "update" => Op::MemberUpdate { id, peer },
                    "seen" => Op::MemberSeen { id, index: Index(number("index")) },
                    _ => Op::MemberRegister {
                        id,
                        storage: [number("storage") as u8; 16],
                        boots: number("boots"),
                        peer,
                        clients: option("url").map(Into::into).into_iter().collect(),
                        behaviour: option("behaviour").map_or(BEHAVIOUR, |n| n.parse().unwrap()),
                        release: text("release"),
                    },
                }
            }
            _ => native::op(&native::Said::new(words))
                .unwrap_or_else(|| panic!("unknown operation `{}`", words.join(" "))),
        }
    }
}

type Words<'a, I> = std::iter::Peekable<I>;

fn id(word: &str) -> SessionId {
    SessionId(word.parse().unwrap())
}

fn create<'a>(word: &str, option: &impl Fn(&str) -> Option<&'a str>, plain: &[&str]) -> SessionCreate {
    SessionCreate {
        id: id(word),
        face: if plain.contains(&"etcd") { SessionFace::Etcd } else { SessionFace::Native },
        ttl_ms: option("ttl").map_or(15_000, millis),
        on_expire: if plain.contains(&"keep-keys") { OnExpire::Release } else { OnExpire::Delete },
        name: option("name").unwrap_or_default().into(),
        metadata: Vec::new(),
        alias: None,
        secret: None,
    }
}

pub(crate) fn request(text: &str) -> RequestId {
    match text.split_once('/') {
        None => {
            let mut uuid = [0; 16];
            uuid[..text.len()].copy_from_slice(text.as_bytes());
            RequestId::Uuid(uuid)
        }
        Some((session, rest)) => {
            let (seq, acked) = rest.split_once('<').unwrap_or((rest, "0"));
            let (seq, acked_below) = (seq.parse().unwrap(), acked.parse().unwrap());
            if let Some(series) = session.strip_prefix('~') {
                return RequestId::Series { series: series.parse().unwrap(), seq, acked_below };
            }
            RequestId::Session { session: id(session), seq, acked_below }
        }
    }
}

fn limit(name: &str) -> Limit {
    match name {
        "txn-ops" => Limit::TxnOps,
        "lock-waiters" => Limit::LockWaiters,
        "session-things" => Limit::SessionThings,
        "session-requests" => Limit::SessionRequests,
        "one-shot-requests" => Limit::OneShotRequests,
        "ring-changes" => Limit::RingChanges,
        _ => panic!("unknown limit {name}"),
    }
}

pub(crate) fn millis(text: &str) -> u64 {
    match text.strip_suffix("ms") {
        Some(ms) => ms.parse().unwrap(),
        None => match text.strip_suffix('m') {
            Some(minutes) => minutes.parse::<u64>().unwrap() * 60_000,
            None => text.strip_suffix('s').unwrap().parse::<u64>().unwrap() * 1000,
        },
    }
}

/// `version:a=1`, `create:a..b>3`, `mod:a!=2`, `value:a=x`, `lease:a=7`; conditions as `native/txns.rs` has them.
fn compare(word: &str) -> Compare {
    if let Some((relation, condition)) = native::condition(word) {
        let span = Span::one(Key::from_bytes(b""));
        return Compare { span, relation, target: CompareTarget::Condition(Box::new(condition)) };
    }
    let (target, rest) = word.split_once(':').unwrap();
    let at = rest.find(['=', '!', '<', '>']).unwrap();
    let (keys, rest) = rest.split_at(at);
    let (relation, value) = match rest.as_bytes()[0] {
        b'=' => (Relation::Equal, &rest[1..]),
        b'<' => (Relation::Less, &rest[1..]),
        b'>' => (Relation::Greater, &rest[1..]),
        _ => (Relation::NotEqual, &rest[2..]),
    };
    let (start, end) = keys.split_once("..").unwrap_or((keys, ""));
    let start = if start == "''" { "" } else { start };
    let number = || value.parse().unwrap();
    Compare {
        span: Span::etcd(Space::Keys, NamespaceId::DEFAULT, start.as_bytes(), end.as_bytes()),
        relation,
        target: match target {
            "version" => CompareTarget::Version(number()),
            "create" => CompareTarget::CreateRevision(number()),
            "mod" => CompareTarget::ModRevision(number()),
            "lease" => CompareTarget::Lease(number()),
            _ => CompareTarget::Value(value.as_bytes().into()),
        },
    }
}

// ---- What is shown ----

fn show_record(record: &Record) -> String {
    let meta = record.meta();
    let value = if record.key()[0] == Space::Native as u8 {
        "...".to_string()
    } else if record.value().len() > 40 {
        format!("{} bytes", record.value().len())
    } else {
        record.value().escape_ascii().to_string()
    };
    let owner = if meta.owner.0 == 0 { String::new() } else { format!(" session={}", meta.owner) };
    let name = record.name().escape_ascii();
    format!("{name}={value} create={} mod={} version={}{owner}", meta.create_revision, meta.mod_revision, meta.version)
}

fn show_change(change: &Change) -> String {
    let meta = change.record.meta();
    let space = if change.record.key()[0] == Space::Native as u8 { "native " } else { "" };
    let place = format!("{}.{}", meta.mod_revision, meta.index);
    let before = change.before.as_ref().map_or(String::new(), |b| format!(" (was mod={})", b.meta().mod_revision));
    if meta.tombstone {
        return format!("{place} {space}{} deleted{before}", change.record.name().escape_ascii());
    }
    format!("{place} {space}{}{before}", show_record(&change.record))
}

pub(crate) fn show_reply(reply: &Reply) -> String {
    let replayed = if reply.replayed { "again " } else { "" };
    match &reply.result {
        Ok(txn) => format!("{replayed}rev={} {}", reply.revision, show_txn(txn)),
        Err(rejection) => format!("{replayed}rev={} rejected: {rejection}", reply.revision),
    }
}

fn show_txn(txn: &TxnReply) -> String {
    let results: Vec<_> = txn.results.iter().map(show_op).collect();
    format!("{}{}", if txn.succeeded { "" } else { "else: " }, results.join("; "))
}

fn show_op(reply: &OpReply) -> String {
    match reply {
        OpReply::Native(reply) => native::said(reply),
        OpReply::Put { prev: None } => "put".into(),
        OpReply::Put { prev: Some(prev) } => format!("put, was {}", show_record(prev)),
        OpReply::Delete { deleted, prev } => {
            let prev: Vec<_> = prev.iter().map(|r| format!(", was {}", show_record(r))).collect();
            format!("deleted {deleted}{}", prev.concat())
        }
        OpReply::Range(range) => {
            let records: Vec<_> = range.records.iter().map(show_record).collect();
            format!("[{}] count={}{}", records.join(", "), range.count, if range.more { " more" } else { "" })
        }
        OpReply::Txn(txn) => format!("({})", show_txn(txn)),
        OpReply::SessionCreated { id, token, ttl_ms } => format!("session {id} token={token} ttl={ttl_ms}ms"),
        OpReply::LockGranted(grant) => {
            format!(
                "granted token={} to session {} (token {}, ttl {}ms)",
                grant.token, grant.session, grant.session_token, grant.ttl_ms
            )
        }
        OpReply::LockCancelled { waiters } => format!("cancelled {waiters}"),
        OpReply::Compacted => "compacted".into(),
        OpReply::SessionEnded => "session ended".into(),
        OpReply::LockReleased => "released".into(),
        OpReply::Member(member) => show_member(member),
        OpReply::Done => "done".into(),
        OpReply::ResultNotRetained => "result not retained".into(),
    }
}

fn show_member(m: &MemberRecord) -> String {
    let replaces = m.replaces.map_or(String::new(), |id| format!(" replaces={id}"));
    let come = match m.storage[0] {
        0 => String::new(),
        storage => format!(" storage={storage} boots={} behaviour={} release={}", m.boots, m.behaviour, m.release),
    };
    format!("member {} {} at {} {}{replaces} {:?} seen={}{come}", m.id, m.name, m.peer, m.role, m.clients, m.seen)
}

fn show_lock(info: &LockInfo) -> String {
    let waiters: Vec<_> = info
        .waiters
        .iter()
        .map(|w| format!("{}{} until {:?}", w.session, show_owner(&w.owner), w.deadline.map(|d| d.0)))
        .collect();
    let Some(holder) = info.holder.as_ref() else { return format!("lock {} is free", info.name.escape_ascii()) };
    assert_eq!(holder.token, info.newest);
    format!(
        "lock {} held by {}{} token={} since={} waiters [{}]",
        info.name.escape_ascii(),
        holder.session,
        show_owner(&holder.owner),
        holder.token,
        holder.since,
        waiters.join(", ")
    )
}

fn show_owner(owner: &[u8]) -> String {
    if owner.is_empty() { String::new() } else { format!(" ({})", owner.escape_ascii()) }
}

pub(crate) fn snapshot(machine: &mut Machine, max_bytes: usize) -> Vec<Vec<u8>> {
    machine.snapshot_begin();
    std::iter::from_fn(|| machine.snapshot_next(max_bytes)).collect()
}

pub(crate) fn load(blocks: &[Vec<u8>]) -> Machine {
    let mut loader = Loader::new();
    for block in blocks {
        loader.push(block).unwrap();
    }
    loader.finish().unwrap()
}
