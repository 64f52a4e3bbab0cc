package clients

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	recipes "go.etcd.io/etcd/client/v3/experimental/recipes"
)

func session(t *testing.T, client *clientv3.Client, ttl int) *concurrency.Session {
	t.Helper()
	s := must[*concurrency.Session](t)(concurrency.NewSession(client, concurrency.WithTTL(ttl)))
	t.Cleanup(func() { s.Close() })
	return s
}

func TestMutexExcludes(t *testing.T) {
	client, prefix, ctx := start(t)
	var inside, entered atomic.Int32
	var group sync.WaitGroup
	for range 16 {
		s := session(t, client, 30)
		group.Go(func() {
			for range 5 {
				mutex := concurrency.NewMutex(s, prefix+"m")
				if err := mutex.Lock(ctx); err != nil {
					t.Error(err)
					return
				}
				if inside.Add(1) != 1 {
					t.Error("two are inside at once")
				}
				entered.Add(1)
				time.Sleep(time.Millisecond)
				inside.Add(-1)
				if err := mutex.Unlock(ctx); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	if entered.Load() != 80 {
		t.Fatalf("%d of 80 entered", entered.Load())
	}
}

func TestMutexTryLock(t *testing.T) {
	client, prefix, ctx := start(t)
	first, second := concurrency.NewMutex(session(t, client, 30), prefix+"m"), concurrency.NewMutex(session(t, client, 30), prefix+"m")
	if err := first.TryLock(ctx); err != nil {
		t.Fatal(err)
	}
	if err := second.TryLock(ctx); !errors.Is(err, concurrency.ErrLocked) {
		t.Fatalf("a held lock: %v", err)
	}
	if err := first.Unlock(ctx); err != nil {
		t.Fatal(err)
	}
	if err := second.TryLock(ctx); err != nil {
		t.Fatal(err)
	}
}

// The owner that lost its lease writes late, guarded by IsOwner: the write must be refused, while the new owner's passes.
func TestMutexIsOwnerFences(t *testing.T) {
	client, prefix, ctx := start(t)
	old := session(t, client, 30)
	stale := concurrency.NewMutex(old, prefix+"m")
	if err := stale.Lock(ctx); err != nil {
		t.Fatal(err)
	}
	fresh := concurrency.NewMutex(session(t, client, 30), prefix+"m")
	taken := make(chan error, 1)
	go func() { taken <- fresh.Lock(ctx) }()
	must[*clientv3.LeaseRevokeResponse](t)(client.Revoke(ctx, old.Lease()))
	if err := <-taken; err != nil {
		t.Fatal(err)
	}
	write := func(mutex *concurrency.Mutex, text string) bool {
		return must[*clientv3.TxnResponse](t)(client.Txn(ctx).If(mutex.IsOwner()).Then(clientv3.OpPut(prefix+"out", text)).Commit()).Succeeded
	}
	if !write(fresh, "new") {
		t.Error("the owner's write was refused")
	}
	if write(stale, "late") || value(t, ctx, client, prefix+"out") != "new" {
		t.Error("the former owner's write passed")
	}
	select {
	case <-old.Done():
	case <-time.After(15 * time.Second):
		t.Error("the session does not notice that its lease is gone")
	}
}

func TestMutexIsFreedByDeath(t *testing.T) {
	client, prefix, ctx := start(t)
	p := newProxy(t)
	dying := must[*concurrency.Session](t)(concurrency.NewSession(connect(t, p.addr()), concurrency.WithTTL(2)))
	if err := concurrency.NewMutex(dying, prefix+"m").Lock(ctx); err != nil {
		t.Fatal(err)
	}
	p.hold()
	begun := time.Now()
	if err := concurrency.NewMutex(session(t, client, 30), prefix+"m").Lock(ctx); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 8*time.Second || took < 500*time.Millisecond {
		t.Errorf("taken over after %v; the lease is of 2 s", took)
	}
}

func TestMutexGivesUpWaiting(t *testing.T) {
	client, prefix, ctx := start(t)
	if err := concurrency.NewMutex(session(t, client, 30), prefix+"m").Lock(ctx); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if err := concurrency.NewMutex(session(t, client, 30), prefix+"m").Lock(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	got := must[*clientv3.GetResponse](t)(client.Get(ctx, prefix+"m/", clientv3.WithPrefix(), clientv3.WithCountOnly()))
	if got.Count != 1 {
		t.Fatalf("%d keys are in the queue, the one that gave up left its own", got.Count)
	}
}

func TestElection(t *testing.T) {
	client, prefix, ctx := start(t)
	observer := concurrency.NewElection(session(t, client, 30), prefix+"e")
	seen := observer.Observe(ctx)
	leading := concurrency.NewElection(session(t, client, 30), prefix+"e")
	if err := leading.Campaign(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	expect := func(name string) {
		t.Helper()
		for {
			select {
			case resp := <-seen:
				if len(resp.Kvs) > 0 && string(resp.Kvs[0].Value) == name {
					return
				}
			case <-time.After(15 * time.Second):
				t.Fatalf("the observer never saw %s", name)
			}
		}
	}
	expect("one")
	if err := leading.Proclaim(ctx, "one, still"); err != nil {
		t.Fatal(err)
	}
	expect("one, still")
	dying := session(t, client, 2)
	next, third := concurrency.NewElection(dying, prefix+"e"), concurrency.NewElection(session(t, client, 30), prefix+"e")
	won := make(chan error, 2)
	go func() { won <- next.Campaign(ctx, "two") }()
	waitCount(t, ctx, client, prefix+"e/", 2)
	go func() { won <- third.Campaign(ctx, "three") }()
	waitCount(t, ctx, client, prefix+"e/", 3)
	if err := leading.Resign(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-won; err != nil {
		t.Fatal(err)
	}
	expect("two")
	if leader := must[*clientv3.GetResponse](t)(third.Leader(ctx)); string(leader.Kvs[0].Value) != "two" {
		t.Fatalf("the leader is %s", leader.Kvs[0].Value)
	}
	dying.Orphan() // the leader stops renewing, as one that died
	if err := <-won; err != nil {
		t.Fatal(err)
	}
	expect("three")
	if err := next.Proclaim(ctx, "a ghost"); err == nil {
		t.Error("a dead leader could proclaim")
	}
}

func waitCount(t *testing.T, ctx context.Context, client *clientv3.Client, prefix string, count int64) {
	t.Helper()
	for {
		got := must[*clientv3.GetResponse](t)(client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly()))
		if got.Count == count {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestSTMBankTransfer(t *testing.T) {
	client, prefix, ctx := start(t)
	const accounts, each = 6, 100
	for i := range accounts {
		put(t, ctx, client, fmt.Sprintf("%s%d", prefix, i), strconv.Itoa(each))
	}
	for _, isolation := range []concurrency.Isolation{concurrency.SerializableSnapshot, concurrency.Serializable, concurrency.RepeatableReads} {
		var group sync.WaitGroup
		for worker := range 8 {
			group.Go(func() {
				for n := range 15 {
					from, to := fmt.Sprintf("%s%d", prefix, (worker+n)%accounts), fmt.Sprintf("%s%d", prefix, (worker*3+n*5+1)%accounts)
					if from == to {
						continue
					}
					_, err := concurrency.NewSTM(client, func(stm concurrency.STM) error {
						rich, err := strconv.Atoi(stm.Get(from))
						if err != nil {
							return err
						}
						poor, err := strconv.Atoi(stm.Get(to))
						if err != nil {
							return err
						}
						stm.Put(from, strconv.Itoa(rich-rich/10))
						stm.Put(to, strconv.Itoa(poor+rich/10))
						return nil
					}, concurrency.WithIsolation(isolation), concurrency.WithAbortContext(ctx))
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		group.Wait()
		sum := 0
		for _, kv := range must[*clientv3.GetResponse](t)(client.Get(ctx, prefix, clientv3.WithPrefix())).Kvs {
			amount := must[int](t)(strconv.Atoi(string(kv.Value)))
			if amount < 0 {
				t.Errorf("%s holds %d", kv.Key, amount)
			}
			sum += amount
		}
		if sum != accounts*each {
			t.Fatalf("money was made or lost: %d, expected %d", sum, accounts*each)
		}
	}
}

func TestRecipes(t *testing.T) {
	client, prefix, ctx := start(t)
	queue := recipes.NewQueue(client, prefix+"q")
	for i := range 10 {
		if err := queue.Enqueue(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 10 {
		if got := must[string](t)(queue.Dequeue()); got != fmt.Sprint(i) {
			t.Fatalf("dequeued %s, expected %d", got, i)
		}
	}
	s := session(t, client, 30)
	lock := recipes.NewRWMutex(s, prefix+"rw")
	if err := lock.RLock(); err != nil {
		t.Fatal(err)
	}
	if err := lock.RUnlock(); err != nil {
		t.Fatal(err)
	}
	if err := lock.Lock(); err != nil {
		t.Fatal(err)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	_ = ctx
}
