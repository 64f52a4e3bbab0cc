//! Counters and sequences in scripts: `counter-add NAME delta=5 min=0 max=10`, `counter-set NAME value=3`, `counter-delete NAME`, both with
//! `absent`, `if=3` or `at=7` (the revision of the last change), and `sequence-next NAME block=10 from=100`.

use super::Said;
use tenure_machine::*;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let name = || -> Box<[u8]> {
        match said.plain(0).unwrap() {
            "''" => Box::default(),
            "long" => vec![b'n'; 5_000].into(),
            name => name.as_bytes().into(),
        }
    };
    let signed = |option: &str| said.option(option).map(|n| n.parse::<i64>().unwrap());
    let expect = || {
        let changed = || said.option("at").map(|at| CounterExpect::Changed(Revision(at.parse().unwrap())));
        let value = || signed("if").map(CounterExpect::Value);
        said.has("absent").then_some(CounterExpect::Absent).or_else(value).or_else(changed)
    };
    let op = match said.verb {
        "counter-add" => {
            let delta = signed("delta").unwrap();
            CounterOp::Add(CounterAdd { name: name(), delta, min: signed("min"), max: signed("max") })
        }
        "counter-set" => CounterOp::Set(CounterSet { name: name(), value: signed("value").unwrap(), expect: expect() }),
        "counter-delete" => CounterOp::Delete(CounterDelete { name: name(), expect: expect() }),
        "sequence-next" => {
            let block = said.option("block").map_or(1, |n| n.parse().unwrap());
            CounterOp::Next(SequenceNext { name: name(), block, at_least: said.number("from") })
        }
        _ => return None,
    };
    Some(op.into())
}

pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    let said = match (what, rest) {
        ("counter", [name]) => match machine.object::<Counter>(namespace, name.as_bytes()) {
            None => format!("no counter {name}"),
            Some(counter) => format!("counter {name} = {} since {}", counter.value, counter.changed),
        },
        ("counters", rest) => {
            let prefix = rest.first().copied().unwrap_or_default();
            let all = machine.objects::<Counter>(namespace, prefix.as_bytes(), None, 100);
            let all: Vec<_> = all.iter().map(|(name, c)| format!("{}={}", name.escape_ascii(), c.value)).collect();
            format!("counters [{}]", all.join(" "))
        }
        ("sequence", [name]) => match machine.object::<Sequence>(namespace, name.as_bytes()) {
            None => format!("no sequence {name}"),
            Some(sequence) => format!("sequence {name} goes on at {}", sequence.next),
        },
        _ => return None,
    };
    Some(said)
}
