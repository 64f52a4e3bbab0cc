//! Stories of one member as text: commands above the line, what happened below it. `UPDATE=1` rewrites what is below.
//!
//! `put K V`, `get K`, `session ID TTL`, `renew ID`, `lock ID [WAIT]`, `left ID`; `pass MS` lets time go by as the driver would,
//! `freeze MS` stops the process that long, `crash` starts it anew on what was synced, `state` tells sessions and log time.

use super::tests::{Rig, acquire, config, put, session};
use super::*;
use std::fmt::Write as _;
use tenure_machine::{OpReply, Wait};

struct Story {
    rig: Rig,
    boot: u64,
    /// What each open ticket was for.
    asked: BTreeMap<Ticket, String>,
    told: String,
}

impl Story {
    fn run(script: &str) -> String {
        let rig = Rig::new(config(1));
        let mut story = Self { rig, boot: 1, asked: BTreeMap::new(), told: String::new() };
        for line in script.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
            story.line(line);
        }
        story.told
    }

    fn line(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words.get(i).and_then(|w| w.parse::<u64>().ok()).unwrap_or_default();
        match words[0] {
            "put" => self.submit(line, put(words[1], words[2].as_bytes())),
            "session" => self.submit(line, Txn::of(Op::SessionCreate(session(number(1), number(2))))),
            "lock" if words.len() > 2 => self.submit(line, acquire(number(1), Wait::Ms(number(2)))),
            "lock" => self.submit(line, acquire(number(1), Wait::None)),
            "renew" => {
                let ticket = self.rig.member.renew(SessionId(number(1)), 0);
                self.asked.insert(ticket, line.to_owned());
            }
            "get" => {
                let value = self.rig.value(words[1]).map(|v| String::from_utf8_lossy(&v).into_owned());
                self.tell(&format!("{line}: {}", value.as_deref().unwrap_or("-")));
            }
            "left" => {
                let left = self.rig.member.remaining_ms(SessionId(number(1)), Millis(self.rig.now));
                self.tell(&format!("{line}: {left:?} ms"));
            }
            "freeze" => self.rig.now += number(1),
            "pass" => {
                let answers = self.rig.pass(number(1));
                self.answers(answers);
            }
            "crash" => {
                self.boot += 1;
                self.rig = Rig::on(self.rig.crash(), config(self.boot));
                self.asked.clear();
            }
            "state" => {
                let machine = self.rig.member.machine();
                let sessions: Vec<u64> = machine.sessions(SessionId(0), 100).iter().map(|s| s.id.0).collect();
                let text =
                    format!("log time {} ms, sessions {sessions:?}, revision {}", machine.stamp(), machine.revision());
                self.tell(&text);
            }
            other => panic!("no command {other}"),
        }
    }

    fn submit(&mut self, line: &str, txn: Txn) {
        match self.rig.member.submit(txn) {
            Ok(ticket) => {
                self.asked.insert(ticket, line.to_owned());
                let answers = self.rig.poll();
                self.answers(answers);
            }
            Err(refusal) => self.tell(&format!("{line}: refused, {refusal}")),
        }
    }

    fn answers(&mut self, answers: Vec<(Ticket, Answer)>) {
        for (ticket, answer) in answers {
            let asked = self.asked.remove(&ticket).unwrap_or_else(|| "?".to_owned());
            let text = match answer {
                Answer::Done(reply) => match reply.result {
                    Err(rejection) => format!("rejected, {rejection}"),
                    Ok(done) => match &done.results[0] {
                        OpReply::LockGranted(grant) => format!("token {}", grant.token),
                        _ => format!("ok, revision {}", reply.revision),
                    },
                },
                Answer::Renewed(Ok(renewal)) => format!("renewed for {} ms", renewal.ttl_ms),
                Answer::Renewed(Err(rejection)) => format!("rejected, {rejection}"),
                other => format!("{other:?}"),
            };
            self.tell(&format!("{asked}: {text}"));
        }
    }

    fn tell(&mut self, text: &str) {
        writeln!(self.told, "{:>7} ms  {text}", self.rig.now).unwrap();
    }
}

#[test]
fn scripts() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    names.sort();
    assert!(!names.is_empty());
    for path in names {
        let text = std::fs::read_to_string(&path).unwrap();
        let (script, expected) = text.split_once("---\n").unwrap_or((&text, ""));
        let told = Story::run(script);
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, format!("{script}---\n{told}")).unwrap();
        } else {
            assert_eq!(told, expected, "{}", path.display());
        }
    }
}
