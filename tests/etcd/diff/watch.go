package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	mvccpb "go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// watchStream records what one Watch stream said, per watcher.
//
// How events are split over responses depends on timing at both servers, so only the events of each watcher are compared, in order,
// and the rules for responses are checked on each side alone: a revision is never split (unless fragmented), revisions rise,
// and a header is never older than its events. A broken rule is recorded as an event, and so becomes a difference.
type watchStream struct {
	endpoint *endpoint
	stream   pb.Watch_WatchClient
	cancel   context.CancelFunc

	mu       sync.Mutex
	changed  *sync.Cond
	control  []string           // created and canceled answers, in order
	events   map[int64][]string // by watch id
	last     map[int64]int64    // the newest revision each watcher saw
	open     map[int64]bool     // the watcher's last response was a fragment with more to come
	options  map[int64]*pb.WatchCreateRequest
	pending  []*pb.WatchCreateRequest // creates sent and not yet answered, in order
	live     map[int64]bool
	progress []int64 // header revisions of manual progress answers
	ended    string
}

func (e *endpoint) openWatch() (*watchStream, error) {
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := e.watch.Watch(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	w := &watchStream{endpoint: e, stream: stream, cancel: cancel, events: map[int64][]string{}, last: map[int64]int64{},
		open: map[int64]bool{}, options: map[int64]*pb.WatchCreateRequest{}, live: map[int64]bool{}}
	w.changed = sync.NewCond(&w.mu)
	go w.receive()
	return w, nil
}

func (w *watchStream) receive() {
	for {
		resp, err := w.stream.Recv()
		w.mu.Lock()
		if err != nil {
			w.ended = renderError(err)
			w.changed.Broadcast()
			w.mu.Unlock()
			return
		}
		if w.endpoint.tamper != nil {
			w.endpoint.tamper(resp)
		}
		w.record(resp)
		w.changed.Broadcast()
		w.mu.Unlock()
	}
}

func (w *watchStream) record(resp *pb.WatchResponse) {
	id := resp.WatchId
	if resp.Created {
		if len(w.pending) > 0 {
			w.options[id] = w.pending[0]
			w.pending = w.pending[1:]
		}
		w.live[id] = !resp.Canceled
		w.control = append(w.control, render(resp))
		return
	}
	if resp.Canceled {
		w.live[id] = false
		w.events[id] = append(w.events[id], "canceled "+render(resp))
		return
	}
	if len(resp.Events) == 0 && id == -1 {
		w.progress = append(w.progress, resp.GetHeader().GetRevision())
		return
	}
	if len(resp.Events) == 0 {
		return // periodic progress: its moment is not ours to compare
	}
	w.check(resp)
	asked := w.options[id].GetPrevKv()
	for _, event := range resp.Events {
		if !asked && event.PrevKv != nil {
			if w.endpoint.strictPrev {
				w.events[id] = append(w.events[id], "rule broken: prev_kv that was not asked for")
			}
			event = proto.Clone(event).(*mvccpb.Event)
			event.PrevKv = nil
		}
		w.events[id] = append(w.events[id], render(event))
	}
}

func (w *watchStream) check(resp *pb.WatchResponse) {
	id, first, last := resp.WatchId, resp.Events[0].Kv.ModRevision, resp.Events[len(resp.Events)-1].Kv.ModRevision
	broken := func(format string, args ...any) {
		w.events[id] = append(w.events[id], "rule broken: "+fmt.Sprintf(format, args...))
	}
	if !slices.IsSortedFunc(resp.Events, func(a, b *mvccpb.Event) int { return int(a.Kv.ModRevision - b.Kv.ModRevision) }) {
		broken("events of one response are not in revision order")
	}
	if first < w.last[id] || first == w.last[id] && !w.open[id] {
		broken("revision %d came again after %d", first, w.last[id])
	}
	if resp.GetHeader().GetRevision() < last {
		broken("header revision %d is older than the event of %d", resp.GetHeader().GetRevision(), last)
	}
	if resp.Fragment && !w.options[id].GetFragment() {
		broken("a fragment that was not asked for")
	}
	w.last[id], w.open[id] = last, resp.Fragment
}

// wait blocks until the condition holds, and says so, or until the time is over.
func (w *watchStream) wait(limit time.Duration, condition func() bool) bool {
	deadline := time.Now().Add(limit) // taken before the timer starts, so that the timer never wakes us too early
	timer := time.AfterFunc(limit, func() {
		w.mu.Lock()
		w.changed.Broadcast()
		w.mu.Unlock()
	})
	defer timer.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for !condition() {
		if !time.Now().Before(deadline) || w.ended != "" {
			return condition()
		}
		w.changed.Wait()
	}
	return true
}

// create sends the request and returns the server's answer to it.
func (w *watchStream) create(req *pb.WatchCreateRequest) string {
	w.mu.Lock()
	before := len(w.control)
	w.pending = append(w.pending, req)
	w.mu.Unlock()
	if err := w.stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: req}}); err != nil {
		return "send: " + err.Error()
	}
	if !w.wait(callLimit, func() bool { return len(w.control) > before }) {
		return "no answer to the create request " + w.ended
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.control[len(w.control)-1]
}

func (w *watchStream) cancelWatch(id int64) string {
	w.mu.Lock()
	live := w.live[id]
	w.mu.Unlock()
	err := w.stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
	if err != nil {
		return "send: " + err.Error()
	}
	if !live {
		return "not live"
	}
	if !w.wait(callLimit, func() bool { return !w.live[id] }) {
		return "no answer to the cancel request"
	}
	return "canceled"
}

func (w *watchStream) requestProgress() error {
	return w.stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// awaitProgress asks until the server says that everything up to the revision was delivered on this stream.
func (w *watchStream) awaitProgress(revision int64) string {
	w.mu.Lock()
	before := len(w.progress)
	w.mu.Unlock()
	reached := func() bool {
		return slices.ContainsFunc(w.progress[before:], func(r int64) bool { return r >= revision })
	}
	for deadline := time.Now().Add(callLimit); time.Now().Before(deadline); {
		if err := w.requestProgress(); err != nil {
			return "send: " + err.Error()
		}
		if w.wait(50*time.Millisecond, reached) {
			return "in sync"
		}
		if w.ended != "" {
			return "stream ended: " + w.ended
		}
	}
	return "no progress answer for the newest revision"
}

// report is everything recorded so far, per watcher.
func (w *watchStream) report() string {
	text := w.eventsOnly()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended != "" {
		text += "ended: " + w.ended + "\n"
	}
	return text
}

func (w *watchStream) eventsOnly() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	ids := []int64{}
	for id := range w.events {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	var out strings.Builder
	for _, id := range ids {
		fmt.Fprintf(&out, "watcher %d:\n", id)
		for _, event := range w.events[id] {
			fmt.Fprintf(&out, "  %s\n", event)
		}
	}
	return out.String()
}

func (w *watchStream) anyLive() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, live := range w.live {
		if live {
			return true
		}
	}
	return false
}
