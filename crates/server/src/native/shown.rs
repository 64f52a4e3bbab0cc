//! The things of the native space in words: kinds, names and facts, for whoever watches things of any kind.
//!
//! Promises. S1: the name of a kind and the names of its facts never change; facts are added. S2: numbers are decimal; bytes that are no text
//! are told in base64 under the name with `_bytes` behind it.

use std::collections::BTreeMap;

use base64::Engine as _;
use tenure_machine::{
    Config, Counter, Election, Health, Instance, LOCKS, Object, Pool, Record, SESSIONS, Seen, Sequence, Service,
    SessionId, Stored,
};

use super::{Refused, refuse};

/// Kinds that can be watched, with their letters.
const KINDS: [(&str, u8); 9] = [
    ("session", SESSIONS),
    ("lock", LOCKS),
    ("election", Election::KIND),
    ("config", Config::KIND),
    ("service", Instance::KIND),
    ("service-index", Service::KIND),
    ("counter", Counter::KIND),
    ("sequence", Sequence::KIND),
    ("pool", Pool::KIND),
];
/// Kinds of which there are as many as there is work: a watch of them would be a second copy of it.
const UNWATCHED: [(&str, &str); 5] = [
    ("queue", "receive from it, or look at its metrics"),
    ("job", "look at it, or receive it"),
    ("marker", "look at it"),
    ("idempotency", "begin with `wait_ms`, or look at it"),
    ("reservation", "watch its pool"),
];
/// Between the service's name and the instance's id in keys; a slash where they are told.
const SEPARATOR: u8 = 0;

pub(crate) fn letter(kind: &str) -> Result<u8, Refused> {
    if let Some((_, letter)) = KINDS.iter().find(|(name, _)| *name == kind) {
        return Ok(*letter);
    }
    match UNWATCHED.iter().find(|(name, _)| *name == kind) {
        Some((_, instead)) => Err(refuse("kind", format!("things of kind `{kind}` are not watched: {instead}"))),
        None => {
            let known: Vec<_> = KINDS.iter().map(|(name, _)| *name).collect();
            let why = format!("there is no kind `{kind}`: it is `key`, `any` or one of {}", known.join(", "));
            Err(refuse("kind", why))
        }
    }
}

pub(crate) fn kind(letter: u8) -> &'static str {
    KINDS.iter().find(|(_, of)| *of == letter).map_or("other", |(name, _)| name)
}

/// A name as keys have it. A session is named by its number.
pub(crate) fn stored_name(letter: u8, name: &str, prefix: bool) -> Result<Vec<u8>, Refused> {
    match letter {
        SESSIONS if name.is_empty() => Ok(Vec::new()),
        SESSIONS if prefix => Err(refuse("prefix", "numbers of sessions have no prefix: leave the name out for all")),
        SESSIONS => {
            let id: u64 = name.parse().map_err(|_| refuse("name", "a session is named by its id, a number"))?;
            Ok(id.to_be_bytes().to_vec())
        }
        Instance::KIND => {
            let mut stored = name.as_bytes().to_vec();
            // As a prefix only a slash at the end ends the service's name.
            let slash =
                if prefix { stored.len().checked_sub(1) } else { stored.iter().rposition(|&byte| byte == b'/') };
            if let Some(slash) = slash.filter(|&slash| stored[slash] == b'/') {
                stored[slash] = SEPARATOR;
            }
            Ok(stored)
        }
        _ => Ok(name.as_bytes().to_vec()),
    }
}

/// The name as people know it.
pub(crate) fn told_name(letter: u8, stored: &[u8]) -> Vec<u8> {
    match (letter, <[u8; 8]>::try_from(stored)) {
        (SESSIONS, Ok(id)) => SessionId(u64::from_be_bytes(id)).to_string().into_bytes(),
        (Instance::KIND, _) => stored.iter().map(|&byte| if byte == SEPARATOR { b'/' } else { byte }).collect(),
        _ => stored.to_vec(),
    }
}

/// What a record says of a thing that is there.
pub(crate) fn facts(record: &Record) -> BTreeMap<String, String> {
    let mut facts = Facts::default();
    match Seen::of(record) {
        Some(Seen::Session(session)) => {
            facts.put("token", record.mod_revision());
            facts.put("ttl_ms", session.ttl_ms);
            facts.put("name", &session.name);
            for (name, value) in &session.metadata {
                facts.put(&format!("metadata.{name}"), value);
            }
        }
        Some(Seen::Lock(holder)) => {
            facts.put("token", holder.token);
            facts.put("holder_session", holder.session);
            facts.bytes("holder", &holder.owner);
        }
        Some(Seen::SharedLock(lock)) => {
            facts.put("holders", lock.holds);
            if lock.permits > 0 {
                facts.put("permits", lock.permits);
            }
            if let Some(newest) = lock.newest {
                facts.put("token", newest.token);
                facts.put("holder_session", newest.session);
                facts.bytes("holder", &newest.owner);
            }
        }
        Some(Seen::Object(object)) => object_facts(&object, &mut facts),
        None => {}
    }
    facts.0
}

fn object_facts(object: &Object, facts: &mut Facts) {
    match object {
        Object::Election(election) => {
            let Some(leader) = &election.leader else { return };
            facts.put("token", leader.token);
            facts.put("holder_session", leader.session);
            facts.put("priority", leader.priority);
            facts.put("published", leader.published);
            facts.bytes("value", &leader.value);
        }
        Object::Instance(instance) => {
            facts.put("token", instance.token);
            facts.put("revision", instance.revision);
            facts.put("address", &instance.spec.address);
            facts.put("port", instance.spec.port);
            facts.put("weight", instance.spec.weight);
            facts.put("tags", instance.spec.tags.join(","));
            for (name, value) in &instance.spec.meta {
                facts.put(&format!("meta.{name}"), value);
            }
            let health = match instance.health() {
                Health::Passing => "passing",
                Health::Warning => "warning",
                Health::Critical => "critical",
                Health::Draining => "draining",
            };
            facts.put("health", health);
            facts.put("why", &instance.why);
        }
        Object::Config(config) => {
            facts.put("revision", config.revision);
            facts.put("newest", config.newest);
            let Some(current) = &config.current else { return };
            facts.put("version", current.number);
            facts.put("author", &current.author);
            facts.put("comment", &current.comment);
            facts.put("media", &current.media);
            facts.bytes("content", &current.content);
        }
        Object::Service(service) => facts.put("index", service.index),
        Object::Counter(counter) => {
            facts.put("value", counter.value);
            facts.put("revision", counter.changed);
        }
        Object::Sequence(sequence) => {
            facts.put("next", sequence.next);
            facts.put("revision", sequence.changed);
        }
        Object::Pool(pool) => {
            facts.put("capacity", pool.capacity);
            facts.put("available", pool.available());
            facts.put("held", pool.held);
            facts.put("confirmed", pool.confirmed);
        }
        // The others are not watched.
        _ => {}
    }
}

#[derive(Default)]
struct Facts(BTreeMap<String, String>);

impl Facts {
    fn put(&mut self, name: &str, value: impl ToString) {
        let value = value.to_string();
        if !value.is_empty() {
            self.0.insert(name.to_owned(), value);
        }
    }

    fn bytes(&mut self, name: &str, value: &[u8]) {
        match std::str::from_utf8(value) {
            Ok(text) => self.put(name, text),
            Err(_) => self.put(&format!("{name}_bytes"), base64::engine::general_purpose::STANDARD.encode(value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use tenure_machine::{Check, Instance, InstanceSpec, LogTime, Revision, SessionId};

    use super::*;

    #[test]
    fn who_is_critical_is_told_as_such_also_while_it_drains() {
        let check = |checked, draining, expected: &str| {
            let spec = InstanceSpec {
                address: "127.0.0.1".into(),
                port: 80,
                tags: Vec::new(),
                meta: Vec::new(),
                weight: 1,
                session: SessionId(0),
                check: Check::Ttl(1_000),
                deregister_after_ms: 60_000,
            };
            let instance = Instance {
                spec: Box::new(spec),
                token: Revision(2),
                revision: Revision(2),
                registered: LogTime(0),
                checked,
                why: "".into(),
                since: LogTime(0),
                fell: false,
                draining,
                leaves: None,
            };
            let mut facts = Facts::default();
            object_facts(&Object::Instance(std::sync::Arc::new(instance)), &mut facts);
            assert_eq!(facts.0["health"], expected);
        };
        check(Health::Passing, false, "passing");
        check(Health::Passing, true, "draining");
        check(Health::Critical, true, "critical");
    }
}
