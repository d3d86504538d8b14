//! The listeners, and what all their connections share.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use bson::{RawDocument, RawDocumentBuf, rawdoc};
use mongo_core::{
    CancellationToken, Error, ErrorKind, Result,
    clock::SystemClock,
    lock::{self, lock},
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
    peer::{Gone, LARGE, Peer, prepare},
    requests::Requests,
    rules::{RuleBook, Rules},
    session::{Ended, Session, wants_api_version},
    stream::Stream,
    wire::reply::{self, LONGEST_READ, Whole},
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
    setting_rules: Mutex<()>,
    members: Option<Members>,
    /// In pieces of [`LARGE`].
    memory: Semaphore,
    #[cfg(feature = "tls")]
    pub(crate) listening: Option<Listening>,
    #[cfg(feature = "tls")]
    pub(crate) connecting: Option<Connecting>,
    started: Instant,
    /// Nothing new is begun.
    draining: AtomicBool,
    /// Requests under way that may leave something to be gone on with.
    opening: AtomicUsize,
    /// Until when a cursor or a transaction may be gone on with that was used last; in milliseconds from the start.
    goes_on_until: AtomicU64,
    /// That nobody is served any more.
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

    /// So much of it is taken.
    pub(crate) fn memory_taken(&self) -> usize {
        (memory_pieces(&self.settings) - self.memory.available_permits()) * LARGE
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
        Arc::clone(&lock::read(&self.rules))
    }

    /// Puts others in force.
    pub(crate) fn set_rules(&self, rules: &Rules) -> Result<u64> {
        // One after the other, so that no two have the same number; and apart from who only reads.
        let _alone = lock(&self.setting_rules);
        // Of rules that are not fit nothing is left in the metrics.
        rules.check()?;
        let before = self.rules();
        let version = before.version + 1;
        let book = Arc::new(RuleBook::new(rules, version, Some(&before), self.metrics.as_ref())?);
        *lock::write(&self.rules) = book;
        Ok(version)
    }

    pub(crate) fn members(&self) -> Option<&Members> {
        self.members.as_ref()
    }

    /// How long the proxy has been there.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Something begins that may be gone on with once it is answered.
    pub(crate) fn opening(&self) -> Opening<'_> {
        self.opening.fetch_add(1, SeqCst);
        Opening(self)
    }

    /// Something was used that may be gone on with.
    pub(crate) fn leaves_something(&self) {
        let until = (self.now() + self.settings.drain_within).as_millis();
        self.goes_on_until.fetch_max(u64::try_from(until).unwrap_or(u64::MAX), Relaxed);
    }

    /// Waits until nothing is left that may be gone on with, or until then; for ever if there is no such time.
    async fn goes_on(&self, until: Option<Instant>) {
        let Some(until) = until else { return std::future::pending().await };
        loop {
            let now = Instant::now();
            // Of what is under way nobody knows yet.
            let may_begin = if self.opening.load(SeqCst) > 0 { now + LOOKED_AFTER } else { self.started };
            let goes_on = self.started + Duration::from_millis(self.goes_on_until.load(Relaxed));
            let next = until.min(goes_on.max(may_begin));
            if next <= now {
                return;
            }
            sleep_until(next.min(now + LOOKED_AFTER)).await;
        }
    }

    /// What of the time for draining is kept for requests that are under way at its end.
    fn last_moment(&self) -> Duration {
        LAST_MOMENT.min(self.settings.drain_within / 4)
    }

    /// Nothing new is begun from now on.
    pub(crate) fn drain(&self) {
        if !self.draining.swap(true, SeqCst) {
            tracing::info!("nothing new is begun any more");
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(SeqCst)
    }

    /// Waits until nobody is served any more.
    pub(crate) async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// By which a session knows that.
    pub(crate) fn stop_of_a_session(&self) -> CancellationToken {
        self.stop.child_token()
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
        settings.check()?;
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
        let shared = Shared {
            memory: Semaphore::new(memory_pieces(&settings)),
            #[cfg(feature = "tls")]
            listening: settings.listen_tls.as_ref().map(Listening::new).transpose()?,
            #[cfg(feature = "tls")]
            connecting: settings.upstream_tls.as_ref().map(Connecting::new).transpose()?,
            setting_rules: Mutex::new(()),
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
            opening: AtomicUsize::new(0),
            goes_on_until: AtomicU64::new(0),
            stop: CancellationToken::new(),
        };
        if let Some(members) = &shared.members {
            drop(listener);
            let mut ports = Vec::new();
            for member in shared.ask_for_members().await? {
                let port = members.shown(&member).and_then(|shown| shown.rsplit(':').next()?.parse().ok());
                let none = || Error::invalid("nothing can listen for a member").with_context("member", &member);
                ports.push(port.ok_or_else(|| none().with_context("address", listen))?);
            }
            address.set_port(ports.into_iter().min().unwrap_or_default());
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
                () = shared.goes_on(until.map(|until| until - shared.last_moment())) => break,
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
            tracing::debug!(connection = place.connection.id, %ended, "a connection has ended");
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
    let meet = async {
        // First TLS, where there is any: a stranger that does not speak it costs the server nothing.
        let client = shared.accept(client).await.map_err(|error| Ended::Client(error.into()))?;
        // A server that is down is a connection that ends before a byte.
        let server = shared.connect(upstream).await.map_err(|error| {
            tracing::warn!(%error, upstream, "the server cannot be connected to");
            Ended::NoServer(error)
        })?;
        Ok((client, server))
    };
    let met = tokio::select! {
        met = meet => met,
        () = shared.stopping() => Err(Ended::Stopped),
    };
    match met {
        Ok((client, server)) => Session::new(Peer::new(client), Peer::new(server), shared, connection).run().await,
        Err(ended) => {
            shared.instruments.ended(&ended);
            ended
        }
    }
}

fn memory_pieces(settings: &ProxySettings) -> usize {
    (settings.large_messages_bytes.max(LEAST_MEMORY) / LARGE).min(Semaphore::MAX_PERMITS)
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

/// A request under way that may leave something to be gone on with.
#[derive(Debug)]
pub(crate) struct Opening<'a>(&'a Shared);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.opening.fetch_sub(1, SeqCst);
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
        for seed in self.settings.upstream.split(',').map(str::trim).filter(|seed| !seed.is_empty()) {
            match timeout(self.settings.connect_within, self.members_by(seed)).await.unwrap_or_else(|late| Err(late.into())) {
                Ok(members) if !members.is_empty() => return Ok(members),
                // Or it has been taken out of its set.
                Ok(_) => {
                    let what = "the server is no member of a replica set: stand before it alone (Topology::Direct)";
                    failed = Error::invalid(what).with_context("server", seed);
                }
                Err(error) => {
                    let what = "no member of the replica set can be asked for the others: is it up, and is TLS what it speaks?";
                    failed = Error::new(ErrorKind::Unavailable, what).with_context("member", seed).with_source(error);
                }
            }
        }
        Err(failed)
    }

    /// The members that a server knows.
    async fn members_by(&self, seed: &str) -> io::Result<Vec<String>> {
        let mut server = Peer::new(self.connect(seed).await?);
        let mut hello = self.ask(&mut server, &rawdoc! { "hello": 1, "$db": "admin" }).await?;
        // A server that wants to be told the version of its interface (requireApiVersion).
        if wants_api_version(&hello) {
            hello = self.ask(&mut server, &rawdoc! { "hello": 1, "apiVersion": "1", "$db": "admin" }).await?;
        }
        Ok(members::of(&hello))
    }

    async fn ask(&self, server: &mut Peer, command: &RawDocument) -> io::Result<RawDocumentBuf> {
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidData);
        let gone = |gone: Gone| io::Error::other(gone.to_string());
        server.send(&reply::request(1, command), self.settings.connect_within).await.map_err(gone)?;
        let header = loop {
            if let Some(header) = server.header() {
                break header.map_err(wrong)?;
            }
            server.fill(LARGE).await.map_err(gone)?;
        };
        if header.length > LONGEST_READ || header.response_to != 1 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        while server.buffered().len() < header.length {
            server.fill(LARGE).await.map_err(gone)?;
        }
        let answer = Whole::read(header, server.take(header.length)).map_err(wrong)?;
        answer.document().map(ToOwned::to_owned).map_err(wrong)
    }
}

/// Of the largest message twice: as it came, and inflated.
const LEAST_MEMORY: usize = 96 << 20;
/// 64 KiB a second.
const SLOWEST_PER_MILLISECOND: usize = 64;
const AFTER_FAILURE: Duration = Duration::from_millis(50);
/// So long nobody has been there.
const QUIET: Duration = Duration::from_secs(3);
/// How often it is looked whether anything is left.
const LOOKED_AFTER: Duration = Duration::from_millis(50);
/// Of the time for draining, so much at most is for requests that are under way at its end.
const LAST_MOMENT: Duration = Duration::from_secs(5);
/// Connections that were accepted and wait to be served.
const ARRIVING: usize = 64;
