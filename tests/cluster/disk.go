package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// disk is an ext4 file system of one member in a file of its own, so that it can be filled and broken without touching anything else.
type disk struct {
	image string
	at    string // where it is mounted
	loop  string // "loop3"
}

const diskSize = 1 << 30 // sparse: it takes what is written

func newDisk(image, at string) (*disk, error) {
	file, err := os.Create(image)
	if err != nil {
		return nil, err
	}
	err = file.Truncate(diskSize)
	file.Close()
	if err != nil {
		return nil, err
	}
	// No blocks reserved for the superuser: full must mean full.
	if err := run("", "mkfs.ext4", "-q", "-F", "-m", "0", image); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		return nil, err
	}
	d := &disk{image: image, at: at}
	return d, d.mount()
}

func (d *disk) mount() error {
	if err := run("", "mount", "-o", "loop,errors=remount-ro", d.image, d.at); err != nil {
		return err
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[1] == d.at {
			d.loop = filepath.Base(fields[0])
			return nil
		}
	}
	return fmt.Errorf("%s is not mounted", d.at)
}

func (d *disk) ballast() string { return filepath.Join(d.at, "ballast") }

// fill leaves only so many bytes free.
func (d *disk) fill(leave int64) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(d.at, &stat); err != nil {
		return err
	}
	size := int64(stat.Bavail)*stat.Bsize - leave
	if size <= 0 {
		return nil
	}
	file, err := os.Create(d.ballast())
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.Fallocate(int(file.Fd()), 0, 0, size)
}

// empty makes room again, for good: a power cut a moment later would bring back what was removed and not synced.
func (d *disk) empty() error {
	if err := os.Remove(d.ballast()); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	root, err := os.Open(d.at)
	if err != nil {
		return err
	}
	defer root.Close()
	return root.Sync()
}

// readOnly makes the file system read-only under the open files, as the kernel does after an error on the disk.
func (d *disk) readOnly() error {
	return os.WriteFile(fmt.Sprintf("/sys/fs/ext4/%s/trigger_fs_error", d.loop), []byte("1"), 0o644)
}

// fail lets every later write and sync fail with an I/O error. What was not synced before is lost, as when the power goes.
func (d *disk) fail() error {
	const shutdown, withoutFlush = 0x8004587d, 2
	root, err := os.Open(d.at)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.IoctlSetPointerInt(int(root.Fd()), shutdown, withoutFlush); err != nil {
		return fmt.Errorf("shutting down the file system: %w", err)
	}
	return nil
}

// replug takes the file system away and brings it back healthy, with what had reached the disk. Nobody may have files open.
func (d *disk) replug() error {
	if err := unix.Unmount(d.at, 0); err != nil {
		return fmt.Errorf("unmounting %s: %w", d.at, err)
	}
	return d.mount()
}
