//! What a proxy costs whoever goes through it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use mongo_core::{
    CancellationToken, ConnectOptions, Deployment, Error, ErrorKind, Result,
    bson::{Document, doc},
    connect,
};
use mongo_examples::Host;
use mongo_proxy::{Proxy, ProxySettings};
use serde::Serialize;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::oneshot,
    task::JoinSet,
    time::{Instant, sleep},
};

#[derive(Args, Clone)]
pub(crate) struct ProxyBench {
    /// How long each is measured, each time
    #[arg(long, value_name = "N", default_value_t = 1)]
    seconds: u64,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 15)]
    runs: usize,
    /// Connections at once
    #[arg(long, value_name = "N", default_values_t = [1, 16])]
    connections: Vec<u32>,
    /// Documents to look up, of about 100 bytes
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    documents: i32,
    /// Another program to measure in the same run, as haproxy=/usr/sbin/haproxy
    #[arg(long, value_name = "NAME=PATH")]
    peer: Vec<String>,
}

/// A way to the server.
#[derive(Serialize)]
pub(crate) struct Row {
    way: &'static str,
    connections: u32,
    /// Means of the middle half of the runs; microseconds for one lookup.
    p50: f64,
    p99: f64,
    /// Beyond the direct way in the same run.
    added_p50: f64,
    added_p99: f64,
    per_second: f64,
}

impl Row {
    pub(crate) fn print(&self) {
        println!(
            "{:20} {:>4} connections  p50 {:>6.0} us  p99 {:>6.0} us   added {:>5.0} / {:>5.0} us {:>9.0} lookups/s",
            self.way, self.connections, self.p50, self.p99, self.added_p50, self.added_p99, self.per_second
        );
    }
}

/// What came out once.
struct Once {
    p50: f64,
    p99: f64,
    per_second: f64,
}

pub(crate) async fn rows(uri: Option<&str>, settings: &ProxyBench) -> Result<Vec<Row>> {
    let host = Host::at(uri).await?;
    eprintln!("{}", host.describe());
    let server = host.deployment.hosts().first().map(ToString::to_string);
    let server = server.ok_or_else(|| Error::invalid("the deployment has no host"))?;
    fill(&host.deployment, settings.documents).await?;
    let peer = settings.peer.iter().find_map(|peer| peer.strip_prefix("haproxy=").map(PathBuf::from));
    let ways: Vec<Way> = [Way::Direct, Way::Forwarder, Way::Ours].into_iter().chain(peer.map(Way::HaProxy)).collect();
    let mut rows = Vec::new();
    for connections in &settings.connections {
        let mut measured: Vec<Vec<Once>> = ways.iter().map(|_| Vec::new()).collect();
        for run in 0..settings.runs.max(1) {
            // In another order each time, and opened anew: where a system puts a thread first it may stay, and be woken fast or slowly for as long.
            for turn in 0..ways.len() {
                let which = (run + turn) % ways.len();
                let open = ways[which].open(&server).await?;
                measured[which].push(lookups(&open.address, *connections, settings).await?);
                open.close().await?;
            }
        }
        for (way, runs) in ways.iter().zip(&measured) {
            let added =
                |of: fn(&Once) -> f64| middle_half(runs.iter().zip(&measured[0]).map(|(one, direct)| of(one) - of(direct)));
            rows.push(Row {
                way: way.name(),
                connections: *connections,
                p50: middle_half(runs.iter().map(|once| once.p50)),
                p99: middle_half(runs.iter().map(|once| once.p99)),
                added_p50: added(|once| once.p50),
                added_p99: added(|once| once.p99),
                per_second: middle_half(runs.iter().map(|once| once.per_second)),
            });
        }
    }
    host.deployment.database("mongo_bench").drop().await?;
    Ok(rows)
}

async fn fill(deployment: &Deployment, documents: i32) -> Result<()> {
    let database = deployment.database("mongo_bench");
    database.drop().await?;
    let documents = (0..documents.max(1)).map(|id| doc! { "_id": id, "text": "x".repeat(80) });
    database.collection::<Document>("lookups").insert_many(documents).await?;
    Ok(())
}

/// One after the other on each connection.
async fn lookups(address: &str, connections: u32, settings: &ProxyBench) -> Result<Once> {
    let options = ConnectOptions::from_uri(format!("mongodb://{address}/?directConnection=true"))?;
    let deployment = connect(options.with_max_pool_size(connections).with_min_pool_size(connections)).await?;
    let from = Instant::now() + WARM_UP;
    let until = from + Duration::from_secs(settings.seconds);
    let mut all = JoinSet::new();
    for seed in 0..connections {
        let lookups = deployment.database("mongo_bench").collection::<Document>("lookups");
        let documents = settings.documents.max(1);
        all.spawn(async move {
            let mut random = fastrand::Rng::with_seed(seed.into());
            let mut took = Vec::new();
            loop {
                let began = Instant::now();
                if began >= until {
                    return Ok::<_, Error>(took);
                }
                lookups.find_one(doc! { "_id": random.i32(0..documents) }).await?;
                if began >= from {
                    took.push(began.elapsed().as_secs_f64() * 1e6);
                }
            }
        });
    }
    let mut took = Vec::new();
    while let Some(one) = all.join_next().await {
        took.extend(one??);
    }
    let percentile = |percent| mongo_examples::shop::Ledger::percentile(&took, percent);
    Ok(Once { p50: percentile(50), p99: percentile(99), per_second: took.len() as f64 / settings.seconds.max(1) as f64 })
}

/// How the server is reached.
enum Way {
    Direct,
    Forwarder,
    Ours,
    HaProxy(PathBuf),
}

impl Way {
    fn name(&self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Forwarder => "a plain forwarder",
            Self::Ours => "mongo-proxy",
            Self::HaProxy(_) => "haproxy, mode tcp",
        }
    }

    async fn open(&self, server: &str) -> Result<Open> {
        let (address, kept) = match self {
            Self::Direct => (server.to_owned(), Kept::Nothing),
            Self::Forwarder => {
                let listener = TcpListener::bind("127.0.0.1:0").await.and_then(TcpListener::into_std).map_err(no_way)?;
                let address = listener.local_addr().map_err(no_way)?;
                (address.to_string(), on_threads_of_its_own(forward(listener, server.to_owned())))
            }
            Self::Ours => {
                let (tell, told) = oneshot::channel();
                let settings = ProxySettings::new(server);
                let kept = on_threads_of_its_own(async move {
                    let proxy = Proxy::bind("127.0.0.1:0", settings).await?;
                    // Or nobody wants to know any more.
                    let _gone = tell.send(proxy.address());
                    proxy.run(&CancellationToken::new()).await
                });
                match told.await {
                    Ok(address) => (address.to_string(), kept),
                    // It says itself why.
                    Err(_) => return Err(kept.end().await.err().unwrap_or_else(|| Error::internal("the proxy does not listen"))),
                }
            }
            Self::HaProxy(path) => {
                let (haproxy, address) = start_haproxy(path, server).await?;
                (address.to_string(), Kept::HaProxy(haproxy))
            }
        };
        Ok(Open { address, kept })
    }
}

/// A way that is open.
struct Open {
    address: String,
    kept: Kept,
}

impl Open {
    async fn close(self) -> Result<()> {
        self.kept.end().await
    }
}

/// What keeps a way open.
enum Kept {
    Nothing,
    Threads(CancellationToken, std::thread::JoinHandle<Result<()>>),
    HaProxy(HaProxy),
}

impl Kept {
    async fn end(self) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Threads(end, thread) => {
                end.cancel();
                let joined = tokio::task::spawn_blocking(|| thread.join()).await;
                joined
                    .map_err(|error| Error::internal("a way cannot be closed").with_source(error))?
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
            Self::HaProxy(mut haproxy) => haproxy.process.kill().await.map_err(no_way),
        }
    }
}

/// So that it does not take turns with who measures.
fn on_threads_of_its_own(serve: impl Future<Output = Result<()>> + Send + 'static) -> Kept {
    let end = CancellationToken::new();
    let ended = end.clone();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(no_way)?;
        runtime.block_on(async {
            tokio::select! {
                served = serve => served,
                () = ended.cancelled() => Ok(()),
            }
        })
    });
    Kept::Threads(end, thread)
}

async fn forward(listener: std::net::TcpListener, server: String) -> Result<()> {
    let listener = TcpListener::from_std(listener).map_err(no_way)?;
    loop {
        let (mut client, _) = listener.accept().await.map_err(no_way)?;
        let server = server.clone();
        tokio::spawn(async move {
            let mut server = TcpStream::connect(server).await?;
            client.set_nodelay(true)?;
            server.set_nodelay(true)?;
            copy_bidirectional(&mut client, &mut server).await
        });
    }
}

/// The mean of what lies between the quartiles. Of values of two kinds, as those of a thread that is woken fast or slowly, a median is of one or of the other.
fn middle_half(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let outside = values.len() / 4;
    let inside = &values[outside..values.len() - outside];
    inside.iter().sum::<f64>() / inside.len() as f64
}

fn no_way(error: std::io::Error) -> Error {
    Error::internal("a way to the server cannot be set up").with_source(error)
}

struct HaProxy {
    process: Child,
    _folder: tempfile::TempDir,
}

async fn start_haproxy(path: &Path, server: &str) -> Result<(HaProxy, SocketAddr)> {
    // Somebody else could take the port in between; then it does not start, and that is told.
    let address = TcpListener::bind("127.0.0.1:0").await.and_then(|listener| listener.local_addr()).map_err(no_way)?;
    let folder = tempfile::tempdir().map_err(no_way)?;
    let file = folder.path().join("haproxy.cfg");
    let configuration = format!(
        "global\n  maxconn 2000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\nlisten mongo\n  bind {address}\n  server one {server}\n"
    );
    tokio::fs::write(&file, configuration).await.map_err(no_way)?;
    let process = Command::new(path)
        .arg("-db")
        .arg("-f")
        .arg(&file)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Error::invalid("a peer cannot be run: check its path").with_source(error))?;
    let by = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).await.is_err() {
        if Instant::now() > by {
            return Err(Error::new(ErrorKind::Unavailable, "a peer does not listen"));
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok((HaProxy { process, _folder: folder }, address))
}

const WARM_UP: Duration = Duration::from_millis(500);
