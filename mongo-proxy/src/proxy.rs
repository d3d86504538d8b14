//! The listeners, and what all their connections share.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bson::{RawDocument, rawdoc};
use mongo_core::{
    CancellationToken, Error, ErrorKind, Result,
    clock::SystemClock,
    metrics::{MetricsSink, NoMetrics},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, SemaphorePermit, mpsc},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

#[cfg(feature = "tls")]
use crate::tls::{Connecting, Listening};
use crate::{
    ProxyHandle, ProxySettings, Topology,
    connections::{Connection, Connections},
    instruments::Instruments,
    members::{self, Door, Members},
    peer::{LARGE, Peer, prepare},
    requests::Requests,
    rules::{RuleBook, Rules},
    session::{Ended, Session},
    stream::Stream,
    wire::{
        header::{HEADER, Header, Opcode},
        reply,
        scan::Scan,
    },
};

/// A proxy that listens.
///
/// ```no_run
/// use mongo_core::CancellationToken;
/// use mongo_proxy::{Proxy, ProxySettings};
///
/// # async fn example() -> mongo_core::Result<()> {
/// let proxy = Proxy::bind("127.0.0.1:27018", ProxySettings::new("127.0.0.1:27017")).await?;
/// println!("mongodb://{}/?directConnection=true", proxy.address());
/// // Until somebody cancels it.
/// proxy.run(&CancellationToken::new()).await
/// # }
/// ```
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    /// Those that are open already, and those that will be.
    doors: mpsc::UnboundedReceiver<Door>,
    shared: Arc<Shared>,
}

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) settings: ProxySettings,
    pub(crate) instruments: Instruments,
    pub(crate) connections: Connections,
    pub(crate) requests: Requests,
    pub(crate) clock: SystemClock,
    metrics: Arc<dyn MetricsSink>,
    rules: RwLock<Arc<RuleBook>>,
    members: Option<Members>,
    /// In pieces of [`LARGE`].
    memory: Semaphore,
    #[cfg(feature = "tls")]
    pub(crate) listening: Option<Listening>,
    #[cfg(feature = "tls")]
    connecting: Option<Connecting>,
    started: Instant,
    /// Nothing new is begun.
    draining: AtomicBool,
    /// Until when a cursor or a transaction may be gone on with that was used last; in milliseconds from the start.
    goes_on_until: AtomicU64,
    stop: CancellationToken,
}

impl Shared {
    /// By when more must have come of a message that began then, and of which so much has come.
    pub(crate) fn message_until(&self, began: Instant, received: usize) -> Instant {
        let received = Duration::from_millis(u64::try_from(received / SLOWEST_PER_MILLISECOND).unwrap_or(u64::MAX));
        began + self.settings.message_within + received
    }

    /// Takes memory for so many bytes; nothing if there is none in time.
    pub(crate) async fn memory(&self, bytes: usize) -> Option<SemaphorePermit<'_>> {
        let pieces = u32::try_from(bytes.div_ceil(LARGE)).ok()?;
        timeout(self.settings.message_within, self.memory.acquire_many(pieces)).await.ok()?.ok()
    }

    /// Takes a connection of a client, and speaks TLS with it if that is wanted.
    async fn accept(&self, client: TcpStream) -> io::Result<Stream> {
        prepare(&client)?;
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.listening {
            return timeout(self.settings.message_within, tls.accept(client)).await?;
        }
        Ok(Stream::Plain(client))
    }

    /// Connects to a server.
    async fn connect(&self, upstream: &str) -> io::Result<Stream> {
        let connect = async {
            let server = TcpStream::connect(upstream).await?;
            prepare(&server)?;
            #[cfg(feature = "tls")]
            if let Some(tls) = &self.connecting {
                return tls.connect(server, upstream).await;
            }
            Ok(Stream::Plain(server))
        };
        timeout(self.settings.connect_within, connect).await?
    }

    /// Whether the server is shown a certificate that is the proxy's.
    pub(crate) fn shows_certificate(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.settings.upstream_tls.as_ref().is_some_and(|tls| tls.certificate_file.is_some());
        #[cfg(not(feature = "tls"))]
        false
    }

    /// The rules that are in force now.
    pub(crate) fn rules(&self) -> Arc<RuleBook> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts others in force.
    pub(crate) fn set_rules(&self, rules: &Rules) -> Result<u64> {
        // From reading what there was to writing, so that no two have the same number.
        let mut book = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        let version = book.version + 1;
        *book = Arc::new(RuleBook::new(rules, version, Some(&book), self.metrics.as_ref())?);
        Ok(version)
    }

    pub(crate) fn members(&self) -> Option<&Members> {
        self.members.as_ref()
    }

    /// How long the proxy has been there.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Something is used that may be gone on with.
    pub(crate) fn begins_something(&self) {
        let until = (self.now() + self.settings.drain_within).as_millis();
        self.goes_on_until.fetch_max(u64::try_from(until).unwrap_or(u64::MAX), Relaxed);
    }

    /// Waits until nothing is left that may be gone on with, or until then; for ever if there is no such time.
    async fn goes_on(&self, until: Option<Instant>) {
        let Some(until) = until else { return std::future::pending().await };
        loop {
            let next = until.min(self.started + Duration::from_millis(self.goes_on_until.load(Relaxed)));
            if next <= Instant::now() {
                return;
            }
            sleep_until(next).await;
        }
    }

    /// Nothing new is begun from now on.
    pub(crate) fn drain(&self) {
        if !self.draining.swap(true, Relaxed) {
            tracing::info!("nothing new is begun any more");
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Waits until the proxy is to stop.
    pub(crate) async fn stopping(&self) {
        self.stop.cancelled().await;
    }
}

impl Proxy {
    /// Listens at an address, as `127.0.0.1:27018`; port 0 for any that is free.
    ///
    /// # Errors
    /// `InvalidInput` for an address that is none or is taken, or settings that are not fit; `Unavailable` if a replica set cannot be asked for its members.
    pub async fn bind(listen: &str, settings: ProxySettings) -> Result<Self> {
        Self::bind_with_metrics(listen, settings, Arc::new(NoMetrics)).await
    }

    /// As [`bind`](Self::bind), and tells `metrics` of what happens: see the table in the [crate's documentation](crate#metrics).
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub async fn bind_with_metrics(listen: &str, settings: ProxySettings, metrics: Arc<dyn MetricsSink>) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::new(ErrorKind::InvalidInput, "cannot listen: choose another address")
                .with_context("address", listen)
                .with_source(error)
        };
        let (opened, doors) = mpsc::unbounded_channel();
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let mut address = listener.local_addr().map_err(failed)?;
        let members = match settings.topology {
            Topology::Direct => None,
            Topology::ReplicaSet => {
                // Whether the address is fit is known now. The port is the first member's.
                if listen.rsplit(':').next() == Some("0") {
                    address.set_port(0);
                }
                Some(Members::new(address, settings.advertise.as_deref(), opened.clone())?)
            }
        };
        let pieces = (settings.large_messages_bytes.max(LEAST_MEMORY) / LARGE).min(Semaphore::MAX_PERMITS);
        let shared = Shared {
            memory: Semaphore::new(pieces),
            #[cfg(feature = "tls")]
            listening: settings.listen_tls.as_ref().map(Listening::new).transpose()?,
            #[cfg(feature = "tls")]
            connecting: settings.upstream_tls.as_ref().map(Connecting::new).transpose()?,
            rules: RwLock::new(Arc::new(RuleBook::new(&settings.rules, 1, None, metrics.as_ref())?)),
            requests: Requests::new(settings.request_log.clone()),
            instruments: Instruments::new(metrics.as_ref()),
            settings,
            connections: Connections::default(),
            clock: SystemClock::new(),
            metrics,
            members,
            started: Instant::now(),
            draining: AtomicBool::new(false),
            goes_on_until: AtomicU64::new(0),
            stop: CancellationToken::new(),
        };
        if let Some(members) = &shared.members {
            drop(listener);
            for member in shared.ask_for_members().await? {
                members.shown(&member);
            }
            let all = members.all();
            let first = all.iter().filter_map(|(_, shown)| shown.rsplit(':').next()?.parse().ok()).min();
            address.set_port(
                first.ok_or_else(|| Error::invalid("nothing can listen for any member").with_context("address", listen))?,
            );
        } else {
            let upstream = shared.settings.upstream.as_str().into();
            // It is received below.
            let _received = opened.send(Door { listener, upstream });
        }
        Ok(Self { doors, address, shared: Arc::new(shared) })
    }

    /// For whoever has to do with it while it runs.
    pub fn handle(&self) -> ProxyHandle {
        ProxyHandle(Arc::clone(&self.shared))
    }

    /// Where it listens; for a replica set, where it listens for one of the members. Clients find the others from there.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves whoever comes, until it is cancelled. Nothing new is begun then ([`ProxyHandle::drain`]), and for
    /// [`drain_within`](ProxySettings::drain_within) at most what is under way is served to its end, and cursors and transactions are gone on with
    /// that were used within the last so long; for these connections are taken, too, as drivers drop theirs. If there are none, it ends at once.
    ///
    /// # Errors
    /// None after which it could go on; that no connection can be accepted for a while is logged.
    ///
    /// # Cancel safety
    /// Dropping the future closes all connections.
    pub async fn run(mut self, cancel: &CancellationToken) -> Result<()> {
        let mut sessions = JoinSet::new();
        let mut listening = JoinSet::new();
        let (arrives, mut arrived) = mpsc::channel(ARRIVING);
        let mut until = None;
        let shared = Arc::clone(&self.shared);
        loop {
            let is_quiet = until.is_some() && sessions.is_empty();
            tokio::select! {
                biased;
                () = cancel.cancelled(), if until.is_none() => {
                    shared.drain();
                    until = Some(Instant::now() + shared.settings.drain_within);
                }
                () = shared.goes_on(until) => break,
                Some(ended) = sessions.join_next(), if !sessions.is_empty() => tell_of_panic(ended),
                Some(door) = self.doors.recv() => {
                    listening.spawn(accept(door, arrives.clone()));
                }
                Some((client, address, upstream)) = arrived.recv() => self.admit(client, address, upstream, &mut sessions),
                // Who had a cursor has gone, or would be back by now.
                () = sleep(QUIET), if is_quiet => break,
            }
        }
        listening.shutdown().await;
        drop(arrived);
        shared.stop.cancel();
        let until = until.unwrap_or_else(Instant::now);
        if timeout_at(until, all_end(&mut sessions)).await.is_err() {
            tracing::warn!(connections = sessions.len(), "requests were still under way when the time to end them was over");
            sessions.shutdown().await;
        }
        Ok(())
    }

    fn admit(&self, client: TcpStream, address: SocketAddr, upstream: Arc<str>, sessions: &mut JoinSet<()>) {
        let shared = Arc::clone(&self.shared);
        let Some(connection) = shared.connections.open(address, &upstream, shared.settings.max_connections) else {
            shared.instruments.turned_away.add_one();
            return;
        };
        let place = Place { shared, connection };
        sessions.spawn(async move {
            place.shared.instruments.connections(&place.shared.connections);
            let ended = serve(client, &upstream, &place).await;
            tracing::debug!(%address, %ended, "a connection has ended");
        });
    }
}

/// Takes whoever comes to a door.
async fn accept(door: Door, arrives: mpsc::Sender<(TcpStream, SocketAddr, Arc<str>)>) {
    loop {
        match door.listener.accept().await {
            Ok((client, address)) => {
                if arrives.send((client, address, Arc::clone(&door.upstream))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                // Without a file handle to spare, the same would come back at once.
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(AFTER_FAILURE).await;
            }
        }
    }
}

async fn serve(client: TcpStream, upstream: &str, Place { shared, connection }: &Place) -> Ended {
    // First TLS, where there is any: a stranger that does not speak it costs the server nothing.
    let client = shared.accept(client).await.map_err(|error| Ended::Client(error.into()));
    // A server that is down is a connection that ends before a byte.
    let server = match &client {
        Ok(_) => shared.connect(upstream).await.map_err(|error| {
            tracing::warn!(%error, upstream, "the server cannot be connected to");
            Ended::Server(error.into())
        }),
        Err(_) => Err(Ended::Closed),
    };
    match (client, server) {
        (Ok(client), Ok(server)) => Session::new(Peer::new(client), Peer::new(server), shared, connection).run().await,
        (Err(ended), _) | (Ok(_), Err(ended)) => {
            shared.instruments.ended(&ended);
            ended
        }
    }
}

async fn all_end(sessions: &mut JoinSet<()>) {
    while let Some(ended) = sessions.join_next().await {
        tell_of_panic(ended);
    }
}

/// Of whom it serves a session tells itself; what is told here is a fault of the proxy.
fn tell_of_panic(ended: std::result::Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection was given up for a fault of the proxy");
    }
}

/// A connection's place among those that there may be.
#[derive(Debug)]
struct Place {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.connections.close(self.connection.id);
        self.shared.instruments.connections(&self.shared.connections);
    }
}

impl Shared {
    /// Asks the members that are given, one after the other, for all that there are.
    async fn ask_for_members(&self) -> Result<Vec<String>> {
        let mut failed = Error::invalid("a replica set needs the address of a member, as 127.0.0.1:27017");
        for seed in self.settings.upstream.split(',').filter(|seed| !seed.is_empty()) {
            match timeout(self.settings.connect_within, self.hello(seed)).await.unwrap_or_else(|late| Err(late.into())) {
                Ok(hello) => return members::of(RawDocument::from_bytes(&hello).map_err(|_| failed)?),
                Err(error) => {
                    let what = "no member of the replica set can be asked for the others: is it up, and is TLS what it speaks?";
                    failed = Error::new(ErrorKind::Unavailable, what).with_context("member", seed).with_source(error);
                }
            }
        }
        Err(failed)
    }

    async fn hello(&self, seed: &str) -> io::Result<Vec<u8>> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidData);
        let mut server = Peer::new(self.connect(seed).await?);
        let asks = Header { length: HEADER, request_id: 0, response_to: 0, opcode: Opcode::Message };
        let request = reply::to(asks, 1, &rawdoc! { "hello": 1, "$db": "admin" });
        server.send(&request, self.settings.connect_within).await.map_err(|gone| io::Error::other(gone.to_string()))?;
        let header = loop {
            if let Some(header) = server.header() {
                break header.map_err(|_| wrong())?;
            }
            server.fill(LARGE).await.map_err(|gone| io::Error::other(gone.to_string()))?;
        };
        if header.length > LARGE {
            return Err(wrong());
        }
        while server.buffered().len() < header.length {
            server.fill(LARGE).await.map_err(|gone| io::Error::other(gone.to_string()))?;
        }
        let mut scan = Scan::new(header);
        scan.advance(&server.buffered()[HEADER..header.length]).map_err(|_| wrong())?;
        let body = scan.body().filter(|_| scan.is_complete()).ok_or_else(wrong)?;
        Ok(server.buffered()[body].to_vec())
    }
}

/// Of the largest message twice: as it came, and inflated.
const LEAST_MEMORY: usize = 96 << 20;
/// 64 KiB a second.
const SLOWEST_PER_MILLISECOND: usize = 64;
const AFTER_FAILURE: Duration = Duration::from_millis(50);
/// So long nobody has been there.
const QUIET: Duration = Duration::from_secs(1);
/// Connections that were accepted and wait to be served.
const ARRIVING: usize = 64;
