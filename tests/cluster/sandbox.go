package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The test runs in a child that is the first process of its own process, mount and network namespaces. When that child ends in whatever way,
// the kernel ends every member with it and takes back every namespace and mount: no clean-up of ours can be missed.

const (
	insideVariable   = "CLUSTER_INSIDE" // holds the working folder
	folderPrefix     = "tenure-cluster-"
	exitNoNamespaces = 77
)

// enclose runs the test in its namespaces, or on loopback where they cannot be made, and removes the working folder afterwards.
func enclose(o *options) (int, error) {
	sweep(o.dir)
	folder, err := filepath.Abs(filepath.Join(o.dir, folderPrefix+strconv.Itoa(os.Getpid())))
	if err != nil {
		return 2, err
	}
	if err := os.MkdirAll(filepath.Join(folder, "evidence"), 0o755); err != nil {
		return 2, err
	}
	defer os.RemoveAll(folder)
	if !o.loopback {
		code, err := child(o, folder, unix.CLONE_NEWPID|unix.CLONE_NEWNS|unix.CLONE_NEWNET)
		if err == nil && code != exitNoNamespaces {
			return code, nil
		}
		if err != nil && !errors.Is(err, os.ErrPermission) && !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.ENOSYS) {
			return 2, err
		}
		o.loopback = true
	}
	fmt.Printf("network namespaces cannot be made here, or are not wanted: no partitions; kill, stop and disk faults on loopback instead\n")
	return child(o, folder, 0)
}

func child(o *options, folder string, flags uintptr) (int, error) {
	// The child must die when its parent's thread does; the main thread lives as long as the process.
	runtime.LockOSThread()
	args := append(os.Args[1:len(os.Args):len(os.Args)], "-seed", strconv.FormatUint(o.seed, 10))
	if o.loopback {
		args = append(args, "-loopback")
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), insideVariable+"="+folder)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// A group of its own: an interrupt at the terminal comes to this process alone, which ends the child.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL, Setpgid: true}
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(interrupts)
	if err := cmd.Start(); err != nil {
		return 2, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-done:
	case <-interrupts:
		fmt.Println("interrupted: ending the members")
		_ = cmd.Process.Kill()
		<-done
		return 130, nil
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, nil
	}
	return 2, fmt.Errorf("the test ended with %v", cmd.ProcessState)
}

// sweep removes the folders of runs whose process is gone. Their namespaces, mounts and members went with the process.
func sweep(parent string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(strings.TrimPrefix(entry.Name(), folderPrefix))
		if err != nil || !strings.HasPrefix(entry.Name(), folderPrefix) || syscall.Kill(pid, 0) == nil {
			continue
		}
		_ = os.RemoveAll(filepath.Join(parent, entry.Name()))
	}
}

// run runs a program to its end and says what it printed if it failed.
func run(stdin, program string, args ...string) error {
	cmd := exec.Command(program, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, strings.TrimSpace(string(output)))
	}
	return nil
}
