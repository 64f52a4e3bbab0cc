// Package launch starts a server under test as a child process and waits until it answers.
//
// Promises. A server gets free loopback ports and a folder of its own; Kill ends exactly the process that was started, and
// waits for it. Not promised. A port found free may be taken by someone else before the child binds it; Start then fails.
package launch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// EtcdCommand is the command template that runs one member of the real etcd from the given binary.
func EtcdCommand(binary string) string {
	return binary + " --data-dir {dir} --listen-client-urls http://127.0.0.1:{port} --advertise-client-urls http://127.0.0.1:{port}" +
		" --listen-peer-urls http://127.0.0.1:{peer} --initial-advertise-peer-urls http://127.0.0.1:{peer}" +
		" --initial-cluster default=http://127.0.0.1:{peer} --log-level error"
}

// Server is a child process and the address of its client port.
type Server struct {
	Addr   string
	cmd    *exec.Cmd
	output *tail
	done   chan struct{}
}

// FreePort asks the kernel for a loopback port that nobody listens on now.
func FreePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

// Expand fills {dir}, {port} and {peer} into a command template and splits it at blanks.
func Expand(template, dir string, port, peer int) []string {
	fields := strings.Fields(template)
	replacer := strings.NewReplacer("{dir}", dir, "{port}", strconv.Itoa(port), "{peer}", strconv.Itoa(peer))
	for i, field := range fields {
		fields[i] = replacer.Replace(field)
	}
	return fields
}

// Spawn starts the command and returns at once: the server may still be starting.
func Spawn(template, dir string, port, peer int) (*Server, error) {
	args := Expand(template, dir, port, peer)
	if len(args) == 0 {
		return nil, errors.New("the command that starts the server is empty")
	}
	cmd := exec.Command(args[0], args[1:]...)
	output := &tail{limit: 16 << 10}
	cmd.Stdout, cmd.Stderr = output, output
	// A server must not outlive the test that started it, not even when the test itself is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", args[0], err)
	}
	server := &Server{Addr: fmt.Sprintf("127.0.0.1:%d", port), cmd: cmd, output: output, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(server.done)
	}()
	return server, nil
}

// Start spawns the command on free ports and waits until a read is answered.
func Start(template, dir string, patience time.Duration) (*Server, error) {
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	peer, err := FreePort()
	if err != nil {
		return nil, err
	}
	server, err := Spawn(template, dir, port, peer)
	if err != nil {
		return nil, err
	}
	if err := server.WaitReady(patience); err != nil {
		server.Kill()
		return nil, err
	}
	return server, nil
}

// WaitReady returns once a linearizable read is answered, or says why the server did not come up.
func (s *Server) WaitReady(patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		select {
		case <-s.done:
			return fmt.Errorf("the server ended while starting; its last words:\n%s", s.output)
		default:
		}
		err := Probe(s.Addr, time.Second)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no answer from %s within %v: %w; its last words:\n%s", s.Addr, patience, err, s.output)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Probe does one linearizable read over a connection of its own.
func Probe(addr string, limit time.Duration) error {
	// A plain dial first: it fails at once while nobody listens, where gRPC would back off.
	plain, err := net.DialTimeout("tcp", addr, limit)
	if err != nil {
		return err
	}
	plain.Close()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	_, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("probe"), CountOnly: true})
	return err
}

// Kill ends the process with SIGKILL and waits until it is gone. Killing a dead one does nothing.
func (s *Server) Kill() {
	select {
	case <-s.done:
	default:
		_ = s.cmd.Process.Kill()
		<-s.done
	}
}

// Signal sends a signal to the process.
func (s *Server) Signal(signal os.Signal) error { return s.cmd.Process.Signal(signal) }

// Done is closed when the process has ended.
func (s *Server) Done() <-chan struct{} { return s.done }

// Output is the end of what the server printed.
func (s *Server) Output() string { return s.output.String() }

// tail keeps the last bytes written to it.
type tail struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	limit int
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	if extra := t.buf.Len() - t.limit; extra > 0 {
		t.buf.Next(extra)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}
