package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"tenure.dev/tests/etcd/launch"
)

// progressLimit is how long a majority may take to serve again after a fault, and every member after a heal.
const progressLimit = 10 * time.Second

// cluster is the members under test, on the network and the disks that the nemesis breaks.
type cluster struct {
	folder  string
	net     *network // nil: all on loopback
	members []*member
}

// member is one process of the server and what belongs to it.
type member struct {
	index      int
	name       string
	ip         string
	port, peer int
	folder     string
	disk       *disk // nil on loopback
	args       []string
	net        *network
	log        *os.File

	mu      sync.Mutex
	cmd     *exec.Cmd
	done    chan struct{}
	stopped bool // by SIGSTOP
	killed  bool // by us
	lives   int
	mayEnd  bool // its disk is full or broken: it may end by itself
	broken  bool // ... and must be taken away and brought back
}

func newCluster(o *options, net *network, folder string) (*cluster, error) {
	c := &cluster{folder: folder, net: net}
	names, urls := []string{}, []string{}
	for i := range o.members {
		m := &member{index: i, name: fmt.Sprintf("n%d", i), ip: "127.0.0.1", net: net, folder: filepath.Join(folder, fmt.Sprintf("n%d", i), "data")}
		var err error
		if net != nil {
			m.ip, m.port, m.peer = nodeIP(i), 2379, 2380
			if m.disk, err = newDisk(filepath.Join(folder, m.name+".image"), filepath.Dir(m.folder)); err != nil {
				return nil, err
			}
		} else {
			if err = os.MkdirAll(filepath.Dir(m.folder), 0o755); err != nil {
				return nil, err
			}
			if m.port, err = launch.FreePort(); err != nil {
				return nil, err
			}
			if m.peer, err = launch.FreePort(); err != nil {
				return nil, err
			}
		}
		if m.log, err = os.Create(filepath.Join(folder, "evidence", m.name+".log")); err != nil {
			return nil, err
		}
		c.members = append(c.members, m)
		names = append(names, fmt.Sprintf("%s=%s:%d", m.name, m.ip, m.peer))
		urls = append(urls, fmt.Sprintf("%s=http://%s:%d", m.name, m.ip, m.peer))
	}
	for _, m := range c.members {
		fill := strings.NewReplacer("{name}", m.name, "{dir}", m.folder, "{ip}", m.ip, "{port}", strconv.Itoa(m.port), "{peer}", strconv.Itoa(m.peer),
			"{cluster}", strings.Join(names, ","), "{cluster_urls}", strings.Join(urls, ","))
		for _, field := range strings.Fields(o.command) {
			m.args = append(m.args, fill.Replace(field))
		}
		if err := m.start(); err != nil {
			c.stop()
			return nil, err
		}
	}
	return c, nil
}

func (c *cluster) place() string {
	if c.net == nil {
		return "on loopback"
	}
	return "each in a network namespace and on a disk of its own"
}

func (c *cluster) stop() {
	for _, m := range c.members {
		m.kill()
	}
	for _, m := range c.members {
		if m.disk != nil {
			_ = unix.Unmount(m.disk.at, unix.MNT_DETACH)
			m.disk = nil
		}
	}
}

func (m *member) start() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	fmt.Fprintf(m.log, "---- start at %s\n", time.Now().Format("15:04:05.000"))
	cmd := exec.Command(m.args[0], m.args[1:]...)
	cmd.Stdout, cmd.Stderr = m.log, m.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	done := make(chan struct{})
	wait := func() {
		_ = cmd.Wait()
		fmt.Fprintf(m.log, "---- ended at %s: %v\n", time.Now().Format("15:04:05.000"), cmd.ProcessState)
		close(done)
	}
	if err := startOnOwnThread(m.net, m.index, cmd.Start, wait); err != nil {
		return fmt.Errorf("starting %s: %w", m.args[0], err)
	}
	m.cmd, m.done, m.stopped, m.killed = cmd, done, false, false
	m.lives++
	return nil
}

// life counts the starts of the process.
func (m *member) life() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lives
}

func (m *member) alive() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cmd == nil {
		return false
	}
	select {
	case <-m.done:
		return false
	default:
		return true
	}
}

// kill ends the process with SIGKILL and waits until it is gone.
func (m *member) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cmd == nil {
		return
	}
	select {
	case <-m.done:
	default:
		m.killed = true
		_ = m.cmd.Process.Kill()
		<-m.done
	}
}

// terminate asks the process to end in an orderly way.
func (m *member) terminate() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.killed = true
	return m.cmd.Process.Signal(syscall.SIGTERM)
}

// pause stops the process as a long stall would; resume lets it go on.
func (m *member) pause() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = true
	return m.cmd.Process.Signal(syscall.SIGSTOP)
}

func (m *member) resume() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = false
	return m.cmd.Process.Signal(syscall.SIGCONT)
}

// limitFiles lets the member's files grow no further than so many bytes: the nearest to a full disk that needs no file system of its own.
func (m *member) limitFiles(bytes uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	limit := unix.Rlimit{Cur: bytes, Max: unix.RLIM_INFINITY}
	return unix.Prlimit(m.cmd.Process.Pid, unix.RLIMIT_FSIZE, &limit, nil)
}

// endedByItself tells whether the process ended although nobody killed it and its disk is well.
func (m *member) endedByItself() bool {
	if m.alive() {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.killed && !m.mayEnd
}

func (m *member) addr() string { return fmt.Sprintf("%s:%d", m.ip, m.port) }

// addrs are the client addresses of some members.
func (c *cluster) addrs(members []int) []string {
	addrs := make([]string, len(members))
	for i, index := range members {
		addrs[i] = c.members[index].addr()
	}
	return addrs
}

// quickly connects again soon after a failure: the wait of the test must be the server's, not that of the library's back-off.
var quickly = grpc.WithConnectParams(grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.3, Jitter: 0.2, MaxDelay: 400 * time.Millisecond},
	MinConnectTimeout: time.Second,
})

func (c *cluster) client(members []int) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints: c.addrs(members), Logger: zap.NewNop(), DialTimeout: 5 * time.Second, DialOptions: []grpc.DialOption{quickly},
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 2 * time.Second, MaxCallRecvMsgSize: 1 << 30,
	})
}

// dial is a bare connection to one member: no retries hide what that member says.
func (c *cluster) dial(index int) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+c.members[index].addr(), grpc.WithTransportCredentials(insecure.NewCredentials()), quickly,
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
}

// call does one thing over a connection of its own.
func (c *cluster) call(index int, limit time.Duration, f func(context.Context, *grpc.ClientConn) error) error {
	conn, err := c.dial(index)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return f(ctx, conn)
}

// leader asks every member and believes the newest term that its own leader confirms.
func (c *cluster) leader(patience time.Duration) (int, error) {
	deadline := time.Now().Add(patience)
	for {
		answers := make([]*pb.StatusResponse, len(c.members))
		var group sync.WaitGroup
		for i := range c.members {
			group.Go(func() {
				_ = c.call(i, 600*time.Millisecond, func(ctx context.Context, conn *grpc.ClientConn) error {
					answer, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
					if err == nil {
						answers[i] = answer
					}
					return err
				})
			})
		}
		group.Wait()
		leader, term := -1, uint64(0)
		for i, answer := range answers {
			if answer != nil && answer.Leader != 0 && answer.Leader == answer.Header.MemberId && answer.RaftTerm > term {
				leader, term = i, answer.RaftTerm
			}
		}
		if leader >= 0 {
			return leader, nil
		}
		if time.Now().After(deadline) {
			return -1, fmt.Errorf("no member says that it leads within %v", patience)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// writeAndRead does one write and one linearizable read at one member.
func writeAndRead(ctx context.Context, conn *grpc.ClientConn, key string) error {
	kv := pb.NewKVClient(conn)
	if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte("x")}); err != nil {
		return err
	}
	_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	return err
}

func (c *cluster) serves(index int, deadline time.Time) error {
	for {
		err := c.call(index, 1500*time.Millisecond, func(ctx context.Context, conn *grpc.ClientConn) error {
			return writeAndRead(ctx, conn, fmt.Sprintf("progress/%d", index))
		})
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %w", c.members[index].name, err)
		}
		time.Sleep(30 * time.Millisecond)
	}
}

// progress waits until each of these members answers a write and a linearizable read, and tells how long the slowest took.
func (c *cluster) progress(members []int, limit time.Duration) (time.Duration, error) {
	began := time.Now()
	problems := make([]error, len(members))
	var group sync.WaitGroup
	for i, index := range members {
		group.Go(func() { problems[i] = c.serves(index, began.Add(limit)) })
	}
	group.Wait()
	if err := errors.Join(problems...); err != nil {
		return 0, fmt.Errorf("no progress within %v: %w", limit, err)
	}
	return time.Since(began), nil
}

// anyProgress waits until one of these members does.
func (c *cluster) anyProgress(members []int, limit time.Duration) (time.Duration, error) {
	began := time.Now()
	outcomes := make(chan error, len(members))
	for _, index := range members {
		go func() { outcomes <- c.serves(index, began.Add(limit)) }()
	}
	var problems []error
	for range members {
		err := <-outcomes
		if err == nil {
			return time.Since(began), nil
		}
		problems = append(problems, err)
	}
	return 0, fmt.Errorf("no progress within %v: %w", limit, errors.Join(problems...))
}

// page asks for one of the pages that an orchestrator asks for.
func (c *cluster) page(index int, path string, limit time.Duration) (int, error) {
	client := http.Client{Timeout: limit, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + c.members[index].addr() + path)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	_, err = io.Copy(io.Discard, answer.Body)
	return answer.StatusCode, err
}

func all(members int) []int {
	list := make([]int, members)
	for i := range list {
		list[i] = i
	}
	return list
}

func without(list []int, gone ...int) []int {
	var left []int
	for _, i := range list {
		keep := true
		for _, g := range gone {
			keep = keep && i != g
		}
		if keep {
			left = append(left, i)
		}
	}
	return left
}
