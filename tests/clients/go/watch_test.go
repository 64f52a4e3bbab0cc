package clients

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// watchReady is closed when watchers created before on this client's default stream are in place: creates are served in order.
func watchReady(t *testing.T, ctx context.Context, client *clientv3.Client) <-chan struct{} {
	t.Helper()
	ready := make(chan struct{})
	created := client.Watch(ctx, "ready", clientv3.WithCreatedNotify())
	go func() {
		<-created
		close(ready)
	}()
	return ready
}

func TestWatchPrefixWithPrevKV(t *testing.T) {
	client, prefix, ctx := start(t)
	first := put(t, ctx, client, prefix+"a", "1")
	watch := client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(first))
	put(t, ctx, client, prefix+"a", "2")
	must[*clientv3.DeleteResponse](t)(client.Delete(ctx, prefix+"a"))
	events := collect(t, ctx, watch, 3)
	if !events[0].IsCreate() || events[0].PrevKv != nil {
		t.Errorf("first event %v", events[0])
	}
	if !events[1].IsModify() || string(events[1].PrevKv.Value) != "1" {
		t.Errorf("second event %v", events[1])
	}
	if events[2].Type != clientv3.EventTypeDelete || string(events[2].PrevKv.Value) != "2" {
		t.Errorf("third event %v", events[2])
	}
}

func TestWatchFilters(t *testing.T) {
	client, prefix, ctx := start(t)
	first := put(t, ctx, client, prefix+"k", "1")
	deletes := client.Watch(ctx, prefix+"k", clientv3.WithFilterPut(), clientv3.WithRev(first))
	puts := client.Watch(ctx, prefix+"k", clientv3.WithFilterDelete(), clientv3.WithRev(first))
	must[*clientv3.DeleteResponse](t)(client.Delete(ctx, prefix+"k"))
	put(t, ctx, client, prefix+"k", "2")
	if events := collect(t, ctx, deletes, 1); events[0].Type != clientv3.EventTypeDelete {
		t.Errorf("%v", events)
	}
	for _, event := range collect(t, ctx, puts, 2) {
		if event.Type != clientv3.EventTypePut {
			t.Errorf("%v", event)
		}
	}
}

func TestWatchResumesAfterReconnect(t *testing.T) {
	client, prefix, ctx := start(t)
	p := newProxy(t)
	watching := connect(t, p.addr())
	first := put(t, ctx, client, prefix+"k", "first")
	watch := watching.Watch(ctx, prefix+"k", clientv3.WithRev(first))
	collect(t, ctx, watch, 1)
	const count = 300
	go func() {
		for i := range count {
			if i%60 == 30 {
				p.cut()
			}
			if _, err := client.Put(ctx, prefix+"k", fmt.Sprint(i)); err != nil {
				return // the count of events tells
			}
		}
	}()
	for i, event := range collect(t, ctx, watch, count) {
		if string(event.Kv.Value) != fmt.Sprint(i) {
			t.Fatalf("event %d carries %s: lost or repeated over a reconnect", i, event.Kv.Value)
		}
	}
	if p.accepted < 2 {
		t.Fatal("the client never reconnected: nothing was tested")
	}
}

func TestWatchCompacted(t *testing.T) {
	client, prefix, ctx := start(t)
	// A compaction would reach into the other tests' history: only what is older than all of them is safe to drop.
	put(t, ctx, client, prefix+"k", "v") // so that there is something at revision 2
	if _, err := client.Compact(ctx, 2); err != nil && !errors.Is(err, rpctypes.ErrCompacted) && !errors.Is(err, rpctypes.ErrFutureRev) {
		t.Fatal(err)
	}
	for resp := range client.Watch(ctx, prefix, clientv3.WithRev(1)) {
		if resp.Err() == nil {
			continue
		}
		if !errors.Is(resp.Err(), rpctypes.ErrCompacted) || resp.CompactRevision < 2 {
			t.Fatalf("compact revision %d, %v", resp.CompactRevision, resp.Err())
		}
		return
	}
	t.Fatal("the watch ended without saying why")
}

func TestWatchRequestProgress(t *testing.T) {
	client, prefix, ctx := start(t)
	watch := client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if resp := <-watch; !resp.Created {
		t.Fatalf("expected the created answer, got %v", resp)
	}
	for i := range 20 {
		written := put(t, ctx, client, prefix+"k", fmt.Sprint(i))
		if err := client.RequestProgress(ctx); err != nil {
			t.Fatal(err)
		}
		seen := false
		for done := false; !done; {
			select {
			case resp := <-watch:
				for _, event := range resp.Events {
					seen = seen || event.Kv.ModRevision == written
				}
				if resp.IsProgressNotify() && resp.Header.Revision >= written {
					if !seen {
						t.Fatalf("progress %d came before the event of %d", resp.Header.Revision, written)
					}
					done = true
				}
			case <-time.After(time.Second):
				// Not in sync at that moment: ask again, as kube-apiserver does.
				if err := client.RequestProgress(ctx); err != nil {
					t.Fatal(err)
				}
			case <-ctx.Done():
				t.Fatal("no progress answer")
			}
		}
	}
}

func TestWatchFragment(t *testing.T) {
	client, prefix, ctx := start(t)
	watch := client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithFragment(), clientv3.WithPrevKV())
	<-watchReady(t, ctx, client)
	big := strings.Repeat("f", 500_000)
	for i := range 10 {
		put(t, ctx, client, fmt.Sprintf("%s%d", prefix, i), big)
	}
	must[*clientv3.DeleteResponse](t)(client.Delete(ctx, prefix, clientv3.WithPrefix()))
	for i, event := range collect(t, ctx, watch, 20)[10:] {
		if event.Type != clientv3.EventTypeDelete || len(event.PrevKv.Value) != len(big) || !strings.HasSuffix(string(event.Kv.Key), fmt.Sprint(i)) {
			t.Fatalf("delete event %d is of %s with %d bytes before", i, event.Kv.Key, len(event.PrevKv.GetValue()))
		}
	}
}

func TestWatchManyOnOneStream(t *testing.T) {
	client, prefix, ctx := start(t)
	const watchers = 500
	channels := make([]clientv3.WatchChan, watchers)
	for i := range channels {
		channels[i] = client.Watch(ctx, fmt.Sprintf("%s%d", prefix, i%10))
	}
	<-watchReady(t, ctx, client)
	for i := range 10 {
		put(t, ctx, client, fmt.Sprintf("%s%d", prefix, i), "v")
	}
	for i, channel := range channels {
		if event := collect(t, ctx, channel, 1)[0]; string(event.Kv.Key) != fmt.Sprintf("%s%d", prefix, i%10) {
			t.Fatalf("watcher %d got %s", i, event.Kv.Key)
		}
	}
}

func TestWatchCancelEndsChannel(t *testing.T) {
	client, prefix, ctx := start(t)
	own, cancel := context.WithCancel(ctx)
	watch := client.Watch(own, prefix)
	<-watchReady(t, ctx, client)
	cancel()
	select {
	case <-drained(watch):
	case <-time.After(10 * time.Second):
		t.Fatal("a cancelled watch stays open")
	}
}

func drained(watch clientv3.WatchChan) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		for range watch {
		}
		close(done)
	}()
	return done
}

// A client that stops reading its watch must neither delay writers nor other watchers, nor lose its own events.
func TestSlowWatcherDelaysNobody(t *testing.T) {
	client, prefix, ctx := start(t)
	conn := must[*grpc.ClientConn](t)(grpc.NewClient("passthrough:///"+serverAddr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(65535), grpc.WithInitialConnWindowSize(65535), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30))))
	defer conn.Close()
	slow := must[pb.Watch_WatchClient](t)(pb.NewWatchClient(conn).Watch(ctx))
	first := put(t, ctx, client, prefix+"0", "v")
	request := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(prefix), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(prefix)), StartRevision: first}}}
	if err := slow.Send(request); err != nil {
		t.Fatal(err)
	}
	quick := client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(first))
	collect(t, ctx, quick, 1)
	const writes = 600
	load := strings.Repeat("s", 60_000) // 36 MB in all: far above every buffer in between
	worst := time.Duration(0)
	for i := range writes {
		begun := time.Now()
		written := put(t, ctx, client, prefix+fmt.Sprint(i%4), load)
		if event := collect(t, ctx, quick, 1)[0]; event.Kv.ModRevision != written {
			t.Fatalf("event of %d, expected %d", event.Kv.ModRevision, written)
		}
		worst = max(worst, time.Since(begun))
	}
	if worst > 3*time.Second {
		t.Errorf("a write and its event took %v beside a watcher that does not read", worst)
	}
	// It wakes up, and gets everything in order.
	seen, last := 0, int64(0)
	for seen < writes+1 {
		resp, err := slow.Recv()
		if err != nil {
			t.Fatalf("after %d events: %v", seen, err)
		}
		if resp.Canceled {
			t.Fatalf("the slow watcher was cancelled: %s", resp.CancelReason)
		}
		for _, event := range resp.Events {
			if event.Kv.ModRevision <= last {
				t.Fatalf("revision %d after %d", event.Kv.ModRevision, last)
			}
			last = event.Kv.ModRevision
			seen++
		}
	}
}
