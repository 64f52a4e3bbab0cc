package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// spoiler changes a true history or the members' ends in one small way that no correct cluster can bring about. It answers false when the history has
// nothing to spoil.
type spoiler struct {
	name  string
	found string // the check that must notice it
	spoil func(*history, *ends) bool
}

func spoilers() []spoiler {
	return []spoiler{
		{"a read shows the value before the last acknowledged write", byRegisters, func(h *history, _ *ends) bool {
			return change(h.ops, func(o *op) bool {
				if o.Kind != read || o.Outcome != answered {
					return false
				}
				for _, w := range h.ops {
					if w.Kind == write && w.Outcome == answered && w.Key == o.Key && w.Return < o.Call && w.Arg == o.Got && w.Got != "" {
						o.Got, o.GotRev = w.Got, w.GotRev
						return true
					}
				}
				return false
			})
		}},
		{"an acknowledged write of a register was never made", byRegisters, func(h *history, _ *ends) bool {
			seen := observed(h)
			for i, o := range h.ops {
				if o.Kind == write && o.Outcome == answered && seen[o.Arg] {
					h.ops = slices.Delete(h.ops, i, i+1)
					return true
				}
			}
			return false
		}},
		{"the last read misses an acknowledged write", byRegisters, func(h *history, _ *ends) bool {
			// A deletion that was told as unknown may come true at any time, so nothing is missed where there is one.
			open := map[string]bool{}
			for _, o := range h.ops {
				open[o.Key] = open[o.Key] || o.Outcome != answered
			}
			return change(h.ops, func(o *op) bool {
				if o.Client != -1 || o.Got == "" || open[o.Key] {
					return false
				}
				o.Got, o.GotRev = "", 0
				return true
			})
		}},
		{"two swaps from one value succeed", byRegisters, func(h *history, _ *ends) bool {
			return change(h.ops, func(o *op) bool {
				if o.Kind != swap || o.Outcome != answered || o.Done || o.Got == "" {
					return false
				}
				o.Done, o.Got = true, o.Expect
				return true
			})
		}},
		{"a reader saw half of a transaction", byRegisters, func(h *history, _ *ends) bool {
			return change(h.ops, func(o *op) bool {
				if o.Key[:4] != "pair" || o.Kind != read || o.Got == "" {
					return false
				}
				o.Got = "half a transaction"
				return true
			})
		}},
		{"a write that was told as unknown came true twice", byRegisters, func(h *history, _ *ends) bool {
			for i, o := range h.ops {
				if o.Kind != write || o.Outcome != answered || o.Got == "" {
					continue
				}
				// What it replaced comes back after it.
				late := o
				late.Kind, late.Arg, late.Call, late.Return, late.Got = read, "", o.Return+1, o.Return+2, o.Got
				for _, other := range h.ops {
					if other.Key == o.Key && other.Outcome == answered && other.Kind != read && other.Return > o.Call && other.Call < late.Return && other.Arg != o.Arg {
						late.Key = ""
					}
				}
				if late.Key != "" {
					h.ops = slices.Insert(h.ops, i+1, late)
					return true
				}
			}
			return false
		}},
		{"a read answers an older revision than the write before it", byRevisions, func(h *history, _ *ends) bool {
			return change(h.ops, func(o *op) bool {
				if o.Kind != read || o.Outcome != answered || o.Call < int64(time.Second) {
					return false
				}
				o.Rev -= 20
				return true
			})
		}},
		{"a write took effect twice, so its value has two revisions", byContents, func(h *history, e *ends) bool {
			return change(h.ops, func(o *op) bool {
				if o.Client != -1 || o.GotRev == 0 || o.Key[:3] != "reg" {
					return false
				}
				for _, image := range e.images {
					for i, kv := range image {
						if string(kv.Key) == o.Key {
							image[i] = proto.Clone(kv).(*mvccpb.KeyValue)
							image[i].ModRevision++
						}
					}
				}
				return true
			})
		}},
		{"a refused write is seen", byRefused, func(h *history, _ *ends) bool {
			seen := observed(h)
			return change(h.ops, func(o *op) bool {
				if o.Kind != write || !seen[o.Arg] {
					return false
				}
				o.Outcome = refused
				return true
			})
		}},
		{"an acknowledged key is lost", byAdditions, func(h *history, e *ends) bool {
			return loseOne(h, e)
		}},
		{"a stale read shows what nobody wrote", byStale, func(h *history, _ *ends) bool {
			return change(h.stale, func(s *staleRead) bool {
				s.Got = "nobody's"
				return true
			})
		}},
		{"a member goes back in time", byStale, func(h *history, _ *ends) bool {
			slices.Reverse(h.stale)
			return change(h.stale, func(s *staleRead) bool {
				s.Rev, s.Got, s.GotRev = 1, "", 0
				return true
			})
		}},
		{"a second owner comes before the first one's lease is over", byHolds, func(h *history, _ *ends) bool {
			slices.SortFunc(h.holds, func(a, b hold) int { return int(a.From - b.From) })
			for i := 1; i < len(h.holds); i++ {
				if h.holds[i].Name == h.holds[i-1].Name {
					h.holds[i-1].Until = h.holds[i].From + 1
					return true
				}
			}
			return false
		}},
		{"a token is given twice", byTokens, func(h *history, _ *ends) bool {
			slices.SortFunc(h.holds, func(a, b hold) int { return int(a.From - b.From) })
			for i := 1; i < len(h.holds); i++ {
				if h.holds[i].Name == h.holds[i-1].Name {
					h.holds[i].Token = h.holds[i-1].Token
					return true
				}
			}
			return false
		}},
		{"two owners count the same number", byCounts, func(h *history, _ *ends) bool {
			if len(h.counts) < 2 || h.counts[0].Outcome != answered {
				return false
			}
			again := h.counts[0]
			again.Token++
			h.counts = append(h.counts, again)
			return true
		}},
		{"a lease that is renewed is told to be gone", byLeases, func(h *history, _ *ends) bool {
			return change(h.leases, func(e *leaseEvent) bool {
				if e.What != granted {
					return false
				}
				again := *e
				again.What, again.Return = gone, e.Return+1
				h.leases = append(h.leases, again)
				return true
			})
		}},
		{"an abandoned lease lives on", byAbandoned, func(h *history, e *ends) bool {
			if len(h.leases) == 0 || len(e.images[0]) == 0 {
				return false
			}
			kv := proto.Clone(e.images[0][0]).(*mvccpb.KeyValue)
			kv.Lease = h.leases[0].Lease
			e.images[0][0] = kv
			return true
		}},
		{"a watcher is told twice", byEvents, func(h *history, _ *ends) bool {
			for i, e := range h.events {
				if e.Key != "" {
					h.events = slices.Insert(h.events, i, e)
					return true
				}
			}
			return false
		}},
		{"a watcher misses an event", byEvents, func(h *history, _ *ends) bool {
			for i, e := range h.events {
				if e.Key != "" {
					h.events = slices.Delete(h.events, i, i+1)
					return true
				}
			}
			return false
		}},
		{"one member misses a key", byImages, func(_ *history, e *ends) bool {
			last := len(e.images) - 1
			e.images[last] = e.images[last][1:]
			return true
		}},
		{"one member holds another value", byImages, func(_ *history, e *ends) bool {
			kv := proto.Clone(e.images[1][0]).(*mvccpb.KeyValue)
			kv.Value = append(kv.Value, '!')
			e.images[1][0] = kv
			return true
		}},
	}
}

// change lets f spoil the first entry that it can.
func change[T any](list []T, f func(*T) bool) bool {
	for i := range list {
		if f(&list[i]) {
			return true
		}
	}
	return false
}

func loseOne(h *history, e *ends) bool {
	for _, a := range h.added {
		if a.Outcome == answered {
			for i := range e.images {
				e.images[i] = slices.DeleteFunc(e.images[i], func(kv *mvccpb.KeyValue) bool { return string(kv.Key) == a.Key })
			}
			return true
		}
	}
	return false
}

// selfcheck takes a true history of a short run with one dead leader, in which no check may find anything, and spoils it in every way. The checks that
// ask the members are tried where their answer must be no.
func (t *test) selfcheck() error {
	c := t.cluster
	if _, err := c.progress(all(t.o.members), 30*time.Second); err != nil {
		return fmt.Errorf("the members do not come up: %w", err)
	}
	t.history = newHistory()
	clients, err := startClients(c, t.history, t.o.seed)
	if err != nil {
		return err
	}
	defer clients.stop()
	n := &nemesis{test: t, cluster: c, clients: clients}
	time.Sleep(5 * time.Second)
	n.round("a true history", faultNamed("kill -9 of the leader"))
	time.Sleep(5 * time.Second)
	clients.stop()
	e, err := readEnds(c, t.history)
	if err != nil {
		return err
	}
	evidence := filepath.Join(c.folder, "evidence")
	t.check("a true history", firstProblem(judge(t.history, e, evidence)))
	scratch := filepath.Join(c.folder, "spoiled")
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		return err
	}
	for _, s := range spoilers() {
		h, spoiled := t.history.copied(), e.copied()
		if !s.spoil(h, spoiled) {
			t.check("spoiled: "+s.name, errors.New("the history has nothing to spoil"))
			continue
		}
		err := errors.New("nobody noticed")
		for _, v := range judge(h, spoiled, scratch) {
			if v.name == s.found && v.err() != nil {
				err = nil
			}
		}
		if t.check("spoiled: "+s.name, err) {
			fmt.Println("ok   noticed: " + s.name)
		}
	}
	t.checkAskers(n)
	fmt.Println(t.history.summary())
	return nil
}

func firstProblem(verdicts []*verdict) error {
	for _, v := range verdicts {
		if err := v.err(); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
	}
	return nil
}

func (e *ends) copied() *ends {
	images := make([][]*mvccpb.KeyValue, len(e.images))
	for i, image := range e.images {
		images[i] = slices.Clone(image)
	}
	return &ends{revision: e.revision, images: images}
}

// checkAskers: a healthy cluster must not pass for one without a majority, a stopped one not for one that serves, an open network not for a cut one.
func (t *test) checkAskers(n *nemesis) {
	c := t.cluster
	wrong := 0
	for _, a := range n.refusals([]int{0}) {
		if a.err != nil {
			wrong++
		}
	}
	noticed := func(name string, yes bool) {
		var err error
		if !yes {
			err = errors.New("nobody noticed")
		}
		if t.check(name, err) {
			fmt.Println("ok   noticed: " + name)
		}
	}
	// Of nine answers five must be no: both waves of writes and reads, and /readyz.
	noticed("a healthy cluster is asked for the refusals of a minority", wrong == 5)
	if c.net != nil {
		wanted := noCuts(t.o.members)
		wanted.both(0, 1)
		noticed("the network is open where it should be cut", c.net.verify(wanted, time.Second) != nil)
		err := c.net.set(wanted)
		noticed("the network is cut where it should be open", err == nil && c.net.verify(noCuts(t.o.members), time.Second) != nil)
		_ = c.net.set(noCuts(t.o.members))
	}
	for _, m := range c.members[:t.o.members/2+1] {
		_ = m.pause()
	}
	_, err := c.anyProgress(all(t.o.members), 2*time.Second)
	noticed("a cluster without a majority makes no progress", err != nil)
	for _, m := range c.members[:t.o.members/2+1] {
		_ = m.resume()
	}
	c.members[0].kill()
	c.members[0].killed = false
	noticed("a member has ended by itself", c.members[0].endedByItself())
}
