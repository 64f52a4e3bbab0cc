// Command diff runs the same operations against a reference (the real etcd) and a subject and compares every answer.
//
// Promises. Programs come from seeds alone; a difference is printed with seed, step, operation, both answers and the command that
// runs it again; the last line counts what passed and failed. Not promised. Steps run one after another: races between clients are
// judged elsewhere, by oracles, since two correct servers may resolve them differently.
// What is hidden before comparing, and why, is said where it is done (render.go, watch.go, generate.go, cases.go).
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"tenure.dev/tests/etcd/launch"
)

type options struct {
	ref, subject           string
	refCmd, subjectCmd     string
	seeds, ops             int
	seed                   int64
	only, skip             string
	selfcheck, verbose     bool
	budget                 time.Duration
	failuresMax            int
	subjectIsEtcd, noCases bool
}

func main() {
	var o options
	flag.StringVar(&o.ref, "ref", os.Getenv("REF_ENDPOINT"), "host:port of a running reference (env REF_ENDPOINT)")
	flag.StringVar(&o.subject, "subject", os.Getenv("SUBJECT_ENDPOINT"), "host:port of a running subject (env SUBJECT_ENDPOINT)")
	flag.StringVar(&o.refCmd, "ref-cmd", os.Getenv("REF_CMD"), "command that starts a fresh reference, with {dir} {port} {peer}; a path alone is an etcd binary (env REF_CMD)")
	flag.StringVar(&o.subjectCmd, "subject-cmd", os.Getenv("SUBJECT_CMD"), "the same for the subject (env SUBJECT_CMD)")
	flag.IntVar(&o.seeds, "seeds", 60, "how many generated programs")
	flag.IntVar(&o.ops, "ops", 120, "steps in each program")
	flag.Int64Var(&o.seed, "seed", -1, "run only this program")
	flag.StringVar(&o.only, "only", "", "run only the fixed cases whose name matches, and no programs")
	flag.StringVar(&o.skip, "skip", "", "leave out the fixed cases whose name matches")
	flag.BoolVar(&o.selfcheck, "selfcheck", false, "prove that the harness can fail: spoil answers of a second reference in known ways, each must be noticed")
	flag.BoolVar(&o.verbose, "v", false, "name every case")
	flag.DurationVar(&o.budget, "budget", 150*time.Second, "start no further program after this time")
	flag.IntVar(&o.failuresMax, "failures", 10, "stop after this many differences")
	flag.BoolVar(&o.noCases, "no-cases", false, "run no fixed cases")
	flag.Parse()
	code, err := run(&o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "diff:", err)
		code = 2
	}
	os.Exit(code)
}

// serve gives the address to use: the one given, or that of a server started for this run.
func serve(name, addr, command, scratch string) (string, *launch.Server, error) {
	if addr != "" {
		return strings.TrimPrefix(addr, "http://"), nil, nil
	}
	if command == "" {
		return "", nil, fmt.Errorf("neither -%s nor -%s-cmd is given", name, name)
	}
	if !strings.Contains(command, " ") {
		command = launch.EtcdCommand(command)
	}
	server, err := launch.Start(command, filepath.Join(scratch, name), 30*time.Second)
	if err != nil {
		return "", nil, err
	}
	return server.Addr, server, nil
}

func run(o *options) (int, error) {
	scratch, err := os.MkdirTemp("", "diff")
	if err != nil {
		return 2, err
	}
	defer os.RemoveAll(scratch)
	if o.selfcheck && o.subject == "" && o.subjectCmd == "" {
		o.subjectCmd = o.refCmd
	}
	refAddr, refServer, err := serve("ref", o.ref, o.refCmd, scratch)
	if err != nil {
		return 2, err
	}
	if refServer != nil {
		defer refServer.Kill()
	}
	subAddr, subServer, err := serve("subject", o.subject, o.subjectCmd, scratch)
	if err != nil {
		return 2, err
	}
	if subServer != nil {
		defer subServer.Kill()
	}
	ref, err := dial("reference", refAddr)
	if err != nil {
		return 2, err
	}
	sub, err := dial("subject", subAddr)
	if err != nil {
		return 2, err
	}
	o.subjectIsEtcd = isEtcd(sub)
	sub.strictPrev = !o.subjectIsEtcd
	if o.selfcheck {
		return selfcheck(ref, sub)
	}
	return compareAll(o, ref, sub, subServer)
}

// isEtcd tells the real etcd by a metric that only its backend has.
func isEtcd(e *endpoint) bool {
	_, _, body, err := e.httpDo("GET", "/metrics", "")
	return err == nil && strings.Contains(string(body), "etcd_disk_backend_commit_duration_seconds")
}

func compareAll(o *options, ref, sub *endpoint, subServer *launch.Server) (int, error) {
	started := time.Now()
	passed, failed, skipped, steps := 0, 0, 0, 0
	dead := false // the subject has ended: nothing further can pass
	judge := func(name, rerun string, body func(*comparison)) {
		c := &comparison{ref: ref, sub: sub}
		begun := time.Now()
		err := c.run(body)
		steps += c.steps
		if err == nil {
			passed++
			if o.verbose {
				fmt.Printf("ok   %s: %d steps, %v\n", name, c.steps, time.Since(begun).Round(time.Millisecond))
			}
			return
		}
		failed++
		fmt.Printf("FAIL %s: %v\n", name, err)
		if last := len(c.history) - 2; last >= 0 {
			fmt.Printf("  the steps before:\n    %s\n", strings.Join(c.history[max(0, last-2):last+1], "\n    "))
		}
		fmt.Printf("  again: %s\n", rerun)
		if subServer != nil {
			select {
			case <-subServer.Done():
				fmt.Printf("  the subject has ended; its last words:\n%s\n", subServer.Output())
				dead = true
			default:
			}
		}
	}
	command := "go run ./etcd/diff -ref-cmd " + shown(o.refCmd, "ETCD") + " -subject-cmd " + shown(o.subjectCmd, "COMMAND")
	if o.seed < 0 && !o.noCases {
		only, err := regexp.Compile(o.only)
		if err != nil {
			return 2, err
		}
		skip, err := regexp.Compile(o.skip)
		if err != nil {
			return 2, err
		}
		for _, named := range cases() {
			if failed >= o.failuresMax || dead {
				break
			}
			if !only.MatchString(named.name) {
				continue
			}
			if o.skip != "" && skip.MatchString(named.name) {
				skipped++
				fmt.Println("skip", named.name)
				continue
			}
			judge("case "+named.name, fmt.Sprintf("%s -only '^%s$'", command, named.name), named.body)
		}
	}
	if o.only == "" {
		first, last := uint64(1), uint64(o.seeds)
		if o.seed >= 0 {
			first, last = uint64(o.seed), uint64(o.seed)
		}
		for seed := first; seed <= last && failed < o.failuresMax && !dead; seed++ {
			if time.Since(started) > o.budget {
				fmt.Printf("the time of %v is over: %d of %d programs ran\n", o.budget, seed-first, o.seeds)
				break
			}
			judge(fmt.Sprintf("seed %d", seed), fmt.Sprintf("%s -seed %d -ops %d", command, seed, o.ops), program(seed, o.ops))
		}
	}
	fmt.Printf("%d steps compared in %v\n", steps, time.Since(started).Round(time.Millisecond))
	if skipped > 0 {
		fmt.Printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	} else {
		fmt.Printf("%d passed, %d failed\n", passed, failed)
	}
	if failed > 0 || passed == 0 {
		return 1, nil
	}
	return 0, nil
}

func shown(command, otherwise string) string {
	if command == "" {
		return otherwise
	}
	return "'" + command + "'"
}
