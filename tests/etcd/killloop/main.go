// Command killloop kills a server with SIGKILL at random moments under load by the real Go client, restarts it on the same folder
// and checks what survived.
//
// Checked after each restart. K1: every acknowledged write is there, or a later write to that key is. K2: a value that was acknowledged
// or read never goes back. K3: the store's revision never goes back, and no mod_revision is used for two contents. K4: a write with
// unknown outcome is there whole or not at all (each transaction writes a pair). K5: an exclusive register, written only by the owner
// of a concurrency.Mutex in a transaction guarded by its ownership, counts without a gap, and its owners' tokens (the create revision
// of the lock key) never go back: two holders at once would break one or the other. K6: a lease outlives the kill, with its keys.
// Not checked here. Anything about lost unsynced disk writes: a killed process leaves the page cache to the kernel; that is the
// simulation's work.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tenure.dev/tests/etcd/launch"
)

const (
	uniqueWriters = 4
	hotKeys       = 3
	hotWriters    = 2 // each
	pairWriters   = 2
	lockers       = 3
	callLimit     = 3 * time.Second
)

type options struct {
	command string
	rounds  int
	seed    uint64
	load    time.Duration
	budget  time.Duration
	dir     string
	check   bool
}

func main() {
	var o options
	flag.StringVar(&o.command, "cmd", os.Getenv("SUBJECT_CMD"), "command that starts the server, with {dir} {port} {peer}; a path alone is an etcd binary (env SUBJECT_CMD)")
	flag.IntVar(&o.rounds, "rounds", 50, "kills")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "seed of the moments at which the server is killed")
	flag.DurationVar(&o.load, "load", time.Second, "longest load before a kill")
	flag.DurationVar(&o.budget, "budget", 170*time.Second, "start no further round after this time")
	flag.StringVar(&o.dir, "dir", "", "parent of the data folder; kept after a failure")
	flag.BoolVar(&o.check, "selfcheck", false, "prove that the loop can fail: bring back an older copy of the folder in round 3, which must be noticed")
	flag.Parse()
	code, err := run(&o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "killloop:", err)
		code = 2
	}
	os.Exit(code)
}

func run(o *options) (int, error) {
	if o.command == "" {
		return 2, errors.New("-cmd or SUBJECT_CMD must say how to start the server")
	}
	if !strings.Contains(o.command, " ") {
		o.command = launch.EtcdCommand(o.command)
	}
	scratch, err := os.MkdirTemp(o.dir, "killloop")
	if err != nil {
		return 2, err
	}
	port, err := launch.FreePort()
	if err != nil {
		return 2, err
	}
	peer, err := launch.FreePort()
	if err != nil {
		return 2, err
	}
	l := &loop{o: o, rng: rand.New(rand.NewPCG(o.seed, 1)), dir: filepath.Join(scratch, "data"), port: port, peer: peer, book: newBook()}
	fmt.Printf("seed %d\n", o.seed)
	passed, failed := 0, 0
	started := time.Now()
	for round := 1; round <= o.rounds; round++ {
		if time.Since(started) > o.budget {
			fmt.Printf("the time of %v is over: %d of %d rounds ran\n", o.budget, round-1, o.rounds)
			break
		}
		problems := l.round(round)
		if o.check && len(problems) == 0 {
			if err := l.sabotage(round); err != nil {
				return 2, err
			}
		}
		if len(problems) == 0 {
			passed++
			continue
		}
		failed++
		fmt.Printf("FAIL round %d:\n", round)
		for i, problem := range problems {
			if i == 20 {
				fmt.Printf("  and %d more\n", len(problems)-i)
				break
			}
			fmt.Println("  " + problem)
		}
		fmt.Printf("  data folder: %s\n", l.dir)
		break // what follows a lost write is not news
	}
	l.stop()
	b := l.book
	fmt.Printf("%d writes acknowledged, %d with unknown outcome, %d lock grants, %d leases, %d kills while starting, %v\n",
		b.acked, b.unknown, b.grants, len(b.leases), l.earlyKills, time.Since(started).Round(time.Millisecond))
	if o.check {
		noticed := failed
		passed, failed = noticed, 1-noticed
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed == 0 && passed > 0 {
		return 0, os.RemoveAll(scratch)
	}
	return 1, nil
}

type loop struct {
	o          *options
	rng        *rand.Rand
	dir        string
	port, peer int
	server     *launch.Server
	client     *clientv3.Client
	book       *book
	earlyKills int
}

func (l *loop) stop() {
	if l.client != nil {
		l.client.Close()
	}
	if l.server != nil {
		l.server.Kill()
	}
}

// spawn starts the server on the folder; every fourth time it is first killed while starting.
func (l *loop) spawn() error {
	for l.rng.IntN(4) == 0 {
		server, err := launch.Spawn(l.o.command, l.dir, l.port, l.peer)
		if err != nil {
			return err
		}
		time.Sleep(time.Duration(l.rng.IntN(250)) * time.Millisecond)
		select {
		case <-server.Done():
			return fmt.Errorf("the server ended by itself while starting:\n%s", server.Output())
		default:
		}
		server.Kill()
		l.earlyKills++
	}
	server, err := launch.Spawn(l.o.command, l.dir, l.port, l.peer)
	if err != nil {
		return err
	}
	l.server = server
	if err := server.WaitReady(20 * time.Second); err != nil {
		server.Kill()
		return err
	}
	return nil
}

func (l *loop) round(round int) []string {
	if err := l.spawn(); err != nil {
		return []string{"start: " + err.Error()}
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{l.server.Addr}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		return []string{"client: " + err.Error()}
	}
	l.client = client
	defer client.Close()
	if problems := l.book.verify(client); len(problems) > 0 {
		return problems
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for i := range uniqueWriters {
		group.Go(func() { l.book.writeUnique(ctx, client, round, i) })
	}
	for i := range hotKeys * hotWriters {
		group.Go(func() { l.book.writeHot(ctx, client, i%hotKeys) })
	}
	for i := range pairWriters {
		group.Go(func() { l.book.writePairs(ctx, client, i) })
	}
	for i := range lockers {
		group.Go(func() { l.book.lockAndCount(ctx, client, fmt.Sprintf("r%d-%d", round, i)) })
	}
	group.Go(func() { l.book.holdLease(ctx, client, round) })
	load := 100*time.Millisecond + time.Duration(l.rng.Int64N(int64(l.o.load)))
	if round%5 == 0 {
		load += 2500 * time.Millisecond // long enough for the locks of the last round's dead holders to expire and be granted anew
	}
	time.Sleep(load)
	select {
	case <-l.server.Done():
		cancel()
		client.Close()
		group.Wait()
		return []string{"the server ended by itself:\n" + l.server.Output()}
	default:
	}
	l.server.Kill()
	cancel()
	// The recipe's clean-up after a cancelled Lock waits for a server as long as the client is open.
	client.Close()
	group.Wait()
	if problems := l.book.takeProblems(); len(problems) > 0 {
		return problems
	}
	if round == l.o.rounds { // the last kill is judged too
		return l.last()
	}
	return nil
}

// sabotage keeps a copy of the folder after round 2 and puts it back after round 3, as a disk that forgot its newest writes.
func (l *loop) sabotage(round int) error {
	backup := l.dir + ".older"
	switch round {
	case 2:
		return os.CopyFS(backup, os.DirFS(l.dir))
	case 3:
		if err := os.RemoveAll(l.dir); err != nil {
			return err
		}
		return os.Rename(backup, l.dir)
	}
	return nil
}

func (l *loop) last() []string {
	if err := l.spawn(); err != nil {
		return []string{"start: " + err.Error()}
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{l.server.Addr}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		return []string{"client: " + err.Error()}
	}
	defer client.Close()
	return l.book.verify(client)
}

// book is what the clients were told. Everything in it was acknowledged or read, so it must stay true.
type book struct {
	mu       sync.Mutex
	unique   map[string]int64 // key -> revision of its acknowledged write
	maybe    map[string]bool  // unique keys with unknown outcome
	hot      map[string]int64 // key -> highest number acknowledged or read
	pairs    map[string]int64 // pair name -> highest number acknowledged or read
	content  map[int64]string // mod_revision -> what was first seen under it
	leases   map[int64]string // granted and acknowledged, with the key attached
	revision int64
	counter  int64 // exclusive register: highest count acknowledged or read
	token    int64 // the newest owner's token seen in the register
	acked    int
	unknown  int
	grants   int
	problems []string
}

func newBook() *book {
	return &book{unique: map[string]int64{}, maybe: map[string]bool{}, hot: map[string]int64{}, pairs: map[string]int64{},
		content: map[int64]string{}, leases: map[int64]string{}}
}

func (b *book) problem(format string, args ...any) {
	b.problems = append(b.problems, fmt.Sprintf(format, args...))
}

func (b *book) takeProblems() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	problems := b.problems
	b.problems = nil
	return problems
}

// sawRevision notes a header revision; within one life of the server answers overtake each other, so only the maximum counts.
func (b *book) sawRevision(revision int64) { b.revision = max(b.revision, revision) }

// sawContent checks that a revision is used for one content only. Several keys of one transaction share a revision, so the key is
// part of what is remembered under it.
func (b *book) sawContent(revision int64, owner, key, value string) {
	mine := owner + "|" + key + "=" + value
	first, known := b.content[revision]
	if !known {
		b.content[revision] = mine
		return
	}
	sameOwner := strings.SplitN(first, "|", 2)[0] == owner
	sameKey := strings.HasPrefix(first, owner+"|"+key+"=")
	if !sameOwner || sameKey && first != mine {
		b.problem("K3: revision %d was used for %s and for %s", revision, first, mine)
	}
}

// refused tells errors that say the write did not happen from those that leave it open.
func refused(err error) bool {
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return true
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition:
		return true
	}
	return false
}

func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, callLimit)
}

func (b *book) writeUnique(ctx context.Context, client *clientv3.Client, round, writer int) {
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("unique/%03d/%d/%06d", round, writer, n)
		call, cancel := bounded(ctx)
		resp, err := client.Put(call, key, key)
		cancel()
		b.mu.Lock()
		switch {
		case err == nil:
			b.acked++
			b.unique[key] = resp.Header.Revision
			b.sawRevision(resp.Header.Revision)
			b.sawContent(resp.Header.Revision, "unique:"+key, key, key)
		case !refused(err):
			b.unknown++
			b.maybe[key] = true
		}
		b.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// writeHot raises a number by compare-and-set, so it grows by one per success whoever wins.
func (b *book) writeHot(ctx context.Context, client *clientv3.Client, index int) {
	key := fmt.Sprintf("hot/%d", index)
	for ctx.Err() == nil {
		call, cancel := bounded(ctx)
		got, err := client.Get(call, key)
		cancel()
		if err != nil {
			return
		}
		number, modified := int64(0), int64(0)
		if len(got.Kvs) > 0 {
			number, _ = strconv.ParseInt(string(got.Kvs[0].Value), 10, 64)
			modified = got.Kvs[0].ModRevision
		}
		next := strconv.FormatInt(number+1, 10)
		call, cancel = bounded(ctx)
		resp, err := client.Txn(call).If(clientv3.Compare(clientv3.ModRevision(key), "=", modified)).Then(clientv3.OpPut(key, next)).Commit()
		cancel()
		b.mu.Lock()
		if err == nil && resp.Succeeded {
			b.acked++
			if b.hot[key] >= number+1 {
				// Another writer may have been told a higher number already, but never the same one.
				if first, known := b.content[resp.Header.Revision]; known {
					b.problem("K3: revision %d answered twice: %s and %s=%s", resp.Header.Revision, first, key, next)
				}
			}
			b.hot[key] = max(b.hot[key], number+1)
			b.sawRevision(resp.Header.Revision)
			b.sawContent(resp.Header.Revision, "hot", key, next)
		} else if err != nil && !refused(err) {
			b.unknown++
		}
		b.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// writePairs writes one number to two keys in one transaction and deletes a third that only exists between: all or nothing.
func (b *book) writePairs(ctx context.Context, client *clientv3.Client, writer int) {
	name := fmt.Sprintf("pair/%d", writer)
	b.mu.Lock()
	number := b.pairs[name]
	b.mu.Unlock()
	for ctx.Err() == nil {
		number++
		value := strconv.FormatInt(number, 10)
		call, cancel := bounded(ctx)
		resp, err := client.Txn(call).Then(clientv3.OpPut(name+"/left", value), clientv3.OpPut(name+"/right", value)).Commit()
		cancel()
		b.mu.Lock()
		if err == nil {
			b.acked++
			b.pairs[name] = number
			b.sawRevision(resp.Header.Revision)
			b.sawContent(resp.Header.Revision, name, name+"/left", value)
		} else if !refused(err) {
			b.unknown++
		}
		b.mu.Unlock()
		if err != nil {
			return
		}
	}
}

const (
	lockName = "lock/register"
	register = "register"
)

// lockAndCount takes the mutex by the client library's recipe and counts the register up by one, guarded by ownership alone: the
// write does not compare the register itself, so a second holder would repeat a count or bring back an older token.
func (b *book) lockAndCount(ctx context.Context, client *clientv3.Client, owner string) {
	session, err := concurrency.NewSession(client, concurrency.WithTTL(2), concurrency.WithContext(ctx))
	if err != nil {
		return
	}
	defer session.Orphan() // as a killed holder would: the lock is freed by expiry
	for ctx.Err() == nil {
		mutex := concurrency.NewMutex(session, lockName)
		if err := mutex.Lock(ctx); err != nil {
			return
		}
		token, err := tokenOf(ctx, client, mutex)
		if err != nil {
			return
		}
		call, cancel := bounded(ctx)
		got, err := client.Get(call, register)
		cancel()
		if err != nil {
			return
		}
		count, previous := parseRegister(got)
		value := fmt.Sprintf("%d %d %s", count+1, token, owner)
		call, cancel = bounded(ctx)
		resp, err := client.Txn(call).If(mutex.IsOwner()).Then(clientv3.OpPut(register, value)).Commit()
		cancel()
		b.mu.Lock()
		if previous > token {
			b.problem("K5: the owner with token %d read a register written under the later token %d", token, previous)
		}
		b.readRegister(count, previous)
		switch {
		case err == nil && resp.Succeeded:
			b.acked++
			b.grants++
			if count+1 <= b.counter {
				b.problem("K5: count %d was given twice, now to %s", count+1, owner)
			}
			b.readRegister(count+1, token)
			b.sawRevision(resp.Header.Revision)
			b.sawContent(resp.Header.Revision, "register", register, value)
		case err != nil && !refused(err):
			b.unknown++
		}
		b.mu.Unlock()
		if err != nil {
			return
		}
		call, cancel = bounded(ctx)
		err = mutex.Unlock(call)
		cancel()
		if err != nil {
			return
		}
	}
}

func (b *book) readRegister(count, token int64) {
	b.counter = max(b.counter, count)
	b.token = max(b.token, token)
}

// tokenOf is the create revision of the lock key: the order in which the recipe serves.
func tokenOf(ctx context.Context, client *clientv3.Client, mutex *concurrency.Mutex) (int64, error) {
	call, cancel := bounded(ctx)
	defer cancel()
	got, err := client.Get(call, mutex.Key())
	if err != nil {
		return 0, err
	}
	if len(got.Kvs) == 0 {
		return 0, errors.New("the lock key is gone")
	}
	return got.Kvs[0].CreateRevision, nil
}

func parseRegister(got *clientv3.GetResponse) (count, token int64) {
	if len(got.Kvs) > 0 {
		_, _ = fmt.Sscan(string(got.Kvs[0].Value), &count, &token)
	}
	return count, token
}

// holdLease grants a long lease with one key: both must outlive the kill.
func (b *book) holdLease(ctx context.Context, client *clientv3.Client, round int) {
	call, cancel := bounded(ctx)
	defer cancel()
	lease, err := client.Grant(call, 3600)
	if err != nil {
		return
	}
	key := fmt.Sprintf("leased/%03d", round)
	if _, err := client.Put(call, key, "here", clientv3.WithLease(lease.ID)); err != nil {
		return
	}
	b.mu.Lock()
	b.leases[int64(lease.ID)] = key
	b.mu.Unlock()
}

// verify reads everything at one revision after a restart and holds it against the book.
func (b *book) verify(client *clientv3.Client) []string {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	all, err := client.Get(ctx, "", clientv3.WithPrefix())
	if err != nil {
		return []string{"reading after the restart: " + err.Error()}
	}
	b.mu.Lock()
	if all.Header.Revision < b.revision {
		b.problem("K3: the revision went back from %d to %d", b.revision, all.Header.Revision)
	}
	b.sawRevision(all.Header.Revision)
	values, modified := map[string]string{}, map[string]int64{}
	for _, kv := range all.Kvs {
		values[string(kv.Key)], modified[string(kv.Key)] = string(kv.Value), kv.ModRevision
		if kv.ModRevision > all.Header.Revision {
			b.problem("K3: key %s has revision %d, above the store's %d", kv.Key, kv.ModRevision, all.Header.Revision)
		}
	}
	b.verifyUnique(values, modified)
	b.verifyHot(values, modified)
	b.verifyPairs(values, modified)
	b.verifyRegister(all, values, modified)
	leases := make(map[int64]string, len(b.leases))
	for id, key := range b.leases {
		leases[id] = key
	}
	b.mu.Unlock()
	b.verifyLeases(ctx, client, leases, values)
	return b.takeProblems()
}

func (b *book) verifyUnique(values map[string]string, modified map[string]int64) {
	for key, revision := range b.unique {
		if values[key] != key {
			b.problem("K1: acknowledged write %s is lost", key)
		} else if modified[key] != revision {
			b.problem("K3: %s was acknowledged at revision %d and is now at %d", key, revision, modified[key])
		}
	}
	for key, value := range values {
		if !strings.HasPrefix(key, "unique/") {
			continue
		}
		if value != key {
			b.problem("K4: %s holds %q, which nobody wrote", key, value)
		}
		_, acked := b.unique[key]
		if !acked && !b.maybe[key] {
			b.problem("K4: %s is there but was never sent, or was refused", key)
		}
		b.sawContent(modified[key], "unique:"+key, key, value)
	}
	// An unknown outcome is settled now: what is not there must never appear.
	for key := range b.maybe {
		if _, there := values[key]; there {
			b.unique[key] = modified[key]
		}
		delete(b.maybe, key)
	}
}

func (b *book) verifyHot(values map[string]string, modified map[string]int64) {
	for index := range hotKeys {
		key := fmt.Sprintf("hot/%d", index)
		number, _ := strconv.ParseInt(values[key], 10, 64)
		if number < b.hot[key] {
			b.problem("K2: %s went back from %d to %d", key, b.hot[key], number)
		}
		// Each of the two writers may have one success it was not told of; both raised the number they had read by one.
		if number > b.hot[key]+hotWriters {
			b.problem("K4: %s is %d, more than %d acknowledged plus %d unknown", key, number, b.hot[key], hotWriters)
		}
		b.hot[key] = max(number, b.hot[key])
		if number > 0 {
			b.sawContent(modified[key], "hot", key, values[key])
		}
	}
}

func (b *book) verifyPairs(values map[string]string, modified map[string]int64) {
	for writer := range pairWriters {
		name := fmt.Sprintf("pair/%d", writer)
		left, right := values[name+"/left"], values[name+"/right"]
		if left != right || modified[name+"/left"] != modified[name+"/right"] {
			b.problem("K4: half a transaction: %s is %q at %d and %q at %d", name, left, modified[name+"/left"], right, modified[name+"/right"])
		}
		number, _ := strconv.ParseInt(left, 10, 64)
		if number != b.pairs[name] && number != b.pairs[name]+1 {
			b.problem("K1: %s is %d, acknowledged was %d", name, number, b.pairs[name])
		}
		b.pairs[name] = max(number, b.pairs[name])
	}
}

func (b *book) verifyRegister(all *clientv3.GetResponse, values map[string]string, modified map[string]int64) {
	var count, token int64
	_, _ = fmt.Sscan(values[register], &count, &token)
	if count < b.counter {
		b.problem("K2: the register went back from %d to %d", b.counter, count)
	}
	if token < b.token {
		b.problem("K5: the register's token went back from %d to %d", b.token, token)
	}
	// Without a gap and written once per count: the key's version is the count.
	for _, kv := range all.Kvs {
		if string(kv.Key) == register && kv.Version != count {
			b.problem("K5: the register was written %d times but counts %d", kv.Version, count)
		}
	}
	b.readRegister(count, token)
	if count > 0 {
		b.sawContent(modified[register], "register", register, values[register])
	}
}

func (b *book) verifyLeases(ctx context.Context, client *clientv3.Client, leases map[int64]string, values map[string]string) {
	for id, key := range leases {
		state, err := client.TimeToLive(ctx, clientv3.LeaseID(id), clientv3.WithAttachedKeys())
		b.mu.Lock()
		switch {
		case err != nil:
			b.problem("K6: asking for lease %d: %v", id, err)
		case state.TTL <= 0:
			b.problem("K6: lease %d of an hour is gone", id)
		case values[key] != "here":
			b.problem("K6: the key %s of lease %d is gone", key, id)
		case len(state.Keys) != 1 || string(state.Keys[0]) != key:
			b.problem("K6: lease %d should hold %s and holds %q", id, key, state.Keys)
		}
		b.mu.Unlock()
	}
}
