// Command ctl runs the unmodified etcdctl against a reference (the real etcd) and a subject and compares what it prints and returns.
//
// Hidden before comparing: addresses, ids of clusters, members and leases, terms, sizes and times. Everything else, exit codes and
// error texts too, must be equal. Commands that need a service which the subject does not have yet stand in the table notServed.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"tenure.dev/tests/etcd/launch"
)

// step is one call of etcdctl. {lease} in its arguments stands for the lease granted last on that side.
type step struct {
	args  string
	stdin string
	// lines ends a command that never ends by itself once it has printed this many lines.
	lines int
	// beside is run while the command is running, once it printed its first line or after half a second.
	beside string
	// loose compares only the exit code and which fields are there: the values are each server's own.
	loose bool
}

type script struct {
	name  string
	steps []step
}

var scripts = []script{
	{"put-get-del", []step{
		{args: "put k one"}, {args: "put k two --prev-kv"}, {args: "put k", stdin: "from input"}, {args: "get k"}, {args: "get k --print-value-only"},
		{args: "get k -w json"}, {args: "get k -w fields"}, {args: "get k -w simple --hex"}, {args: "get absent"}, {args: "get absent -w json"},
		{args: "get k --rev 2"}, {args: "get k --rev 99999"}, {args: "put a 1"}, {args: "put b 2"}, {args: "put c 3"},
		{args: "get a c"}, {args: "get b --from-key"}, {args: "get --prefix= "}, {args: "get k --prefix --keys-only"}, {args: "get a --from-key --limit 2 -w json"},
		{args: "get a --from-key --order DESCEND --sort-by MODIFY"}, {args: "get a --from-key --count-only -w fields"}, {args: "get a --consistency s"},
		{args: "put k --ignore-value --prev-kv"}, {args: "put nothing --ignore-value"}, {args: "put k v --lease 1234"},
		{args: "del a --prev-kv"}, {args: "del a"}, {args: "del b --from-key --prev-kv"}, {args: "get a --from-key --count-only -w fields"},
	}},
	{"txn", []step{
		{args: "put t 1"},
		{args: "txn", stdin: "value(\"t\") = \"1\"\n\nput t 2\nget t\n\nget t\n\n"},
		{args: "txn -w json", stdin: "value(\"t\") = \"1\"\n\nput t 3\n\nget t\ndel nothing\n\n"},
		{args: "txn", stdin: "mod(\"t\") > \"0\"\nver(\"t\") < \"9\"\ncreate(\"t\") != \"0\"\n\ndel t\n\n\n"},
		{args: "txn", stdin: "\nput d 1\nput d 2\n\n\n"},
		{args: "get t -w json"},
	}},
	{"watch", []step{
		{args: "put w 1"},
		{args: "watch w", beside: "put w 2", lines: 3},
		{args: "watch w --prev-kv -w json", beside: "put w 3", lines: 1},
		{args: "watch w --prefix --rev 1", lines: 3},
		{args: "watch w --progress-notify", beside: "del w", lines: 2},
		{args: "watch w -- echo seen", beside: "put w 4", lines: 4},
	}},
	{"lease", []step{
		{args: "lease grant 300"}, {args: "put l v --lease {lease}"}, {args: "get l"}, {args: "lease timetolive {lease} --keys"},
		{args: "lease list"}, {args: "lease keep-alive {lease} --once"}, {args: "lease revoke {lease}"}, {args: "lease revoke {lease}"},
		{args: "lease timetolive {lease}"}, {args: "lease keep-alive {lease} --once"}, {args: "get l"}, {args: "lease grant 0"}, {args: "lease grant 9000000001"},
	}},
	{"lock-and-elect", []step{
		{args: "lock name -- echo inside"}, {args: "lock name --ttl 5 -- false"}, {args: "lock name", lines: 1},
		{args: "elect office me", lines: 2}, {args: "elect -l office", beside: "elect office other", lines: 2},
		{args: "get name --prefix"}, {args: "get office --prefix"}, // nothing is left; the revision depends on who was interrupted when
	}},
	{"compaction", []step{
		{args: "put c 1"}, {args: "put c 2"}, {args: "compaction 99999"}, {args: "compaction 3"}, {args: "compaction 3"}, {args: "compaction 4 --physical"},
		{args: "get c --rev 2"}, {args: "watch c --rev 2", lines: 1},
	}},
	{"cluster", []step{
		{args: "member list", loose: true}, {args: "member list -w json", loose: true}, {args: "member list -w table", loose: true},
		{args: "endpoint status -w json", loose: true}, {args: "endpoint status -w fields", loose: true}, {args: "endpoint status --cluster -w json", loose: true},
		{args: "endpoint health"}, {args: "endpoint health --cluster"}, {args: "version"},
	}},
	{"bad-calls", []step{
		{args: "get"}, {args: "put"}, {args: "nope"}, {args: "get x --rev abc"}, {args: "lease revoke xyz"}, {args: "del"},
	}},
}

// notServed is what the subject may refuse today. A command of this table passes if the subject behaves as the reference or if its
// output matches the expectation; whoever makes one work moves it to the scripts above.
var notServed = []struct {
	args, expectation, why string
}{
	{"endpoint hashkv", `Unimplemented|unimplemented|unknown (service|method)`, "the hash is over etcd's own stored bytes"},
	{"alarm list", `Unimplemented|unimplemented|unknown (service|method)`, "no alarms yet: quota steps come with the operating work"},
	{"alarm disarm", `Unimplemented|unimplemented|unknown (service|method)`, "as alarm list"},
	{"defrag", `Unimplemented|unimplemented|unknown (service|method)`, "storage reuses space by itself"},
	{"snapshot save {scratch}/db", `Unimplemented|unimplemented|unknown (service|method)`, "snapshots have a format of their own"},
	{"move-leader 1", `Unimplemented|unimplemented|unknown (service|method)|no leader`, "one member only"},
	{"member remove 1", `Unimplemented|unimplemented|unknown (service|method)`, "one member only"},
	{"auth status", `Unimplemented|unimplemented|unknown (service|method)`, "no users yet"},
	{"user list", `Unimplemented|unimplemented|unknown (service|method)`, "no users yet"},
	{"role list", `Unimplemented|unimplemented|unknown (service|method)`, "no users yet"},
	{"downgrade validate 3.6", `Unimplemented|unimplemented|unknown (service|method)`, "etcd's own storage versions"},
}

type side struct {
	name, addr, lease, scratch string
}

type result struct {
	code           int
	stdout, stderr string
}

var (
	etcdctl   string
	verbose   bool
	selfcheck bool
)

func main() {
	refCmd := flag.String("ref-cmd", os.Getenv("REF_CMD"), "command that starts a fresh reference; a path alone is an etcd binary (env REF_CMD)")
	subjectCmd := flag.String("subject-cmd", os.Getenv("SUBJECT_CMD"), "the same for the subject (env SUBJECT_CMD)")
	flag.StringVar(&etcdctl, "etcdctl", os.Getenv("ETCDCTL"), "path of the etcdctl binary (env ETCDCTL)")
	flag.BoolVar(&selfcheck, "selfcheck", false, "prove that a difference is noticed: the subject is asked to write another value, and the script must fail")
	flag.BoolVar(&verbose, "v", false, "print what the reference answered")
	only := flag.String("only", "", "run only the scripts whose name matches; notserved is the table's")
	flag.Parse()
	code, err := run(*refCmd, *subjectCmd, *only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "ctl:", err)
		code = 2
	}
	os.Exit(code)
}

func run(refCmd, subjectCmd, only string) (int, error) {
	if etcdctl == "" || refCmd == "" || subjectCmd == "" {
		return 2, errors.New("-etcdctl, -ref-cmd and -subject-cmd are needed")
	}
	wanted, err := regexp.Compile(only)
	if err != nil {
		return 2, err
	}
	scratch, err := os.MkdirTemp("", "ctl")
	if err != nil {
		return 2, err
	}
	defer os.RemoveAll(scratch)
	passed, failed := 0, 0
	count := func(name, problem string) {
		if problem == "" {
			passed++
			return
		}
		failed++
		fmt.Printf("FAIL %s: %s\n", name, problem)
	}
	// A fresh pair for each script, so that one difference in revisions is not seen in all that follow.
	for i, s := range scripts {
		if !wanted.MatchString(s.name) {
			continue
		}
		err := withPair(refCmd, subjectCmd, filepath.Join(scratch, fmt.Sprint(i)), func(ref, sub *side) {
			for _, step := range s.steps {
				count(s.name+": etcdctl "+step.args, compare(ref, sub, step))
			}
		})
		if err != nil {
			return 2, err
		}
	}
	if wanted.MatchString("notserved") {
		err := withPair(refCmd, subjectCmd, filepath.Join(scratch, "last"), func(ref, sub *side) {
			for _, entry := range notServed {
				count("not served: etcdctl "+entry.args, refusal(ref, sub, entry.args, entry.expectation))
			}
		})
		if err != nil {
			return 2, err
		}
	}
	if selfcheck {
		fmt.Printf("%d differences noticed\n", failed)
		passed, failed = min(failed, 1), 1-min(failed, 1)
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 || passed == 0 {
		return 1, nil
	}
	return 0, nil
}

func withPair(refCmd, subjectCmd, scratch string, body func(ref, sub *side)) error {
	var sides []*side
	for _, each := range []struct{ name, command string }{{"reference", refCmd}, {"subject", subjectCmd}} {
		command := each.command
		if !strings.Contains(command, " ") {
			command = launch.EtcdCommand(command)
		}
		dir := filepath.Join(scratch, each.name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		server, err := launch.Start(command, filepath.Join(dir, "data"), 30*time.Second)
		if err != nil {
			return fmt.Errorf("%s: %w", each.name, err)
		}
		defer server.Kill()
		sides = append(sides, &side{name: each.name, addr: server.Addr, scratch: dir})
	}
	body(sides[0], sides[1])
	return nil
}

func compare(ref, sub *side, s step) string {
	var want, got result
	var group sync.WaitGroup
	group.Go(func() { want = ref.call(s) })
	group.Go(func() { got = sub.call(s) })
	group.Wait()
	if s.loose {
		want.stdout, got.stdout = fieldsOnly(want.stdout), fieldsOnly(got.stdout)
	}
	if verbose {
		fmt.Printf("etcdctl %s: exit %d\n%s%s", s.args, want.code, want.stdout, want.stderr)
	}
	if want == got {
		return ""
	}
	return fmt.Sprintf("\n  reference: exit %d\n%s%s\n  subject: exit %d\n%s%s", want.code, want.stdout, want.stderr, got.code, got.stdout, got.stderr)
}

func refusal(ref, sub *side, args, expectation string) string {
	s := step{args: args, loose: true}
	want, got := ref.call(s), sub.call(s)
	same := want.code == got.code && fieldsOnly(want.stdout) == fieldsOnly(got.stdout) && want.stderr == got.stderr
	if same {
		return ""
	}
	if matched, _ := regexp.MatchString(expectation, got.stderr+got.stdout); matched && got.code != 0 {
		return ""
	}
	return fmt.Sprintf("neither as the reference nor refused by /%s/: exit %d\n%s%s", expectation, got.code, got.stdout, got.stderr)
}

// call runs one etcdctl and hides what no two servers share.
func (s *side) call(st step) result {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	cmd := s.command(ctx, st.args)
	if st.stdin != "" {
		cmd.Stdin = strings.NewReader(st.stdin)
	}
	out := &lineCounter{reached: make(chan struct{}), first: make(chan struct{}), want: st.lines}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &stderr
	if err := cmd.Start(); err != nil {
		return result{code: -1, stderr: err.Error()}
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	var beside *exec.Cmd
	besideOut := &lineCounter{reached: make(chan struct{}), first: make(chan struct{})}
	if st.beside != "" {
		// A watch prints nothing until there is an event, so its start is given some time.
		select {
		case <-out.first:
		case <-time.After(500 * time.Millisecond):
		}
		beside = s.command(ctx, st.beside)
		beside.Stdout = besideOut
		_ = beside.Start()
	}
	code := 0
	if st.lines > 0 {
		select {
		case <-out.reached:
		case <-ended:
			code = cmd.ProcessState.ExitCode()
		case <-ctx.Done():
			code = -2
		}
		// An interrupt lets lock and elect give back what they hold.
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
		case <-time.After(3 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	} else {
		<-ended
		code = cmd.ProcessState.ExitCode()
	}
	if beside != nil {
		// The watcher may see what this command did before the command itself knows: an elect that is interrupted then leaves its key.
		select {
		case <-besideOut.first:
		case <-time.After(3 * time.Second):
		}
		_ = beside.Process.Signal(os.Interrupt)
		_ = beside.Wait()
	}
	stdout := out.text(st.lines)
	if found := regexp.MustCompile(`lease ([0-9a-f]+) granted`).FindStringSubmatch(stdout); found != nil {
		s.lease = found[1]
	}
	return result{code: code, stdout: s.hide(stdout), stderr: s.hide(stderr.String())}
}

func (s *side) command(ctx context.Context, args string) *exec.Cmd {
	args = strings.NewReplacer("{lease}", s.lease, "{scratch}", s.scratch).Replace(args)
	if selfcheck && s.name == "subject" {
		args = strings.ReplaceAll(args, "put k one", "put k spoiled")
	}
	cmd := exec.CommandContext(ctx, etcdctl, append([]string{"--endpoints", s.addr}, strings.Fields(args)...)...)
	cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
	return cmd
}

var hidden = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile(`"(cluster_id|member_id|raft_term|lease)":\d+`), `"$1":0`},
	{regexp.MustCompile(`"(ClusterID|MemberID|RaftTerm|Lease)" : \d+`), `"$1" : 0`},
	{regexp.MustCompile(`\d+(\.\d+)?(ms|µs|s)\b`), "TIME"},
	{regexp.MustCompile(`\{"level".*\n?`), ""}, // the client's own log, with the time and source line
	{regexp.MustCompile(`[0-9a-f]{14,16}`), "ID"},
}

func (s *side) hide(text string) string {
	text = strings.ReplaceAll(text, s.addr, "ADDR")
	text = strings.ReplaceAll(text, s.scratch, "SCRATCH")
	for _, h := range hidden {
		text = h.pattern.ReplaceAllString(text, h.with)
	}
	return text
}

// fieldsOnly keeps the names of fields and drops their values: the types of JSON, the names of "fields" output, the heading of a
// table, and of plain lines how many values they list.
func fieldsOnly(text string) string {
	var parsed any
	if err := json.Unmarshal([]byte(text), &parsed); err == nil {
		return typeOf(parsed)
	}
	var out strings.Builder
	heading := true
	for line := range strings.Lines(text) {
		name, _, quoted := strings.Cut(line, " : ")
		switch {
		case quoted:
			fmt.Fprintln(&out, name)
		case strings.Contains(line, "│") || strings.Contains(line, "|"):
			if heading {
				fmt.Fprintln(&out, strings.Join(strings.Fields(line), " "))
			}
			heading = false
		case strings.ContainsAny(line, "─+"):
		default:
			fmt.Fprintf(&out, "%d values\n", strings.Count(line, ", ")+1)
		}
	}
	return out.String()
}

func typeOf(value any) string {
	switch v := value.(type) {
	case map[string]any:
		var fields []string
		for name, child := range v {
			fields = append(fields, name+":"+typeOf(child))
		}
		slices.Sort(fields)
		return "{" + strings.Join(fields, " ") + "}"
	case []any:
		if len(v) == 0 {
			return "[]"
		}
		return "[" + typeOf(v[0]) + "]"
	default:
		return fmt.Sprintf("%T", v)
	}
}

// lineCounter collects output and tells when enough lines are there.
type lineCounter struct {
	mu             sync.Mutex
	buffer         bytes.Buffer
	want           int
	first, reached chan struct{}
	sawFirst, done bool
}

func (l *lineCounter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buffer.Write(p)
	lines := bytes.Count(l.buffer.Bytes(), []byte("\n"))
	if lines > 0 && !l.sawFirst {
		l.sawFirst = true
		close(l.first)
	}
	if l.want > 0 && lines >= l.want && !l.done {
		l.done = true
		close(l.reached)
	}
	return len(p), nil
}

// text is the output, cut after the lines that were asked for: how much more came before the end is chance.
func (l *lineCounter) text(lines int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := strings.SplitAfter(l.buffer.String(), "\n")
	if lines > 0 && len(all) > lines {
		all = all[:lines]
	}
	return strings.Join(all, "")
}
