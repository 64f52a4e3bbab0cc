//! etcd's KV service: Range, RangeStream, Put, DeleteRange, Txn, Compact.
//!
//! Promises. K1: a request is checked in the order in which etcd checks it, so that a request with two faults is told the same one.
//! K2: reads are linearizable unless the client asks for a serializable one.
//! Relies on. The checks that need state (leases, revisions, missing keys) are the machine's.

use bytes::{BufMut as _, Bytes, BytesMut};
use tenure_machine::{
    Compare, CompareTarget, Delete, NamespaceId, Op, OpReply, Order, Put, Range, Record, Relation, Reply, Revision,
    SessionId, SortBy, Space, Span, SubTxn, Txn,
};
use tenure_wire::etcd::etcdserverpb as pb;

use super::encode::{self, Fields};
use super::{decode, encoded, failed, require_leader};
use crate::Context;
use crate::driver::ReadReply;
use crate::rpc::{Call, FRAME_HEAD, Incoming, Outgoing, Router, Status};
use crate::status::{self, EtcdError, etcd_rejection};

/// What etcd's envelope adds to a request before its size is judged: two heads and a request id.
const ENVELOPE_BYTES: usize = 18;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    let c = context.clone();
    router.unary("/etcdserverpb.KV/Range", move |call, message| range(c.clone(), call, message));
    let c = context.clone();
    router.stream("/etcdserverpb.KV/RangeStream", move |call, incoming, outgoing| {
        range_stream(c.clone(), call, incoming, outgoing)
    });
    let c = context.clone();
    router.unary("/etcdserverpb.KV/Put", move |call, message| put(c.clone(), call, message));
    let c = context.clone();
    router.unary("/etcdserverpb.KV/DeleteRange", move |call, message| delete_range(c.clone(), call, message));
    let c = context.clone();
    router.unary("/etcdserverpb.KV/Txn", move |call, message| txn(c.clone(), call, message));
    super::unary(router, context, "/etcdserverpb.KV/Compact", compact);
}

async fn range(context: Context, call: Call, message: Bytes) -> Result<Bytes, Status> {
    require_leader(&context, &call)?;
    let request: pb::RangeRequest = decode(message)?;
    check_range(&request)?;
    let fields = match (request.keys_only, pb::range_request::SortTarget::Value as i32 == request.sort_target) {
        (false, _) => Fields::All,
        (true, false) => Fields::Keys,
        (true, true) => Fields::KeysAndLease,
    };
    let (reply, revision) = read(context.range(range_op(&request), request.serializable).await)?;
    Ok(encode::range(&context.identity, revision, &reply, fields))
}

fn read<T>(reply: ReadReply<T>) -> Result<(T, Revision), Status> {
    let (result, revision) = reply.map_err(failed)?;
    Ok((result.map_err(|rejection| etcd_rejection(&rejection))?, revision))
}

async fn put(context: Context, call: Call, message: Bytes) -> Result<Bytes, Status> {
    require_leader(&context, &call)?;
    let size = message.len();
    let request: pb::PutRequest = decode(message)?;
    check_put(&request)?;
    check_size(&context, size)?;
    let reply = write(&context, Txn::of(put_op(&request))).await?;
    match results(&reply)? {
        [OpReply::Put { prev }] => Ok(encode::put(&context.identity, reply.revision, prev.as_ref())),
        _ => Err(unexpected()),
    }
}

async fn delete_range(context: Context, call: Call, message: Bytes) -> Result<Bytes, Status> {
    require_leader(&context, &call)?;
    let size = message.len();
    let request: pb::DeleteRangeRequest = decode(message)?;
    check_delete(&request)?;
    check_size(&context, size)?;
    let reply = write(&context, Txn::of(delete_op(&request))).await?;
    match results(&reply)? {
        [OpReply::Delete { deleted, prev }] => Ok(encode::delete(&context.identity, reply.revision, *deleted, prev)),
        _ => Err(unexpected()),
    }
}

async fn txn(context: Context, call: Call, message: Bytes) -> Result<Bytes, Status> {
    require_leader(&context, &call)?;
    let size = message.len();
    let request: pb::TxnRequest = decode(message)?;
    check_txn(&request, context.settings.max_txn_ops)?;
    let txn = Txn {
        compares: request.compare.iter().filter_map(compare).collect(),
        then: request.success.iter().filter_map(op).collect(),
        otherwise: request.failure.iter().filter_map(op).collect(),
        ..Txn::default()
    };
    if is_read_only(&request) {
        let (reply, revision) = read(context.read_txn(txn, is_serializable(&request)).await)?;
        return Ok(encode::txn(&context.identity, revision, &reply));
    }
    check_size(&context, size)?;
    let reply = write(&context, txn).await?;
    match &reply.result {
        Ok(result) => Ok(encode::txn(&context.identity, reply.revision, result)),
        Err(rejection) => Err(etcd_rejection(rejection)),
    }
}

async fn compact(context: Context, request: pb::CompactionRequest) -> Result<pb::CompactionResponse, Status> {
    let reply = write(&context, Txn::of(Op::Compact { revision: request.revision })).await?;
    results(&reply)?;
    Ok(pb::CompactionResponse { header: Some(context.identity.header(reply.revision)) })
}

async fn write(context: &Context, txn: Txn) -> Result<Reply, Status> {
    context.write(txn).await.map_err(failed)
}

fn results(reply: &Reply) -> Result<&[OpReply], Status> {
    match &reply.result {
        Ok(result) => Ok(&result.results),
        Err(rejection) => Err(etcd_rejection(rejection)),
    }
}

fn unexpected() -> Status {
    Status::internal("the state machine answered another question")
}

/// Records of one key range in chunks that merge into the answer of Range; header, count and more are in the last one.
async fn range_stream(context: Context, call: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    require_leader(&context, &call)?;
    let Some(message) = incoming.next().await else { return Ok(()) };
    let request: pb::RangeRequest = decode(message?)?;
    check_range(&request)?;
    if !is_default_order(&request) {
        return Err(Status::unimplemented("RangeStream does not support custom sort orders"));
    }
    if has_revision_filters(&request) {
        return Err(Status::unimplemented("RangeStream does not support revision filters"));
    }
    if request.count_only {
        let (reply, revision) = read(context.range(range_op(&request), request.serializable).await)?;
        let range_response = pb::RangeResponse {
            header: Some(context.identity.header(revision)),
            count: reply.count as i64,
            ..Default::default()
        };
        let answer = encoded(&pb::RangeStreamResponse { range_response: Some(range_response) });
        return outgoing.send(answer).await.map_err(|_| cancelled());
    }
    let span = key_span(&request.key, &request.range_end);
    let mut slices = context.slices(span, request.revision, request.serializable).map_err(failed)?;
    let limit = if request.limit > 0 { request.limit as u64 } else { u64::MAX };
    let fields = if request.keys_only { Fields::Keys } else { Fields::All };
    let (mut count, mut sent) = (0u64, 0u64);
    while let Some(slice) = slices.next().await {
        let mut slice = slice.map_err(|rejection| etcd_rejection(&rejection))?;
        sort_chunk(&mut slice.records, request.sort_target);
        count += slice.records.len() as u64;
        let wanted = (limit - sent).min(slice.records.len() as u64);
        sent += wanted;
        let mut body = BytesMut::new();
        for record in &slice.records[..wanted as usize] {
            encode::put_key_value(&mut body, 2, record, fields);
        }
        if slice.is_last {
            encode::put_header(&mut body, &context.identity, slice.current.0);
            encode::put_number(&mut body, 3, u64::from(count > sent));
            encode::put_number(&mut body, 4, count);
        } else if wanted == 0 {
            // Beyond the limit the rest is only counted.
            continue;
        }
        outgoing.send_framed(framed_range(&body)).await.map_err(|_| cancelled())?;
        if slice.is_last {
            return Ok(());
        }
    }
    Err(status::STOPPED.into())
}

/// A target without an order passes etcd's check and orders each chunk for itself.
fn sort_chunk(records: &mut [Record], sort_target: i32) {
    use pb::range_request::SortTarget;
    match SortTarget::try_from(sort_target) {
        Ok(SortTarget::Version) => records.sort_by_key(|record| record.meta().version),
        Ok(SortTarget::Create) => records.sort_by_key(|record| record.meta().create_revision),
        Ok(SortTarget::Mod) => records.sort_by_key(|record| record.meta().mod_revision),
        Ok(SortTarget::Value) => records.sort_by(|a, b| a.value().cmp(b.value())),
        // Already in the order of keys.
        Ok(SortTarget::Key) | Err(_) => {}
    }
}

/// `RangeStreamResponse { range_response }`, framed.
fn framed_range(body: &[u8]) -> Bytes {
    let head = 1 + encode::varint_len(body.len() as u64);
    let mut out = BytesMut::with_capacity(FRAME_HEAD + head + body.len());
    out.put_u8(0);
    out.put_u32((head + body.len()) as u32);
    encode::put_message_head(&mut out, 1, body.len());
    out.put_slice(body);
    out.freeze()
}

pub(crate) fn cancelled() -> Status {
    Status::new(crate::rpc::Code::Cancelled, "context canceled")
}

fn check_size(context: &Context, size: usize) -> Result<(), Status> {
    if size + ENVELOPE_BYTES > context.settings.max_request_bytes {
        Err(status::REQUEST_TOO_LARGE.into())
    } else {
        Ok(())
    }
}

fn check_range(request: &pb::RangeRequest) -> Result<(), EtcdError> {
    if request.key.is_empty() {
        return Err(status::EMPTY_KEY);
    }
    let is_known = pb::range_request::SortOrder::try_from(request.sort_order).is_ok()
        && pb::range_request::SortTarget::try_from(request.sort_target).is_ok();
    if is_known { Ok(()) } else { Err(status::INVALID_SORT_OPTION) }
}

fn check_put(request: &pb::PutRequest) -> Result<(), EtcdError> {
    if request.key.is_empty() {
        return Err(status::EMPTY_KEY);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(status::VALUE_PROVIDED);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(status::LEASE_PROVIDED);
    }
    Ok(())
}

fn check_delete(request: &pb::DeleteRangeRequest) -> Result<(), EtcdError> {
    if request.key.is_empty() { Err(status::EMPTY_KEY) } else { Ok(()) }
}

/// The number of operations, then compares, then each operation; nested ones share what is left of the number.
fn check_txn(request: &pb::TxnRequest, ops_max: usize) -> Result<(), EtcdError> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    if ops > ops_max {
        return Err(status::TOO_MANY_OPS);
    }
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(status::EMPTY_KEY);
    }
    for op in request.success.iter().chain(&request.failure) {
        check_op(op, ops_max - ops)?;
    }
    Ok(())
}

fn check_op(op: &pb::RequestOp, ops_max: usize) -> Result<(), EtcdError> {
    use pb::request_op::Request;
    match &op.request {
        Some(Request::RequestRange(request)) => check_range(request),
        Some(Request::RequestPut(request)) => check_put(request),
        Some(Request::RequestDeleteRange(request)) => check_delete(request),
        Some(Request::RequestTxn(request)) => check_txn(request, ops_max),
        None => Err(status::KEY_NOT_FOUND),
    }
}

/// Only ranges, nested transactions not counted as such: those are logged, as in etcd.
fn is_read_only(request: &pb::TxnRequest) -> bool {
    ranges(request).all(|range| range.is_some())
}

fn is_serializable(request: &pb::TxnRequest) -> bool {
    ranges(request).all(|range| range.is_some_and(|range| range.serializable))
}

fn ranges(request: &pb::TxnRequest) -> impl Iterator<Item = Option<&pb::RangeRequest>> {
    request.success.iter().chain(&request.failure).map(|op| match &op.request {
        Some(pb::request_op::Request::RequestRange(range)) => Some(range),
        _ => None,
    })
}

fn is_default_order(request: &pb::RangeRequest) -> bool {
    use pb::range_request::{SortOrder, SortTarget};
    request.sort_order == SortOrder::None as i32
        || (request.sort_target == SortTarget::Key as i32 && request.sort_order == SortOrder::Ascend as i32)
}

fn has_revision_filters(request: &pb::RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

fn key_span(key: &[u8], range_end: &[u8]) -> Span {
    Span::etcd(Space::Keys, NamespaceId::DEFAULT, key, range_end)
}

fn range_op(request: &pb::RangeRequest) -> Range {
    use pb::range_request::{SortOrder, SortTarget};
    let order = match SortOrder::try_from(request.sort_order) {
        Ok(SortOrder::Ascend) => Order::Ascending,
        Ok(SortOrder::Descend) => Order::Descending,
        _ => Order::None,
    };
    let sort_by = match SortTarget::try_from(request.sort_target) {
        Ok(SortTarget::Version) => SortBy::Version,
        Ok(SortTarget::Create) => SortBy::CreateRevision,
        Ok(SortTarget::Mod) => SortBy::ModRevision,
        Ok(SortTarget::Value) => SortBy::Value,
        _ => SortBy::Key,
    };
    Range {
        span: key_span(&request.key, &request.range_end),
        limit: request.limit,
        revision: request.revision,
        order,
        sort_by,
        keys_only: request.keys_only,
        count_only: request.count_only,
        min_mod_revision: request.min_mod_revision,
        max_mod_revision: request.max_mod_revision,
        min_create_revision: request.min_create_revision,
        max_create_revision: request.max_create_revision,
    }
}

fn put_op(request: &pb::PutRequest) -> Op {
    Op::Put(Put {
        key: tenure_machine::Key::new(Space::Keys, NamespaceId::DEFAULT, &request.key),
        value: request.value[..].into(),
        session: SessionId(request.lease as u64),
        prev: request.prev_kv,
        keep_value: request.ignore_value,
        keep_session: request.ignore_lease,
    })
}

fn delete_op(request: &pb::DeleteRangeRequest) -> Op {
    Op::Delete(Delete { span: key_span(&request.key, &request.range_end), prev: request.prev_kv })
}

/// `None` only for an operation that the checks have refused.
fn op(op: &pb::RequestOp) -> Option<Op> {
    use pb::request_op::Request;
    Some(match op.request.as_ref()? {
        Request::RequestRange(request) => Op::Range(range_op(request)),
        Request::RequestPut(request) => put_op(request),
        Request::RequestDeleteRange(request) => delete_op(request),
        Request::RequestTxn(request) => Op::Txn(Box::new(SubTxn {
            compares: request.compare.iter().filter_map(compare).collect(),
            then: request.success.iter().filter_map(self::op).collect(),
            otherwise: request.failure.iter().filter_map(self::op).collect(),
        })),
    })
}

/// A compare, or `None` where it holds whatever the keys are: etcd lets an unknown relation hold.
fn compare(compare: &pb::Compare) -> Option<Compare> {
    use pb::compare::{CompareResult, CompareTarget as Target, TargetUnion};
    let target = match (Target::try_from(compare.target).ok(), &compare.target_union) {
        (Some(Target::Version), Some(TargetUnion::Version(n))) => Some(CompareTarget::Version(*n)),
        (Some(Target::Version), _) => Some(CompareTarget::Version(0)),
        (Some(Target::Create), Some(TargetUnion::CreateRevision(n))) => Some(CompareTarget::CreateRevision(*n)),
        (Some(Target::Create), _) => Some(CompareTarget::CreateRevision(0)),
        (Some(Target::Mod), Some(TargetUnion::ModRevision(n))) => Some(CompareTarget::ModRevision(*n)),
        (Some(Target::Mod), _) => Some(CompareTarget::ModRevision(0)),
        (Some(Target::Value), Some(TargetUnion::Value(value))) => Some(CompareTarget::Value(value[..].into())),
        (Some(Target::Value), _) => Some(CompareTarget::Value(Box::default())),
        (Some(Target::Lease), Some(TargetUnion::Lease(n))) => Some(CompareTarget::Lease(*n)),
        (Some(Target::Lease), _) => Some(CompareTarget::Lease(0)),
        // An unknown target compares as equal.
        (None, _) => None,
    };
    let relation = match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => Some(Relation::Equal),
        Ok(CompareResult::Greater) => Some(Relation::Greater),
        Ok(CompareResult::Less) => Some(Relation::Less),
        Ok(CompareResult::NotEqual) => Some(Relation::NotEqual),
        Err(_) => None,
    };
    let (relation, target) = match (relation, target) {
        (Some(relation), Some(target)) => (relation, target),
        // A value is compared only with keys that are there, whatever the relation.
        (None, Some(CompareTarget::Value(_))) => (Relation::Greater, CompareTarget::Version(0)),
        (None, _) | (Some(Relation::Equal), None) => return None,
        // Never true: versions are not negative.
        (Some(_), None) => (Relation::Less, CompareTarget::Version(0)),
    };
    Some(Compare { span: key_span(&compare.key, &compare.range_end), relation, target })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(levels: usize) -> pb::TxnRequest {
        let inner = match levels {
            0 => pb::request_op::Request::RequestPut(pb::PutRequest {
                key: Bytes::from_static(b"k"),
                ..Default::default()
            }),
            _ => pb::request_op::Request::RequestTxn(nested(levels - 1)),
        };
        pb::TxnRequest { success: vec![pb::RequestOp { request: Some(inner) }], ..Default::default() }
    }

    #[test]
    fn nested_transactions_share_the_limit() {
        assert_eq!(check_txn(&nested(2), 3), Ok(()));
        assert_eq!(check_txn(&nested(3), 3), Err(status::TOO_MANY_OPS));
    }

    #[test]
    fn checks_in_order() {
        let range = |key: &'static [u8], sort_order| pb::RangeRequest {
            key: Bytes::from_static(key),
            sort_order,
            ..Default::default()
        };
        assert_eq!(check_range(&range(b"", 99)), Err(status::EMPTY_KEY));
        assert_eq!(check_range(&range(b"k", 99)), Err(status::INVALID_SORT_OPTION));
        let put = pb::PutRequest { key: Bytes::from_static(b"k"), lease: 1, ignore_lease: true, ..Default::default() };
        assert_eq!(check_put(&put), Err(status::LEASE_PROVIDED));
        let empty = pb::TxnRequest { success: vec![pb::RequestOp { request: None }], ..Default::default() };
        assert_eq!(check_txn(&empty, 128), Err(status::KEY_NOT_FOUND));
        assert!(is_read_only(&pb::TxnRequest::default()) && is_serializable(&pb::TxnRequest::default()));
        assert!(!is_read_only(&nested(1)));
    }
}
