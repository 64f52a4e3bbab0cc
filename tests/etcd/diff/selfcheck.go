package main

import (
	"bytes"
	"fmt"
	"os"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// spoiler changes one kind of answer in a small way; a harness that does not notice compares too little.
type spoiler struct {
	name string
	body func(*comparison)
	grpc func(proto.Message)
	http func([]byte) []byte
}

func spoilers() []spoiler {
	seeds := func(c *comparison) { // several programs, so that each kind of answer occurs
		for seed := uint64(1); seed <= 6; seed++ {
			if err := (&comparison{ref: c.ref, sub: c.sub}).run(program(seed, 120)); err != nil {
				panic(&difference{what: err.Error()})
			}
		}
	}
	return []spoiler{
		{"nothing is spoiled", seeds, nil, nil},
		{"count of a range is one more", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.RangeResponse); ok && r.Count > 3 {
				r.Count++
			}
		}, nil},
		{"more is dropped", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.RangeResponse); ok {
				r.More = false
			}
		}, nil},
		{"lease of a key is dropped", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.RangeResponse); ok {
				for _, kv := range r.Kvs {
					kv.Lease = 0
				}
			}
		}, nil},
		{"prev_kv of a put is dropped", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.PutResponse); ok {
				r.PrevKv = nil
			}
		}, nil},
		{"deleted is one less", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.DeleteRangeResponse); ok && r.Deleted > 1 {
				r.Deleted--
			}
		}, nil},
		{"header of a txn's operation is dropped", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.TxnResponse); ok {
				for _, op := range r.Responses {
					if inner := op.GetResponseRange(); inner != nil {
						inner.Header = nil
					}
				}
			}
		}, nil},
		{"member id is missing", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.LeaseGrantResponse); ok && r.Header != nil {
				r.Header.MemberId = 0
			}
		}, nil},
		{"prev_kv of an event is dropped", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.WatchResponse); ok {
				for _, event := range r.Events {
					event.PrevKv = nil
				}
			}
		}, nil},
		{"a late event is dropped", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.WatchResponse); ok && len(r.Events) > 1 {
				r.Events = r.Events[:len(r.Events)-1]
			}
		}, nil},
		{"an event comes twice", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.WatchResponse); ok && len(r.Events) > 0 {
				r.Events = append(r.Events, r.Events[0])
			}
		}, nil},
		{"cancel reason is another", watchBad, func(m proto.Message) {
			if r, ok := m.(*pb.WatchResponse); ok && r.CancelReason != "" {
				r.CancelReason += "."
			}
		}, nil},
		{"compact revision of a canceled watcher is dropped", watchPast, func(m proto.Message) {
			if r, ok := m.(*pb.WatchResponse); ok {
				r.CompactRevision = 0
			}
		}, nil},
		{"an unknown field is added", seeds, func(m proto.Message) {
			if r, ok := m.(*pb.PutResponse); ok {
				r.ProtoReflect().SetUnknown([]byte{0xa0, 0x06, 0x01})
			}
		}, nil},
		{"a number of the gateway is no string", gatewayKV, nil, func(body []byte) []byte {
			return bytes.Replace(body, []byte(`"count":"1"`), []byte(`"count":1`), 1)
		}},
		{"an error of the gateway has another text", gatewayKV, nil, func(body []byte) []byte {
			return bytes.Replace(body, []byte("key is not provided"), []byte("key not provided"), 1)
		}},
	}
}

// selfcheck spoils the answers of a second reference; all but the first, which spoils nothing, must be noticed.
func selfcheck(ref, sub *endpoint) (int, error) {
	passed, failed := 0, 0
	for i, s := range spoilers() {
		sub.tamper, sub.tamperHTTP = s.grpc, s.http
		if sub.tamper == nil {
			sub.tamper = func(proto.Message) {}
		}
		err := (&comparison{ref: ref, sub: sub}).run(s.body)
		if (err != nil) == (i > 0) {
			passed++
			fmt.Printf("ok   %s\n", s.name)
			continue
		}
		failed++
		fmt.Printf("FAIL %s: noticed=%v %v\n", s.name, err != nil, err)
	}
	fmt.Fprintf(os.Stdout, "%d passed, %d failed\n", passed, failed)
	if failed > 0 {
		return 1, nil
	}
	return 0, nil
}
