package main

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// namedCase is a fixed story; the generated programs cover what has no order or limit to hit exactly.
type namedCase struct {
	name string
	body func(*comparison)
}

func cases() []namedCase {
	return append([]namedCase{
		{"put-options", putOptions},
		{"range-options", rangeOptions},
		{"range-sorts-many-keys", rangeSortsManyKeys},
		{"range-stream-large", rangeStreamLarge},
		{"empty-keys", emptyKeys},
		{"txn-limits", txnLimits},
		{"txn-duplicates", txnDuplicates},
		{"txn-shapes", txnShapes},
		{"txn-sees-own-writes", txnSeesOwnWrites},
		{"txn-fails-whole", txnFailsWhole},
		{"request-too-large", requestTooLarge},
		{"compaction", compaction},
		{"lease-limits", leaseLimits},
		{"lease-keys", leaseKeys},
		{"lease-keepalive", leaseKeepAlive},
		{"lease-expiry", leaseExpiry},
		{"watch-ids", watchIDs},
		{"watch-past-and-compacted", watchPast},
		{"watch-filters", watchFilters},
		{"watch-progress", watchProgress},
		{"watch-fragment", watchFragment},
		{"watch-txn-is-one-revision", watchTxn},
		{"watch-bad-requests", watchBad},
		{"wire-unknown-fields", wireUnknownFields},
		{"wire-unknown-methods", wireUnknownMethods},
		{"wire-bad-bytes", wireBadBytes},
		{"grpc-health", grpcHealth},
		{"member-list", memberList},
		{"maintenance-status", maintenanceStatus},
		{"maintenance-hashkv", maintenanceHashKV},
		{"maintenance-alarm", maintenanceAlarm},
	}, gatewayCases()...)
}

func put(c *comparison, r *pb.PutRequest) string {
	return c.both("Put "+render(r), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.kv.Put(ctx, r))
	})
}

func get(c *comparison, r *pb.RangeRequest) string {
	return c.both("Range "+render(r), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.kv.Range(ctx, r))
	})
}

func del(c *comparison, r *pb.DeleteRangeRequest) string {
	return c.both("DeleteRange "+render(r), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.kv.DeleteRange(ctx, r))
	})
}

func txn(c *comparison, r *pb.TxnRequest) string {
	return c.both("Txn "+render(r), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.kv.Txn(ctx, r))
	})
}

func compact(c *comparison, r *pb.CompactionRequest) string {
	return c.both("Compact "+render(r), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.kv.Compact(ctx, r))
	})
}

func grant(c *comparison, id, ttl int64) string {
	return c.both(fmt.Sprintf("LeaseGrant %d ttl %d", id, ttl), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: ttl}))
	})
}

func revoke(c *comparison, id int64) string {
	return c.both(fmt.Sprintf("LeaseRevoke %d", id), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id}))
	})
}

func timeToLive(c *comparison, id int64) string {
	return c.both(fmt.Sprintf("LeaseTimeToLive %d", id), func(e *endpoint) string {
		return e.timeToLive(&pb.LeaseTimeToLiveRequest{ID: id, Keys: true})
	})
}

func opPut(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func opGet(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func opDelete(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end), PrevKv: true}}}
}

func opTxn(t *pb.TxnRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: t}}
}

func all() *pb.RangeRequest { return &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}} }

func putOptions(c *comparison) {
	k := []byte("k")
	c.expect(put(c, &pb.PutRequest{Key: k, IgnoreValue: true}), "key not found")
	c.expect(put(c, &pb.PutRequest{Key: k, IgnoreLease: true}), "key not found")
	c.expect(put(c, &pb.PutRequest{Key: k, Value: []byte("v"), IgnoreValue: true}), "value is provided")
	c.expect(put(c, &pb.PutRequest{Key: k, Lease: 1, IgnoreLease: true}), "lease is provided")
	c.expect(put(c, &pb.PutRequest{Key: k, Lease: 404}), "requested lease not found")
	c.expect(put(c, &pb.PutRequest{Key: k, Lease: -1}), "requested lease not found")
	grant(c, 31, 600)
	put(c, &pb.PutRequest{Key: k, Value: []byte("one"), Lease: 31, PrevKv: true})
	put(c, &pb.PutRequest{Key: k, Value: []byte("two"), IgnoreLease: true, PrevKv: true})
	put(c, &pb.PutRequest{Key: k, IgnoreValue: true, PrevKv: true})
	timeToLive(c, 31)
	put(c, &pb.PutRequest{Key: k, IgnoreValue: true, IgnoreLease: true, PrevKv: true})
	put(c, &pb.PutRequest{Key: k, PrevKv: true})
	get(c, all())
	revoke(c, 31)
	get(c, all())
}

func rangeOptions(c *comparison) {
	for i, name := range []string{"p/1", "p/2", "p/3", "p/4", "q"} {
		put(c, &pb.PutRequest{Key: []byte(name), Value: []byte{byte(9 - i)}})
	}
	put(c, &pb.PutRequest{Key: []byte("p/2"), Value: []byte("again")})
	now := c.ref.revision.Load()
	p, end := []byte("p/"), []byte("p0")
	for _, limit := range []int64{-7, 0, 1, 2, 3, 4, 5} {
		for _, revision := range []int64{0, now - 1, now} {
			get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: limit, Revision: revision})
			get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: limit, Revision: revision, CountOnly: true})
			get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: limit, Revision: revision, KeysOnly: true})
		}
	}
	for order := range int32(4) {
		for target := range int32(6) {
			get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: 2, SortOrder: pb.RangeRequest_SortOrder(order), SortTarget: pb.RangeRequest_SortTarget(target)})
		}
	}
	for offset := int64(-6); offset <= 1; offset++ {
		get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: 2, MinModRevision: now + offset})
		get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: 2, MaxModRevision: now + offset})
		get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: 2, MinCreateRevision: now + offset})
		get(c, &pb.RangeRequest{Key: p, RangeEnd: end, Limit: 2, MaxCreateRevision: now + offset, CountOnly: true})
	}
	c.expect(get(c, &pb.RangeRequest{Key: p, Revision: now + 1}), "future revision")
	c.expect(get(c, &pb.RangeRequest{Key: p, Revision: now + 1, Serializable: true}), "future revision")
	c.expect(get(c, &pb.RangeRequest{Key: p, Revision: 1}), "compacted")
	get(c, &pb.RangeRequest{Key: p, Revision: -1})
	get(c, &pb.RangeRequest{Key: []byte("q"), RangeEnd: []byte("p")})
	get(c, &pb.RangeRequest{Key: []byte("p/2"), RangeEnd: []byte("p/2")})
	get(c, &pb.RangeRequest{Key: []byte("p/2"), RangeEnd: []byte{0}, CountOnly: true, KeysOnly: true})
	get(c, &pb.RangeRequest{Key: []byte{0}, Limit: 1})
}

func rangeSortsManyKeys(c *comparison) {
	// Every value, version and revision is different, so that the order is fully said by the request.
	for i := range 40 {
		for range 1 + (i*7)%40 {
			put(c, &pb.PutRequest{Key: fmt.Appendf(nil, "s/%02d", i), Value: fmt.Appendf(nil, "%02d", (i*11)%40)})
		}
	}
	for order := range int32(3) {
		for target := range int32(5) {
			get(c, &pb.RangeRequest{Key: []byte("s/"), RangeEnd: []byte("s0"), Limit: 25,
				SortOrder: pb.RangeRequest_SortOrder(order), SortTarget: pb.RangeRequest_SortTarget(target)})
		}
	}
}

func rangeStreamLarge(c *comparison) {
	for i := range 200 {
		put(c, &pb.PutRequest{Key: fmt.Appendf(nil, "l/%03d", i), Value: bytes.Repeat([]byte{byte(i)}, 40_000)})
	}
	stream := func(r *pb.RangeRequest) string {
		return c.both("RangeStream "+render(r), func(e *endpoint) string { return e.rangeStream(r) })
	}
	now := c.ref.revision.Load()
	get(c, all())
	stream(all())
	stream(&pb.RangeRequest{Key: []byte("l/"), RangeEnd: []byte("l0"), Limit: 150})
	stream(&pb.RangeRequest{Key: []byte("l/"), RangeEnd: []byte("l0"), Limit: 200})
	stream(&pb.RangeRequest{Key: []byte("l/"), RangeEnd: []byte("l0"), KeysOnly: true})
	stream(&pb.RangeRequest{Key: []byte("l/"), RangeEnd: []byte("l0"), CountOnly: true})
	stream(&pb.RangeRequest{Key: []byte("l/"), RangeEnd: []byte("l0"), Revision: now - 50})
	stream(&pb.RangeRequest{Key: []byte("none")})
	stream(&pb.RangeRequest{Key: []byte("l/007")})
	c.expect(stream(&pb.RangeRequest{}), "key is not provided")
	c.expect(stream(&pb.RangeRequest{Key: []byte("l/"), SortOrder: 1, SortTarget: 1}), "custom sort orders")
	stream(&pb.RangeRequest{Key: []byte("l/"), RangeEnd: []byte("l0"), Limit: 3, SortOrder: 1})
	stream(&pb.RangeRequest{Key: []byte("l/"), RangeEnd: []byte("l0"), Limit: 3, SortOrder: 2})
	c.expect(stream(&pb.RangeRequest{Key: []byte("l/"), MinModRevision: 1}), "revision filters")
	c.expect(stream(&pb.RangeRequest{Key: []byte("l/"), Revision: now + 9}), "future revision")
	c.expect(stream(&pb.RangeRequest{Key: []byte("l/"), Revision: 1}), "compacted")
}

func emptyKeys(c *comparison) {
	c.expect(put(c, &pb.PutRequest{}), "key is not provided")
	c.expect(get(c, &pb.RangeRequest{}), "key is not provided")
	c.expect(get(c, &pb.RangeRequest{RangeEnd: []byte{0}}), "key is not provided")
	c.expect(del(c, &pb.DeleteRangeRequest{}), "key is not provided")
	c.expect(txn(c, &pb.TxnRequest{Compare: []*pb.Compare{{}}}), "key is not provided")
	c.expect(txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("", "")}}), "key is not provided")
	c.expect(txn(c, &pb.TxnRequest{Failure: []*pb.RequestOp{opGet("", "")}}), "key is not provided")
	c.expect(txn(c, &pb.TxnRequest{Failure: []*pb.RequestOp{opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opDelete("", "")}})}}), "key is not provided")
	c.expect(txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{{}}}), "key not found")
	txn(c, &pb.TxnRequest{})
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opTxn(&pb.TxnRequest{})}})
}

func manyOps(count int, prefix string) []*pb.RequestOp {
	ops := make([]*pb.RequestOp, count)
	for i := range ops {
		ops[i] = opPut(fmt.Sprintf("%s%d", prefix, i), "v")
	}
	return ops
}

func txnLimits(c *comparison) {
	compares := make([]*pb.Compare, 129)
	for i := range compares {
		compares[i] = &pb.Compare{Key: []byte("k"), TargetUnion: &pb.Compare_Version{}}
	}
	txn(c, &pb.TxnRequest{Success: manyOps(128, "k")})
	c.expect(txn(c, &pb.TxnRequest{Success: manyOps(129, "k")}), "too many operations")
	c.expect(txn(c, &pb.TxnRequest{Failure: manyOps(129, "k")}), "too many operations")
	txn(c, &pb.TxnRequest{Success: manyOps(128, "k"), Failure: manyOps(128, "k")})
	txn(c, &pb.TxnRequest{Compare: compares[:128]})
	c.expect(txn(c, &pb.TxnRequest{Compare: compares}), "too many operations")
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opTxn(&pb.TxnRequest{Success: manyOps(127, "k")})}})
	c.expect(txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opTxn(&pb.TxnRequest{Success: manyOps(128, "k")})}}), "too many operations")
	txn(c, &pb.TxnRequest{Compare: compares[:64], Success: []*pb.RequestOp{opTxn(&pb.TxnRequest{Success: manyOps(65, "k")})}})
	txn(c, &pb.TxnRequest{Compare: compares[:64], Success: []*pb.RequestOp{opTxn(&pb.TxnRequest{Success: manyOps(64, "k")})}})
	get(c, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})
}

func txnDuplicates(c *comparison) {
	duplicate := func(t *pb.TxnRequest) { c.expect(txn(c, t), "duplicate key") }
	duplicate(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1"), opPut("a", "2")}})
	duplicate(&pb.TxnRequest{Failure: []*pb.RequestOp{opPut("a", "1"), opPut("a", "2")}})
	duplicate(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1"), opDelete("a", "")}})
	duplicate(&pb.TxnRequest{Success: []*pb.RequestOp{opDelete("a", "c"), opPut("b", "1")}})
	duplicate(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1"), opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "2")}})}})
	duplicate(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1"), opTxn(&pb.TxnRequest{Failure: []*pb.RequestOp{opPut("a", "2")}})}})
	duplicate(&pb.TxnRequest{Success: []*pb.RequestOp{
		opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "2")}}), opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "3")}})}})
	duplicate(&pb.TxnRequest{Success: []*pb.RequestOp{
		opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opDelete("a", "z")}}), opPut("b", "1")}})
	// Allowed: both branches of one nested transaction, deletes over deletes, reads of anything.
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{
		opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "2")}, Failure: []*pb.RequestOp{opPut("a", "3")}})}})
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opDelete("a", ""), opDelete("a", "c"), opGet("a", "")}})
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1"), opGet("a", "z"), opDelete("b", "c")}})
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1")}, Failure: []*pb.RequestOp{opPut("a", "2")}})
	// Deleting "everything" is not seen as an overlap by the reference: its end sorts as the smallest key there.
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opDelete("\x00", "\x00"), opPut("zzz", "1")}})
	// Two nested deletes and a put nested beside them: whether nested deletes of a sibling count.
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{
		opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opDelete("a", "c")}}), opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("b", "1")}})}})
	get(c, all())
}

func txnShapes(c *comparison) {
	put(c, &pb.PutRequest{Key: []byte("n"), Value: []byte("5")})
	put(c, &pb.PutRequest{Key: []byte("n"), Value: []byte("6")})
	now := c.ref.revision.Load()
	for result := range int32(5) {
		for offset := int64(-1); offset <= 1; offset++ {
			for _, key := range []string{"n", "absent"} {
				for _, cmp := range []*pb.Compare{
					{Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 2 + offset}},
					{Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: now - 1 + offset}},
					{Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: now + offset}},
					{Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte{byte('6' + offset)}}},
					{Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: offset}},
					{Target: pb.Compare_VALUE}, {Target: pb.Compare_LEASE}, {Target: pb.Compare_VERSION}, {Target: 9},
				} {
					cmp.Key, cmp.Result = []byte(key), pb.Compare_CompareResult(result)
					txn(c, &pb.TxnRequest{Compare: []*pb.Compare{cmp}, Success: []*pb.RequestOp{opGet(key, "")}})
				}
			}
		}
	}
	// Compares over a range hold for all its keys; over an empty range they see a key that is absent.
	put(c, &pb.PutRequest{Key: []byte("n2"), Value: []byte("6")})
	for _, end := range []string{"n1", "n3", "\x00", "a"} {
		for result := range int32(4) {
			txn(c, &pb.TxnRequest{Compare: []*pb.Compare{{Key: []byte("n"), RangeEnd: []byte(end), Result: pb.Compare_CompareResult(result),
				Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 1}}}})
			txn(c, &pb.TxnRequest{Compare: []*pb.Compare{{Key: []byte("o"), RangeEnd: []byte(end), Result: pb.Compare_CompareResult(result),
				Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("6")}}}})
		}
	}
	// Reads inside a transaction at old, compacted and future revisions.
	for _, revision := range []int64{now - 1, now, now + 1, now + 2, 1, -1} {
		op := opGet("n", "")
		op.GetRequestRange().Revision = revision
		txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{op}})
		txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("other", "x"), op}})
		get(c, all())
	}
}

func txnSeesOwnWrites(c *comparison) {
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{
		opPut("a", "1"), opGet("a", "z"),
		opTxn(&pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte("a"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("1")}}},
			Success: []*pb.RequestOp{opPut("b", "then"), opGet("a", "z")},
			Failure: []*pb.RequestOp{opPut("b", "else"), opGet("a", "z")},
		}),
		opDelete("c", ""), opGet("\x00", "\x00"),
	}})
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opDelete("a", "c"), opGet("a", "z"), opPut("c", "2")}})
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opGet("a", "z")}})
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opDelete("nothing", "")}})
	get(c, all())
}

func txnFailsWhole(c *comparison) {
	lost := opPut("b", "2")
	lost.GetRequestPut().Lease = 404
	c.expect(txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1"), lost}}), "lease not found")
	c.expect(get(c, &pb.RangeRequest{Key: []byte("a")}), "revision=")
	ignoring := opPut("b", "")
	ignoring.GetRequestPut().IgnoreValue = true
	c.expect(txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1"), ignoring}}), "key not found")
	get(c, all())
	// In the branch that does not run, neither matters.
	txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", "1")}, Failure: []*pb.RequestOp{lost, opGet("a", "")}})
	get(c, all())
}

func requestTooLarge(c *comparison) {
	put(c, &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("v"), 1<<20)})
	put(c, &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("w"), 1536*1024-100)})
	c.expect(put(c, &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("v"), 1536*1024)}), "request is too large")
	c.expect(put(c, &pb.PutRequest{Key: bytes.Repeat([]byte("k"), 1536*1024+7)}), "request is too large")
	c.expect(put(c, &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("v"), 3<<20)}), "received message larger than max")
	c.expect(txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opPut("a", strings.Repeat("x", 800_000)), opPut("b", strings.Repeat("x", 800_000))}}), "request is too large")
	get(c, all())
}

func compaction(c *comparison) {
	for i := range 6 {
		put(c, &pb.PutRequest{Key: []byte("k"), Value: []byte{byte(i)}})
	}
	now := c.ref.revision.Load()
	c.expect(compact(c, &pb.CompactionRequest{Revision: now + 1}), "future revision")
	compact(c, &pb.CompactionRequest{Revision: now - 3})
	c.expect(compact(c, &pb.CompactionRequest{Revision: now - 3}), "compacted")
	c.expect(compact(c, &pb.CompactionRequest{Revision: now - 4}), "compacted")
	c.expect(compact(c, &pb.CompactionRequest{}), "compacted")
	c.expect(compact(c, &pb.CompactionRequest{Revision: -1}), "compacted")
	for revision := now - 5; revision <= now; revision++ {
		get(c, &pb.RangeRequest{Key: []byte("k"), Revision: revision})
	}
	del(c, &pb.DeleteRangeRequest{Key: []byte("k")})
	compact(c, &pb.CompactionRequest{Revision: now + 1, Physical: true})
	get(c, &pb.RangeRequest{Key: []byte("k"), Revision: now + 1})
	get(c, &pb.RangeRequest{Key: []byte("k"), Revision: now})
	put(c, &pb.PutRequest{Key: []byte("k")}) // versions start anew
	get(c, all())
}

func leaseLimits(c *comparison) {
	c.expect(grant(c, 41, 1), "TTL=2")
	c.expect(grant(c, 41, 60), "lease already exists")
	c.expect(grant(c, 42, 9_000_000_001), "too large lease TTL")
	grant(c, 43, 9_000_000_000)
	grant(c, 44, 0)
	grant(c, 45, -3)
	grant(c, -9, 100)
	c.both("LeaseGrant without id", func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		resp, err := e.lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 77})
		if err == nil && resp.ID > 0 {
			resp.ID = 1
		}
		return answer(resp, err)
	})
	c.expect(revoke(c, 404), "requested lease not found")
	revoke(c, 43)
	c.expect(revoke(c, 43), "requested lease not found")
	c.expect(timeToLive(c, 43), "TTL=-1")
	timeToLive(c, -9)
	revoke(c, 0)
	timeToLive(c, 0)
}

func leaseKeys(c *comparison) {
	grant(c, 51, 900)
	grant(c, 52, 900)
	for _, key := range []string{"x", "y", "z"} {
		put(c, &pb.PutRequest{Key: []byte(key), Lease: 51})
	}
	timeToLive(c, 51)
	put(c, &pb.PutRequest{Key: []byte("y"), Lease: 52}) // moves
	put(c, &pb.PutRequest{Key: []byte("z")})            // detaches
	del(c, &pb.DeleteRangeRequest{Key: []byte("q")})
	timeToLive(c, 51)
	timeToLive(c, 52)
	before := get(c, all())
	revoke(c, 51)
	if get(c, all()) == before {
		panic(&difference{what: "revoking must delete the lease's keys", ref: before, sub: before})
	}
	del(c, &pb.DeleteRangeRequest{Key: []byte("y")})
	timeToLive(c, 52)
	revoke(c, 52) // holds nothing now: takes no revision
	get(c, all())
	c.both("LeaseLeases", func(e *endpoint) string { return e.leases() })
}

func leaseKeepAlive(c *comparison) {
	grant(c, 61, 100)
	c.both("LeaseKeepAlive", func(e *endpoint) string { return e.keepAlive(61, 404, 61, 0, -1) })
	c.both("LeaseKeepAlive closed at once", func(e *endpoint) string { return e.keepAlive() })
	revoke(c, 61)
	c.both("LeaseKeepAlive after revoke", func(e *endpoint) string { return e.keepAlive(61) })
}

func leaseExpiry(c *comparison) {
	grant(c, 71, 2)
	put(c, &pb.PutRequest{Key: []byte("e1"), Lease: 71})
	put(c, &pb.PutRequest{Key: []byte("e2"), Lease: 71})
	put(c, &pb.PutRequest{Key: []byte("stays")})
	c.both("open watch stream 0", func(e *endpoint) string {
		stream, err := e.openWatch()
		if err != nil {
			return renderError(err)
		}
		e.streams[0] = stream
		return stream.create(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true})
	})
	started := time.Now()
	c.both("wait for the expiry of lease 71", func(e *endpoint) string {
		for time.Since(started) < callLimit {
			ctx, cancel := limited()
			resp, err := e.kv.Range(ctx, &pb.RangeRequest{Key: []byte("e"), RangeEnd: []byte("f")})
			cancel()
			if err != nil {
				return renderError(err)
			}
			if resp.Count == 0 {
				if early := time.Since(started); early < 1500*time.Millisecond {
					return fmt.Sprintf("gone after %v, before its time", early)
				}
				return "gone"
			}
			time.Sleep(20 * time.Millisecond)
		}
		return "still there"
	})
	timeToLive(c, 71)
	get(c, all())
	c.eventually(3*time.Second, "events", func(e *endpoint) string { return sortedEvents(e.streams[0]) })
}

// sortedEvents is the report with the events sorted: the order in which a lease's keys are deleted is not promised.
func sortedEvents(w *watchStream) string {
	lines := strings.Split(w.report(), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func openStream(c *comparison, id int) {
	c.both(fmt.Sprintf("open watch stream %d", id), func(e *endpoint) string {
		stream, err := e.openWatch()
		if err != nil {
			return renderError(err)
		}
		e.streams[id] = stream
		return "open"
	})
}

func watch(c *comparison, stream int, r *pb.WatchCreateRequest) string {
	return c.both(fmt.Sprintf("watch on stream %d %s", stream, render(r)), func(e *endpoint) string { return e.streams[stream].create(r) })
}

func cancelWatch(c *comparison, stream int, id int64) {
	c.both(fmt.Sprintf("cancel %d on stream %d", id, stream), func(e *endpoint) string { return e.streams[stream].cancelWatch(id) })
}

func inSync(c *comparison, stream int) {
	revision := c.ref.revision.Load()
	text := c.both("progress", func(e *endpoint) string { return e.streams[stream].awaitProgress(revision) })
	c.expect(text, "in sync")
	events(c, stream)
}

func events(c *comparison, stream int) {
	c.eventually(3*time.Second, "events", func(e *endpoint) string { return e.streams[stream].report() })
}

func watchIDs(c *comparison) {
	openStream(c, 0)
	a := []byte("a")
	watch(c, 0, &pb.WatchCreateRequest{Key: a})
	watch(c, 0, &pb.WatchCreateRequest{Key: a, WatchId: 2})
	watch(c, 0, &pb.WatchCreateRequest{Key: a, WatchId: 2, PrevKv: true})
	watch(c, 0, &pb.WatchCreateRequest{Key: a})
	watch(c, 0, &pb.WatchCreateRequest{Key: a}) // skips 2
	watch(c, 0, &pb.WatchCreateRequest{Key: a, WatchId: -1})
	watch(c, 0, &pb.WatchCreateRequest{Key: a, WatchId: -7})
	watch(c, 0, &pb.WatchCreateRequest{Key: a, WatchId: 1 << 40})
	put(c, &pb.PutRequest{Key: a})
	inSync(c, 0)
	cancelWatch(c, 0, 2)
	cancelWatch(c, 0, 2)
	cancelWatch(c, 0, 4040)
	watch(c, 0, &pb.WatchCreateRequest{Key: a, WatchId: 2})
	put(c, &pb.PutRequest{Key: a})
	inSync(c, 0)
}

func watchPast(c *comparison) {
	first := c.ref.revision.Load() + 1
	for i := range 12 {
		put(c, &pb.PutRequest{Key: fmt.Appendf(nil, "w/%d", i%3), Value: []byte{byte(i)}})
	}
	del(c, &pb.DeleteRangeRequest{Key: []byte("w/"), RangeEnd: []byte("w0")})
	openStream(c, 0)
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("w/"), RangeEnd: []byte("w0"), StartRevision: first, PrevKv: true})
	inSync(c, 0)
	compact(c, &pb.CompactionRequest{Revision: first + 5})
	// Too late ones are on a stream of their own, see tooLate.
	openStream(c, 1)
	openStream(c, 2)
	for offset := int64(3); offset <= 8; offset++ {
		stream := 1
		if offset < 5 {
			stream = 2
		}
		watch(c, stream, &pb.WatchCreateRequest{Key: []byte("w/"), RangeEnd: []byte("w0"), StartRevision: first + offset, PrevKv: true})
		events(c, stream)
	}
	watch(c, 2, &pb.WatchCreateRequest{Key: []byte("w/1"), StartRevision: 1})
	put(c, &pb.PutRequest{Key: []byte("w/1")})
	inSync(c, 1)
	inSync(c, 0)
	text := c.both("cancel reasons", func(e *endpoint) string {
		w := e.streams[2]
		w.wait(callLimit, func() bool { return len(w.events) == 3 })
		return w.report()
	})
	c.expect(text, "compact_revision")
}

func watchFilters(c *comparison) {
	put(c, &pb.PutRequest{Key: []byte("f")})
	openStream(c, 0)
	for _, filters := range [][]pb.WatchCreateRequest_FilterType{nil, {0}, {1}, {0, 1}, {1, 1}, {7}} {
		watch(c, 0, &pb.WatchCreateRequest{Key: []byte("f"), Filters: filters, StartRevision: c.ref.revision.Load()})
	}
	del(c, &pb.DeleteRangeRequest{Key: []byte("f")})
	put(c, &pb.PutRequest{Key: []byte("f"), Value: []byte("2")})
	inSync(c, 0)
}

// progressAnswers counts the manual progress answers after one request, given half a second to come.
func progressAnswers(e *endpoint, stream int) string {
	w := e.streams[stream]
	w.mu.Lock()
	before := len(w.progress)
	w.mu.Unlock()
	if err := w.requestProgress(); err != nil {
		return err.Error()
	}
	w.wait(500*time.Millisecond, func() bool { return len(w.progress) > before })
	w.mu.Lock()
	defer w.mu.Unlock()
	return fmt.Sprint(w.progress[before:])
}

func watchProgress(c *comparison) {
	openStream(c, 0)
	c.both("progress without a watcher", func(e *endpoint) string { return progressAnswers(e, 0) })
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("p")})
	put(c, &pb.PutRequest{Key: []byte("unrelated")})
	c.both("progress in sync", func(e *endpoint) string { return progressAnswers(e, 0) })
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("p"), WatchId: 9, StartRevision: c.ref.revision.Load() + 100})
	c.both("progress with a watcher of the future", func(e *endpoint) string { return progressAnswers(e, 0) })
	cancelWatch(c, 0, 9)
	c.both("progress after its end", func(e *endpoint) string { return progressAnswers(e, 0) })
	cancelWatch(c, 0, 0)
	c.both("progress after the last watcher", func(e *endpoint) string { return progressAnswers(e, 0) })
}

func watchFragment(c *comparison) {
	openStream(c, 0)
	first := c.ref.revision.Load() + 1
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("big/"), RangeEnd: []byte("big0"), Fragment: true, PrevKv: true})
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("big/"), RangeEnd: []byte("big0")})
	for i := range 30 {
		put(c, &pb.PutRequest{Key: fmt.Appendf(nil, "big/%02d", i), Value: bytes.Repeat([]byte{byte(i)}, 300_000)})
	}
	del(c, &pb.DeleteRangeRequest{Key: []byte("big/"), RangeEnd: []byte("big0")})
	inSync(c, 0)
	openStream(c, 1)
	watch(c, 1, &pb.WatchCreateRequest{Key: []byte("big/"), RangeEnd: []byte("big0"), Fragment: true, PrevKv: true, StartRevision: first})
	watch(c, 1, &pb.WatchCreateRequest{Key: []byte("big/"), RangeEnd: []byte("big0"), PrevKv: true, StartRevision: first})
	inSync(c, 1)
}

func watchTxn(c *comparison) {
	openStream(c, 0)
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true})
	for range 20 {
		txn(c, &pb.TxnRequest{Success: manyOps(100, "t")})
		txn(c, &pb.TxnRequest{Success: []*pb.RequestOp{opDelete("t1", "t5"), opPut("t6", "x"), opDelete("t7", "")}})
	}
	inSync(c, 0)
}

func watchBad(c *comparison) {
	openStream(c, 0)
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("k"), StartRevision: -1})
	watch(c, 0, &pb.WatchCreateRequest{StartRevision: -1 << 62})
	watch(c, 0, &pb.WatchCreateRequest{}) // no key: the smallest one
	watch(c, 0, &pb.WatchCreateRequest{RangeEnd: []byte("b")})
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("b"), RangeEnd: []byte("a")})
	watch(c, 0, &pb.WatchCreateRequest{Key: []byte("b"), RangeEnd: []byte("b")})
	c.both("an empty request is ignored", func(e *endpoint) string {
		return fmt.Sprint(e.streams[0].stream.Send(&pb.WatchRequest{}))
	})
	put(c, &pb.PutRequest{Key: []byte("a")})
	put(c, &pb.PutRequest{Key: []byte("b")})
	put(c, &pb.PutRequest{Key: []byte{0}})
	inSync(c, 0)
	c.both("half-closing the stream", func(e *endpoint) string {
		w := e.streams[0]
		_ = w.stream.CloseSend()
		w.wait(300*time.Millisecond, func() bool { return w.ended != "" })
		return w.report()
	})
}

func wireUnknownFields(c *comparison) {
	plain, _ := proto.Marshal(&pb.PutRequest{Key: []byte("u"), Value: []byte("v")})
	extended := protowire.AppendTag(plain, 900, protowire.BytesType)
	extended = protowire.AppendBytes(extended, []byte("from the future"))
	extended = protowire.AppendTag(extended, 901, protowire.VarintType)
	extended = protowire.AppendVarint(extended, 7)
	c.both("Put with unknown fields", func(e *endpoint) string {
		return e.raw("/etcdserverpb.KV/Put", extended, &pb.PutResponse{})
	})
	doubled := append(slices.Clone(plain), plain...)
	c.both("Put with fields given twice", func(e *endpoint) string {
		return e.raw("/etcdserverpb.KV/Put", doubled, &pb.PutResponse{})
	})
	get(c, all())
}

func wireUnknownMethods(c *comparison) {
	for _, method := range []string{"/etcdserverpb.KV/Nope", "/etcdserverpb.Nope/Put", "/nope/nope", "/Put"} {
		c.both("method "+method, func(e *endpoint) string { return e.raw(method, nil, &pb.PutResponse{}) })
	}
}

// wireBadBytes compares only the code: the text names the decoder's own error.
func wireBadBytes(c *comparison) {
	for _, body := range [][]byte{{0xff}, {0x0a, 0x7f, 'x'}, {0x08, 0x01}, {0x0a}, {0x18, 0xff, 0xff}} {
		c.both(fmt.Sprintf("Put of bytes %x", body), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			var out []byte
			err := e.conn.Invoke(ctx, "/etcdserverpb.KV/Put", &body, &out, forceRaw)
			return status.Code(err).String()
		})
	}
}

func grpcHealth(c *comparison) {
	for _, service := range []string{"", "etcdserverpb.KV", "nope"} {
		c.both("health of "+service, func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(grpc_health_v1.NewHealthClient(e.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service}))
		})
	}
}

func shape(checks ...any) string {
	var broken []string
	for i := 0; i < len(checks); i += 2 {
		if !checks[i+1].(bool) {
			broken = append(broken, checks[i].(string))
		}
	}
	if len(broken) > 0 {
		return "not as it should be: " + strings.Join(broken, ", ")
	}
	return "good shape"
}

func memberList(c *comparison) {
	for _, linearizable := range []bool{true, false} {
		c.both("MemberList", func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			resp, err := e.cluster.MemberList(ctx, &pb.MemberListRequest{Linearizable: linearizable})
			if err != nil {
				return renderError(err)
			}
			reachable := len(resp.Members) == 1 && len(resp.Members[0].ClientURLs) > 0 &&
				slices.ContainsFunc(resp.Members[0].ClientURLs, func(url string) bool { return strings.HasSuffix(url, e.addr) })
			return shape("one member", len(resp.Members) == 1, "reachable clientURLs", reachable,
				"name", len(resp.Members) == 1 && resp.Members[0].Name != "",
				"id", len(resp.Members) == 1 && resp.Members[0].ID != 0 && resp.Members[0].ID == resp.Header.MemberId,
				"not a learner", len(resp.Members) == 1 && !resp.Members[0].IsLearner,
				"peerURLs", len(resp.Members) == 1 && len(resp.Members[0].PeerURLs) > 0,
				"header", resp.Header.GetClusterId() != 0 && resp.Header.GetRaftTerm() != 0 && resp.Header.GetRevision() == 0)
		})
	}
}

var versionText = regexp.MustCompile(`^3\.[4-9]\.\d+$`)

func maintenanceStatus(c *comparison) {
	put(c, &pb.PutRequest{Key: []byte("k")})
	c.both("Status", func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		resp, err := e.maint.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			return renderError(err)
		}
		return shape("version is one of etcd 3.4 or later", versionText.MatchString(resp.Version), "dbSize", resp.DbSize > 0,
			"dbSizeInUse", resp.DbSizeInUse > 0 && resp.DbSizeInUse <= resp.DbSize, "leader is this member", resp.Leader == resp.Header.MemberId,
			"raftIndex", resp.RaftIndex > 0, "raftAppliedIndex", resp.RaftAppliedIndex > 0 && resp.RaftAppliedIndex <= resp.RaftIndex,
			"raftTerm", resp.RaftTerm > 0 && resp.RaftTerm == resp.Header.RaftTerm, "no errors", len(resp.Errors) == 0,
			"not a learner", !resp.IsLearner, "storageVersion", strings.HasPrefix(resp.StorageVersion, "3."), "dbSizeQuota", resp.DbSizeQuota > 0,
			"downgradeInfo", resp.DowngradeInfo != nil && !resp.DowngradeInfo.Enabled,
			"header revision", resp.Header.Revision == e.revision.Load())
	})
}

// maintenanceHashKV compares all but the hash itself: it is over stored bytes, which are each server's own affair.
func maintenanceHashKV(c *comparison) {
	put(c, &pb.PutRequest{Key: []byte("k")})
	put(c, &pb.PutRequest{Key: []byte("k")})
	now := c.ref.revision.Load()
	for _, revision := range []int64{0, now, now - 1, now + 1, 1} {
		c.both(fmt.Sprintf("HashKV at %d", revision), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			resp, err := e.maint.HashKV(ctx, &pb.HashKVRequest{Revision: revision})
			if err == nil && resp.Hash != 0 {
				resp.Hash = 1
			}
			return answer(resp, err)
		})
	}
}

func maintenanceAlarm(c *comparison) {
	c.both("Alarm GET", func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.maint.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_GET}))
	})
}
