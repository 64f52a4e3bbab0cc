//! What the front alone costs: server CPU per put of 256 bytes with next to nothing behind it.
//!
//! `cargo run --release -p tenure-server --example front_bench -- [seconds]`
//!
//! The clients run as a process of their own, one request in flight per connection, with an HTTP/2 PING beside each request as Go's
//! gRPC client sends it; the server's CPU is read from `/proc/self/stat`. "echo" answers at once; "driver" hands the request to a thread that
//! works in batches with a pause of 200 us each, in the place of a disk. `hyper` is the general stack on the same requests.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::Request;
use prost::Message;
use tenure_server::front::{Front, FrontConfig};
use tenure_server::metrics::Exposition;
use tenure_server::pages::{Check, CheckFuture, Health};
use tenure_server::rpc::{Router, Status, frame};
use tenure_wire::etcd::etcdserverpb as pb;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct NoHealth;

impl Health for NoHealth {
    fn checks(&self) -> &'static [Check] {
        &[]
    }

    fn run(&self, _: &'static str) -> CheckFuture<'_> {
        Box::pin(async { Ok(()) })
    }

    fn health(&self, _: bool, _: &[String]) -> CheckFuture<'_> {
        Box::pin(async { Ok(()) })
    }

    fn metrics(&self, _: &mut Exposition) {}
}

fn reply(message: Bytes) -> Result<Bytes, Status> {
    let request = pb::PutRequest::decode(message).map_err(|error| Status::undecodable(&error))?;
    let header = pb::ResponseHeader {
        revision: request.value.len() as i64,
        cluster_id: 1 << 60,
        member_id: 1 << 59,
        raft_term: 2,
    };
    Ok(pb::PutResponse { header: Some(header), prev_kv: None }.encode_to_vec().into())
}

type Job = (Bytes, oneshot::Sender<Result<Bytes, Status>>);

/// A thread that takes what is queued as one batch, pauses, and answers.
fn driver() -> mpsc::Sender<Job> {
    let (sender, mut receiver) = mpsc::channel::<Job>(4096);
    std::thread::spawn(move || {
        let mut batch = Vec::new();
        while receiver.blocking_recv_many(&mut batch, 1024) > 0 {
            std::thread::sleep(Duration::from_micros(200));
            for (message, answer) in batch.drain(..) {
                let _ = answer.send(reply(message));
            }
        }
    });
    sender
}

fn router(mode: &str) -> Router {
    let mut router = Router::new();
    if mode == "echo" {
        router.unary("/etcdserverpb.KV/Put", |_, message| async move { reply(message) });
        return router;
    }
    let driver = driver();
    router.unary("/etcdserverpb.KV/Put", move |_, message| {
        let driver = driver.clone();
        async move {
            let (answer, answered) = oneshot::channel();
            driver.try_send((message, answer)).map_err(|_| Status::unavailable("too many requests"))?;
            answered.await.map_err(|_| Status::unavailable("gone"))?
        }
    });
    router
}

/// The same calls behind hyper.
async fn serve_hyper(listener: TcpListener, router: Router) {
    use http_body_util::{BodyExt, StreamBody};
    let router = Arc::new(router);
    loop {
        let (stream, peer) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let router = router.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let router = router.clone();
                async move {
                    let (head, body) = request.into_parts();
                    let message = body.collect().await?.to_bytes().slice(5..);
                    let Some(tenure_server::rpc::Method::Unary(method)) = router.find(head.uri.path()) else {
                        panic!()
                    };
                    let call = tenure_server::rpc::Call {
                        face: tenure_server::rpc::Face::Grpc,
                        metadata: head.headers,
                        peer: Some(peer),
                        deadline: None,
                    };
                    let answer = method(call, message).await.unwrap();
                    let mut framed = BytesMut::new();
                    frame(&answer, &mut framed);
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    let frames = [
                        Ok::<_, hyper::Error>(http_body::Frame::data(framed.freeze())),
                        Ok(http_body::Frame::trailers(trailers)),
                    ];
                    let response = http::Response::builder().header("content-type", "application/grpc");
                    Ok::<_, hyper::Error>(response.body(StreamBody::new(tokio_stream::iter(frames))).unwrap())
                }
            });
            let executor = hyper_util::rt::TokioExecutor::new();
            let mut builder = hyper_util::server::conn::auto::Builder::new(executor);
            builder.http2().initial_stream_window_size(1 << 20).initial_connection_window_size(16 << 20);
            let _ = builder.serve_connection(hyper_util::rt::TokioIo::new(stream), service).await;
        });
    }
}

fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

async fn client(address: SocketAddr, connections: usize, seconds: u64) {
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut tasks = Vec::new();
    for _ in 0..connections {
        tasks.push(tokio::spawn(one_client(address, until)));
    }
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await.unwrap());
    }
    latencies.sort_unstable();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_micros();
    println!("{} {} {}", latencies.len(), at(0.5), at(0.99));
}

async fn one_client(address: SocketAddr, until: Instant) -> Vec<Duration> {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut client, mut connection): (h2::client::SendRequest<Bytes>, _) =
        h2::client::handshake(stream).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    tokio::spawn(connection);
    let request =
        pb::PutRequest { key: "some/key/of/24/bytes/...".into(), value: vec![7; 256].into(), ..Default::default() };
    let mut framed = BytesMut::new();
    frame(&request.encode_to_vec(), &mut framed);
    let body = framed.freeze();
    let mut latencies = Vec::new();
    while Instant::now() < until {
        let start = Instant::now();
        client = client.ready().await.unwrap();
        let request = Request::post("http://localhost/etcdserverpb.KV/Put")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", "bench")
            .body(())
            .unwrap();
        // As with Go's client the PING leaves with the request; one at a time.
        std::future::poll_fn(|cx| {
            let _ = pings.poll_pong(cx);
            std::task::Poll::Ready(())
        })
        .await;
        let _ = pings.send_ping(h2::Ping::opaque());
        let (response, mut send) = client.send_request(request, false).unwrap();
        send.send_data(body.clone(), true).unwrap();
        let mut answer = response.await.unwrap().into_body();
        while let Some(data) = answer.data().await {
            let len = data.unwrap().len();
            answer.flow_control().release_capacity(len).unwrap();
        }
        assert_eq!(answer.trailers().await.unwrap().unwrap()["grpc-status"], "0");
        latencies.push(start.elapsed());
    }
    latencies
}

fn runtime(kind: &str) -> tokio::runtime::Runtime {
    let mut builder = match kind {
        "current" => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.enable_all().build().unwrap()
}

/// One line of the table.
fn measure(stack: &'static str, mode: &str, threads: &str, hold: Duration, connections: usize, seconds: &str) {
    let runtime = runtime(threads);
    let router = router(mode);
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let config = FrontConfig { ping_hold: hold, ..FrontConfig::default() };
    let (stop, stopped) = oneshot::channel::<()>();
    let serve = async move {
        if stack == "hyper" {
            tokio::select! { () = serve_hyper(listener, router) => {}, _ = stopped => {} }
            return;
        }
        let front = Front::new(router, Arc::new(NoHealth), config).unwrap();
        front
            .serve(listener, async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
    };
    let served = std::thread::spawn(move || runtime.block_on(serve));
    let before = cpu();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["client", &address.to_string(), &connections.to_string(), seconds])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let used = cpu() - before;
    child.wait().unwrap();
    drop(stop);
    served.join().unwrap();
    let figures: Vec<u64> = line.split_whitespace().map(|figure| figure.parse().unwrap()).collect();
    let per_call = used.as_micros() as f64 / figures[0] as f64;
    let hold = hold.as_micros();
    println!(
        "| {stack} | {mode} | {threads} | {hold} | {connections} | {per_call:.1} | {} | {} | {} |",
        figures[0], figures[1], figures[2]
    );
    std::io::stdout().flush().unwrap();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "client") {
        let (connections, seconds) = (arguments[2].parse().unwrap(), arguments[3].parse().unwrap());
        runtime("multi").block_on(client(arguments[1].parse().unwrap(), connections, seconds));
        return;
    }
    let seconds = arguments.first().map_or("3", String::as_str);
    // One line again and again, for a profiler: seconds, stack, mode, threads, held us, connections.
    if let [_, stack, mode, threads, held, connections] = &arguments[..] {
        let stack = if stack == "hyper" { "hyper" } else { "front" };
        let held = Duration::from_micros(held.parse().unwrap());
        measure(stack, mode, threads, held, connections.parse().unwrap(), seconds);
        return;
    }
    println!("| stack | behind | threads | PING held us | connections | server us/call | calls | p50 us | p99 us |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let millisecond = Duration::from_millis(1);
    for connections in [64, 256] {
        for mode in ["echo", "driver"] {
            measure("hyper", mode, "multi", Duration::ZERO, connections, seconds);
            measure("front", mode, "multi", Duration::ZERO, connections, seconds);
            measure("front", mode, "multi", millisecond, connections, seconds);
            measure("front", mode, "multi", 5 * millisecond, connections, seconds);
            measure("front", mode, "current", Duration::ZERO, connections, seconds);
            measure("front", mode, "current", 5 * millisecond, connections, seconds);
        }
    }
}
