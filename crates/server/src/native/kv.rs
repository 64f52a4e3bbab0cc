//! Native keys: get, put, delete, range in pages, transactions.
//!
//! Promises. A failed expectation is a CONFLICT that carries the key as it is, decided and read in one commit. Pages of one range count and
//! continue over one revision.

use bytes::Bytes;
use tenure_machine::{
    Compare, CompareTarget, Delete, Key, NamespaceId, Op, OpReply, Order, Put, Range, RangeReply, Relation,
    RequireLock, Revision, SortBy, Space, Span, SubTxn, Txn, TxnReply,
};
use tenure_wire::tenure::v1;

use super::{
    Caller, Finish, NativeRead, Plan, Refused, either, header, key, namespace, planned, record, refuse, request_id,
    session_id,
};
use crate::Context;
use crate::rpc::Router;
use crate::status as words;

/// Keys of a page, unless the caller names fewer or more.
const PAGE_DEFAULT: u32 = 1_000;
const PAGE_MAX: u32 = 10_000;
/// A page ends when it has so many bytes.
const PAGE_BYTES: usize = 1 << 20;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    planned(router, context, "/tenure.v1.Kv/Get", |_, _, request| get(&request));
    planned(router, context, "/tenure.v1.Kv/Put", |_, caller, request| put(caller, &request));
    planned(router, context, "/tenure.v1.Kv/Delete", |_, caller, request| delete(caller, &request));
    planned(router, context, "/tenure.v1.Kv/Range", |_, _, request| range(&request));
    planned(router, context, "/tenure.v1.Kv/Txn", |context, caller, request| txn(context, caller, &request));
}

pub(crate) fn get(request: &v1::GetRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let name = filled(either("key", &request.key, &request.key_bytes)?)?;
    let key = key(namespace, name);
    let finish = Finish::Get(name.into());
    let read = if request.revision == 0 {
        NativeRead::Get(key)
    } else {
        NativeRead::Range(Box::new(Range { revision: revision(request.revision)?, ..Range::of(Span::one(key)) }))
    };
    Ok(Plan::Read(read, request.stale, finish))
}

fn filled(name: &[u8]) -> Result<&[u8], Refused> {
    if name.is_empty() { Err(refuse("key", "the key is empty")) } else { Ok(name) }
}

fn revision(revision: u64) -> Result<i64, Refused> {
    i64::try_from(revision).map_err(|_| refuse("revision", "a revision is below 2^63"))
}

pub(crate) fn got(
    key: &[u8],
    found: Option<&tenure_machine::Record>,
    revision: Revision,
) -> Result<v1::GetReply, Refused> {
    match found {
        Some(found) => Ok(v1::GetReply { header: Some(header(revision, false)), record: Some(record(found)) }),
        None => {
            let facts = [("name", String::from_utf8_lossy(key).into_owned()), ("revision", revision.to_string())];
            Err(Box::new(words::not_found("there is no such key", &facts)))
        }
    }
}

pub(crate) fn put(caller: &Caller, request: &v1::PutRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let put = put_op(namespace, request)?;
    let mut txn = Txn {
        namespace,
        request: request_id(request.request.as_ref(), caller)?,
        requires: requires(&request.require_locks)?,
        then: Vec::with_capacity(1),
        ..Txn::default()
    };
    if let Some(fact) = request.expect.as_ref().and_then(|expect| expect.fact.as_ref()) {
        expect(&mut txn, put.key.clone(), fact);
    }
    txn.then.push(Op::Put(put));
    Ok(Plan::Write(txn, Finish::Put))
}

fn put_op(namespace: NamespaceId, request: &v1::PutRequest) -> Result<Put, Refused> {
    Ok(Put {
        key: key(namespace, filled(either("key", &request.key, &request.key_bytes)?)?),
        value: either("value", &request.value, &request.value_bytes)?.into(),
        session: session_id("session", request.session)?,
        prev: request.prev,
        keep_value: false,
        keep_session: false,
    })
}

/// Makes the transaction depend on the key, and read the key where it is not as expected.
fn expect(txn: &mut Txn, key: Key, fact: &v1::expect::Fact) {
    use v1::expect::Fact;
    let (relation, target) = match fact {
        Fact::Absent(true) => (Relation::Equal, CompareTarget::Version(0)),
        Fact::Absent(false) => (Relation::Greater, CompareTarget::Version(0)),
        Fact::Version(n) => (Relation::Equal, CompareTarget::Version(signed(*n))),
        Fact::ModRevision(n) => (Relation::Equal, CompareTarget::ModRevision(signed(*n))),
        Fact::Value(text) => (Relation::Equal, CompareTarget::Value(text.as_bytes().into())),
        Fact::ValueBytes(bytes) => (Relation::Equal, CompareTarget::Value(bytes[..].into())),
    };
    txn.compares.push(Compare { span: Span::one(key.clone()), relation, target });
    txn.otherwise.push(Op::Range(Range::of(Span::one(key))));
}

fn requires(locks: &[v1::RequireLock]) -> Result<Vec<RequireLock>, Refused> {
    let one = |lock: &v1::RequireLock| {
        if lock.name.is_empty() {
            return Err(refuse("require_locks.name", "the name of a lock is empty"));
        }
        Ok(RequireLock { name: lock.name.as_bytes().into(), token: Revision(lock.token) })
    };
    locks.iter().map(one).collect()
}

pub(crate) fn delete(caller: &Caller, request: &v1::DeleteRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let delete = delete_op(namespace, request)?;
    let mut txn = Txn {
        namespace,
        request: request_id(request.request.as_ref(), caller)?,
        requires: requires(&request.require_locks)?,
        ..Txn::default()
    };
    if let Some(fact) = request.expect.as_ref().and_then(|expect| expect.fact.as_ref()) {
        if delete.span.end.is_some() {
            return Err(refuse("expect", "an expectation is about one key"));
        }
        expect(&mut txn, delete.span.start.clone(), fact);
    }
    txn.then.push(Op::Delete(delete));
    Ok(Plan::Write(txn, Finish::Delete))
}

fn delete_op(namespace: NamespaceId, request: &v1::DeleteRequest) -> Result<Delete, Refused> {
    let start = either("key", &request.key, &request.key_bytes)?;
    let end = either("end", &request.end, &request.end_bytes)?;
    let span = match (request.prefix, end.is_empty()) {
        (true, false) => return Err(refuse("prefix", "a prefix has no end")),
        (true, true) => prefix_span(namespace, start),
        (false, false) => Span { start: key(namespace, start), end: Some(key(namespace, end)) },
        (false, true) => Span::one(key(namespace, filled(start)?)),
    };
    Ok(Delete { span, prev: request.prev })
}

/// Where a range begins. No key is empty, and the state machine refuses to look for one: the first that can be stands for it.
fn first(namespace: NamespaceId, start: &[u8]) -> Key {
    key(namespace, if start.is_empty() { &[0] } else { start })
}

/// Every key that begins so.
fn prefix_span(namespace: NamespaceId, prefix: &[u8]) -> Span {
    let mut end = prefix.to_vec();
    while end.last() == Some(&0xff) {
        end.pop();
    }
    let end = match end.last_mut() {
        Some(last) => {
            *last += 1;
            key(namespace, &end)
        }
        None => Key::end_of(Space::Keys, namespace),
    };
    Span { start: first(namespace, prefix), end: Some(end) }
}

/// What a page needs to know to be answered.
pub(crate) struct Page {
    /// Keys of the pages before.
    delivered: u64,
}

pub(crate) fn range(request: &v1::RangeRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let mut range = range_op(namespace, request)?;
    range.limit = i64::from(match request.limit {
        0 => PAGE_DEFAULT,
        more if more > PAGE_MAX => return Err(refuse("limit", format!("a page has at most {PAGE_MAX} keys"))),
        limit => limit,
    });
    let delivered = resume(&mut range, &request.resume, namespace)?;
    Ok(Plan::Read(NativeRead::Range(Box::new(range)), request.stale, Finish::Range(Box::new(Page { delivered }))))
}

fn range_op(namespace: NamespaceId, request: &v1::RangeRequest) -> Result<Range, Refused> {
    let start = either("key", &request.key, &request.key_bytes)?;
    let end = either("end", &request.end, &request.end_bytes)?;
    let span = match (request.prefix, end.is_empty()) {
        (true, false) => return Err(refuse("prefix", "a prefix has no end")),
        (true, true) => prefix_span(namespace, start),
        (false, false) => Span { start: first(namespace, start), end: Some(key(namespace, end)) },
        (false, true) => Span { start: first(namespace, start), end: Some(Key::end_of(Space::Keys, namespace)) },
    };
    Ok(Range {
        revision: revision(request.revision)?,
        order: if request.descending { Order::Descending } else { Order::None },
        sort_by: SortBy::Key,
        keys_only: request.keys_only,
        count_only: request.count_only,
        limit: i64::from(request.limit),
        ..Range::of(span)
    })
}

/// Goes on where a page ended: a mark is the number of keys delivered so far (8 bytes, big endian) and the last of them.
fn resume(range: &mut Range, mark: &[u8], namespace: NamespaceId) -> Result<u64, Refused> {
    if mark.is_empty() {
        return Ok(0);
    }
    let Some((delivered, last)) = mark.split_first_chunk::<8>() else {
        return Err(refuse("resume", "this is not the `next` of a page"));
    };
    if range.order == Order::Descending {
        range.span.end = Some(key(namespace, last));
    } else {
        let mut next = last.to_vec();
        next.push(0);
        range.span.start = key(namespace, &next);
    }
    Ok(u64::from_be_bytes(*delivered))
}

fn mark(delivered: u64, last: &[u8]) -> Bytes {
    let mut mark = delivered.to_be_bytes().to_vec();
    mark.extend_from_slice(last);
    mark.into()
}

impl Page {
    pub(crate) fn answer(&self, range: &RangeReply, revision: Revision) -> v1::RangeReply {
        let mut records = Vec::with_capacity(range.records.len());
        let mut bytes = 0;
        for found in &range.records {
            if bytes >= PAGE_BYTES {
                break;
            }
            bytes += found.as_bytes().len();
            records.push(shown(found, range.keys_only));
        }
        let next = match range.records.get(records.len().wrapping_sub(1)) {
            Some(last) if range.more || records.len() < range.records.len() => {
                mark(self.delivered + records.len() as u64, last.name())
            }
            _ => Bytes::new(),
        };
        v1::RangeReply { header: Some(header(revision, false)), records, count: self.delivered + range.count, next }
    }
}

fn shown(found: &tenure_machine::Record, keys_only: bool) -> v1::Record {
    let mut shown = record(found);
    if keys_only {
        shown.value = String::new();
        shown.value_bytes = Bytes::new();
    }
    shown
}

pub(crate) fn txn(context: &Context, caller: &Caller, request: &v1::TxnRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let depth_max = context.settings.max_txn_ops;
    let txn = Txn {
        namespace,
        request: request_id(request.request.as_ref(), caller)?,
        requires: requires(&request.require_locks)?,
        compares: compares(namespace, &request.compares)?,
        then: ops(namespace, &request.then, depth_max)?,
        otherwise: ops(namespace, &request.otherwise, depth_max)?,
        ..Txn::default()
    };
    Ok(Plan::Write(txn, Finish::Txn))
}

fn compares(namespace: NamespaceId, compares: &[v1::Compare]) -> Result<Vec<Compare>, Refused> {
    compares.iter().map(|one| compare(namespace, one)).collect()
}

pub(super) fn compare(namespace: NamespaceId, request: &v1::Compare) -> Result<Compare, Refused> {
    use v1::compare::{Fact, Relation as Wire};
    let start = either("compares.key", &request.key, &request.key_bytes)?;
    let end = either("compares.end", &request.end, &request.end_bytes)?;
    let span = match (request.prefix, end.is_empty()) {
        (true, false) => return Err(refuse("compares.prefix", "a prefix has no end")),
        (true, true) => prefix_span(namespace, start),
        (false, false) => Span { start: key(namespace, start), end: Some(key(namespace, end)) },
        (false, true) => Span::one(key(namespace, filled(start)?)),
    };
    let relation = match Wire::try_from(request.relation) {
        Ok(Wire::Equal) => Relation::Equal,
        Ok(Wire::NotEqual) => Relation::NotEqual,
        Ok(Wire::Greater) => Relation::Greater,
        Ok(Wire::Less) => Relation::Less,
        Err(_) => return Err(refuse("compares.relation", "there is no such relation")),
    };
    let target = match &request.fact {
        Some(Fact::Version(n)) => CompareTarget::Version(signed(*n)),
        Some(Fact::CreateRevision(n)) => CompareTarget::CreateRevision(signed(*n)),
        Some(Fact::ModRevision(n)) => CompareTarget::ModRevision(signed(*n)),
        Some(Fact::Value(text)) => CompareTarget::Value(text.as_bytes().into()),
        Some(Fact::ValueBytes(bytes)) => CompareTarget::Value(bytes[..].into()),
        Some(Fact::Session(n)) => CompareTarget::Lease(session_id("compares.session", *n)?.0 as i64),
        None => return Err(refuse("compares.fact", "a compare names what it compares with")),
    };
    Ok(Compare { span, relation, target })
}

/// What no version and no revision reaches is the largest number.
fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn ops(namespace: NamespaceId, requests: &[v1::Op], depth_max: usize) -> Result<Vec<Op>, Refused> {
    requests.iter().map(|one| op(namespace, one, depth_max)).collect()
}

pub(super) fn op(namespace: NamespaceId, request: &v1::Op, depth_max: usize) -> Result<Op, Refused> {
    use v1::op::Op as Wire;
    match request.op.as_ref().ok_or_else(|| refuse("op", "the operation is empty"))? {
        Wire::Put(put) => {
            whole_only(&put.namespace, put.request.is_some(), !put.require_locks.is_empty())?;
            no_expect(put.expect.as_ref())?;
            Ok(Op::Put(put_op(namespace, put)?))
        }
        Wire::Delete(delete) => {
            whole_only(&delete.namespace, delete.request.is_some(), !delete.require_locks.is_empty())?;
            no_expect(delete.expect.as_ref())?;
            Ok(Op::Delete(delete_op(namespace, delete)?))
        }
        Wire::Range(range) => {
            whole_only(&range.namespace, range.stale, false)?;
            let mut op = range_op(namespace, range)?;
            resume(&mut op, &range.resume, namespace)?;
            Ok(Op::Range(op))
        }
        Wire::Txn(txn) => {
            whole_only(&txn.namespace, txn.request.is_some(), !txn.require_locks.is_empty())?;
            let depth_max =
                depth_max.checked_sub(1).ok_or_else(|| refuse("op.txn", "the transactions are nested too deep"))?;
            Ok(Op::Txn(Box::new(SubTxn {
                compares: compares(namespace, &txn.compares)?,
                then: ops(namespace, &txn.then, depth_max)?,
                otherwise: ops(namespace, &txn.otherwise, depth_max)?,
            })))
        }
    }
}

/// What belongs to the whole transaction is not said of one operation.
fn whole_only(namespace: &str, has_request: bool, has_locks: bool) -> Result<(), Refused> {
    if namespace.is_empty() && !has_request && !has_locks {
        return Ok(());
    }
    Err(refuse("op", "`namespace`, `request`, `require_locks` and `stale` belong to the whole transaction"))
}

fn no_expect(expect: Option<&v1::Expect>) -> Result<(), Refused> {
    match expect.and_then(|expect| expect.fact.as_ref()) {
        Some(_) => Err(refuse("op.expect", "in a transaction say it with `compares`")),
        None => Ok(()),
    }
}

pub(crate) fn txn_answer(header: Option<v1::Header>, reply: &TxnReply) -> Result<v1::TxnReply, Refused> {
    let replies = reply.results.iter().map(op_answer).collect::<Result<_, _>>()?;
    Ok(v1::TxnReply { header, succeeded: reply.succeeded, replies })
}

pub(super) fn op_answer(result: &OpReply) -> Result<v1::OpReply, Refused> {
    use v1::op_reply::Result as Wire;
    let result = match result {
        OpReply::Put { prev } => Wire::Put(v1::PutReply { header: None, prev: prev.as_ref().map(record) }),
        OpReply::Delete { deleted, prev } => {
            Wire::Delete(v1::DeleteReply { header: None, deleted: *deleted, prev: prev.iter().map(record).collect() })
        }
        OpReply::Range(range) => {
            let records: Vec<_> = range.records.iter().map(|found| shown(found, range.keys_only)).collect();
            let next = match range.records.last() {
                Some(last) if range.more => mark(records.len() as u64, last.name()),
                _ => Bytes::new(),
            };
            Wire::Range(v1::RangeReply { header: None, records, count: range.count, next })
        }
        OpReply::Txn(inner) => Wire::Txn(txn_answer(None, inner)?),
        OpReply::ResultNotRetained => return Err(Box::new(words::not_retained())),
        _ => return Err(super::mixed_up()),
    };
    Ok(v1::OpReply { result: Some(result) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let check = |prefix: &[u8], end: &[u8]| {
            let span = prefix_span(NamespaceId::DEFAULT, prefix);
            assert_eq!(span.end.unwrap(), key(NamespaceId::DEFAULT, end), "{prefix:?}");
        };
        check(b"a", b"b");
        check(b"a\xff\xff", b"b");
        let all = prefix_span(NamespaceId::DEFAULT, b"\xff\xff");
        assert_eq!(all.end.unwrap(), Key::end_of(Space::Keys, NamespaceId::DEFAULT));
    }

    #[test]
    fn both_forms_of_a_key_are_refused() {
        let request = v1::GetRequest { key: "a".to_owned(), key_bytes: Bytes::from_static(b"a"), ..Default::default() };
        let error = get(&request).err().unwrap();
        assert_eq!((error.code.as_str(), error.facts["field"].as_str()), ("INVALID", "key"));
    }

    #[test]
    fn numbers_beyond_all_are_compared_as_such() {
        use v1::compare::{Fact, Relation as Wire};
        let read = |fact| {
            let (key, relation) = ("a".to_owned(), Wire::Less.into());
            compare(NamespaceId::DEFAULT, &v1::Compare { key, relation, fact: Some(fact), ..Default::default() })
        };
        let check = |fact, expected| assert_eq!(read(fact).unwrap().target, expected);
        check(Fact::Version(7), CompareTarget::Version(7));
        check(Fact::Version(u64::MAX), CompareTarget::Version(i64::MAX));
        check(Fact::CreateRevision(1 << 63), CompareTarget::CreateRevision(i64::MAX));
        check(Fact::ModRevision(u64::MAX), CompareTarget::ModRevision(i64::MAX));
        assert_eq!(read(Fact::Session(1 << 63)).err().unwrap().facts["field"], "compares.session");
    }

    #[test]
    fn a_mark_resumes() {
        let mut range = Range::of(prefix_span(NamespaceId::DEFAULT, b"k"));
        assert_eq!(resume(&mut range, &mark(12, b"k5"), NamespaceId::DEFAULT).unwrap(), 12);
        assert_eq!(range.span.start.name(), b"k5\0");
        assert!(resume(&mut range, b"short", NamespaceId::DEFAULT).is_err());
    }
}
