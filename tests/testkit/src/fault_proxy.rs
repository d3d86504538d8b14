//! A TCP proxy that can break the connections it carries.

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

use crate::{Error, Result, runtime};

/// A TCP proxy on the loopback interface that breaks connections when told to.
///
/// It knows nothing of the protocol. Faults hold for the connections that are open and for those to come, until
/// [`heal`](Self::heal). It runs on a thread of its own, so it does not care which runtime made it or whether that
/// still runs; dropping it closes its port and all its connections.
///
/// ```no_run
/// # async fn example() -> mongo_testkit::Result<()> {
/// use mongo_testkit::FaultProxy;
///
/// let proxy = FaultProxy::start("127.0.0.1:27017").await?;
/// let uri = format!("mongodb://{}/?directConnection=true", proxy.address());
/// proxy.cut();
/// // whoever uses `uri` now meets a reset connection
/// proxy.heal();
/// # Ok(())
/// # }
/// ```
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: AbortHandle,
}

struct Shared {
    upstream: String,
    faults: watch::Sender<Faults>,
    /// How many bytes may still pass from the server before one connection is closed.
    allowance: Mutex<Option<u64>>,
    connections: AtomicUsize,
    accepted: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Faults {
    flow: Flow,
    latency: Duration,
    /// Counts the resets: a connection of an earlier generation ends.
    generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Open,
    Cut,
    Stalled,
}

impl FaultProxy {
    /// Starts a proxy to `upstream`, a `host:port`, on a free port of 127.0.0.1.
    ///
    /// `upstream` need not answer yet: it is called anew for every connection.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no port or no thread to be had.
    pub async fn start(upstream: impl Into<String> + Send) -> Result<Self> {
        let healthy = Faults { flow: Flow::Open, latency: Duration::ZERO, generation: 0 };
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            faults: watch::Sender::new(healthy),
            allowance: Mutex::new(None),
            connections: AtomicUsize::new(0),
            accepted: AtomicU64::new(0),
        });
        let runtime = runtime::background()?;
        // In that runtime, to which the socket belongs from then on.
        let bind = runtime.spawn(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let bound = bind.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        let listener = bound.map_err(Error::io("listen for a fault proxy"))?;
        let address = listener.local_addr().map_err(Error::io("listen for a fault proxy"))?;
        let accepting = runtime.spawn(accept(listener, Arc::clone(&shared))).abort_handle();
        Ok(Self { address, shared, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets all connections, and every new one as soon as it is made.
    ///
    /// The port stays taken, so nobody else can slip in; a client sees a reset where a dead host would refuse.
    pub fn cut(&self) {
        self.change(|faults| {
            faults.flow = Flow::Cut;
            faults.generation += 1;
        });
    }

    /// Resets all connections once; new ones are carried as before.
    pub fn reset(&self) {
        self.change(|faults| faults.generation += 1);
    }

    /// Stops the bytes in both directions. Connections stay, new ones are made, and nobody is told anything.
    ///
    /// What was on its way arrives after [`heal`](Self::heal).
    pub fn stall(&self) {
        self.change(|faults| faults.flow = Flow::Stalled);
    }

    /// Delays every byte by `latency`, each way. Throughput stays.
    pub fn latency(&self, latency: Duration) {
        self.change(|faults| faults.latency = latency);
    }

    /// Lets `bytes` more bytes pass from the server, all connections together, and closes the connection that would
    /// carry the next one: a reply ends in the middle. This happens once; afterwards all is as before.
    ///
    /// Heartbeats count too.
    pub fn truncate_after(&self, bytes: u64) {
        *self.shared.allowance.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
    }

    /// Ends all faults, whichever there are.
    pub fn heal(&self) {
        *self.shared.allowance.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.change(|faults| {
            faults.flow = Flow::Open;
            faults.latency = Duration::ZERO;
        });
    }

    /// How many connections it carries at this moment.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How many connections it has ever accepted, the ones it reset included.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    fn change(&self, change: impl FnOnce(&mut Faults)) {
        self.shared.faults.send_modify(change);
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl fmt::Debug for FaultProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultProxy")
            .field("address", &self.address)
            .field("upstream", &self.shared.upstream)
            .field("faults", &*self.shared.faults.borrow())
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Owned here, so that aborting this task ends them too.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    shared.accepted.fetch_add(1, Ordering::SeqCst);
                    connections.spawn(carry(client, Arc::clone(&shared)));
                }
                // Out of descriptors, most likely: some will be given back.
                Err(error) => {
                    tracing::warn!(%error, "the fault proxy cannot accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::warn!(%error, "a connection of the fault proxy panicked");
                }
            }
        }
    }
}

async fn carry(mut client: TcpStream, shared: Arc<Shared>) {
    let mut faults = shared.faults.subscribe();
    let now = *faults.borrow_and_update();
    if now.flow == Flow::Cut {
        reset(&client);
        return;
    }
    let _counted = Counted::new(&shared.connections);
    let cut = async {
        // An error means that the proxy is gone, which ends this task as well.
        let _ = faults.wait_for(|faults| faults.generation != now.generation).await;
    };
    let carry = async {
        let Ok(mut server) = TcpStream::connect(&shared.upstream).await else { return };
        // A proxy that holds small messages back would measure itself.
        let _ = client.set_nodelay(true).and(server.set_nodelay(true));
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        // The first error ends both directions. It is no news to anybody: the ends see it themselves.
        let _ = tokio::try_join!(
            pump(from_client, to_server, &shared, None),
            pump(from_server, to_client, &shared, Some(&shared.allowance)),
        );
    };
    let broken = tokio::select! {
        () = cut => true,
        () = carry => false,
    };
    if broken {
        reset(&client);
    }
}

/// Makes the close of `stream` a reset instead of an orderly end.
fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "a connection ends in order that should have been reset");
    }
}

async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    shared: &Shared,
    allowance: Option<&Mutex<Option<u64>>>,
) -> io::Result<()> {
    let (queue, mut queued) = mpsc::channel::<(Instant, Vec<u8>)>(QUEUED_READS);
    let reading = async move {
        loop {
            let mut bytes = vec![0; READ_BYTES];
            let read = from.read(&mut bytes).await?;
            if read == 0 {
                return Ok(());
            }
            bytes.truncate(read);
            let latency = shared.faults.borrow().latency;
            if queue.send((Instant::now() + latency, bytes)).await.is_err() {
                return Ok(());
            }
        }
    };
    let writing = async move {
        let mut faults = shared.faults.subscribe();
        while let Some((due, bytes)) = queued.recv().await {
            if due > Instant::now() {
                sleep_until(due).await;
            }
            if faults.wait_for(|faults| faults.flow != Flow::Stalled).await.is_err() {
                return Ok(());
            }
            let allowed = allowance.map_or(bytes.len(), |allowance| take(allowance, bytes.len()));
            to.write_all(bytes.get(..allowed).unwrap_or(&bytes)).await?;
            if allowed < bytes.len() {
                to.shutdown().await?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
        to.shutdown().await
    };
    tokio::try_join!(reading, writing).map(|_| ())
}

/// How many of `wanted` bytes may pass. Fewer than all are the last of their connection, and the end of the rule.
fn take(allowance: &Mutex<Option<u64>>, wanted: usize) -> usize {
    let mut allowance = allowance.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(left) = *allowance else { return wanted };
    match usize::try_from(left) {
        Ok(left) if left < wanted => {
            *allowance = None;
            left
        }
        _ => {
            *allowance = Some(left - wanted as u64);
            wanted
        }
    }
}

/// Counts a connection for as long as it lives, however it ends.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::SeqCst);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

const READ_BYTES: usize = 16 * 1024;
/// With [`READ_BYTES`] a mebibyte on its way in each direction, so that latency does not limit throughput.
const QUEUED_READS: usize = 64;

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    /// Answers every byte with itself.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        address
    }

    async fn answer(stream: &mut TcpStream, question: &[u8]) -> io::Result<Vec<u8>> {
        stream.write_all(question).await?;
        let mut answer = vec![0; question.len()];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    async fn proxied() -> (FaultProxy, TcpStream) {
        let proxy = FaultProxy::start(echo().await.to_string()).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut stream, b"hello").await.unwrap(), b"hello");
        (proxy, stream)
    }

    #[tokio::test]
    async fn bytes_pass_unchanged_and_the_end_is_passed_on() {
        let (proxy, mut stream) = proxied().await;
        let sent: Vec<u8> = (0..=250).cycle().take(3_000_000).collect();
        let (mut from, mut to) = stream.split();
        let mut received = Vec::new();
        let send = async {
            to.write_all(&sent).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let ((), read) = tokio::join!(send, from.read_to_end(&mut received));
        read.unwrap();
        assert!(received == sent);
        drop(stream);
        timeout(Duration::from_secs(5), async {
            while proxy.connections() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn cut_resets_old_and_new_connections_until_healed() {
        let (proxy, mut stream) = proxied().await;
        proxy.cut();
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        // The reset may come before the connection is made, or after.
        let again = async { answer(&mut TcpStream::connect(proxy.address()).await?, b"x").await };
        assert!(again.await.is_err());
        proxy.heal();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut stream, b"x").await.unwrap(), b"x");
        assert_eq!((proxy.connections(), proxy.accepted()), (1, 3));
    }

    #[tokio::test]
    async fn reset_lets_new_connections_through() {
        let (proxy, mut stream) = proxied().await;
        proxy.reset();
        assert!(stream.read(&mut [0]).await.is_err());
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut stream, b"x").await.unwrap(), b"x");
    }

    #[tokio::test]
    async fn stalled_bytes_arrive_after_healing() {
        let (proxy, mut stream) = proxied().await;
        proxy.stall();
        stream.write_all(b"late").await.unwrap();
        let mut late = [0; 4];
        assert!(timeout(Duration::from_millis(100), stream.read_exact(&mut late)).await.is_err());
        proxy.heal();
        stream.read_exact(&mut late).await.unwrap();
        assert_eq!(&late, b"late");
    }

    #[tokio::test]
    async fn latency_is_added_each_way() {
        let (proxy, mut stream) = proxied().await;
        proxy.latency(Duration::from_millis(40));
        let begin = Instant::now();
        answer(&mut stream, b"x").await.unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(80));
    }

    #[tokio::test]
    async fn a_reply_is_truncated_once() {
        let (proxy, mut stream) = proxied().await;
        proxy.truncate_after(7);
        assert_eq!(answer(&mut stream, b"1234").await.unwrap(), b"1234");
        stream.write_all(b"5678").await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"567");
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(answer(&mut stream, b"123456789").await.unwrap(), b"123456789");
    }

    #[tokio::test]
    async fn dropping_it_ends_its_connections() {
        let (proxy, mut stream) = proxied().await;
        drop(proxy);
        assert!(matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)));
    }

    #[test]
    fn it_outlives_the_runtime_that_made_it() {
        let server = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let upstream = server.local_addr().unwrap().to_string();
        let proxy = tokio::runtime::Runtime::new().unwrap().block_on(FaultProxy::start(upstream)).unwrap();
        let _client = std::net::TcpStream::connect(proxy.address()).unwrap();
        server.accept().unwrap();
    }
}
