package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// keyNames has at most 12 keys on purpose: the reference sorts with an unstable sort that is stable only up to 12 entries, so with
// more keys the order among equal sort values would be an accident of its implementation.
var keyNames = []string{"a", "a\x00", "ab", "abc", "b", "b/1", "b/2", "b/\xff", "c", "\xff", "\xff\xff"}

var valueNames = []string{"", "1", "2", "10", "x", "\x00", "\xff\xfe", "longer value with blanks"}

var leaseIDs = []int64{0, 11, 12, 13, 7000000000}

// markers lie outside of the generated keys' prefixes but inside of "everything" ranges.
const markerKey = "zz-marker"

type watcherModel struct {
	stream int
	id     int64
}

// generator makes one step after another; its model of the store is only the revisions and the watchers.
type generator struct {
	c         *comparison
	rng       *rand.Rand
	base      int64
	compacted int64
	watchers  []watcherModel
	streams   int
}

func (g *generator) chance(percent int) bool { return g.rng.IntN(100) < percent }

func pick[T any](g *generator, from []T) T { return from[g.rng.IntN(len(from))] }

func (g *generator) key() []byte {
	if g.chance(1) {
		return nil
	}
	return []byte(pick(g, keyNames))
}

// rangeEnd gives nothing, a prefix end, "from key", another key (perhaps a smaller one), or an empty-but-present end.
func (g *generator) rangeEnd(key []byte) []byte {
	switch g.rng.IntN(6) {
	case 0, 1:
		return nil
	case 2:
		return prefixEnd(key)
	case 3:
		return []byte{0}
	default:
		return []byte(pick(g, keyNames))
	}
}

func prefixEnd(key []byte) []byte {
	end := slices.Clone(key)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return []byte{0}
}

func (g *generator) now() int64 { return g.c.ref.revision.Load() }

// someRevision is mostly one that can be read, sometimes a compacted, future, negative or very large one.
func (g *generator) someRevision() int64 {
	switch g.rng.IntN(20) {
	case 0:
		return g.now() + 1 + g.rng.Int64N(3)
	case 1:
		return -1 - g.rng.Int64N(3)
	case 2:
		return max(1, g.compacted-1)
	case 3:
		return g.compacted
	case 4:
		return 1 << 62
	default:
		return g.compacted + g.rng.Int64N(max(1, g.now()-g.compacted+1))
	}
}

func (g *generator) rangeRequest() *pb.RangeRequest {
	r := &pb.RangeRequest{Key: g.key()}
	r.RangeEnd = g.rangeEnd(r.Key)
	if g.chance(30) {
		r.Limit = pick(g, []int64{-1, 1, 2, 3, 5, 100})
	}
	if g.chance(30) {
		r.Revision = g.someRevision()
	}
	if g.chance(40) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.rng.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.rng.IntN(5))
	}
	if g.chance(2) {
		r.SortTarget = pb.RangeRequest_SortTarget(pick(g, []int32{5, -1, 99}))
	}
	if g.chance(1) {
		r.SortOrder = 3
	}
	r.Serializable = g.chance(20)
	r.KeysOnly = g.chance(15)
	r.CountOnly = g.chance(10)
	if g.chance(8) {
		r.MinModRevision = g.someRevision()
	}
	if g.chance(8) {
		r.MaxModRevision = g.someRevision()
	}
	if g.chance(8) {
		r.MinCreateRevision = g.someRevision()
	}
	if g.chance(8) {
		r.MaxCreateRevision = g.someRevision()
	}
	return r
}

func (g *generator) putRequest() *pb.PutRequest {
	r := &pb.PutRequest{Key: g.key(), Value: []byte(pick(g, valueNames)), PrevKv: g.chance(30)}
	if g.chance(30) {
		r.Lease = pick(g, leaseIDs)
	}
	if g.chance(2) {
		r.Lease = pick(g, []int64{999, -5})
	}
	if g.chance(8) {
		r.IgnoreValue = true
		if g.chance(80) {
			r.Value = nil
		}
	}
	if g.chance(8) {
		r.IgnoreLease = true
		if g.chance(80) {
			r.Lease = 0
		}
	}
	return r
}

func (g *generator) deleteRequest() *pb.DeleteRangeRequest {
	r := &pb.DeleteRangeRequest{Key: g.key(), PrevKv: g.chance(40)}
	if g.chance(40) {
		r.RangeEnd = g.rangeEnd(r.Key)
	}
	return r
}

func (g *generator) compare() *pb.Compare {
	c := &pb.Compare{Key: g.key(), Result: pb.Compare_CompareResult(g.rng.IntN(4)), Target: pb.Compare_CompareTarget(g.rng.IntN(5))}
	if g.chance(20) {
		c.RangeEnd = g.rangeEnd(c.Key)
	}
	target := c.Target
	if g.chance(3) {
		target = pb.Compare_CompareTarget(g.rng.IntN(5)) // the union names another field than the target
	}
	if g.chance(3) {
		return c // no union at all
	}
	switch target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: g.rng.Int64N(4)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: pick(g, []int64{0, g.someRevision()})}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: pick(g, []int64{0, g.someRevision()})}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: []byte(pick(g, valueNames))}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: pick(g, leaseIDs)}
	}
	if g.chance(1) {
		c.Result = 7
	}
	return c
}

func (g *generator) txnRequest(depth int) *pb.TxnRequest {
	t := &pb.TxnRequest{}
	for range g.rng.IntN(3) {
		t.Compare = append(t.Compare, g.compare())
	}
	t.Success = g.branch(depth)
	t.Failure = g.branch(depth)
	return t
}

// branch makes up to four operations. Half of the transactions would be refused for a key written twice if keys were free, so
// writes mostly take keys not used before in the branch.
func (g *generator) branch(depth int) []*pb.RequestOp {
	var ops []*pb.RequestOp
	fresh := g.rng.Perm(len(keyNames))
	for range g.rng.IntN(4) {
		switch n := g.rng.IntN(10); {
		case n < 4:
			put := g.putRequest()
			if !g.chance(10) {
				put.Key, fresh = []byte(keyNames[fresh[0]]), fresh[1:]
			}
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
		case n < 7:
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.rangeRequest()}})
		case n < 9 || depth == 0:
			del := &pb.DeleteRangeRequest{Key: []byte(keyNames[fresh[0]]), PrevKv: g.chance(40)}
			fresh = fresh[1:]
			if g.chance(20) {
				del.RangeEnd = prefixEnd(del.Key)
			}
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: del}})
		default:
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: g.txnRequest(depth - 1)}})
		}
	}
	return ops
}

func (g *generator) step() {
	switch n := g.rng.IntN(100); {
	case n < 28:
		g.put()
	case n < 36:
		r := g.deleteRequest()
		g.c.both("DeleteRange "+render(r), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(e.kv.DeleteRange(ctx, r))
		})
	case n < 58:
		r := g.rangeRequest()
		g.c.both("Range "+render(r), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(e.kv.Range(ctx, r))
		})
	case n < 62:
		r := g.rangeRequest()
		if g.chance(80) {
			r.SortOrder, r.SortTarget = 0, 0
			r.MinModRevision, r.MaxModRevision, r.MinCreateRevision, r.MaxCreateRevision = 0, 0, 0, 0
		}
		g.c.both("RangeStream "+render(r), func(e *endpoint) string { return e.rangeStream(r) })
	case n < 80:
		t := g.txnRequest(2)
		g.c.both("Txn "+render(t), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(e.kv.Txn(ctx, t))
		})
	case n < 90:
		g.leaseStep()
	case n < 92:
		g.compact()
	default:
		g.watchStep()
	}
}

func (g *generator) put() {
	r := g.putRequest()
	g.c.both("Put "+render(r), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.kv.Put(ctx, r))
	})
}

func (g *generator) compact() {
	if g.chance(50) {
		g.sync() // a watcher not yet caught up may be cut off or not, by chance
	} else if len(g.watchers) > 0 {
		return
	}
	r := &pb.CompactionRequest{Revision: g.someRevision(), Physical: g.chance(40)}
	text := g.c.both("Compact "+render(r), func(e *endpoint) string {
		ctx, cancel := limited()
		defer cancel()
		return answer(e.kv.Compact(ctx, r))
	})
	if text[0] == '{' {
		g.compacted = max(g.compacted, r.Revision)
	}
}

func (g *generator) leaseStep() {
	id := pick(g, leaseIDs[1:])
	if g.chance(4) {
		id = pick(g, []int64{999, -5})
	}
	switch n := g.rng.IntN(10); {
	case n < 4:
		r := &pb.LeaseGrantRequest{ID: id, TTL: pick(g, []int64{600, 1000, 86400, 9_000_000_000})}
		if g.chance(5) {
			r.TTL = pick(g, []int64{9_000_000_001, 1 << 62})
		}
		g.c.both("LeaseGrant "+render(r), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(e.lease.LeaseGrant(ctx, r))
		})
	case n < 6:
		r := &pb.LeaseRevokeRequest{ID: id}
		g.c.both("LeaseRevoke "+render(r), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(e.lease.LeaseRevoke(ctx, r))
		})
	case n < 8:
		r := &pb.LeaseTimeToLiveRequest{ID: id, Keys: g.chance(70)}
		g.c.both("LeaseTimeToLive "+render(r), func(e *endpoint) string { return e.timeToLive(r) })
	case n < 9:
		g.c.both("LeaseLeases", func(e *endpoint) string { return e.leases() })
	default:
		g.c.both(fmt.Sprintf("LeaseKeepAlive %d", id), func(e *endpoint) string { return e.keepAlive(id, 12) })
	}
}

// timeToLive hides how many of the last seconds have passed: the two sides are not asked at the same moment. The keys of a lease
// come in no promised order (the reference walks a map).
func (e *endpoint) timeToLive(r *pb.LeaseTimeToLiveRequest) string {
	ctx, cancel := limited()
	defer cancel()
	resp, err := e.lease.LeaseTimeToLive(ctx, r)
	if err == nil {
		slices.SortFunc(resp.Keys, slices.Compare)
		if resp.TTL <= resp.GrantedTTL && resp.TTL >= resp.GrantedTTL-30 && resp.TTL > 0 {
			resp.TTL = resp.GrantedTTL
		}
	}
	return answer(resp, err)
}

// leases sorts by id: the reference's order is by expiry, which differs by microseconds.
func (e *endpoint) leases() string {
	ctx, cancel := limited()
	defer cancel()
	resp, err := e.lease.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
	if err == nil {
		slices.SortFunc(resp.Leases, func(a, b *pb.LeaseStatus) int { return int(a.ID - b.ID) })
	}
	return answer(resp, err)
}

func (g *generator) watchStep() {
	switch n := g.rng.IntN(10); {
	case n < 1 && g.streams < 3 || g.streams == 0:
		g.openStream()
	case n < 7:
		g.createWatcher()
	case n < 8 && len(g.watchers) > 0:
		g.cancelWatcher()
	default:
		g.sync()
	}
}

func (g *generator) openStream() {
	id := g.streams
	g.c.both(fmt.Sprintf("open watch stream %d", id), func(e *endpoint) string {
		stream, err := e.openWatch()
		if err != nil {
			return renderError(err)
		}
		e.streams[id] = stream
		return "open"
	})
	g.streams++
}

func (g *generator) createWatcher() {
	if len(g.watchers) >= 12 {
		return
	}
	stream := g.rng.IntN(g.streams)
	r := &pb.WatchCreateRequest{Key: g.key(), PrevKv: g.chance(50), ProgressNotify: g.chance(30), Fragment: g.chance(20)}
	r.RangeEnd = g.rangeEnd(r.Key)
	switch g.rng.IntN(6) {
	case 0, 1:
		r.StartRevision = g.compacted + g.rng.Int64N(max(1, g.now()-g.compacted+1))
	case 2:
		r.StartRevision = g.now() + 1 + g.rng.Int64N(5)
	case 3:
		r.StartRevision = pick(g, []int64{-1, 1, max(1, g.compacted-1), 0})
	}
	for range g.rng.IntN(3) {
		r.Filters = append(r.Filters, pb.WatchCreateRequest_FilterType(g.rng.IntN(2)))
	}
	if g.chance(40) {
		r.WatchId = pick(g, []int64{1, 2, 5, 100})
	}
	if r.StartRevision > 0 && r.StartRevision < g.compacted {
		g.tooLate(r)
		return
	}
	g.c.both(fmt.Sprintf("watch on stream %d %s", stream, render(r)), func(e *endpoint) string {
		return e.streams[stream].create(r)
	})
	w := g.c.ref.streams[stream]
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, live := range w.live {
		if live && !slices.Contains(g.watchers, watcherModel{stream, id}) {
			g.watchers = append(g.watchers, watcherModel{stream, id})
		}
	}
}

// tooLate watches from a compacted revision, on a stream of its own: a stream on which the reference ended a watcher that way never
// again answers a progress request (it still counts that watcher as not in sync), and so could no longer be waited for.
func (g *generator) tooLate(r *pb.WatchCreateRequest) {
	const own = 1000
	openStream(g.c, own)
	text := g.c.both("watch from a compacted revision "+render(r), func(e *endpoint) string {
		w := e.streams[own]
		text := w.create(r)
		if !strings.Contains(text, "canceled=true") {
			w.wait(callLimit, func() bool { return len(w.events) > 0 })
		}
		w.cancel()
		return text + "\n" + w.eventsOnly()
	})
	g.c.expect(text, "canceled=true")
}

func (g *generator) cancelWatcher() {
	g.sync() // else events on their way may be dropped or not, by chance
	// The map above has no order: sort before choosing, so that a seed means one program.
	slices.SortFunc(g.watchers, func(a, b watcherModel) int { return (a.stream-b.stream)*1000 + int(a.id-b.id) })
	victim := g.rng.IntN(len(g.watchers) + 1)
	target := watcherModel{g.rng.IntN(g.streams), 77}
	if victim < len(g.watchers) {
		target = g.watchers[victim]
		g.watchers = slices.Delete(g.watchers, victim, victim+1)
	}
	g.c.both(fmt.Sprintf("cancel watcher %d of stream %d", target.id, target.stream), func(e *endpoint) string {
		return e.streams[target.stream].cancelWatch(target.id)
	})
}

// sync moves past the start of every watcher by marker writes, waits until each stream says it delivered everything, and compares.
func (g *generator) sync() {
	for range 6 {
		g.c.both("marker", func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(e.kv.Put(ctx, &pb.PutRequest{Key: []byte(markerKey)}))
		})
	}
	revision := g.now()
	for id := range g.streams {
		text := g.c.both(fmt.Sprintf("progress of stream %d", id), func(e *endpoint) string {
			if !e.streams[id].anyLive() {
				return "in sync, for want of a watcher"
			}
			return e.streams[id].awaitProgress(revision)
		})
		g.c.expect(text, "in sync")
		g.c.eventually(3*time.Second, fmt.Sprintf("events of stream %d", id), func(e *endpoint) string { return e.streams[id].report() })
	}
}

// finish compares the whole state once more, by every way of reading it.
func (g *generator) finish() {
	g.sync()
	for revision := g.compacted; revision <= g.now(); revision += max(1, (g.now()-g.compacted)/8) {
		r := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: revision}
		g.c.both("final Range "+render(r), func(e *endpoint) string {
			ctx, cancel := limited()
			defer cancel()
			return answer(e.kv.Range(ctx, r))
		})
	}
	for _, id := range leaseIDs[1:] {
		g.c.both("final TimeToLive", func(e *endpoint) string {
			return e.timeToLive(&pb.LeaseTimeToLiveRequest{ID: id, Keys: true})
		})
	}
}
