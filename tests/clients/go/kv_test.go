package clients

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/clientv3util"
	"go.etcd.io/etcd/client/v3/leasing"
	"go.etcd.io/etcd/client/v3/mirror"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/client/v3/ordering"
)

func TestKVPutGetDelete(t *testing.T) {
	client, prefix, ctx := start(t)
	key := prefix + "k"
	first := put(t, ctx, client, key, "one")
	previous := must[*clientv3.PutResponse](t)(client.Put(ctx, key, "two", clientv3.WithPrevKV()))
	if string(previous.PrevKv.Value) != "one" || previous.PrevKv.ModRevision != first {
		t.Fatalf("prev_kv is %v", previous.PrevKv)
	}
	got := must[*clientv3.GetResponse](t)(client.Get(ctx, key))
	if kv := got.Kvs[0]; kv.Version != 2 || kv.CreateRevision != first || kv.ModRevision != previous.Header.Revision {
		t.Fatalf("got %v", kv)
	}
	old := must[*clientv3.GetResponse](t)(client.Get(ctx, key, clientv3.WithRev(first)))
	if string(old.Kvs[0].Value) != "one" {
		t.Fatalf("at revision %d: %v", first, old.Kvs)
	}
	deleted := must[*clientv3.DeleteResponse](t)(client.Delete(ctx, key, clientv3.WithPrevKV()))
	if deleted.Deleted != 1 || string(deleted.PrevKvs[0].Value) != "two" {
		t.Fatalf("deleted %v", deleted)
	}
	if value(t, ctx, client, key) != "<absent>" {
		t.Fatal("still there")
	}
}

func TestKVRangeOptions(t *testing.T) {
	client, prefix, ctx := start(t)
	for i := range 10 {
		put(t, ctx, client, fmt.Sprintf("%s%d", prefix, i), strings.Repeat("v", 10-i))
	}
	check := func(what, expected string, opts ...clientv3.OpOption) {
		t.Helper()
		got := must[*clientv3.GetResponse](t)(client.Get(ctx, prefix, append([]clientv3.OpOption{clientv3.WithPrefix()}, opts...)...))
		names := ""
		for _, kv := range got.Kvs {
			names += strings.TrimPrefix(string(kv.Key), prefix)
		}
		if text := fmt.Sprintf("%s of %d more=%v", names, got.Count, got.More); text != expected {
			t.Errorf("%s: %q, expected %q", what, text, expected)
		}
	}
	check("prefix", "0123456789 of 10 more=false")
	check("limit", "012 of 10 more=true", clientv3.WithLimit(3))
	check("descending", "987 of 10 more=true", clientv3.WithLimit(3), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend))
	check("by value", "98 of 10 more=true", clientv3.WithLimit(2), clientv3.WithSort(clientv3.SortByValue, clientv3.SortAscend))
	check("count only", " of 10 more=false", clientv3.WithCountOnly())
	check("serializable", "0123456789 of 10 more=false", clientv3.WithSerializable())
	stream := must[clientv3.GetStreamChan](t)(client.GetStream(ctx, prefix, clientv3.WithPrefix()))
	merged := must[*clientv3.GetResponse](t)(clientv3.GetStreamToGetResponse(stream))
	if len(merged.Kvs) != 10 || merged.Count != 10 {
		t.Errorf("GetStream gave %d of %d", len(merged.Kvs), merged.Count)
	}
}

func TestKVErrorsAreRecognised(t *testing.T) {
	client, prefix, ctx := start(t)
	revision := put(t, ctx, client, prefix+"k", "v")
	check := func(what string, err, expected error) {
		t.Helper()
		if !errors.Is(err, expected) {
			t.Errorf("%s: %v, expected %v", what, err, expected)
		}
	}
	_, err := client.Get(ctx, prefix, clientv3.WithRev(revision+1_000_000))
	check("future revision", err, rpctypes.ErrFutureRev)
	_, err = client.Put(ctx, "", "v")
	check("empty key", err, rpctypes.ErrEmptyKey)
	_, err = client.Put(ctx, prefix+"k", "v", clientv3.WithLease(404404))
	check("unknown lease", err, rpctypes.ErrLeaseNotFound)
	_, err = client.Put(ctx, prefix+"absent", "", clientv3.WithIgnoreValue())
	check("nothing to keep", err, rpctypes.ErrKeyNotFound)
	_, err = client.Txn(ctx).Then(clientv3.OpPut(prefix+"d", "1"), clientv3.OpPut(prefix+"d", "2")).Commit()
	check("duplicate", err, rpctypes.ErrDuplicateKey)
	ops := make([]clientv3.Op, 129)
	for i := range ops {
		ops[i] = clientv3.OpPut(fmt.Sprintf("%s%d", prefix, i), "v")
	}
	_, err = client.Txn(ctx).Then(ops...).Commit()
	check("129 operations", err, rpctypes.ErrTooManyOps)
	if _, err = client.Txn(ctx).Then(ops[:128]...).Commit(); err != nil {
		t.Errorf("128 operations: %v", err)
	}
	_, err = client.Put(ctx, prefix+"big", strings.Repeat("x", 1600*1024))
	check("too large", err, rpctypes.ErrRequestTooLarge)
}

func TestKVBigValues(t *testing.T) {
	client, prefix, ctx := start(t)
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	for i := range 12 {
		put(t, ctx, client, fmt.Sprintf("%s%02d", prefix, i), big)
	}
	got := must[*clientv3.GetResponse](t)(client.Get(ctx, prefix, clientv3.WithPrefix()))
	for _, kv := range got.Kvs {
		if !bytes.Equal(kv.Value, []byte(big)) {
			t.Fatalf("%s is not what was written", kv.Key)
		}
	}
	if len(got.Kvs) != 12 {
		t.Fatalf("%d keys", len(got.Kvs))
	}
}

func TestKVTxn(t *testing.T) {
	client, prefix, ctx := start(t)
	key := prefix + "k"
	create := func() *clientv3.TxnResponse {
		return must[*clientv3.TxnResponse](t)(client.Txn(ctx).If(clientv3util.KeyMissing(key)).
			Then(clientv3.OpPut(key, "made")).Else(clientv3.OpGet(key)).Commit())
	}
	if !create().Succeeded {
		t.Fatal("the key is not there, yet the create failed")
	}
	again := create()
	if again.Succeeded || string(again.Responses[0].GetResponseRange().Kvs[0].Value) != "made" {
		t.Fatalf("a second create: %v", again)
	}
	// All compares, nested ones too, see the state before the transaction; its operations see what the ones before them wrote.
	nested := must[*clientv3.TxnResponse](t)(client.Txn(ctx).Then(
		clientv3.OpPut(key, "changed"),
		clientv3.OpTxn([]clientv3.Cmp{clientv3.Compare(clientv3.Value(key), "=", "made")}, []clientv3.Op{clientv3.OpGet(key)}, nil)).Commit())
	inner := nested.Responses[1].GetResponseTxn()
	if !inner.Succeeded || string(inner.Responses[0].GetResponseRange().Kvs[0].Value) != "changed" {
		t.Fatalf("nested: %v", nested)
	}
}

func TestNamespaceWrapper(t *testing.T) {
	client, prefix, ctx := start(t)
	kv := namespace.NewKV(client, prefix)
	watch := namespace.NewWatcher(client, prefix).Watch(ctx, "", clientv3.WithPrefix())
	<-watchReady(t, ctx, client)
	must[*clientv3.TxnResponse](t)(kv.Txn(ctx).If(clientv3util.KeyMissing("a")).Then(clientv3.OpPut("a", "1"), clientv3.OpPut("b", "2")).Commit())
	got := must[*clientv3.GetResponse](t)(kv.Get(ctx, "", clientv3.WithFromKey()))
	if len(got.Kvs) != 2 || string(got.Kvs[0].Key) != "a" {
		t.Fatalf("through the namespace: %v", got.Kvs)
	}
	if value(t, ctx, client, prefix+"b") != "2" {
		t.Fatal("not under the prefix")
	}
	if events := collect(t, ctx, watch, 2); string(events[0].Kv.Key) != "a" {
		t.Fatalf("events %v", events)
	}
}

func TestMirror(t *testing.T) {
	client, prefix, ctx := start(t)
	for i := range 30 {
		put(t, ctx, client, fmt.Sprintf("%s%02d", prefix, i), "v")
	}
	syncer := mirror.NewSyncer(client, prefix, 0)
	base, failed := syncer.SyncBase(ctx)
	count := 0
	for resp := range base {
		count += len(resp.Kvs)
	}
	if err := <-failed; err != nil || count != 30 {
		t.Fatalf("base: %d keys, %v", count, err)
	}
	updates := syncer.SyncUpdates(ctx)
	put(t, ctx, client, prefix+"new", "v")
	if events := collect(t, ctx, updates, 1); string(events[0].Kv.Key) != prefix+"new" {
		t.Fatalf("update %v", events[0])
	}
}

func TestOrderingWrapper(t *testing.T) {
	client, prefix, ctx := start(t)
	kv := ordering.NewKV(client, ordering.NewOrderViolationSwitchEndpointClosure(client))
	put(t, ctx, kv, prefix+"k", "v")
	got := must[*clientv3.GetResponse](t)(kv.Get(ctx, prefix+"k", clientv3.WithSerializable()))
	if len(got.Kvs) != 1 {
		t.Fatal("a serializable read after a write on the only member does not see it")
	}
}

func TestLeasingWrapper(t *testing.T) {
	client, prefix, ctx := start(t)
	first, closeFirst, err := leasing.NewKV(client, prefix+"leasing/")
	if err != nil {
		t.Fatal(err)
	}
	defer closeFirst()
	second, closeSecond, err := leasing.NewKV(connect(t, serverAddr), prefix+"leasing/")
	if err != nil {
		t.Fatal(err)
	}
	defer closeSecond()
	put(t, ctx, client, prefix+"k", "0")
	for round := range 5 {
		expected := fmt.Sprint(round)
		put(t, ctx, second, prefix+"k", expected) // revokes the first one's cached copy
		if got := value(t, ctx, first, prefix+"k"); got != expected {
			t.Fatalf("a stale %q was read from the cache, expected %q", got, expected)
		}
	}
}
