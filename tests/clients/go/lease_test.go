package clients

import (
	"errors"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestLeaseExpiryDeletesKeys(t *testing.T) {
	client, prefix, ctx := start(t)
	lease := must[*clientv3.LeaseGrantResponse](t)(client.Grant(ctx, 2))
	first := put(t, ctx, client, prefix+"a", "v", clientv3.WithLease(lease.ID))
	granted := time.Now()
	put(t, ctx, client, prefix+"b", "v", clientv3.WithLease(lease.ID))
	watch := client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithRev(first))
	collect(t, ctx, watch, 2)
	took := time.Since(granted)
	if took < 1800*time.Millisecond {
		t.Errorf("deleted after %v, before the 2 s are over", took)
	}
	if took > 6*time.Second {
		t.Errorf("deleted only after %v", took)
	}
	state := must[*clientv3.LeaseTimeToLiveResponse](t)(client.TimeToLive(ctx, lease.ID))
	if state.TTL != -1 {
		t.Errorf("an expired lease has %d s left", state.TTL)
	}
}

func TestLeaseKeepAliveHoldsKeys(t *testing.T) {
	client, prefix, ctx := start(t)
	lease := must[*clientv3.LeaseGrantResponse](t)(client.Grant(ctx, 2))
	put(t, ctx, client, prefix+"k", "v", clientv3.WithLease(lease.ID))
	alive := must[<-chan *clientv3.LeaseKeepAliveResponse](t)(client.KeepAlive(ctx, lease.ID))
	for deadline := time.Now().Add(6 * time.Second); time.Now().Before(deadline); {
		select {
		case resp, open := <-alive:
			if !open || resp.TTL != 2 {
				t.Fatalf("keep-alive answered %v, open %v", resp, open)
			}
		case <-time.After(2 * time.Second):
			t.Fatal("no keep-alive answer for 2 s")
		}
	}
	if value(t, ctx, client, prefix+"k") != "v" {
		t.Fatal("the key of a living lease is gone")
	}
	must[*clientv3.LeaseRevokeResponse](t)(client.Revoke(ctx, lease.ID))
	if value(t, ctx, client, prefix+"k") != "<absent>" {
		t.Fatal("revoking left the key")
	}
	for range alive { // ends: the lease is gone
	}
	if _, err := client.KeepAliveOnce(ctx, lease.ID); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Fatalf("keep-alive of a revoked lease: %v", err)
	}
}

func TestLeaseTimeToLiveWithKeys(t *testing.T) {
	client, prefix, ctx := start(t)
	lease := must[*clientv3.LeaseGrantResponse](t)(client.Grant(ctx, 100))
	put(t, ctx, client, prefix+"a", "", clientv3.WithLease(lease.ID))
	put(t, ctx, client, prefix+"b", "", clientv3.WithLease(lease.ID))
	put(t, ctx, client, prefix+"a", "") // detaches
	state := must[*clientv3.LeaseTimeToLiveResponse](t)(client.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys()))
	if state.GrantedTTL != 100 || state.TTL < 90 || len(state.Keys) != 1 || string(state.Keys[0]) != prefix+"b" {
		t.Fatalf("%+v", state)
	}
	found := false
	for _, each := range must[*clientv3.LeaseLeasesResponse](t)(client.Leases(ctx)).Leases {
		found = found || each.ID == lease.ID
	}
	if !found {
		t.Fatal("the lease is not listed")
	}
}

func TestLeaseSurvivesReconnect(t *testing.T) {
	client, prefix, ctx := start(t)
	p := newProxy(t)
	holder := connect(t, p.addr())
	lease := must[*clientv3.LeaseGrantResponse](t)(holder.Grant(ctx, 3))
	put(t, ctx, holder, prefix+"k", "v", clientv3.WithLease(lease.ID))
	alive := must[<-chan *clientv3.LeaseKeepAliveResponse](t)(holder.KeepAlive(ctx, lease.ID))
	go func() {
		for range alive {
		}
	}()
	for range 5 {
		time.Sleep(time.Second)
		p.cut()
	}
	if value(t, ctx, client, prefix+"k") != "v" {
		t.Fatal("the lease died although its holder reconnected each time")
	}
}

// A holder whose network is dead, with the connection still open, loses its lease in time.
func TestLeaseOfHalfOpenConnectionExpires(t *testing.T) {
	client, prefix, ctx := start(t)
	p := newProxy(t)
	holder := connect(t, p.addr())
	lease := must[*clientv3.LeaseGrantResponse](t)(holder.Grant(ctx, 2))
	put(t, ctx, holder, prefix+"k", "v", clientv3.WithLease(lease.ID))
	alive := must[<-chan *clientv3.LeaseKeepAliveResponse](t)(holder.KeepAlive(ctx, lease.ID))
	<-alive
	p.hold()
	held := time.Now()
	for value(t, ctx, client, prefix+"k") == "v" {
		if time.Since(held) > 8*time.Second {
			t.Fatal("still alive 8 s after its holder fell silent")
		}
		time.Sleep(50 * time.Millisecond)
	}
	for range alive { // the client notices by its own clock and ends the channel
	}
}
