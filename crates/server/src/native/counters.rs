//! Native counters and sequences: add, set, delete, next, look, list.

use tenure_machine::{
    BLOCK_MAX, Counter, CounterAdd, CounterDelete, CounterExpect, CounterOp, CounterReply, CounterSet, OpReply,
    Revision, Sequence, SequenceNext, Txn,
};
use tenure_wire::tenure::v1;

use super::sessions::page_limit;
use super::{Caller, Refused, change, look, mixed_up, namespace, refuse, reply_of, seen, text, txn_of};
use crate::Context;
use crate::driver::View;
use crate::rpc::Router;
use crate::status as words;

const NAME_BYTES_MAX: usize = 1_024;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Counters/Add", plan_add, |_, request: &v1::CounterAddRequest, changed| {
        let counter = Some(shown(&request.name, counted(changed.reply)?));
        Ok(v1::CounterAddReply { header: Some(changed.header), counter })
    });
    change(router, context, "/tenure.v1.Counters/Set", plan_set, |_, request: &v1::CounterSetRequest, changed| {
        let counter = Some(shown(&request.name, counted(changed.reply)?));
        Ok(v1::CounterSetReply { header: Some(changed.header), counter })
    });
    change(router, context, "/tenure.v1.Counters/Delete", plan_delete, |_, _, changed| {
        let CounterReply::Deleted(deleted) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::CounterDeleteReply { header: Some(changed.header), deleted })
    });
    change(router, context, "/tenure.v1.Sequences/Next", plan_next, |_, _, changed| {
        let CounterReply::Numbers(numbers) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::SequenceNextReply { header: Some(changed.header), from: numbers.from, to: numbers.to })
    });
    look(router, context, "/tenure.v1.Counters/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Counters/List", |request| request.stale, list);
    look(router, context, "/tenure.v1.Sequences/Get", |request| request.stale, get_sequence);
    look(router, context, "/tenure.v1.Sequences/List", |request| request.stale, list_sequences);
}

fn plan_add(_: &Context, caller: &Caller, request: &v1::CounterAddRequest) -> Result<Txn, Refused> {
    let delta = request.delta.ok_or_else(|| refuse("delta", "say how much to add"))?;
    let (min, max) = (request.min, request.max);
    if min.zip(max).is_some_and(|(min, max)| min > max) {
        return Err(refuse("min", "the lower bound is above the upper one"));
    }
    let op = CounterOp::Add(CounterAdd { name: name(&request.name)?, delta, min, max });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_set(_: &Context, caller: &Caller, request: &v1::CounterSetRequest) -> Result<Txn, Refused> {
    let value = request.value.ok_or_else(|| refuse("value", "say what to set it to"))?;
    let expect = expectation(request.expect.as_ref())?;
    let op = CounterOp::Set(CounterSet { name: name(&request.name)?, value, expect });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_delete(_: &Context, caller: &Caller, request: &v1::CounterDeleteRequest) -> Result<Txn, Refused> {
    let expect = expectation(request.expect.as_ref())?;
    let op = CounterOp::Delete(CounterDelete { name: name(&request.name)?, expect });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_next(_: &Context, caller: &Caller, request: &v1::SequenceNextRequest) -> Result<Txn, Refused> {
    let block = request.block.max(1);
    if block > BLOCK_MAX {
        return Err(refuse("block", format!("a call takes at most {BLOCK_MAX} numbers")));
    }
    let op = CounterOp::Next(SequenceNext { name: name(&request.name)?, block, at_least: request.at_least });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn name(name: &str) -> Result<Box<[u8]>, Refused> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(refuse("name", format!("a name has 1 to {NAME_BYTES_MAX} bytes")));
    }
    Ok(name.as_bytes().into())
}

fn expectation(expect: Option<&v1::CounterExpect>) -> Result<Option<CounterExpect>, Refused> {
    use v1::counter_expect::Fact;
    let Some(expect) = expect else { return Ok(None) };
    match expect.fact {
        Some(Fact::Absent(true)) => Ok(Some(CounterExpect::Absent)),
        Some(Fact::Absent(false)) => Err(refuse("expect.absent", "expect a value or a revision of what is there")),
        Some(Fact::Value(value)) => Ok(Some(CounterExpect::Value(value))),
        Some(Fact::Revision(revision)) => Ok(Some(CounterExpect::Changed(Revision(revision)))),
        None => Err(refuse("expect", "say what is expected, or leave it out")),
    }
}

fn counted(reply: OpReply) -> Result<Counter, Refused> {
    match reply_of(reply)? {
        CounterReply::Counted(counter) => Ok(counter),
        _ => Err(mixed_up()),
    }
}

fn shown(name: &str, counter: Counter) -> v1::Counter {
    v1::Counter { name: name.to_owned(), value: counter.value, revision: counter.changed.0 }
}

fn get(view: &View<'_>, request: &v1::CounterGetRequest) -> Result<v1::CounterGetReply, Refused> {
    let found = view.machine.object::<Counter>(namespace(&request.namespace)?, &name(&request.name)?);
    let counter = found.ok_or_else(|| missing("counter", &request.name))?;
    Ok(v1::CounterGetReply { header: seen(view, request.stale), counter: Some(shown(&request.name, *counter)) })
}

fn list(view: &View<'_>, request: &v1::CounterListRequest) -> Result<v1::CounterListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let page = view.machine.objects::<Counter>(namespace, request.prefix.as_bytes(), after(&request.after), max);
    let counters: Vec<_> = page.iter().map(|(name, counter)| shown(&text(name), **counter)).collect();
    let next = counters.last().filter(|_| counters.len() == max).map_or_else(String::new, |last| last.name.clone());
    Ok(v1::CounterListReply { header: seen(view, request.stale), counters, next })
}

fn get_sequence(view: &View<'_>, request: &v1::SequenceGetRequest) -> Result<v1::SequenceGetReply, Refused> {
    let found = view.machine.object::<Sequence>(namespace(&request.namespace)?, &name(&request.name)?);
    let sequence = found.ok_or_else(|| missing("sequence", &request.name))?;
    let sequence = Some(shown_sequence(request.name.clone(), *sequence));
    Ok(v1::SequenceGetReply { header: seen(view, request.stale), sequence })
}

fn list_sequences(view: &View<'_>, request: &v1::SequenceListRequest) -> Result<v1::SequenceListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let page = view.machine.objects::<Sequence>(namespace, request.prefix.as_bytes(), after(&request.after), max);
    let sequences: Vec<_> = page.iter().map(|(name, sequence)| shown_sequence(text(name), **sequence)).collect();
    let next = sequences.last().filter(|_| sequences.len() == max).map_or_else(String::new, |last| last.name.clone());
    Ok(v1::SequenceListReply { header: seen(view, request.stale), sequences, next })
}

fn shown_sequence(name: String, sequence: Sequence) -> v1::Sequence {
    v1::Sequence { name, next: sequence.next, revision: sequence.changed.0 }
}

fn after(after: &str) -> Option<&[u8]> {
    Some(after.as_bytes()).filter(|after| !after.is_empty())
}

fn missing(what: &str, name: &str) -> Refused {
    Box::new(words::not_found(&format!("there is no such {what}"), &[("name", name.to_owned())]))
}
