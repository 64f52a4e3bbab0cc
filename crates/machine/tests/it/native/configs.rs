//! Configuration in scripts.

use super::Said;
use std::collections::BTreeMap;
use tenure_machine::*;

/// `config-publish K text expect=1 by=schema author=a share=500 label=zone:eu`, `config-rollback K 1`, `config-schema K text checked=1 expect=0`
/// (`-` removes it), `config-stage K 2 share=..`, `config-promote K 2`, `config-abort K 2`, `config-delete K`, `config-purge K 3`.
pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let key = || -> Box<str> { said.plain(0).unwrap().into() };
    let option = |name: &str| said.option(name).map(|n| n.parse().unwrap());
    let number = |n: usize| said.plain(n).unwrap().parse().unwrap();
    let note = || ConfigNote {
        key: key(),
        expect: option("expect"),
        author: said.option("author").unwrap_or_default().into(),
        comment: said.option("comment").unwrap_or_default().into(),
        time_ms: said.number("time"),
        checked_by: said.number("by"),
    };
    let rollout = || Rollout {
        share: said.number("share") as u32,
        labels: said
            .option("label")
            .map(|l| l.split_once(':').unwrap())
            .map(|(n, v)| (n.into(), v.into()))
            .into_iter()
            .collect(),
    };
    let at = || ConfigAt { key: key(), version: number(1) };
    let op = match said.verb {
        "config-publish" => {
            let text = said.plain(1).unwrap();
            let content = match text.strip_prefix("zeros*") {
                Some(n) => vec![b'0'; n.parse().unwrap()],
                None => text.as_bytes().to_vec(),
            };
            ConfigOp::Publish(ConfigPublish {
                note: note(),
                media: "text/plain".into(),
                digest: [content.len() as u8; 32],
                content: content.into(),
                rollout: said.option("share").map(|_| rollout()),
            })
        }
        "config-rollback" => ConfigOp::Rollback((note(), number(1))),
        "config-schema" => ConfigOp::SetSchema(ConfigSchemaSet {
            key: key(),
            expect: option("expect"),
            checked: said.number("checked"),
            text: said.plain(1).filter(|text| *text != "-").map(|text| text.as_bytes().into()),
        }),
        "config-stage" => ConfigOp::Stage(ConfigStage { key: key(), version: number(1), rollout: rollout() }),
        "config-promote" => ConfigOp::Promote(at()),
        "config-abort" => ConfigOp::Abort(at()),
        "config-delete" => ConfigOp::Delete(note()),
        "config-purge" => ConfigOp::Purge(at()),
        _ => return None,
    };
    Some(op.into())
}

/// `show config K`: the key with its versions; `show given K`: how many of 1,000 instances are given the candidate, here and of the zone eu.
pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    let [key] = rest else { return None };
    let config = machine.object::<Config>(namespace, key.as_bytes());
    match (what, config) {
        ("config" | "given", None) => Some(format!("no config {key}")),
        ("config", Some(config)) => Some(show_config(machine, namespace, key, config)),
        ("given", Some(config)) => {
            let candidate = config.candidate.as_ref().map_or(0, |candidate| candidate.version.number);
            let count = |labels: &BTreeMap<String, String>| {
                let given =
                    |n: &u32| config.for_instance(key, &format!("i{n}"), labels).is_some_and(|v| v.number == candidate);
                (0..1_000).filter(given).count()
            };
            let eu = BTreeMap::from([("zone".to_owned(), "eu".to_owned())]);
            let nobody = config.for_instance(key, "", &BTreeMap::new()).map_or(0, |v| v.number);
            Some(format!("{} of 1000, {} of 1000 in eu; nobody is given {nobody}", count(&BTreeMap::new()), count(&eu)))
        }
        _ => None,
    }
}

fn show_config(machine: &Machine, namespace: NamespaceId, key: &str, config: &Config) -> String {
    let current = config.current.as_ref().map_or(0, |version| version.number);
    let schema = config.schema.as_ref().map_or(0, |schema| schema.number);
    let candidate = config.candidate.as_ref().map_or(String::new(), |c| format!(", candidate {}", c.version.number));
    let version = |v: &ConfigVersion| {
        let text = String::from_utf8_lossy(&v.content);
        let text = if text.len() > 20 { format!("{} bytes", text.len()) } else { text.into_owned() };
        let copy = if v.copy_of > 0 { format!(" copy of {}", v.copy_of) } else { String::new() };
        let deleted = if v.deleted { " deleted" } else { "" };
        format!("\n  {} at {} `{text}` by `{}` schema={}{copy}{deleted}", v.number, v.revision, v.author, v.schema)
    };
    let versions: Vec<_> = machine.config_versions(namespace, key, 0, 100).into_iter().map(version).collect();
    format!(
        "config {key}: current {current}{candidate}, schema {schema}, changed at {}{}",
        config.revision,
        versions.concat()
    )
}
