package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const (
	callLimit    = 2500 * time.Millisecond
	keysAtATime  = 4
	epoch        = 5 * time.Second // then other keys: what is unknown of a key stays a small puzzle
	roamers      = 4               // clients that know every member
	mutexClients = 4
	electClients = 3
	leaseClients = 3
	ownerTTL     = 3
	leaseTTL     = 4
	mutexName    = "mutex"
	electionName = "election"
	register     = "register" // counted up by the owner of the mutex alone
)

// clients are the unmodified library at work, until stop.
type clients struct {
	cluster *cluster
	history *history
	cancel  context.CancelFunc
	group   sync.WaitGroup
	open    []*clientv3.Client
}

func startClients(c *cluster, h *history, seed uint64) (*clients, error) {
	ctx, cancel := context.WithCancel(context.Background())
	w := &clients{cluster: c, history: h, cancel: cancel}
	everyone := all(len(c.members))
	number := 0
	start := func(members []int, at string, work func(*worker, context.Context)) error {
		client, err := c.client(members)
		if err != nil {
			return err
		}
		w.open = append(w.open, client)
		wk := &worker{clients: w, client: client, id: number, at: at, rng: rand.New(rand.NewPCG(seed, uint64(100+number)))}
		if len(members) == 1 {
			wk.only = c.members[members[0]]
		}
		number++
		w.group.Go(func() { work(wk, ctx) })
		return nil
	}
	var problems []error
	for _, m := range c.members {
		for range 2 {
			problems = append(problems, start([]int{m.index}, m.name, (*worker).useRegisters))
		}
		problems = append(problems, start([]int{m.index}, m.name, (*worker).addKeys), start([]int{m.index}, m.name, (*worker).watchKeys))
	}
	problems = append(problems, start(everyone, "any", (*worker).watchKeys))
	for range roamers {
		problems = append(problems, start(everyone, "any", (*worker).useRegisters))
	}
	problems = append(problems, start(everyone, "any", (*worker).usePairs), start(everyone, "any", (*worker).usePairs))
	for range mutexClients {
		problems = append(problems, start(everyone, "any", (*worker).useMutex))
	}
	for range electClients {
		problems = append(problems, start(everyone, "any", (*worker).useElection))
	}
	for range leaseClients {
		problems = append(problems, start(everyone, "any", (*worker).useLeases))
	}
	if err := errors.Join(problems...); err != nil {
		w.stop()
		return nil, err
	}
	return w, nil
}

// stop ends the clients; calls under way end with unknown outcome. Stopping twice does nothing.
func (w *clients) stop() {
	w.cancel()
	// Closed first: the recipes' own clean-up waits for a server as long as the client is open.
	for _, client := range w.open {
		client.Close()
	}
	w.group.Wait()
	w.open = nil
}

type worker struct {
	clients *clients
	client  *clientv3.Client
	id      int
	at      string
	only    *member // nil: any
	rng     *rand.Rand
	written int
}

func (w *worker) history() *history { return w.clients.history }

func (w *worker) wait(ctx context.Context, least, most time.Duration) {
	timer := time.NewTimer(least + time.Duration(w.rng.Int64N(int64(most-least)+1)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

func (w *worker) value() string {
	w.written++
	return fmt.Sprintf("%d.%d", w.id, w.written)
}

// useRegisters reads, writes, swaps and deletes a few keys that everybody uses.
func (w *worker) useRegisters(ctx context.Context) {
	last := map[string]string{} // what this worker believes to be there, for its compares
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("reg/%d/%d", w.history().now()/int64(epoch), w.rng.IntN(keysAtATime))
		if w.only != nil && n%12 == 11 {
			w.readStale(ctx, key)
		}
		o := op{Client: w.id, At: w.at, Key: key}
		switch dice := w.rng.IntN(100); {
		case dice < 30:
			o.Kind = read
		case dice < 60:
			o.Kind, o.Arg = write, w.value()
		case dice < 84:
			o.Kind, o.Expect, o.Arg = swap, last[key], w.value()
		case dice < 92 && last[key] != "":
			o.Kind, o.Expect = take, last[key]
		default:
			o.Kind = remove
		}
		w.do(ctx, &o)
		if o.Outcome == answered {
			last[key] = o.after()
			w.wait(ctx, 5*time.Millisecond, 25*time.Millisecond)
		} else {
			w.wait(ctx, 20*time.Millisecond, 80*time.Millisecond)
		}
	}
}

// after is what is there after an answered call.
func (o *op) after() string {
	switch {
	case o.Kind == read || (o.Kind == swap || o.Kind == take) && !o.Done:
		return o.Got
	default:
		return o.Arg
	}
}

// do makes one call and writes down what came of it.
func (w *worker) do(ctx context.Context, o *op) {
	call, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	o.Call = w.history().now()
	err := w.ask(call, o)
	o.Return = w.history().now()
	if err != nil {
		o.Outcome, o.Error = judgeError(err), err.Error()
	}
	record(w.history(), &w.history().ops, *o)
}

func (w *worker) ask(ctx context.Context, o *op) error {
	switch o.Kind {
	case read:
		answer, err := w.client.Get(ctx, o.Key)
		if err == nil {
			o.Rev = answer.Header.Revision
			o.saw(answer.Kvs)
		}
		return err
	case write:
		answer, err := w.client.Put(ctx, o.Key, o.Arg, clientv3.WithPrevKV())
		if err == nil {
			o.Rev = answer.Header.Revision
			if answer.PrevKv != nil {
				o.Got, o.GotRev = string(answer.PrevKv.Value), answer.PrevKv.ModRevision
			}
		}
		return err
	case remove:
		answer, err := w.client.Delete(ctx, o.Key, clientv3.WithPrevKV())
		if err == nil {
			o.Rev = answer.Header.Revision
			o.saw(answer.PrevKvs)
			if answer.Deleted != int64(len(answer.PrevKvs)) {
				return fmt.Errorf("deleted %d and showed %d", answer.Deleted, len(answer.PrevKvs))
			}
		}
		return err
	}
	compare := clientv3.Compare(clientv3.Value(o.Key), "=", o.Expect)
	if o.Expect == "" {
		compare = clientv3.Compare(clientv3.CreateRevision(o.Key), "=", 0)
	}
	change := clientv3.OpPut(o.Key, o.Arg, clientv3.WithPrevKV())
	if o.Kind == take {
		change = clientv3.OpDelete(o.Key, clientv3.WithPrevKV())
	}
	answer, err := w.client.Txn(ctx).If(compare).Then(change).Else(clientv3.OpGet(o.Key)).Commit()
	if err != nil {
		return err
	}
	o.Rev, o.Done = answer.Header.Revision, answer.Succeeded
	switch inner := answer.Responses[0].Response.(type) {
	case *pb.ResponseOp_ResponseRange:
		o.saw(inner.ResponseRange.Kvs)
	case *pb.ResponseOp_ResponsePut:
		if before := inner.ResponsePut.PrevKv; before != nil {
			o.Got, o.GotRev = string(before.Value), before.ModRevision
		}
	case *pb.ResponseOp_ResponseDeleteRange:
		o.saw(inner.ResponseDeleteRange.PrevKvs)
	}
	return nil
}

func (w *worker) readStale(ctx context.Context, key string) {
	call, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	life, sent := w.only.life(), w.history().now()
	answer, err := w.client.Get(call, key, clientv3.WithSerializable())
	if err != nil || life != w.only.life() {
		return
	}
	s := staleRead{At: w.only.index, Life: life, Key: key, Rev: answer.Header.Revision, Call: sent, Return: w.history().now()}
	if len(answer.Kvs) > 0 {
		s.Got, s.GotRev = string(answer.Kvs[0].Value), answer.Kvs[0].ModRevision
	}
	record(w.history(), &w.history().stale, s)
}

// usePairs writes one value to two keys in one transaction and reads both in one: the pair is one register.
func (w *worker) usePairs(ctx context.Context) {
	for ctx.Err() == nil {
		name := fmt.Sprintf("pair/%d", w.history().now()/int64(epoch))
		o := op{Client: w.id, At: w.at, Key: name, Kind: read}
		left, right := clientv3.OpGet(name+"/left"), clientv3.OpGet(name+"/right")
		if w.rng.IntN(2) == 0 {
			o.Kind, o.Arg = write, w.value()
			left, right = clientv3.OpPut(name+"/left", o.Arg, clientv3.WithPrevKV()), clientv3.OpPut(name+"/right", o.Arg, clientv3.WithPrevKV())
		}
		call, cancel := context.WithTimeout(ctx, callLimit)
		o.Call = w.history().now()
		answer, err := w.client.Txn(call).Then(left, right).Commit()
		o.Return = w.history().now()
		cancel()
		if err != nil {
			o.Outcome, o.Error = judgeError(err), err.Error()
		} else {
			o.Rev = answer.Header.Revision
			o.Got, o.GotRev = pairOf(answer)
		}
		record(w.history(), &w.history().ops, o)
		w.wait(ctx, 10*time.Millisecond, 40*time.Millisecond)
	}
}

// pairOf is the value of both keys; two values are told as one that nobody wrote.
func pairOf(answer *clientv3.TxnResponse) (string, int64) {
	values, revisions := [2]string{}, [2]int64{}
	for i, inner := range answer.Responses {
		kv := inner.GetResponsePut().GetPrevKv()
		if kvs := inner.GetResponseRange().GetKvs(); len(kvs) > 0 {
			kv = kvs[0]
		}
		values[i], revisions[i] = string(kv.GetValue()), kv.GetModRevision()
	}
	if values[0] != values[1] || revisions[0] != revisions[1] {
		return fmt.Sprintf("half a transaction: %q@%d and %q@%d", values[0], revisions[0], values[1], revisions[1]), revisions[0]
	}
	return values[0], revisions[0]
}

// addKeys writes each key once.
func (w *worker) addKeys(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		a := addition{Key: fmt.Sprintf("set/%d/%06d", w.id, n)}
		call, cancel := context.WithTimeout(ctx, callLimit)
		answer, err := w.client.Put(call, a.Key, a.Key)
		cancel()
		if err == nil {
			a.Rev = answer.Header.Revision
		} else {
			a.Outcome = judgeError(err)
		}
		record(w.history(), &w.history().added, a)
		w.wait(ctx, 20*time.Millisecond, 60*time.Millisecond)
	}
}

// watchKeys watches those keys from the first revision on, as long as the library keeps the watch alive by itself.
func (w *worker) watchKeys(ctx context.Context) {
	record(w.history(), &w.history().events, event{Watcher: w.id, At: w.at})
	for answer := range w.client.Watch(ctx, "set/", clientv3.WithPrefix(), clientv3.WithRev(1)) {
		for _, e := range answer.Events {
			record(w.history(), &w.history().events, event{Watcher: w.id, At: w.at, Key: string(e.Kv.Key), Rev: e.Kv.ModRevision})
		}
	}
}

// watchLimit is longer than progressLimit: a client behind a cut notices a dead connection only by its own pings, after 12 s.
const watchLimit = 20 * time.Second

// watchersCatchUp waits until every watcher was told of a key that is written now.
func (w *clients) watchersCatchUp(c *cluster) (time.Duration, error) {
	began, key := time.Now(), "set/last"
	client, err := c.client(all(len(c.members)))
	if err != nil {
		return 0, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), progressLimit)
	defer cancel()
	if _, err := client.Put(ctx, key, key); err != nil {
		return 0, err
	}
	for {
		behind := w.history.behind(key)
		if len(behind) == 0 {
			return time.Since(began), nil
		}
		if time.Since(began) > watchLimit {
			return 0, fmt.Errorf("watchers that were not told within %v of a key: at %v", watchLimit, behind)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// behind are the members at which a watcher was not told of this key yet.
func (h *history) behind(key string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	waiting := map[int]string{}
	for _, e := range h.events {
		if e.Key == "" {
			waiting[e.Watcher] = e.At
		} else if e.Key == key {
			delete(waiting, e.Watcher)
		}
	}
	return slices.Collect(maps.Values(waiting))
}

// lease is a client's own view of a lease: alive until deadline, counted from the sending of the newest answered renewal.
type lease struct {
	id  clientv3.LeaseID
	ttl int64

	mu       sync.Mutex
	deadline int64
}

func (w *worker) grant(ctx context.Context, ttl int64) (*lease, error) {
	call, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	sent := w.history().now()
	answer, err := w.client.Grant(call, ttl)
	if err != nil {
		return nil, err
	}
	l := &lease{id: answer.ID, ttl: answer.TTL, deadline: sent + answer.TTL*int64(time.Second)}
	w.leaseEvent(l, granted, sent, "granted")
	return l, nil
}

func (w *worker) leaseEvent(l *lease, what leaseWhat, sent int64, how string) {
	record(w.history(), &w.history().leases, leaseEvent{Lease: int64(l.id), What: what, Call: sent, Return: w.history().now(), TTL: l.ttl, How: how})
}

func (l *lease) until() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.deadline
}

// keep renews the lease until the context ends or the lease is lost. Once the deadline has passed, no late answer brings it back.
func (w *worker) keep(ctx context.Context, l *lease) {
	pace := time.Duration(l.ttl) * time.Second / 6
	for ctx.Err() == nil {
		call, cancel := context.WithTimeout(ctx, 2*pace)
		sent := w.history().now()
		ttl, err := w.renew(call, l)
		cancel()
		switch {
		case err == nil && ttl <= 0:
			w.leaseEvent(l, gone, sent, "a renewal was answered: lease not found")
			return
		case err == nil:
			l.mu.Lock()
			alive := w.history().now() < l.deadline
			if alive {
				l.deadline = max(l.deadline, sent+ttl*int64(time.Second))
			}
			l.mu.Unlock()
			if !alive {
				return
			}
			w.leaseEvent(l, granted, sent, "renewed")
		}
		select {
		case <-ctx.Done():
		case <-time.After(pace):
		}
	}
}

// renew is one try; the library's KeepAliveOnce would repeat a refused one without a pause.
func (w *worker) renew(ctx context.Context, l *lease) (int64, error) {
	stream, err := pb.NewLeaseClient(w.client.ActiveConnection()).LeaseKeepAlive(ctx)
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(l.id)}); err != nil {
		return 0, err
	}
	answer, err := stream.Recv()
	return answer.GetTTL(), err
}

// owner is a session of the library with a lease whose deadline is known.
type owner struct {
	*lease
	session *concurrency.Session
	rest    context.CancelFunc
}

func (w *worker) newOwner(ctx context.Context) (*owner, error) {
	l, err := w.grant(ctx, ownerTTL)
	if err != nil {
		return nil, err
	}
	keeping, cancel := context.WithCancel(ctx)
	session, err := concurrency.NewSession(w.client, concurrency.WithLease(l.id), concurrency.WithContext(keeping))
	if err != nil {
		cancel()
		w.leaseEvent(l, abandoned, 0, "no session")
		return nil, err
	}
	go w.keep(keeping, l)
	return &owner{lease: l, session: session, rest: cancel}, nil
}

// leave stops renewing and lets the lease run out, as a client that died would.
func (w *worker) leave(o *owner) {
	o.session.Orphan()
	o.rest()
	w.leaseEvent(o.lease, abandoned, 0, "left")
}

// quit also asks the server to end the lease, so that others need not wait for it.
func (w *worker) quit(ctx context.Context, o *owner) {
	w.leave(o)
	w.leaseEvent(o.lease, revoking, 0, "quitting")
	call, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	_, _ = w.client.Revoke(call, o.id)
}

// useMutex owns the mutex for a while, counts under it, and sometimes walks away as its owner.
func (w *worker) useMutex(ctx context.Context) {
	var o *owner
	defer func() {
		if o != nil {
			w.leave(o)
		}
	}()
	for ctx.Err() == nil {
		if o == nil {
			var err error
			if o, err = w.newOwner(ctx); err != nil {
				o = nil
				w.wait(ctx, 50*time.Millisecond, 200*time.Millisecond)
				continue
			}
		}
		well, walkedAway := w.ownMutex(ctx, o)
		switch {
		case walkedAway:
			w.leave(o)
			o = nil
		case !well:
			// Whether the key of this session is still there is not known, so the session is never used again.
			w.quit(ctx, o)
			o = nil
		}
		w.wait(ctx, 0, 30*time.Millisecond)
	}
}

func (w *worker) ownMutex(ctx context.Context, o *owner) (well, walkedAway bool) {
	mutex := concurrency.NewMutex(o.session, mutexName)
	patience, cancel := context.WithTimeout(ctx, 8*time.Second)
	err := mutex.Lock(patience)
	cancel()
	h := hold{Name: mutexName, Client: w.id, From: w.history().now()}
	if err != nil || h.From >= o.until() {
		return false, false
	}
	isOwner := mutex.IsOwner()
	h.Token = isOwner.GetCompare().GetCreateRevision()
	counted := w.count(ctx, o, isOwner, h.Token)
	w.wait(ctx, 5*time.Millisecond, 150*time.Millisecond)
	if w.rng.IntN(10) == 0 {
		// Walked away: it may believe to own the name until its lease has run out.
		o.rest()
		h.Until = o.until()
		record(w.history(), &w.history().holds, h)
		return false, true
	}
	h.Until = min(w.history().now(), o.until())
	record(w.history(), &w.history().holds, h)
	if !counted {
		return false, false
	}
	call, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return mutex.Unlock(call) == nil, false
}

// count raises the register by one, compared with nothing but ownership.
func (w *worker) count(ctx context.Context, o *owner, isOwner clientv3.Cmp, token int64) bool {
	call, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	got, err := w.client.Get(call, register)
	if err != nil {
		return false
	}
	c := count{Number: 1, Token: token}
	if len(got.Kvs) > 0 {
		var before int64
		_, _ = fmt.Sscan(string(got.Kvs[0].Value), &before)
		c.Number = before + 1
	}
	sent := w.history().now()
	answer, err := w.client.Txn(call).If(isOwner).Then(clientv3.OpPut(register, fmt.Sprintf("%d %d", c.Number, token))).Commit()
	switch {
	case err != nil:
		c.Outcome = judgeError(err)
	case !answer.Succeeded:
		w.leaseEvent(o.lease, gone, sent, "the mutex key is no longer its own")
		return false
	}
	record(w.history(), &w.history().counts, c)
	return err == nil
}

// useElection leads for a while.
func (w *worker) useElection(ctx context.Context) {
	for ctx.Err() == nil {
		o, err := w.newOwner(ctx)
		if err != nil {
			w.wait(ctx, 50*time.Millisecond, 200*time.Millisecond)
			continue
		}
		for w.lead(ctx, o) && ctx.Err() == nil {
			w.wait(ctx, 0, 50*time.Millisecond)
		}
		if w.rng.IntN(3) == 0 {
			w.leave(o)
		} else {
			w.quit(ctx, o)
		}
	}
}

func (w *worker) lead(ctx context.Context, o *owner) bool {
	election := concurrency.NewElection(o.session, electionName)
	patience, cancel := context.WithTimeout(ctx, 8*time.Second)
	err := election.Campaign(patience, fmt.Sprintf("client %d", w.id))
	cancel()
	h := hold{Name: electionName, Client: w.id, From: w.history().now(), Token: election.Rev()}
	if err != nil || h.From >= o.until() {
		return false
	}
	call, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	err = election.Proclaim(call, "still here")
	w.wait(ctx, 20*time.Millisecond, 300*time.Millisecond)
	h.Until = min(w.history().now(), o.until())
	record(w.history(), &w.history().holds, h)
	return err == nil && election.Resign(call) == nil
}

// useLeases keeps a key alive by a lease, looks whether it is there, and at last revokes the lease or abandons it.
func (w *worker) useLeases(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		l, err := w.grant(ctx, leaseTTL)
		if err != nil {
			w.wait(ctx, 100*time.Millisecond, 300*time.Millisecond)
			continue
		}
		keeping, cancel := context.WithCancel(ctx)
		go w.keep(keeping, l)
		key := fmt.Sprintf("leased/%d/%d", w.id, n)
		w.watchLease(ctx, l, key)
		cancel()
		if w.rng.IntN(2) == 0 {
			w.leaseEvent(l, revoking, 0, "revoking")
			call, cancel := context.WithTimeout(ctx, callLimit)
			_, _ = w.client.Revoke(call, l.id)
			cancel()
		}
		w.leaseEvent(l, abandoned, 0, key)
	}
}

func (w *worker) watchLease(ctx context.Context, l *lease, key string) {
	call, cancel := context.WithTimeout(ctx, callLimit)
	_, err := w.client.Put(call, key, "here", clientv3.WithLease(l.id))
	cancel()
	if err != nil {
		return
	}
	end := w.history().now() + int64(3*time.Second) + w.rng.Int64N(int64(15*time.Second))
	for ctx.Err() == nil && w.history().now() < end {
		call, cancel := context.WithTimeout(ctx, callLimit)
		sent := w.history().now()
		got, err := w.client.Get(call, key)
		cancel()
		if err == nil && len(got.Kvs) == 0 {
			w.leaseEvent(l, gone, sent, "its key "+key+" is gone")
			return
		}
		w.wait(ctx, 200*time.Millisecond, 500*time.Millisecond)
	}
}
