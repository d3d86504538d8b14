//! The listener, and what all its connections share.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Result,
    metrics::{MetricsSink, NoMetrics},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, SemaphorePermit},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

#[cfg(feature = "tls")]
use crate::tls::{Connecting, ListenTls, Listening, UpstreamTls};
use crate::{
    instruments::Instruments,
    peer::{LARGE, Peer, prepare},
    session::{Ended, Session},
    stream::Stream,
};

/// How a proxy works.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProxySettings {
    /// The server, as `host:port`.
    pub upstream: String,
    /// Connections at once; who comes when there are so many is sent away. Default 10,000.
    pub max_connections: usize,
    /// How long a connection to the server may take. Default 5 s.
    pub connect_within: Duration,
    /// How long a message may take from its first byte on, and a second more for each 64 KiB of it that have come; the first one from the connection on. And how long a client may take no bytes. How long an
    /// *operation* takes is not limited. Default 30 s.
    pub message_within: Duration,
    /// How long requests under way may still take when the proxy is stopped. Default 30 s.
    pub drain_within: Duration,
    /// What all messages under way that are larger than 64 KiB may take together: who needs it takes it once, before it is read on, and waits for it as long as `message_within`. At least 96 MiB, as the largest compressed
    /// message needs. Default 256 MiB.
    pub large_messages_bytes: usize,
    /// What clients are shown; without it they connect without TLS.
    #[cfg(feature = "tls")]
    pub listen_tls: Option<ListenTls>,
    /// How the server is known; without it it is connected to without TLS.
    #[cfg(feature = "tls")]
    pub upstream_tls: Option<UpstreamTls>,
}

impl ProxySettings {
    /// For the server at this `host:port`, with the defaults of all else.
    pub fn new(upstream: impl Into<String>) -> Self {
        Self {
            upstream: upstream.into(),
            max_connections: 10_000,
            connect_within: Duration::from_secs(5),
            message_within: Duration::from_secs(30),
            drain_within: Duration::from_secs(30),
            large_messages_bytes: 256 << 20,
            #[cfg(feature = "tls")]
            listen_tls: None,
            #[cfg(feature = "tls")]
            upstream_tls: None,
        }
    }

    /// Sets what clients are shown.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn with_listen_tls(mut self, tls: ListenTls) -> Self {
        self.listen_tls = Some(tls);
        self
    }

    /// Sets how the server is known.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn with_upstream_tls(mut self, tls: UpstreamTls) -> Self {
        self.upstream_tls = Some(tls);
        self
    }
}

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
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) settings: ProxySettings,
    pub(crate) instruments: Instruments,
    connections: AtomicUsize,
    /// In pieces of [`LARGE`].
    memory: Semaphore,
    #[cfg(feature = "tls")]
    listening: Option<Listening>,
    #[cfg(feature = "tls")]
    connecting: Option<Connecting>,
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

    /// Connects to the server.
    async fn connect(&self) -> io::Result<Stream> {
        let connect = async {
            let server = TcpStream::connect(&self.settings.upstream).await?;
            prepare(&server)?;
            #[cfg(feature = "tls")]
            if let Some(tls) = &self.connecting {
                return tls.connect(server).await;
            }
            Ok(Stream::Plain(server))
        };
        timeout(self.settings.connect_within, connect).await?
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
    /// `InvalidInput` for an address that is none or is taken.
    pub async fn bind(listen: &str, settings: ProxySettings) -> Result<Self> {
        Self::bind_with_metrics(listen, settings, &NoMetrics).await
    }

    /// As [`bind`](Self::bind), and tells `metrics` of connections (`mongo_proxy_connections`, `mongo_proxy_connections_total` by `outcome`) and of what was no message (`mongo_proxy_malformed_total` by `reason`).
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub async fn bind_with_metrics(listen: &str, settings: ProxySettings, metrics: &dyn MetricsSink) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::new(ErrorKind::InvalidInput, "cannot listen: choose another address")
                .with_context("address", listen)
                .with_source(error)
        };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let pieces = (settings.large_messages_bytes.max(LEAST_MEMORY) / LARGE).min(Semaphore::MAX_PERMITS);
        let shared = Shared {
            memory: Semaphore::new(pieces),
            #[cfg(feature = "tls")]
            listening: settings.listen_tls.as_ref().map(Listening::new).transpose()?,
            #[cfg(feature = "tls")]
            connecting: settings.upstream_tls.as_ref().map(|tls| Connecting::new(tls, &settings.upstream)).transpose()?,
            settings,
            instruments: Instruments::new(metrics),
            connections: AtomicUsize::new(0),
            stop: CancellationToken::new(),
        };
        Ok(Self { listener, address, shared: Arc::new(shared) })
    }

    /// For whoever has to do with it while it runs.
    pub fn handle(&self) -> ProxyHandle {
        ProxyHandle(Arc::clone(&self.shared))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves whoever comes, until it is cancelled; then nobody is let in any more, and whoever has a request under way is served to its end, if that comes within
    /// [`drain_within`](ProxySettings::drain_within).
    ///
    /// # Errors
    /// None after which it could go on; that no connection can be accepted for a while is logged.
    ///
    /// # Cancel safety
    /// Dropping the future closes all connections.
    pub async fn run(self, cancel: &CancellationToken) -> Result<()> {
        let mut sessions = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                Some(ended) = sessions.join_next(), if !sessions.is_empty() => tell_of_panic(ended),
                accepted = self.listener.accept() => match accepted {
                    Ok((client, address)) => self.admit(client, address, &mut sessions),
                    Err(error) => {
                        // Without a file handle to spare, the same would come back at once.
                        tracing::warn!(%error, "a connection could not be accepted");
                        sleep(AFTER_FAILURE).await;
                    }
                },
            }
        }
        drop(self.listener);
        self.shared.stop.cancel();
        let drain = async {
            while let Some(ended) = sessions.join_next().await {
                tell_of_panic(ended);
            }
        };
        let drained = timeout(self.shared.settings.drain_within, drain).await;
        if drained.is_err() {
            tracing::warn!(connections = sessions.len(), "requests were still under way when the time to end them was over");
            sessions.shutdown().await;
        }
        Ok(())
    }

    fn admit(&self, client: TcpStream, address: SocketAddr, sessions: &mut JoinSet<()>) {
        let shared = Arc::clone(&self.shared);
        if shared.connections.fetch_add(1, Relaxed) >= shared.settings.max_connections {
            shared.connections.fetch_sub(1, Relaxed);
            shared.instruments.turned_away.add(1);
            return;
        }
        let place = Place(shared);
        sessions.spawn(async move {
            let shared = &place.0;
            shared.instruments.connections(&shared.connections);
            let ended = serve(client, shared).await;
            tracing::debug!(%address, %ended, "a connection has ended");
        });
    }
}

/// A running proxy, from outside. Clones are the same.
#[derive(Clone, Debug)]
pub struct ProxyHandle(Arc<Shared>);

impl ProxyHandle {
    /// Connections of clients.
    pub fn connections(&self) -> usize {
        self.0.connections.load(Relaxed)
    }

    /// Reads the certificate that clients are shown again, for the connections to come; without one nothing happens.
    ///
    /// # Errors
    /// `InvalidInput` for a file that is not fit; what there was stays then.
    #[cfg(feature = "tls")]
    pub fn reload_certificate(&self) -> Result<()> {
        self.0.listening.as_ref().map_or(Ok(()), Listening::reload)
    }
}

async fn serve(client: TcpStream, shared: &Shared) -> Ended {
    // First TLS, where there is any: a stranger that does not speak it costs the server nothing.
    let client = shared.accept(client).await.map_err(|error| Ended::Client(error.into()));
    // A server that is down is a connection that ends before a byte.
    let server = match &client {
        Ok(_) => shared.connect().await.map_err(|error| {
            tracing::warn!(%error, "the server cannot be connected to");
            Ended::Server(error.into())
        }),
        Err(_) => Err(Ended::Closed),
    };
    match (client, server) {
        (Ok(client), Ok(server)) => Session::new(Peer::new(client), Peer::new(server), shared).run().await,
        (Err(ended), _) | (Ok(_), Err(ended)) => {
            shared.instruments.ended(&ended);
            ended
        }
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
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
        self.0.instruments.connections(&self.0.connections);
    }
}

/// Of the largest message twice: as it came, and inflated.
const LEAST_MEMORY: usize = 96 << 20;
/// 64 KiB a second.
const SLOWEST_PER_MILLISECOND: usize = 64;
const AFTER_FAILURE: Duration = Duration::from_millis(50);
