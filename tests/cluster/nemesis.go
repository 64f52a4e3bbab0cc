package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// nemesis makes one fault at a time while the clients work, heals it, and demands progress under it and after it.
type nemesis struct {
	test    *test
	cluster *cluster
	clients *clients
	rounds  int
	paused  bool   // a leader was stopped by SIGSTOP
	note    string // what a fault has to tell
}

// victims are the leader of the moment and the others, in an order drawn from the seed.
type victims struct {
	leader int
	others []int
}

// fault is one way to hurt the cluster. It answers which members, each of them, must let the cluster go on: a client that reaches one of them must
// get its write through. None: nothing is demanded while it lasts.
type fault struct {
	name   string
	net    bool // needs namespaces
	five   bool // needs five members
	first  bool // comes first in every run
	hold   time.Duration
	inject func(*nemesis, victims) ([]int, error)
}

func catalogue() []fault {
	shape := func(name string, make func(c cuts, v victims, clients int) []int) fault {
		return fault{name: name, net: true, inject: func(n *nemesis, v victims) ([]int, error) {
			wanted := noCuts(len(n.cluster.members))
			able := make(wanted, v, len(n.cluster.members))
			return able, n.cluster.net.set(wanted)
		}}
	}
	cutOff := func(c cuts, one int, from []int) {
		for _, other := range from {
			c.both(one, other)
		}
	}
	return []fault{
		{name: "no majority: every member is cut off", net: true, first: true, inject: (*nemesis).cutAll},
		{name: "no majority: the others are killed", first: true, inject: (*nemesis).killOthers},
		shape("the leader is cut off from the members", func(c cuts, v victims, _ int) []int {
			cutOff(c, v.leader, v.others)
			return v.others
		}),
		shape("the leader is cut off from members and clients", func(c cuts, v victims, clients int) []int {
			cutOff(c, v.leader, append([]int{clients}, v.others...))
			return v.others
		}),
		shape("a follower is cut off from the members", func(c cuts, v victims, _ int) []int {
			cutOff(c, v.others[0], append([]int{v.leader}, v.others[1:]...))
			return append([]int{v.leader}, v.others[1:]...)
		}),
		shape("a follower is cut off from members and clients", func(c cuts, v victims, clients int) []int {
			cutOff(c, v.others[0], append([]int{v.leader, clients}, v.others[1:]...))
			return append([]int{v.leader}, v.others[1:]...)
		}),
		shape("the leader hears no member", func(c cuts, v victims, _ int) []int {
			for _, other := range v.others {
				c[other][v.leader] = true
			}
			return v.others
		}),
		shape("no member hears the leader", func(c cuts, v victims, _ int) []int {
			for _, other := range v.others {
				c[v.leader][other] = true
			}
			return v.others
		}),
		shape("the leader does not hear a follower", func(c cuts, v victims, _ int) []int {
			c[v.others[0]][v.leader] = true
			return append([]int{v.leader}, v.others[1:]...)
		}),
		shape("a follower does not hear the leader", func(c cuts, v victims, _ int) []int {
			c[v.leader][v.others[0]] = true
			return append([]int{v.leader}, v.others[1:]...)
		}),
		shape("the leader and a follower reach only the third", func(c cuts, v victims, _ int) []int {
			c.both(v.leader, v.others[0])
			return append([]int{v.leader}, v.others...)
		}),
		{name: "the leader and a follower are cut off together", net: true, five: true, inject: func(n *nemesis, v victims) ([]int, error) {
			wanted := noCuts(len(n.cluster.members))
			for _, other := range v.others[1:] {
				wanted.both(v.leader, other)
				wanted.both(v.others[0], other)
			}
			return v.others[1:], n.cluster.net.set(wanted)
		}},
		{name: "each member reaches only its two neighbours", net: true, five: true, inject: func(n *nemesis, v victims) ([]int, error) {
			wanted := noCuts(len(n.cluster.members))
			ring := append([]int{v.leader}, v.others...)
			for i := range ring {
				wanted.both(ring[i], ring[(i+2)%len(ring)])
			}
			return ring, n.cluster.net.set(wanted)
		}},
		shape("clients do not reach the leader", func(c cuts, v victims, clients int) []int {
			c.both(clients, v.leader)
			return v.others
		}),
		shape("clients reach one follower only", func(c cuts, v victims, clients int) []int {
			cutOff(c, clients, append([]int{v.leader}, v.others[1:]...))
			return v.others[:1]
		}),
		shape("clients do not hear the leader", func(c cuts, v victims, clients int) []int {
			c[v.leader][clients] = true
			return v.others
		}),
		{name: "the leader's cables flap", net: true, inject: (*nemesis).flap},
		{name: "random cuts", net: true, inject: (*nemesis).randomCuts},
		{name: "kill -9 of the leader", inject: (*nemesis).killLeader},
		{name: "SIGTERM to the leader", inject: (*nemesis).stopLeader},
		{name: "kill -9 of a follower", inject: func(n *nemesis, v victims) ([]int, error) {
			n.cluster.members[v.others[0]].kill()
			return append([]int{v.leader}, v.others[1:]...), nil
		}},
		{name: "kill -9 of three leaders in a row", inject: (*nemesis).killInARow},
		{name: "kill -9 of all", inject: func(n *nemesis, _ victims) ([]int, error) {
			for _, m := range n.cluster.members {
				m.kill()
			}
			return nil, nil
		}},
		{name: "power cut of the leader", net: true, inject: func(n *nemesis, v victims) ([]int, error) { return v.others, n.powerCut(v.leader) }},
		{name: "power cut of all", net: true, inject: func(n *nemesis, v victims) ([]int, error) {
			return nil, n.powerCut(append([]int{v.leader}, v.others...)...)
		}},
		{name: "SIGSTOP of the leader", hold: (ownerTTL + 2) * time.Second, inject: func(n *nemesis, v victims) ([]int, error) {
			n.paused = true
			return v.others, n.cluster.members[v.leader].pause()
		}},
		{name: "SIGSTOP of a follower", inject: func(n *nemesis, v victims) ([]int, error) {
			return append([]int{v.leader}, v.others[1:]...), n.cluster.members[v.others[0]].pause()
		}},
		{name: "the leader stutters", inject: (*nemesis).stutter},
		// The log can still be written, so nobody has a reason to end.
		{name: "little room on the disk of the leader", net: true, hold: 2 * time.Second, inject: func(n *nemesis, v victims) ([]int, error) {
			return v.others, n.cluster.members[v.leader].disk.fill(48 << 20)
		}},
		{name: "little room on the disk of a follower", net: true, hold: 2 * time.Second, inject: func(n *nemesis, v victims) ([]int, error) {
			return append([]int{v.leader}, v.others[1:]...), n.cluster.members[v.others[0]].disk.fill(48 << 20)
		}},
		{name: "full disk of the leader", inject: func(n *nemesis, v victims) ([]int, error) { return v.others, n.fill(v.leader, v.others) }},
		{name: "full disk of a follower", inject: func(n *nemesis, v victims) ([]int, error) {
			rest := append([]int{v.leader}, v.others[1:]...)
			return rest, n.fill(v.others[0], rest)
		}},
		{name: "failing disk of the leader", net: true, inject: func(n *nemesis, v victims) ([]int, error) {
			return v.others, n.breakDisk(v.leader, (*disk).fail)
		}},
		{name: "failing disk of a follower", net: true, inject: func(n *nemesis, v victims) ([]int, error) {
			return append([]int{v.leader}, v.others[1:]...), n.breakDisk(v.others[0], (*disk).fail)
		}},
		{name: "read-only disk of the leader", net: true, inject: func(n *nemesis, v victims) ([]int, error) {
			return v.others, n.breakDisk(v.leader, (*disk).readOnly)
		}},
		{name: "read-only disk of a follower", net: true, inject: func(n *nemesis, v victims) ([]int, error) {
			return append([]int{v.leader}, v.others[1:]...), n.breakDisk(v.others[0], (*disk).readOnly)
		}},
	}
}

func faultNamed(name string) fault {
	faults := catalogue()
	return faults[slices.IndexFunc(faults, func(f fault) bool { return f.name == name })]
}

// rampage makes faults until the time is over: those that every run must show first, the others in an order drawn from the seed.
func (n *nemesis) rampage() error {
	o := n.test.o
	var possible []fault
	left := 0
	for _, f := range catalogue() {
		wanted := o.faults == "" || slices.ContainsFunc(strings.Split(o.faults, ","), func(word string) bool { return strings.Contains(f.name, strings.TrimSpace(word)) })
		switch {
		case !wanted || f.five && o.members < 5:
		case f.net && n.cluster.net == nil:
			left++
		default:
			possible = append(possible, f)
		}
	}
	if left > 0 {
		fmt.Printf("%d faults need namespaces and disks of their own and cannot be made on loopback\n", left)
	}
	if len(possible) == 0 {
		return errors.New("no fault has such a name")
	}
	made := map[string]bool{}
	for time.Since(n.test.began) < o.duration {
		n.test.rng.Shuffle(len(possible), func(a, b int) { possible[a], possible[b] = possible[b], possible[a] })
		slices.SortStableFunc(possible, func(a, b fault) int {
			switch {
			case a.first == b.first:
				return 0
			case a.first:
				return -1
			}
			return 1
		})
		for _, f := range possible {
			if time.Since(n.test.began) >= o.duration {
				break
			}
			n.rounds++
			made[f.name] = true
			n.round(fmt.Sprintf("round %d", n.rounds), f)
		}
	}
	fmt.Printf("%d rounds, %d of %d faults\n", n.rounds, len(made), len(possible))
	return nil
}

// round makes a fault, demands progress, heals, and demands progress again.
func (n *nemesis) round(title string, f fault) {
	t := n.test
	n.note = ""
	leader, err := n.cluster.leader(progressLimit)
	if !t.check(title+": there is a leader", err) {
		_ = n.heal()
		return
	}
	v := victims{leader: leader, others: without(all(t.o.members), leader)}
	t.rng.Shuffle(len(v.others), func(a, b int) { v.others[a], v.others[b] = v.others[b], v.others[a] })
	title = fmt.Sprintf("%s, %s (leader n%d, others %v, at %.1f s)", title, f.name, v.leader, v.others, float64(n.clients.history.now())/1e9)
	before := t.failed
	able, err := f.inject(n, v)
	t.check(title+": the fault", err)
	line := title
	if len(able) > 0 {
		under, err := n.cluster.anyProgress(able, progressLimit)
		if t.check(title+": progress under the fault", err) {
			line += fmt.Sprintf(": goes on after %v", round(under))
		}
	}
	time.Sleep(max(f.hold, 800*time.Millisecond+time.Duration(t.rng.Int64N(int64(1800*time.Millisecond)))))
	for _, m := range n.cluster.members {
		if m.endedByItself() {
			t.check(title, fmt.Errorf("%s ended by itself", m.name))
		} else if !m.alive() && m.mayEnd {
			n.note += fmt.Sprintf("; %s has stopped", m.name)
		}
	}
	t.check(title+": the heal", n.heal())
	healed, err := n.cluster.progress(all(t.o.members), progressLimit)
	if t.check(title+": progress after the heal", err) {
		line += fmt.Sprintf("; healed after %v", round(healed))
	}
	if t.failed == before {
		fmt.Println("ok   " + line + n.note)
	}
	time.Sleep(300 * time.Millisecond)
}

// heal takes back whatever was done, and starts who is not running.
func (n *nemesis) heal() error {
	var problems []error
	if n.cluster.net != nil {
		problems = append(problems, n.cluster.net.set(noCuts(len(n.cluster.members))))
	}
	for _, m := range n.cluster.members {
		if m.stopped {
			problems = append(problems, m.resume())
		}
		if m.broken {
			m.kill()
			if m.disk != nil {
				problems = append(problems, m.disk.replug())
			}
		} else if m.disk != nil {
			problems = append(problems, m.disk.empty())
		}
		if !m.alive() {
			problems = append(problems, m.start())
		}
		m.broken, m.mayEnd = false, false
	}
	return errors.Join(problems...)
}

func (n *nemesis) pause(least, most time.Duration) {
	time.Sleep(least + time.Duration(n.test.rng.Int64N(int64(most-least))))
}

func (n *nemesis) flap(v victims) ([]int, error) {
	for range 4 {
		wanted := noCuts(len(n.cluster.members))
		for _, other := range v.others {
			wanted.both(v.leader, other)
		}
		if err := n.cluster.net.set(wanted); err != nil {
			return nil, err
		}
		n.pause(100*time.Millisecond, 900*time.Millisecond)
		if err := n.cluster.net.set(noCuts(len(n.cluster.members))); err != nil {
			return nil, err
		}
		n.pause(50*time.Millisecond, 500*time.Millisecond)
	}
	return append([]int{v.leader}, v.others...), nil
}

// randomCuts demands nothing while they last: there may be no majority.
func (n *nemesis) randomCuts(victims) ([]int, error) {
	for range 5 {
		wanted := noCuts(len(n.cluster.members))
		for from := range wanted {
			for to := range wanted {
				wanted[from][to] = from != to && n.test.rng.IntN(3) == 0
			}
		}
		if err := n.cluster.net.set(wanted); err != nil {
			return nil, err
		}
		n.pause(200*time.Millisecond, 1500*time.Millisecond)
	}
	return nil, nil
}

func (n *nemesis) stutter(v victims) ([]int, error) {
	m := n.cluster.members[v.leader]
	for range 5 {
		n.paused = true
		if err := m.pause(); err != nil {
			return nil, err
		}
		n.pause(200*time.Millisecond, 1500*time.Millisecond)
		if err := m.resume(); err != nil {
			return nil, err
		}
		n.pause(50*time.Millisecond, 400*time.Millisecond)
	}
	return append([]int{v.leader}, v.others...), nil
}

func (n *nemesis) powerCut(members ...int) error {
	var problems []error
	for _, index := range members {
		m := n.cluster.members[index]
		m.broken, m.mayEnd = true, true
		problems = append(problems, m.disk.fail())
	}
	for _, index := range members {
		n.cluster.members[index].kill()
	}
	return errors.Join(problems...)
}

func (n *nemesis) breakDisk(index int, how func(*disk) error) error {
	m := n.cluster.members[index]
	m.broken, m.mayEnd = true, true
	return how(m.disk)
}

// fill fills one member's disk and lets the others bring so much that it must notice.
func (n *nemesis) fill(index int, others []int) error {
	m := n.cluster.members[index]
	m.mayEnd = true
	if m.disk == nil {
		m.broken = true
		if err := m.limitFiles(1 << 16); err != nil {
			return err
		}
	} else if err := m.disk.fill(2 << 20); err != nil {
		return err
	}
	var group sync.WaitGroup
	value := make([]byte, 256<<10)
	end := time.Now().Add(4 * time.Second)
	for i := range 4 {
		group.Go(func() {
			for k := 0; time.Now().Before(end) && m.alive(); k++ {
				_ = n.cluster.call(others[(i+k)%len(others)], time.Second, func(ctx context.Context, conn *grpc.ClientConn) error {
					_, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "bulk/%d", i), Value: value})
					return err
				})
			}
		})
	}
	group.Wait()
	return nil
}

// killLeader kills the leader and measures the silence: until the first acknowledgement of a write that was sent after the kill.
func (n *nemesis) killLeader(v victims) ([]int, error) {
	p, err := n.probe(v.others)
	if err != nil {
		return nil, err
	}
	defer p.stop()
	n.pause(0, 50*time.Millisecond)
	killed := time.Now()
	n.cluster.members[v.leader].kill()
	deadline := time.After(2 * progressLimit)
	for {
		select {
		case ack := <-p.acks:
			if ack.sent.Before(killed) {
				continue
			}
			gap := ack.at.Sub(killed)
			n.test.gaps = append(n.test.gaps, gap)
			n.note = fmt.Sprintf("; silence of %v", round(gap))
			return v.others, nil
		case <-deadline:
			return nil, fmt.Errorf("no write is acknowledged within %v of the kill", 2*progressLimit)
		}
	}
}

// stopLeader asks the leader to end, as an operator does, and measures the longest time between two acknowledgements around its end.
func (n *nemesis) stopLeader(v victims) ([]int, error) {
	p, err := n.probe(v.others)
	if err != nil {
		return nil, err
	}
	defer p.stop()
	m := n.cluster.members[v.leader]
	n.pause(200*time.Millisecond, 250*time.Millisecond)
	last, longest := (<-p.acks).at, time.Duration(0)
	if err := m.terminate(); err != nil {
		return nil, err
	}
	var over <-chan time.Time
	ended, deadline := m.done, time.After(2*progressLimit)
	for {
		select {
		case ack := <-p.acks:
			if ack.at.After(last) {
				longest, last = max(longest, ack.at.Sub(last)), ack.at
			}
		case <-ended:
			ended, over = nil, time.After(2*time.Second)
		case <-over:
			longest = max(longest, time.Since(last))
			n.test.handovers = append(n.test.handovers, longest)
			n.note = fmt.Sprintf("; silence of %v", round(longest))
			return v.others, nil
		case <-deadline:
			return nil, fmt.Errorf("%s has not ended %v after SIGTERM", m.name, 2*progressLimit)
		}
	}
}

// probe sends writes to these members in turn, one every five milliseconds, whatever became of the ones before.
func (n *nemesis) probe(members []int) (*prober, error) {
	ctx, cancel := context.WithCancel(context.Background())
	p := &prober{cancel: cancel, acks: make(chan ack, 1<<16)}
	var kvs []pb.KVClient
	for _, index := range members {
		conn, err := n.cluster.dial(index)
		if err != nil {
			p.stop()
			return nil, err
		}
		p.conns = append(p.conns, conn)
		kv := pb.NewKVClient(conn)
		if _, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("probe"), Serializable: true}, grpc.WaitForReady(true)); err != nil {
			p.stop()
			return nil, err
		}
		kvs = append(kvs, kv)
	}
	p.group.Go(func() {
		ticker := time.NewTicker(5 * time.Millisecond)
		defer ticker.Stop()
		for i := 0; ctx.Err() == nil; i++ {
			<-ticker.C
			p.group.Go(func() {
				sent := time.Now()
				if _, err := kvs[i%len(kvs)].Put(ctx, &pb.PutRequest{Key: []byte("probe"), Value: []byte("x")}); err == nil {
					p.acks <- ack{sent, time.Now()}
				}
			})
		}
	})
	return p, nil
}

type prober struct {
	cancel context.CancelFunc
	group  sync.WaitGroup
	conns  []*grpc.ClientConn
	acks   chan ack
}

type ack struct{ sent, at time.Time }

func (p *prober) stop() {
	p.cancel()
	p.group.Wait()
	for _, conn := range p.conns {
		conn.Close()
	}
}

func (n *nemesis) killInARow(v victims) ([]int, error) {
	for range 3 {
		if _, err := n.killLeader(v); err != nil {
			return nil, err
		}
		if err := n.cluster.members[v.leader].start(); err != nil {
			return nil, err
		}
		leader, err := n.cluster.leader(progressLimit)
		if err != nil {
			return nil, err
		}
		// The next one may die while the last one is still starting: then the cluster waits for it.
		v = victims{leader: leader, others: without(all(len(n.cluster.members)), leader)}
	}
	return append([]int{v.leader}, v.others...), nil
}

// cutAll leaves every member alone and asks each of them.
func (n *nemesis) cutAll(v victims) ([]int, error) {
	wanted := noCuts(len(n.cluster.members))
	everyone := append([]int{v.leader}, v.others...)
	for _, a := range everyone {
		for _, b := range everyone {
			wanted[a][b] = a != b
		}
	}
	if err := n.cluster.net.set(wanted); err != nil {
		return nil, err
	}
	if n.test.o.etcd {
		// It refuses only after 14 s, and after so long a cut its members need as long again to find each other, which is no fault of this suite's.
		for _, index := range everyone {
			for name, ask := range n.questions(index, false) {
				if !strings.HasSuffix(name, "is refused") {
					n.test.check(fmt.Sprintf("no majority: %s at n%d", name, index), ask())
				}
			}
		}
		return nil, nil
	}
	n.expectRefusals(everyone)
	return nil, nil
}

// killOthers leaves the leader with less than a majority.
func (n *nemesis) killOthers(v victims) ([]int, error) {
	minority := len(n.cluster.members) / 2
	for _, index := range v.others[minority-1:] {
		n.cluster.members[index].kill()
	}
	n.expectRefusals(append([]int{v.leader}, v.others[:minority-1]...))
	return nil, nil
}

func (n *nemesis) expectRefusals(members []int) {
	for _, p := range n.refusals(members) {
		n.test.check(p.name, p.err)
	}
}

type answer struct {
	name string
	err  error
}

// refusals asks members without a majority: at once, while the old leader may not know it yet, and again when everybody does.
func (n *nemesis) refusals(members []int) []answer {
	var mu sync.Mutex
	var answers []answer
	for _, wave := range []string{"at once", "after three seconds"} {
		if wave != "at once" {
			time.Sleep(3 * time.Second)
		}
		var group sync.WaitGroup
		for _, index := range members {
			for what, ask := range n.questions(index, wave != "at once") {
				group.Go(func() {
					name := fmt.Sprintf("no majority, %s: %s at n%d", wave, what, index)
					err := ask()
					mu.Lock()
					defer mu.Unlock()
					answers = append(answers, answer{name, err})
				})
			}
		}
		group.Wait()
	}
	return answers
}

func (n *nemesis) questions(index int, settled bool) map[string]func() error {
	limit := n.test.o.refusal
	unavailable := func(ask func(context.Context, pb.KVClient) error) func() error {
		return func() error {
			began := time.Now()
			err := n.cluster.call(index, limit+2*time.Second, func(ctx context.Context, conn *grpc.ClientConn) error { return ask(ctx, pb.NewKVClient(conn)) })
			took := time.Since(began)
			switch {
			case err == nil:
				return fmt.Errorf("it was answered after %v", round(took))
			case n.test.o.etcd && status.Code(err) == codes.DeadlineExceeded && took <= limit:
			case status.Code(err) != codes.Unavailable || took > limit:
				return fmt.Errorf("refused after %v, with: %w", round(took), err)
			}
			return nil
		}
	}
	page := func(path string, well bool, limit time.Duration) func() error {
		return func() error {
			code, err := n.cluster.page(index, path, limit)
			if err == nil && (code == 200) != well {
				return fmt.Errorf("status %d", code)
			}
			return err
		}
	}
	key := fmt.Appendf(nil, "refused/%d", index)
	questions := map[string]func() error{
		"a write is refused": unavailable(func(ctx context.Context, kv pb.KVClient) error {
			_, err := kv.Put(ctx, &pb.PutRequest{Key: key, Value: []byte("x")})
			return err
		}),
		"a linearizable read is refused": unavailable(func(ctx context.Context, kv pb.KVClient) error {
			_, err := kv.Range(ctx, &pb.RangeRequest{Key: key})
			return err
		}),
		"a stale read is answered": func() error {
			return n.cluster.call(index, 2*time.Second, func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: key, Serializable: true})
				return err
			})
		},
		"/livez is well": page("/livez", true, 2*time.Second),
	}
	if settled {
		questions["/readyz is not well"] = page("/readyz", false, limit)
	}
	return questions
}

// gapSummary tells the silences after one kind of end.
func gapSummary(kind string, gaps []time.Duration) string {
	if len(gaps) == 0 {
		return fmt.Sprintf("no leader ended by %s", kind)
	}
	sorted := slices.Clone(gaps)
	slices.Sort(sorted)
	return fmt.Sprintf("silence after %s to the leader: median %v, max %v, of %d", kind,
		sorted[len(sorted)/2].Round(time.Millisecond), sorted[len(sorted)-1].Round(time.Millisecond), len(sorted))
}
