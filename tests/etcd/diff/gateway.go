package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func gatewayCases() []namedCase {
	return []namedCase{
		{"gateway-kv", gatewayKV},
		{"gateway-txn", gatewayTxn},
		{"gateway-lease", gatewayLease},
		{"gateway-watch", gatewayWatch},
		{"gateway-input-forms", gatewayInputForms},
		{"gateway-bad-json", gatewayBadJSON},
		{"gateway-paths-and-verbs", gatewayPaths},
		{"gateway-cluster", gatewayCluster},
		{"http-version", httpVersion},
		{"http-health", httpHealth},
	}
}

func b64(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

// canonical parses JSON and prints it with sorted keys; header ids and the term become "set", a text that is no JSON stays as it is.
func canonical(body []byte) string {
	// Go's JSON library writes a no-break space in place of a space in its errors, or not, by a hash of the program.
	body = bytes.ReplaceAll(body, []byte("\u00a0"), []byte(" "))

	var value any
	decoder := json.NewDecoder(strings.NewReader(string(body)))
	decoder.UseNumber()
	if err := decoder.Decode(&value); err != nil {
		return fmt.Sprintf("text %q", body)
	}
	hideIDs(value)
	out, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	return string(out)
}

func hideIDs(value any) {
	switch v := value.(type) {
	case map[string]any:
		if header, ok := v["header"].(map[string]any); ok {
			for _, name := range []string{"cluster_id", "member_id", "raft_term"} {
				if text, ok := header[name].(string); ok && text != "" && text != "0" {
					header[name] = "set"
				}
			}
		}
		for _, child := range v {
			hideIDs(child)
		}
	case []any:
		for _, child := range v {
			hideIDs(child)
		}
	}
}

func gateway(c *comparison, method, path, body string) string {
	shown := body
	if len(shown) > 300 {
		shown = shown[:300] + "..."
	}
	return c.both(fmt.Sprintf("%s %s %s", method, path, shown), func(e *endpoint) string {
		code, kind, data, err := e.httpDo(method, path, body)
		if err != nil {
			return "no answer: " + strings.ReplaceAll(err.Error(), e.addr, "ADDR")
		}
		return fmt.Sprintf("%d %s %s", code, kind, canonical(data))
	})
}

func post(c *comparison, path, body string) string { return gateway(c, http.MethodPost, path, body) }

func gatewayKV(c *comparison) {
	key, value := b64("k"), b64("v\x00\xff")
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, key, value))
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q,"prev_kv":true}`, key, value))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q}`, key))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"range_end":%q,"limit":"1","sort_order":"DESCEND","sort_target":"MOD"}`, b64("\x00"), b64("\x00")))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"count_only":true}`, key))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"keys_only":true}`, key))
	post(c, "/v3/kv/range", `{"key":"YWJzZW50"}`)
	c.expect(post(c, "/v3/kv/range", `{}`), "key is not provided")
	c.expect(post(c, "/v3/kv/put", `{}`), "key is not provided")
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"lease":"404"}`, key))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"revision":"1"}`, key))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"revision":"99999999"}`, key))
	post(c, "/v3/kv/deleterange", fmt.Sprintf(`{"key":%q,"prev_kv":true}`, key))
	post(c, "/v3/kv/deleterange", fmt.Sprintf(`{"key":%q}`, key))
	post(c, "/v3/kv/compaction", `{"revision":"99999999"}`)
	post(c, "/v3/kv/compaction", `{"revision":"1"}`)
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, key, b64(strings.Repeat("x", 1600*1024))))
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, key, b64(strings.Repeat("x", 3<<20))))
}

func gatewayTxn(c *comparison) {
	key := b64("t")
	post(c, "/v3/kv/txn", fmt.Sprintf(`{"compare":[{"key":%q,"target":"CREATE","create_revision":"0"}],
		"success":[{"request_put":{"key":%q,"value":"MQ=="}}],"failure":[{"request_range":{"key":%q}}]}`, key, key, key))
	post(c, "/v3/kv/txn", fmt.Sprintf(`{"compare":[{"key":%q,"target":"CREATE","createRevision":"0"}],
		"success":[{"requestPut":{"key":%q,"value":"MQ=="}}],"failure":[{"requestRange":{"key":%q}}]}`, key, key, key))
	post(c, "/v3/kv/txn", fmt.Sprintf(`{"compare":[{"key":%q,"target":"VALUE","result":"EQUAL","value":"MQ=="}],
		"success":[{"request_delete_range":{"key":%q,"prev_kv":true}},{"request_txn":{"success":[{"request_range":{"key":%q}}]}}]}`, key, key, key))
	post(c, "/v3/kv/txn", fmt.Sprintf(`{"success":[{"request_put":{"key":%q}},{"request_put":{"key":%q}}]}`, key, key))
	post(c, "/v3/kv/txn", fmt.Sprintf(`{"success":[{"request_put":{"key":%q},"request_range":{"key":%q}}]}`, key, key))
	post(c, "/v3/kv/txn", fmt.Sprintf(`{"compare":[{"key":%q,"version":"1","mod_revision":"2"}]}`, key))
	post(c, "/v3/kv/txn", `{}`)
	post(c, "/v3/kv/txn", `{"success":[{}]}`)
}

func gatewayLease(c *comparison) {
	post(c, "/v3/lease/grant", `{"TTL":"500","ID":"81"}`)
	post(c, "/v3/lease/grant", `{"TTL":500,"ID":81}`)
	post(c, "/v3/lease/grant", `{"TTL":"9000000001"}`)
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"lease":"81"}`, b64("lk")))
	post(c, "/v3/lease/keepalive", `{"ID":"81"}`)
	post(c, "/v3/lease/keepalive", `{"ID":"404"}`)
	post(c, "/v3/lease/leases", `{}`)
	post(c, "/v3/kv/lease/leases", `{}`)
	post(c, "/v3/lease/timetolive", `{"ID":"404","keys":true}`)
	post(c, "/v3/lease/revoke", `{"ID":"81"}`)
	post(c, "/v3/kv/lease/revoke", `{"ID":"81"}`)
	post(c, "/v3/kv/lease/timetolive", `{"ID":"81"}`)
}

// lines reads the first count JSON objects of a streamed answer.
func (e *endpoint) lines(path, body string, count int) string {
	resp, err := e.http.Post("http://"+e.addr+path, "application/json", strings.NewReader(body))
	if err != nil {
		return "no answer"
	}
	defer resp.Body.Close()
	out := fmt.Sprintf("%d %s\n", resp.StatusCode, resp.Header.Get("Content-Type"))
	reader := bufio.NewReader(resp.Body)
	for range count {
		line, err := reader.ReadBytes('\n')
		if len(line) > 0 {
			out += canonical(line) + "\n"
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				out += "broken off\n"
			}
			break
		}
	}
	return out
}

func gatewayWatch(c *comparison) {
	first := c.ref.revision.Load() + 1
	put(c, &pb.PutRequest{Key: []byte("gw"), Value: []byte("1")})
	stream := func(body string, count int) string {
		return c.both("POST /v3/watch "+body, func(e *endpoint) string { return e.lines("/v3/watch", body, count) })
	}
	c.expect(stream(fmt.Sprintf(`{"create_request":{"key":%q,"start_revision":"%d"}}`, b64("gw"), first), 2), `"kv"`)
	put(c, &pb.PutRequest{Key: []byte("gw"), Value: []byte("2")})
	stream(fmt.Sprintf(`{"create_request":{"key":%q,"start_revision":"%d","prev_kv":true,"watch_id":"7"}}`, b64("gw"), first+1), 2)
	stream(fmt.Sprintf(`{"createRequest":{"key":%q,"rangeEnd":%q,"startRevision":"1"}}`, b64("gw"), b64("gx")), 2)
	stream(fmt.Sprintf(`{"create_request":{"key":%q,"start_revision":"-1"}}`, b64("gw")), 1)
}

func gatewayInputForms(c *comparison) {
	key := b64("form")
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"prevKv":true,"ignoreValue":false}`, key))
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"prev_kv":true,"unknown_field":{"a":[1,2]}}`, key))
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":null}`, key))
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q} trailing`, key))
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q}{"key":"YQ=="}`, key))
	post(c, "/v3/kv/put", fmt.Sprintf(`  {"key" : %q , "lease" : 0 }`, key))
	post(c, "/v3/kv/put", fmt.Sprintf(`{"key":%q,"lease":"0"}`, key))
	post(c, "/v3/kv/put", `{"key":"Zm9ybQ"}`) // no padding
	post(c, "/v3/kv/put", `{"key":"_-8="}`)   // the URL alphabet
	post(c, "/v3/kv/put", `{"key":"Zm\u0039ybQ=="}`)
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"range_end":%q,"sort_target":1,"sort_order":2}`, b64("\x00"), b64("\x00")))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"limit":"1e1"}`, key))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"limit":1e1}`, key))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"limit":1.0}`, key))
	post(c, "/v3/kv/range", fmt.Sprintf(`{"key":%q,"sort_target":77}`, key))
}

func gatewayBadJSON(c *comparison) {
	for _, body := range []string{
		``, `{`, `nonsense`, `[]`, `"text"`, `null`, `7`,
		`{"key":"***"}`, `{"key":7}`, `{"key":"YQ==","value":true}`, `{"key":"YQ==","lease":"abc"}`, `{"key":"YQ==","lease":1.5}`,
		`{"key":"YQ==","lease":"99999999999999999999"}`, `{"key":"YQ==","prev_kv":"yes"}`, `{"key":"YQ==","key":"Yg=="}`, `{"key":"YQ==",}`,
		`{key:"YQ=="}`, `{"key":"YQ==" "value":"YQ=="}`,
	} {
		post(c, "/v3/kv/put", body)
	}
	post(c, "/v3/kv/range", `{"key":"YQ==","sort_target":"SIDEWAYS"}`)
	post(c, "/v3/kv/txn", `{"success":{}}`)
	post(c, "/v3/kv/txn", `{"success":[7]}`)
	get(c, all())
}

func gatewayPaths(c *comparison) {
	for _, path := range []string{"/", "/v3", "/v3/", "/v3/kv", "/v3/kv/nope", "/v3/kv/put/", "/v2/keys", "/v3beta/kv/put", "/v3/kv/rangestream", "/nope"} {
		gateway(c, http.MethodPost, path, `{"key":"YQ=="}`)
	}
	// Not "/": we have a page there, etcd has none.
	for _, path := range []string{"/v3/kv/put", "/v3/kv/range", "/nope", "/v3/nope"} {
		gateway(c, http.MethodGet, path, "")
	}
	gateway(c, http.MethodPut, "/v3/kv/put", `{"key":"YQ=="}`)
	gateway(c, http.MethodDelete, "/v3/kv/range", `{"key":"YQ=="}`)
	get(c, all())
}

func gatewayCluster(c *comparison) {
	c.both("POST /v3/cluster/member/list", func(e *endpoint) string {
		code, kind, data, err := e.httpDo(http.MethodPost, "/v3/cluster/member/list", "{}")
		if err != nil {
			return "no answer"
		}
		return fmt.Sprintf("%d %s %s", code, kind, keysOf(data))
	})
	c.both("POST /v3/maintenance/status", func(e *endpoint) string {
		code, kind, data, err := e.httpDo(http.MethodPost, "/v3/maintenance/status", "{}")
		if err != nil {
			return "no answer"
		}
		return fmt.Sprintf("%d %s %s", code, kind, keysOf(data))
	})
}

// keysOf prints the names and JSON types of all fields, without their values.
func keysOf(body []byte) string {
	var value any
	if err := json.Unmarshal(body, &value); err != nil {
		return fmt.Sprintf("text %q", body)
	}
	return typeOf(value)
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
	case string:
		return "string"
	case nil:
		return "null"
	default:
		return fmt.Sprintf("%T", v)
	}
}

func httpVersion(c *comparison) {
	c.both("GET /version", func(e *endpoint) string {
		code, kind, data, err := e.httpDo(http.MethodGet, "/version", "")
		if err != nil {
			return "no answer"
		}
		var versions map[string]string
		if err := json.Unmarshal(data, &versions); err != nil {
			return fmt.Sprintf("text %q", data)
		}
		for name, version := range versions {
			if !versionText.MatchString(version) {
				return name + " is not a version of the 3.x line: " + version
			}
		}
		return fmt.Sprintf("%d %s %s", code, kind, keysOf(data))
	})
	gateway(c, http.MethodPost, "/version", "{}")
}

func httpHealth(c *comparison) {
	for _, path := range []string{"/health", "/health?serializable=true", "/health?exclude=NOSPACE", "/livez", "/readyz", "/livez/serializable_read",
		"/readyz/linearizable_read", "/readyz/nope"} {
		gateway(c, http.MethodGet, path, "")
	}
	for _, path := range []string{"/livez?verbose", "/readyz?verbose"} {
		c.both("GET "+path, func(e *endpoint) string {
			code, kind, data, err := e.httpDo(http.MethodGet, path, "")
			if err != nil {
				return "no answer"
			}
			lines := strings.Split(string(data), "\n")
			slices.Sort(lines) // the reference lists its checks in a random order
			return fmt.Sprintf("%d %s %q", code, kind, lines)
		})
	}
	gateway(c, http.MethodPost, "/health", "")
	c.eventually(time.Second, "GET /metrics", func(e *endpoint) string {
		code, kind, _, err := e.httpDo(http.MethodGet, "/metrics", "")
		if err != nil {
			return "no answer"
		}
		kind, _, _ = strings.Cut(kind, ";")
		return fmt.Sprintf("%d %s", code, kind)
	})
}
