package main

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// history is everything that the clients asked and were told, on one monotonic clock.
type history struct {
	began time.Time

	mu     sync.Mutex
	ops    []op        // on registers
	stale  []staleRead // at one member each
	added  []addition  // keys that are written once
	holds  []hold      // of mutexes and elections
	counts []count     // in the register that only a mutex owner writes
	leases []leaseEvent
	events []event // that watchers were told of the keys that are written once
}

type kind uint8

const (
	read kind = iota
	write
	swap   // write if the value is Expect
	remove // delete whatever is there
	take   // delete if the value is Expect
)

func (k kind) String() string { return [...]string{"read", "write", "swap", "remove", "take"}[k] }

type outcome uint8

const (
	answered outcome = iota
	refused          // the server says that nothing was done
	unknown
)

func (o outcome) String() string { return [...]string{"answered", "refused", "unknown"}[o] }

// op is one call on one register. No value is written twice, and "" is no value.
type op struct {
	Client  int
	At      string // the member that was asked, or "any"
	Key     string
	Kind    kind
	Expect  string
	Arg     string
	Call    int64
	Return  int64
	Outcome outcome
	Done    bool   // the compare of swap and take held
	Got     string // the value before the call took effect
	GotRev  int64  // its mod_revision; 0 for no value or not told
	Rev     int64  // of the answer's header
	Error   string
}

func (o op) String() string {
	return fmt.Sprintf("%.3f-%.3f s client %d at %s: %s %s expect=%q arg=%q %s done=%v got=%q@%d revision %d %s", float64(o.Call)/1e9, float64(o.Return)/1e9,
		o.Client, o.At, o.Kind, o.Key, o.Expect, o.Arg, o.Outcome, o.Done, o.Got, o.GotRev, o.Rev, o.Error)
}

// staleRead is a serializable read: it may be old, but never older than the one before from the same life of the member, and never of what
// was not written.
type staleRead struct {
	At     int
	Life   int
	Key    string
	Got    string
	GotRev int64
	Rev    int64
	Call   int64
	Return int64
}

// addition is a write of a key that nobody else writes.
type addition struct {
	Key     string
	Outcome outcome
	Rev     int64
}

// event is what a watcher was told, in its order.
type event struct {
	Watcher int
	At      string
	Key     string
	Rev     int64
}

// hold is a time for which a client believed to own a name, by its own view of its lease.
type hold struct {
	Name   string
	Client int
	Token  int64 // create revision of the owner's key
	From   int64
	Until  int64
}

// count is a write to the register of a mutex, guarded by ownership alone: two owners would repeat a number.
type count struct {
	Number  int64
	Token   int64
	Outcome outcome
}

// leaseEvent is something that a client did or heard about a lease.
type leaseEvent struct {
	Lease  int64
	What   leaseWhat
	Call   int64
	Return int64
	TTL    int64 // seconds, with granted and renewed
	How    string
}

type leaseWhat uint8

const (
	granted   leaseWhat = iota // or renewed: alive for TTL from Call on, at least
	gone                       // the server said so
	revoking                   // the client ends it itself
	abandoned                  // nobody renews it any more; Key must go away
)

func newHistory() *history { return &history{began: time.Now()} }

// now is the time since the start, of a clock that nobody sets.
func (h *history) now() int64 { return int64(time.Since(h.began)) }

func record[T any](h *history, list *[]T, entry T) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*list = append(*list, entry)
}

func (h *history) length() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.ops)
}

// copied is a history that may be spoiled without harm to the first.
func (h *history) copied() *history {
	h.mu.Lock()
	defer h.mu.Unlock()
	return &history{began: h.began, ops: slices.Clone(h.ops), stale: slices.Clone(h.stale), added: slices.Clone(h.added), holds: slices.Clone(h.holds),
		counts: slices.Clone(h.counts), leases: slices.Clone(h.leases),
		events: slices.Clone(h.events)}
}

func (h *history) summary() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	outcomes, additions := [3]int{}, [3]int{}
	for _, o := range h.ops {
		outcomes[o.Outcome]++
	}
	for _, a := range h.added {
		additions[a.Outcome]++
	}
	ids := map[int64]bool{}
	for _, e := range h.leases {
		ids[e.Lease] = true
	}
	return fmt.Sprintf("register calls: %d answered, %d refused, %d unknown; stale reads: %d; keys added: %d acknowledged, %d refused, %d unknown; owners: %d; guarded counts: %d; leases: %d; events: %d",
		outcomes[answered], outcomes[refused], outcomes[unknown], len(h.stale), additions[answered], additions[refused], additions[unknown], len(h.holds), len(h.counts), len(ids), len(h.events))
}

// judgeError says what an error tells about the effect of a change. Only what the server says before it proposes counts as refused.
func judgeError(err error) outcome {
	switch rpctypes.ErrorDesc(err) {
	case "etcdserver: no leader", "etcdserver: too many requests", "etcdserver: mvcc: database space exceeded", "etcdserver: request is too large":
		return refused
	}
	return unknown
}
