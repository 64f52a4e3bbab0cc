package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// callLimit bounds every call; an endpoint that hangs shows as a difference, not as a hanging test.
const callLimit = 10 * time.Second

// endpoint is one server under comparison, spoken to without any client library in between.
type endpoint struct {
	name    string
	addr    string
	conn    *grpc.ClientConn
	kv      pb.KVClient
	lease   pb.LeaseClient
	watch   pb.WatchClient
	maint   pb.MaintenanceClient
	cluster pb.ClusterClient
	http    *http.Client
	streams map[int]*watchStream
	// revision is the newest one that any answer's header told.
	revision atomic.Int64
	// strictPrev makes a prev_kv that no watcher asked for a difference. The real etcd leaks such, so it is off for it.
	strictPrev bool
	// tamper, set only by the self-check, changes an answer before it is compared.
	tamper func(proto.Message)
	// tamperHTTP does the same to a gateway body.
	tamperHTTP func([]byte) []byte
}

type withHeader interface{ GetHeader() *pb.ResponseHeader }

func dial(name, addr string) (*endpoint, error) {
	e := &endpoint{name: name, addr: addr, streams: map[int]*watchStream{}}
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30)),
		grpc.WithUnaryInterceptor(e.observe))
	if err != nil {
		return nil, err
	}
	e.conn = conn
	e.kv = pb.NewKVClient(conn)
	e.lease = pb.NewLeaseClient(conn)
	e.watch = pb.NewWatchClient(conn)
	e.maint = pb.NewMaintenanceClient(conn)
	e.cluster = pb.NewClusterClient(conn)
	e.http = &http.Client{Timeout: callLimit}
	return e, nil
}

func (e *endpoint) observe(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	if message, ok := reply.(proto.Message); ok && err == nil {
		if e.tamper != nil {
			e.tamper(message)
		}
		if headed, ok := reply.(withHeader); ok && headed.GetHeader() != nil {
			e.revision.Store(max(e.revision.Load(), headed.GetHeader().Revision))
		}
	}
	return err
}

func limited() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), callLimit)
}

// rawCodec carries bytes as they are, so that a request may hold what no generated type can say.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = rawCodec{}

var forceRaw = grpc.ForceCodecV2(rawCodec{})

// raw sends the bytes as a unary request and decodes the answer into reply.
func (e *endpoint) raw(method string, request []byte, reply proto.Message) string {
	ctx, cancel := limited()
	defer cancel()
	var out []byte
	err := e.conn.Invoke(ctx, method, &request, &out, forceRaw)
	if err != nil {
		return renderError(err)
	}
	if err := proto.Unmarshal(out, reply); err != nil {
		return fmt.Sprintf("undecodable answer %x: %v", out, err)
	}
	return render(reply)
}

// rangeStream merges all chunks into one Range answer, as a client would, and checks the rule that only the last carries the header.
func (e *endpoint) rangeStream(req *pb.RangeRequest) string {
	ctx, cancel := limited()
	defer cancel()
	stream, err := e.kv.RangeStream(ctx, req)
	if err != nil {
		return renderError(err)
	}
	merged, headers, chunks := &pb.RangeResponse{}, 0, 0
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return renderError(err)
		}
		chunks++
		if headers > 0 {
			return "a chunk after the one that carries the header"
		}
		if chunk.RangeResponse.GetHeader() != nil {
			headers++
		}
		proto.Merge(merged, chunk.GetRangeResponse())
	}
	if headers != 1 {
		return fmt.Sprintf("%d headers in %d chunks", headers, chunks)
	}
	return render(merged)
}

// keepAlive sends the ids on one stream and returns the answers in order.
func (e *endpoint) keepAlive(ids ...int64) string {
	ctx, cancel := limited()
	defer cancel()
	stream, err := e.lease.LeaseKeepAlive(ctx)
	if err != nil {
		return renderError(err)
	}
	text := ""
	for _, id := range ids {
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
			return renderError(err)
		}
		text += answer(stream.Recv()) + "\n"
	}
	_ = stream.CloseSend()
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		text += "end: " + renderError(err)
	}
	return text
}

func (e *endpoint) httpDo(method, path, body string) (int, string, []byte, error) {
	req, err := http.NewRequest(method, "http://"+e.addr+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return 0, "", nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.http.Do(req)
	if err != nil {
		return 0, "", nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if e.tamperHTTP != nil {
		data = e.tamperHTTP(data)
	}
	return resp.StatusCode, resp.Header.Get("Content-Type"), data, err
}
