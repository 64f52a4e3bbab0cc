package clients

import (
	"context"
	"net"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

func TestHealthServing(t *testing.T) {
	client, _, ctx := start(t)
	resp := must[*grpc_health_v1.HealthCheckResponse](t)(
		grpc_health_v1.NewHealthClient(client.ActiveConnection()).Check(ctx, &grpc_health_v1.HealthCheckRequest{}))
	if resp.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Fatal(resp.Status)
	}
}

func TestReflectionLists(t *testing.T) {
	client, _, ctx := start(t)
	stream := must[grpc_reflection_v1.ServerReflection_ServerReflectionInfoClient](t)(
		grpc_reflection_v1.NewServerReflectionClient(client.ActiveConnection()).ServerReflectionInfo(ctx))
	request := &grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}
	if err := stream.Send(request); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if realEtcd && status.Code(err) == codes.Unimplemented {
		t.Skip("the real etcd has no reflection")
	}
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, service := range resp.GetListServicesResponse().GetService() {
		names = append(names, service.Name)
	}
	for _, expected := range []string{"etcdserverpb.KV", "etcdserverpb.Watch", "etcdserverpb.Lease", "etcdserverpb.Cluster", "etcdserverpb.Maintenance"} {
		if !slices.Contains(names, expected) {
			t.Errorf("%s is not among %v", expected, names)
		}
	}
}

// Pings each 10 s are what clientv3 users set; a server that finds them too many ends the connection.
func TestKeepAlivePingsAreAllowed(t *testing.T) {
	_, prefix, ctx := start(t)
	conn := must[*grpc.ClientConn](t)(grpc.NewClient("passthrough:///"+serverAddr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true})))
	defer conn.Close()
	watch := must[pb.Watch_WatchClient](t)(pb.NewWatchClient(conn).Watch(ctx))
	request := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(prefix)}}}
	if err := watch.Send(request); err != nil {
		t.Fatal(err)
	}
	must[*pb.WatchResponse](t)(watch.Recv())
	ended := make(chan error, 1)
	go func() {
		_, err := watch.Recv()
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Fatalf("the quiet stream ended: %v", err)
	case <-time.After(34 * time.Second): // three pings
	}
}

// Connections that say nothing, or nonsense, cost the others nothing.
func TestSilentAndNonsenseConnections(t *testing.T) {
	client, prefix, ctx := start(t)
	for i := range 100 {
		conn := must[net.Conn](t)(net.Dial("tcp", serverAddr))
		defer conn.Close()
		switch i % 4 {
		case 1:
			_, _ = conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")) // and then nothing
		case 2:
			_, _ = conn.Write([]byte("\x00\xff nonsense \r\n\r\n"))
		case 3:
			_, _ = conn.Write([]byte("POST /v3/kv/put HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")) // half a body
		}
	}
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	put(t, short, client, prefix+"k", "v")
	if value(t, short, client, prefix+"k") != "v" {
		t.Fatal("not served")
	}
}

func TestSyncKeepsEndpointUsable(t *testing.T) {
	client, prefix, ctx := start(t)
	if err := client.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if len(client.Endpoints()) == 0 {
		t.Fatal("Sync left no endpoint")
	}
	put(t, ctx, client, prefix+"k", "v")
}

func TestRejectOldCluster(t *testing.T) {
	_, prefix, ctx := start(t)
	client := must[*clientv3.Client](t)(clientv3.New(clientv3.Config{Endpoints: []string{serverAddr}, RejectOldCluster: true, DialTimeout: 5 * time.Second}))
	defer client.Close()
	put(t, ctx, client, prefix+"k", "v")
	state := must[*clientv3.StatusResponse](t)(client.Status(ctx, serverAddr))
	if state.Version == "" || state.Leader == 0 || state.DbSize == 0 {
		t.Fatalf("%+v", state)
	}
}

func TestRequireLeader(t *testing.T) {
	client, prefix, ctx := start(t)
	ctx = clientv3.WithRequireLeader(ctx)
	revision := put(t, ctx, client, prefix+"k", "v")
	collect(t, ctx, client.Watch(ctx, prefix+"k", clientv3.WithRev(revision)), 1)
}
