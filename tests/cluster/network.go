package main

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// network is a star: a namespace for each member, one for the clients (the one this process was born in), and a router between them. The
// router forwards everything but what its rules swallow, so each direction between any two is cut alone and no end is told of it.
type network struct {
	members int
	router  string
	names   []string
	cut     cuts
	sockets []net.PacketConn // one in each namespace, the clients' last: they find out who hears whom
	heard   []atomic.Uint64  // [to*nodes+from]: newest probe that arrived
	probe   uint64
}

// cuts says which direction is cut: cuts[from][to]. The number after the last member is the clients.
type cuts [][]bool

const probePort = 7

func noCuts(members int) cuts {
	c := make(cuts, members+1)
	for i := range c {
		c[i] = make([]bool, members+1)
	}
	return c
}

// both cuts the two directions between a and b.
func (c cuts) both(a, b int) { c[a][b], c[b][a] = true, true }

func nodeIP(i int) string { return fmt.Sprintf("10.77.%d.2", i+1) }

func newNetwork(members int) (*network, error) {
	n := &network{members: members, router: fmt.Sprintf("tenure-%d-router", os.Getppid()), cut: noCuts(members)}
	// The names live in a mount of our own, so nobody else sees them.
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return nil, fmt.Errorf("mounting /proc: %w", err)
	}
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("none", "/run/netns", "tmpfs", 0, ""); err != nil {
		return nil, fmt.Errorf("mounting /run/netns: %w", err)
	}
	if err := run("", "ip", "link", "set", "lo", "up"); err != nil {
		return nil, err
	}
	if err := n.addNamespace(n.router); err != nil {
		return nil, err
	}
	if err := n.within(n.router, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644) }); err != nil {
		return nil, err
	}
	for i := range members {
		name := fmt.Sprintf("tenure-%d-n%d", os.Getppid(), i)
		n.names = append(n.names, name)
		if err := n.addNamespace(name); err != nil {
			return nil, err
		}
		if err := n.connect(i, name); err != nil {
			return nil, err
		}
	}
	if err := n.connect(members, ""); err != nil {
		return nil, err
	}
	return n, n.listen()
}

func (n *network) addNamespace(name string) error {
	if err := run("", "ip", "netns", "add", name); err != nil {
		return err
	}
	return run("", "ip", "-n", name, "link", "set", "lo", "up")
}

// connect lays a cable from a namespace to the router; no name is the clients' own namespace.
func (n *network) connect(i int, name string) error {
	prefix := strings.TrimSuffix(nodeIP(i), "2")
	end, here := fmt.Sprintf("v%d", i), []string{}
	peer := []string{"peer", "name", "eth0"}
	if name != "" {
		here = []string{"-n", name}
		peer = append(peer, "netns", name)
	} else {
		// Made here and moved, as this namespace has no name to be moved to.
		if err := run("", "ip", "link", "add", "name", "eth0", "type", "veth", "peer", "name", end, "netns", n.router); err != nil {
			return err
		}
	}
	if name != "" {
		add := append([]string{"-n", n.router, "link", "add", "name", end, "type", "veth"}, peer...)
		if err := run("", "ip", add...); err != nil {
			return err
		}
	}
	router := fmt.Sprintf("address add %s1/24 dev %s\nlink set %s up\n", prefix, end, end)
	if err := run(router, "ip", "-n", n.router, "-batch", "-"); err != nil {
		return err
	}
	node := fmt.Sprintf("address add %s2/24 dev eth0\nlink set eth0 up\nroute add default via %s1\n", prefix, prefix)
	return run(node, "ip", append(here, "-batch", "-")...)
}

// within runs f on a thread inside the namespace; what it opens or starts stays there. The thread ends with f.
func (n *network) within(name string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: a thread in another namespace must not be used again
		done <- enter(name, f)
	}()
	return <-done
}

func enter(name string, f func() error) error {
	handle, err := os.Open("/run/netns/" + name)
	if err != nil {
		return err
	}
	defer handle.Close()
	if err := unix.Setns(int(handle.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering %s: %w", name, err)
	}
	return f()
}

func (n *network) listen() error {
	nodes := n.members + 1
	n.sockets, n.heard = make([]net.PacketConn, nodes), make([]atomic.Uint64, nodes*nodes)
	for i := range nodes {
		open := func() error {
			socket, err := net.ListenPacket("udp4", fmt.Sprintf("%s:%d", nodeIP(i), probePort))
			n.sockets[i] = socket
			return err
		}
		var err error
		if i < n.members {
			err = n.within(n.names[i], open)
		} else {
			err = open()
		}
		if err != nil {
			return err
		}
		go n.hear(i)
	}
	return nil
}

func (n *network) hear(to int) {
	buffer := make([]byte, 64)
	for {
		size, _, err := n.sockets[to].ReadFrom(buffer)
		if err != nil {
			return
		}
		var from int
		var probe uint64
		if _, err := fmt.Sscan(string(buffer[:size]), &from, &probe); err == nil {
			n.heard[to*(n.members+1)+from].Store(probe)
		}
	}
}

// set makes exactly these cuts and proves it: every open direction carries a packet, no cut one does.
func (n *network) set(wanted cuts) error {
	var batch strings.Builder
	for from := range wanted {
		for to := range wanted[from] {
			place := 100 + from*(n.members+1) + to
			switch {
			case wanted[from][to] && !n.cut[from][to]:
				fmt.Fprintf(&batch, "rule add pref %d from %s to %s blackhole\n", place, nodeIP(from), nodeIP(to))
			case !wanted[from][to] && n.cut[from][to]:
				fmt.Fprintf(&batch, "rule del pref %d\n", place)
			}
		}
	}
	if batch.Len() > 0 {
		if err := run(batch.String(), "ip", "-n", n.router, "-batch", "-"); err != nil {
			return err
		}
	}
	n.cut = wanted
	return n.verify(wanted, 3*time.Second)
}

func (n *network) verify(wanted cuts, patience time.Duration) error {
	n.probe++
	nodes := n.members + 1
	deadline := time.Now().Add(patience)
	for {
		missing := ""
		for from := range nodes {
			for to := range nodes {
				if from == to {
					continue
				}
				address := &net.UDPAddr{IP: net.ParseIP(nodeIP(to)), Port: probePort}
				_, _ = n.sockets[from].WriteTo(fmt.Appendf(nil, "%d %d", from, n.probe), address)
			}
		}
		time.Sleep(40 * time.Millisecond)
		for from := range nodes {
			for to := range nodes {
				arrived := n.heard[to*nodes+from].Load() == n.probe
				switch {
				case from == to:
				case arrived && wanted[from][to]:
					return fmt.Errorf("the network is not as it should be: %d still reaches %d", from, to)
				case !arrived && !wanted[from][to]:
					missing = fmt.Sprintf("the network is not as it should be: %d does not reach %d", from, to)
				}
			}
		}
		if missing == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s", missing)
		}
	}
}

// startOnOwnThread starts a process in a member's namespace and keeps the starting thread until it has ended: the process dies with that thread.
func startOnOwnThread(n *network, index int, begin func() error, wait func()) error {
	began := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		start := func() error { return begin() }
		var err error
		if n != nil {
			err = enter(n.names[index], start)
		} else {
			err = start()
		}
		began <- err
		if err == nil {
			wait()
		}
	}()
	return <-began
}
