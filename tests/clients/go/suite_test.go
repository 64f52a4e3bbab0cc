// Package clients runs the unmodified Go client of etcd against a server.
//
// The server is named by TENURE_ENDPOINT (host:port), or started for the run by SUBJECT_CMD (a command with {dir} {port} {peer}, or
// the path of an etcd binary). Tests run side by side on one server, each under a key prefix of its own, so none may rely on the
// store's revision standing still; that is compared exactly in ../../etcd/diff.
package clients

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"tenure.dev/tests/etcd/launch"
)

var (
	serverAddr string
	realEtcd   bool
)

func TestMain(m *testing.M) { os.Exit(runSuite(m)) }

func runSuite(m *testing.M) int {
	serverAddr = strings.TrimPrefix(os.Getenv("TENURE_ENDPOINT"), "http://")
	if serverAddr == "" {
		command := os.Getenv("SUBJECT_CMD")
		if command == "" {
			fmt.Fprintln(os.Stderr, "set TENURE_ENDPOINT (host:port) or SUBJECT_CMD (the command that starts a server)")
			return 2
		}
		if !strings.Contains(command, " ") {
			command = launch.EtcdCommand(command)
		}
		dir, err := os.MkdirTemp("", "clients")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		defer os.RemoveAll(dir)
		server, err := launch.Start(command, dir+"/data", 30*time.Second)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		defer server.Kill()
		serverAddr = server.Addr
	}
	realEtcd = isRealEtcd()
	return m.Run()
}

// isRealEtcd tells the reference by a metric that only its backend has.
func isRealEtcd() bool {
	resp, err := http.Get("http://" + serverAddr + "/metrics")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return err == nil && strings.Contains(string(body), "etcd_disk_backend_commit_duration_seconds")
}

func connect(t *testing.T, addr string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{addr}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// start gives a client, a prefix that no other test uses, and a context that ends with patience.
func start(t *testing.T) (*clientv3.Client, string, context.Context) {
	t.Helper()
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return connect(t, serverAddr), "test/" + t.Name() + "/", ctx
}

func must[T any](t *testing.T) func(value T, err error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func put(t *testing.T, ctx context.Context, client clientv3.KV, key, value string, opts ...clientv3.OpOption) int64 {
	t.Helper()
	return must[*clientv3.PutResponse](t)(client.Put(ctx, key, value, opts...)).Header.Revision
}

func value(t *testing.T, ctx context.Context, client clientv3.KV, key string) string {
	t.Helper()
	got := must[*clientv3.GetResponse](t)(client.Get(ctx, key))
	if len(got.Kvs) == 0 {
		return "<absent>"
	}
	return string(got.Kvs[0].Value)
}

// collect reads watch responses until count events are there.
func collect(t *testing.T, ctx context.Context, watch clientv3.WatchChan, count int) []*clientv3.Event {
	t.Helper()
	var events []*clientv3.Event
	for len(events) < count {
		select {
		case resp, open := <-watch:
			if !open {
				t.Fatalf("the watch ended after %d of %d events", len(events), count)
			}
			if err := resp.Err(); err != nil {
				t.Fatalf("the watch failed after %d of %d events: %v", len(events), count, err)
			}
			events = append(events, resp.Events...)
		case <-ctx.Done():
			t.Fatalf("only %d of %d events came", len(events), count)
		}
	}
	if len(events) > count {
		t.Fatalf("%d events came, expected %d", len(events), count)
	}
	return events
}

// proxy forwards TCP to the server; it can cut every connection, or hold the bytes back as a dead network would.
type proxy struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	held     bool
	freed    chan struct{}
	accepted int
}

func newProxy(t *testing.T) *proxy {
	t.Helper()
	listener := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	p := &proxy{listener: listener, freed: make(chan struct{})}
	close(p.freed)
	go p.serve()
	t.Cleanup(func() {
		listener.Close()
		p.release()
		p.cut()
	})
	return p
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

func (p *proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", serverAddr)
		if err != nil {
			client.Close()
			continue
		}
		p.mu.Lock()
		p.accepted++
		p.conns = append(p.conns, client, server)
		p.mu.Unlock()
		go p.pump(client, server)
		go p.pump(server, client)
	}
}

func (p *proxy) pump(from, to net.Conn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			to.Close()
			return
		}
		p.mu.Lock()
		freed := p.freed
		p.mu.Unlock()
		<-freed
		if _, err := to.Write(buffer[:n]); err != nil {
			from.Close()
			return
		}
	}
}

// cut ends all connections; new ones are accepted.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range p.conns {
		conn.Close()
	}
	p.conns = nil
}

// hold lets nothing through any more, in either direction, without closing anything.
func (p *proxy) hold() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.held {
		p.held, p.freed = true, make(chan struct{})
	}
}

func (p *proxy) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held {
		p.held = false
		close(p.freed)
	}
}
