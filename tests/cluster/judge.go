package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// ends is what the members hold after everything healed and every abandoned lease had its time.
type ends struct {
	revision int64
	images   [][]*mvccpb.KeyValue // of each member, read from itself at that revision
}

// leaseGrace is how much longer than its TTL an abandoned lease may live after the last fault: a new leader gives it its whole TTL again, and
// ends it a little late.
const leaseGrace = 5 * time.Second

// readEnds waits until leases had their time, reads every register once more as a part of the history, and takes each member's own state.
func readEnds(c *cluster, h *history) (*ends, error) {
	if _, err := c.progress(all(len(c.members)), progressLimit); err != nil {
		return nil, err
	}
	time.Sleep(leaseTTL*time.Second + leaseGrace)
	e := &ends{}
	if err := c.readRegisters(h, e); err != nil {
		return nil, err
	}
	for i := range c.members {
		image, err := c.image(i, e.revision)
		if err != nil {
			return nil, fmt.Errorf("the state of %s: %w", c.members[i].name, err)
		}
		e.images = append(e.images, image)
	}
	return e, nil
}

func (c *cluster) readRegisters(h *history, e *ends) error {
	keys := map[string]bool{}
	for _, o := range h.ops {
		keys[o.Key] = true
	}
	return c.call(0, 30*time.Second, func(ctx context.Context, conn *grpc.ClientConn) error {
		kv := pb.NewKVClient(conn)
		sent := h.now()
		everything, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		if err != nil {
			return err
		}
		e.revision = everything.Header.Revision
		there := map[string]*mvccpb.KeyValue{}
		for _, kv := range everything.Kvs {
			there[string(kv.Key)] = kv
		}
		for key := range keys {
			o := op{Client: -1, At: "n0", Key: key, Kind: read, Call: sent, Return: h.now(), Rev: e.revision}
			if strings.HasPrefix(key, "pair/") {
				left, right := there[key+"/left"], there[key+"/right"]
				if string(left.GetValue()) != string(right.GetValue()) {
					o.Got = fmt.Sprintf("half a transaction at the end: %q and %q", left.GetValue(), right.GetValue())
				} else {
					o.Got, o.GotRev = string(left.GetValue()), left.GetModRevision()
				}
			} else if kv := there[key]; kv != nil {
				o.Got, o.GotRev = string(kv.Value), kv.ModRevision
			}
			record(h, &h.ops, o)
		}
		return nil
	})
}

// image is what one member itself holds at a revision; it may need a moment to get there.
func (c *cluster) image(index int, revision int64) ([]*mvccpb.KeyValue, error) {
	deadline := time.Now().Add(progressLimit)
	for {
		var answer *pb.RangeResponse
		err := c.call(index, progressLimit, func(ctx context.Context, conn *grpc.ClientConn) error {
			var err error
			answer, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Serializable: true, Revision: revision})
			return err
		})
		if err == nil && answer.Header.Revision >= revision {
			return answer.Kvs, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("it is not at revision %d within %v: %w", revision, progressLimit, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (o *op) saw(kvs []*mvccpb.KeyValue) {
	if len(kvs) > 0 {
		o.Got, o.GotRev = string(kvs[0].Value), kvs[0].ModRevision
	}
}

// verdict is one check of the whole history.
type verdict struct {
	name     string
	problems []string
}

func (v *verdict) add(format string, args ...any) {
	v.problems = append(v.problems, fmt.Sprintf(format, args...))
}

func (v *verdict) err() error {
	if len(v.problems) == 0 {
		return nil
	}
	shown := v.problems[:min(len(v.problems), 8)]
	more := ""
	if len(v.problems) > len(shown) {
		more = fmt.Sprintf("\n  and %d more", len(v.problems)-len(shown))
	}
	return errors.New(strings.Join(shown, "\n  ") + more)
}

// The names of the checks.
const (
	byRegisters = "every register is linearizable (porcupine)"
	byRevisions = "revisions never go back"
	byContents  = "a value has one revision"
	byRefused   = "what was refused never took effect"
	byAdditions = "no acknowledged write is lost"
	byStale     = "stale reads show what was written, and never go back at one member"
	byHolds     = "a name never has two owners"
	byTokens    = "tokens rise from owner to owner"
	byCounts    = "the register of the mutex counts without a gap"
	byLeases    = "no lease ends before its time"
	byAbandoned = "abandoned leases end"
	byEvents    = "watchers are told everything once, in order"
	byImages    = "all members hold the same"
)

func judge(h *history, e *ends, evidence string) []*verdict {
	return []*verdict{
		judgeRegisters(h, evidence), judgeRevisions(h), judgeContents(h, e), judgeRefused(h, e), judgeAdditions(h, e), judgeStale(h),
		judgeHolds(h), judgeTokens(h), judgeCounts(h, e), judgeLeases(h), judgeAbandoned(h, e), judgeEvents(h, e), judgeImages(e),
	}
}

// model is one register. Values are never written twice, so the value alone is the state.
var model = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		there, in, out := state.(string), input.(op), output.(op)
		known := out.Outcome == answered
		switch in.Kind {
		case read:
			return there == out.Got, there
		case write:
			return !known || there == out.Got, in.Arg
		case remove:
			return !known || there == out.Got, ""
		}
		holds := there == in.Expect
		if known && (holds != out.Done || there != out.Got) {
			return false, there
		}
		if holds {
			return true, in.Arg // "" for take
		}
		return true, there
	},
	DescribeOperation: func(input, output any) string { return output.(op).String() },
	DescribeState:     func(state any) string { return fmt.Sprintf("%q", state) },
}

// observed is every value that somebody was shown.
func observed(h *history) map[string]bool {
	seen := map[string]bool{}
	for _, o := range h.ops {
		if o.Outcome == answered {
			seen[o.Got] = true
		}
	}
	for _, s := range h.stale {
		seen[s.Got] = true
	}
	return seen
}

// puzzle is the part of a history that says something about one register, as the checker wants it. Unknown outcomes may take effect at any later
// time or never. An unknown write whose value nobody was ever shown is left out: every answered change shows what it replaced, so a history
// that can be put in order with that write can be put in order without it.
func puzzle(ops []op, seen map[string]bool) []porcupine.Operation {
	var list []porcupine.Operation
	for i, o := range ops {
		ends := o.Return
		switch {
		case o.Outcome == refused, o.Outcome == unknown && o.Kind == read:
			continue
		case o.Outcome == unknown && (o.Kind == write || o.Kind == swap) && !seen[o.Arg]:
			continue
		case o.Outcome == unknown:
			ends = math.MaxInt64
		}
		list = append(list, porcupine.Operation{ClientId: i, Input: o, Call: o.Call, Output: o, Return: ends})
	}
	return list
}

func judgeRegisters(h *history, evidence string) *verdict {
	v := &verdict{name: byRegisters}
	registers := map[string][]op{}
	for _, o := range h.ops {
		registers[o.Key] = append(registers[o.Key], o)
	}
	seen := observed(h)
	for key, ops := range registers {
		list := puzzle(ops, seen)
		switch porcupine.CheckOperationsTimeout(model, list, 30*time.Second) {
		case porcupine.Ok:
			continue
		case porcupine.Unknown:
			v.add("%s: the checker found no answer within 30 s: %d calls", key, len(list))
			continue
		}
		v.add("%s is not linearizable: %s", key, explain(list, ops, filepath.Join(evidence, strings.ReplaceAll(key, "/", "_"))))
	}
	return v
}

// explain shows the calls around the place where no order was found any more, and leaves the whole story and a picture as evidence.
func explain(list []porcupine.Operation, ops []op, file string) string {
	var story strings.Builder
	for _, o := range ops {
		fmt.Fprintln(&story, o)
	}
	_ = os.WriteFile(file+".txt", []byte(story.String()), 0o644)
	_, info := porcupine.CheckOperationsVerbose(model, list, 10*time.Second)
	_ = porcupine.VisualizePath(model, info, file+".html")
	// The longest beginnings that can be put in order end before the call that does not fit.
	reached := 0
	for _, partition := range info.PartialLinearizations() {
		for _, order := range partition {
			reached = max(reached, len(order))
		}
	}
	slices.SortFunc(list, func(a, b porcupine.Operation) int { return int(a.Return/1000 - b.Return/1000) })
	var shown []string
	for i, o := range list {
		if i >= reached-3 && i <= reached+2 {
			shown = append(shown, fmt.Sprint(o.Output))
		}
	}
	return fmt.Sprintf("%d of %d calls can be put in order, then:\n    %s", reached, len(list), strings.Join(shown, "\n    "))
}

// judgeRevisions: what was answered before a call began has no higher revision than that call's answer, whoever asked whom.
func judgeRevisions(h *history) *verdict {
	v := &verdict{name: byRevisions}
	byCall, byReturn := []op{}, []op{}
	for _, o := range h.ops {
		if o.Outcome == answered {
			byCall, byReturn = append(byCall, o), append(byReturn, o)
		}
	}
	slices.SortFunc(byCall, func(a, b op) int { return int(a.Call - b.Call) })
	slices.SortFunc(byReturn, func(a, b op) int { return int(a.Return - b.Return) })
	next := 0
	var highest op
	for _, o := range byCall {
		for ; next < len(byReturn) && byReturn[next].Return < o.Call; next++ {
			if byReturn[next].Rev > highest.Rev {
				highest = byReturn[next]
			}
		}
		if o.Rev < highest.Rev {
			v.add("%v\n    after %v", o, highest)
		}
	}
	return v
}

// judgeContents: a value has one mod_revision wherever it is seen, and a mod_revision shows one value of a key.
func judgeContents(h *history, e *ends) *verdict {
	v := &verdict{name: byContents}
	revisions, values := map[string]int64{}, map[string]string{}
	look := func(key, value string, revision int64, where string) {
		if value == "" || revision == 0 {
			return
		}
		if first, known := revisions[key+"="+value]; known && first != revision {
			v.add("%s=%s has mod_revision %d and, %s, %d", key, value, first, where, revision)
		}
		revisions[key+"="+value] = revision
		place := fmt.Sprintf("%s@%d", key, revision)
		if first, known := values[place]; known && first != value {
			v.add("%s is %s and, %s, %s", place, first, where, value)
		}
		values[place] = value
	}
	for _, o := range h.ops {
		if o.Outcome != answered {
			continue
		}
		look(o.Key, o.Got, o.GotRev, "in an answer")
		if o.Kind == write || o.Kind == swap && o.Done {
			look(o.Key, o.Arg, o.Rev, "as it was acknowledged")
		}
		if o.GotRev > o.Rev {
			v.add("an answer shows a later revision than its own: %v", o)
		}
	}
	for _, s := range h.stale {
		look(s.Key, s.Got, s.GotRev, "in a stale read")
	}
	for _, image := range e.images {
		for _, kv := range image {
			look(string(kv.Key), string(kv.Value), kv.ModRevision, "at the end")
		}
	}
	return v
}

// judgeRefused: what the server refused never took effect.
func judgeRefused(h *history, e *ends) *verdict {
	v := &verdict{name: byRefused}
	seen := observed(h)
	for _, o := range h.ops {
		if o.Outcome == refused && o.Arg != "" && seen[o.Arg] {
			v.add("%s was seen after %v", o.Arg, o)
		}
	}
	there := e.keys()
	for _, a := range h.added {
		if a.Outcome == refused && there[a.Key] != nil {
			v.add("%s was refused and is there", a.Key)
		}
	}
	return v
}

func (e *ends) keys() map[string]*mvccpb.KeyValue {
	there := map[string]*mvccpb.KeyValue{}
	for _, kv := range e.images[0] {
		there[string(kv.Key)] = kv
	}
	return there
}

func judgeAdditions(h *history, e *ends) *verdict {
	v := &verdict{name: byAdditions}
	there := e.keys()
	for _, a := range h.added {
		kv := there[a.Key]
		switch {
		case a.Outcome != answered:
		case kv == nil:
			v.add("%s was acknowledged at revision %d and is lost", a.Key, a.Rev)
		case kv.ModRevision != a.Rev || string(kv.Value) != a.Key || kv.Version != 1:
			v.add("%s was acknowledged at revision %d and is now %q at %d, version %d", a.Key, a.Rev, kv.Value, kv.ModRevision, kv.Version)
		}
	}
	return v
}

func judgeStale(h *history) *verdict {
	v := &verdict{name: byStale}
	written := map[string]bool{"": true}
	for _, o := range h.ops {
		if o.Outcome != refused {
			written[o.Key+"="+o.Arg] = true
		}
	}
	for _, s := range h.stale {
		if s.Got != "" && !written[s.Key+"="+s.Got] {
			v.add("n%d showed %s=%s, which nobody wrote", s.At, s.Key, s.Got)
		}
		if s.GotRev > s.Rev {
			v.add("n%d showed %s of revision %d at revision %d", s.At, s.Key, s.GotRev, s.Rev)
		}
	}
	for life, reads := range livesOf(h.stale) {
		highest, next := int64(0), 0
		byReturn := slices.Clone(reads)
		slices.SortFunc(reads, func(a, b staleRead) int { return int(a.Call - b.Call) })
		slices.SortFunc(byReturn, func(a, b staleRead) int { return int(a.Return - b.Return) })
		for _, s := range reads {
			for ; next < len(byReturn) && byReturn[next].Return < s.Call; next++ {
				highest = max(highest, byReturn[next].Rev)
			}
			if s.Rev < highest {
				v.add("n%d in its life %d went back from revision %d to %d", life[0], life[1], highest, s.Rev)
			}
		}
	}
	return v
}

func livesOf(reads []staleRead) map[[2]int][]staleRead {
	lives := map[[2]int][]staleRead{}
	for _, s := range reads {
		life := [2]int{s.At, s.Life}
		lives[life] = append(lives[life], s)
	}
	return lives
}

func judgeHolds(h *history) *verdict {
	v := &verdict{name: byHolds}
	for before, after := range successions(h) {
		if after.From < before.Until {
			v.add("%s: client %d (token %d) owned it until %.3f s by its own view, client %d (token %d) from %.3f s", before.Name, before.Client, before.Token,
				float64(before.Until)/1e9, after.Client, after.Token, float64(after.From)/1e9)
		}
	}
	return v
}

func judgeTokens(h *history) *verdict {
	v := &verdict{name: byTokens}
	for before, after := range successions(h) {
		if after.Token <= before.Token {
			v.add("%s: token %d of client %d at %.3f s, then token %d of client %d at %.3f s", before.Name, before.Token, before.Client,
				float64(before.From)/1e9, after.Token, after.Client, float64(after.From)/1e9)
		}
	}
	return v
}

// successions are the neighbours in the order of owning, of each name.
func successions(h *history) func(func(hold, hold) bool) {
	holds := slices.Clone(h.holds)
	slices.SortFunc(holds, func(a, b hold) int { return int(a.From - b.From) })
	return func(yield func(hold, hold) bool) {
		last := map[string]hold{}
		for _, h := range holds {
			if before, known := last[h.Name]; known && !yield(before, h) {
				return
			}
			last[h.Name] = h
		}
	}
}

func judgeCounts(h *history, e *ends) *verdict {
	v := &verdict{name: byCounts}
	tokens := map[int64]int64{}
	highest := int64(0)
	for _, c := range h.counts {
		if c.Outcome != answered {
			continue
		}
		if token, known := tokens[c.Number]; known {
			v.add("%d was counted twice, under the tokens %d and %d", c.Number, token, c.Token)
		}
		tokens[c.Number] = c.Token
		highest = max(highest, c.Number)
	}
	kv := e.keys()[register]
	var number, token int64
	if kv != nil {
		_, _ = fmt.Sscan(string(kv.Value), &number, &token)
	}
	if number < highest {
		v.add("%d was acknowledged and the register is %d", highest, number)
	}
	// Written once for each number, so its version is its number.
	if number != kv.GetVersion() {
		v.add("the register was written %d times and counts %d", kv.GetVersion(), number)
	}
	return v
}

// judgeLeases: while the TTL has not passed since a renewal was sent that was answered, nobody is told that the lease is gone.
func judgeLeases(h *history) *verdict {
	v := &verdict{name: byLeases}
	deadlines, ended := map[int64]int64{}, map[int64]bool{}
	events := slices.Clone(h.leases)
	slices.SortFunc(events, func(a, b leaseEvent) int { return int(a.Return - b.Return) })
	for _, e := range events {
		switch e.What {
		case granted:
			deadlines[e.Lease] = max(deadlines[e.Lease], e.Call+e.TTL*int64(time.Second))
		case revoking:
			ended[e.Lease] = true
		case gone:
			if !ended[e.Lease] && e.Return < deadlines[e.Lease] {
				v.add("lease %x: at %.3f s %s, although it was good until %.3f s", e.Lease, float64(e.Return)/1e9, e.How, float64(deadlines[e.Lease])/1e9)
			}
		}
	}
	return v
}

// judgeAbandoned: what nobody renews any more goes away, with its keys.
func judgeAbandoned(h *history, e *ends) *verdict {
	v := &verdict{name: byAbandoned}
	left := map[int64]bool{}
	for _, event := range h.leases {
		left[event.Lease] = true
	}
	for key, kv := range e.keys() {
		if kv.Lease != 0 && left[kv.Lease] {
			v.add("%s of lease %x is still there", key, kv.Lease)
		}
	}
	return v
}

// judgeEvents: up to the last thing that it was told, a watcher was told of each key, once, by rising revision.
func judgeEvents(h *history, e *ends) *verdict {
	v := &verdict{name: byEvents}
	last, told := map[int]int64{}, map[int]map[string]int64{}
	there := e.keys()
	for _, event := range h.events {
		if event.Key == "" {
			told[event.Watcher] = map[string]int64{}
			continue
		}
		if event.Rev <= last[event.Watcher] {
			v.add("watcher %d at %s: revision %d after %d", event.Watcher, event.At, event.Rev, last[event.Watcher])
		}
		if there[event.Key].GetModRevision() != event.Rev {
			v.add("watcher %d at %s: %s at %d, but it is at %d", event.Watcher, event.At, event.Key, event.Rev, there[event.Key].GetModRevision())
		}
		last[event.Watcher], told[event.Watcher][event.Key] = event.Rev, event.Rev
	}
	for watcher, keys := range told {
		for key, kv := range there {
			if strings.HasPrefix(key, "set/") && kv.ModRevision <= last[watcher] && keys[key] == 0 {
				v.add("watcher %d was never told of %s at %d, but of %d", watcher, key, kv.ModRevision, last[watcher])
			}
		}
	}
	return v
}

func judgeImages(e *ends) *verdict {
	v := &verdict{name: byImages}
	for i, image := range e.images {
		if len(image) != len(e.images[0]) {
			v.add("n%d holds %d keys at revision %d, n0 holds %d", i, len(image), e.revision, len(e.images[0]))
			continue
		}
		for k, kv := range image {
			if !proto.Equal(kv, e.images[0][k]) {
				v.add("n%d holds %v, n0 holds %v", i, kv, e.images[0][k])
			}
		}
	}
	return v
}
