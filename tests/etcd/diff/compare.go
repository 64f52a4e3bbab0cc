package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// comparison runs steps against both endpoints at once and stops its case at the first step that differs.
type comparison struct {
	ref, sub *endpoint
	steps    int
	history  []string
}

// difference is what ends a case: the step, and what each side said.
type difference struct {
	step     int
	what     string
	ref, sub string
}

func (d *difference) Error() string {
	return fmt.Sprintf("step %d: %s\n  reference: %s\n  subject:   %s", d.step, d.what, indent(d.ref), indent(d.sub))
}

func indent(text string) string {
	text = strings.TrimRight(text, "\n")
	if len(text) > 6000 {
		text = text[:6000] + "..."
	}
	return strings.ReplaceAll(text, "\n", "\n             ")
}

// both does one step on each side and compares. It returns the common answer.
func (c *comparison) both(what string, step func(*endpoint) string) string {
	c.steps++
	c.history = append(c.history, what)
	var ref, sub string
	var group sync.WaitGroup
	group.Go(func() { ref = step(c.ref) })
	group.Go(func() { sub = step(c.sub) })
	group.Wait()
	if ref != sub {
		panic(&difference{step: c.steps, what: what, ref: ref, sub: sub})
	}
	return ref
}

// eventually compares until both agree or the time is over, for what each side does at a moment of its own.
func (c *comparison) eventually(limit time.Duration, what string, step func(*endpoint) string) string {
	c.steps++
	c.history = append(c.history, what)
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		ref, sub := step(c.ref), step(c.sub)
		if ref == sub {
			return ref
		}
		if time.Now().After(deadline) {
			panic(&difference{step: c.steps, what: what, ref: ref, sub: sub})
		}
	}
}

// expect is a plain assertion on what both sides agreed on, so that a case cannot pass by both sides failing alike.
func (c *comparison) expect(got, part string) {
	if !strings.Contains(got, part) {
		panic(&difference{step: c.steps, what: "the common answer must contain " + part, ref: got, sub: got})
	}
}

// run executes a case and returns the difference that ended it, or nil. Both stores are made equal first.
func (c *comparison) run(body func(*comparison)) (failure error) {
	defer func() {
		for _, e := range []*endpoint{c.ref, c.sub} {
			for id, stream := range e.streams {
				stream.cancel()
				delete(e.streams, id)
			}
		}
		if caught := recover(); caught != nil {
			diff, ok := caught.(*difference)
			if !ok {
				panic(caught)
			}
			failure = diff
		}
	}()
	if err := c.reset(); err != nil {
		return err
	}
	body(c)
	return nil
}

// reset empties both stores, brings them to one revision and compacts there, so that a failed case does not fail the next one.
func (c *comparison) reset() error {
	for _, e := range []*endpoint{c.ref, c.sub} {
		if err := e.empty(); err != nil {
			return fmt.Errorf("emptying %s: %w", e.name, err)
		}
	}
	for c.ref.revision.Load() != c.sub.revision.Load() {
		behind, goal := c.ref, c.sub.revision.Load()
		if goal < c.ref.revision.Load() {
			behind, goal = c.sub, c.ref.revision.Load()
		}
		if goal-behind.revision.Load() > 100_000 {
			return fmt.Errorf("revisions are too far apart to align: %d and %d", c.ref.revision.Load(), c.sub.revision.Load())
		}
		for behind.revision.Load() < goal {
			if err := behind.burnRevision(); err != nil {
				return err
			}
		}
	}
	for _, e := range []*endpoint{c.ref, c.sub} {
		if err := e.compactHere(); err != nil {
			return err
		}
	}
	return nil
}

func (e *endpoint) empty() error {
	ctx, cancel := limited()
	defer cancel()
	leases, err := e.lease.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
	if err != nil {
		return err
	}
	for _, lease := range leases.Leases {
		if _, err := e.lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: lease.ID}); err != nil {
			return err
		}
	}
	_, err = e.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	return err
}

// burnRevision puts or deletes one key: each changes the revision by one, and the delete leaves the store empty again.
func (e *endpoint) burnRevision() error {
	ctx, cancel := limited()
	defer cancel()
	if _, err := e.kv.Put(ctx, &pb.PutRequest{Key: []byte("align")}); err != nil {
		return err
	}
	return nil
}

func (e *endpoint) compactHere() error {
	ctx, cancel := limited()
	defer cancel()
	// The aligning key is deleted on both sides, present or not on one of them: put it first.
	if _, err := e.kv.Put(ctx, &pb.PutRequest{Key: []byte("align")}); err != nil {
		return err
	}
	resp, err := e.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte("align")})
	if err != nil {
		return err
	}
	_, err = e.kv.Compact(ctx, &pb.CompactionRequest{Revision: resp.Header.Revision})
	return err
}

// program is a generated case: every random choice comes from the seed and from what the endpoints agreed on.
func program(seed uint64, ops int) func(*comparison) {
	return func(c *comparison) {
		g := &generator{c: c, rng: rand.New(rand.NewPCG(seed, 0x7e4e)), base: c.ref.revision.Load()}
		g.compacted = g.base
		for range ops {
			g.step()
		}
		g.finish()
	}
}
