//! What a proxy costs whoever goes through it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
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
    io::{AsyncBufReadExt as _, BufReader, copy_bidirectional},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::JoinSet,
    time::{Instant, sleep, timeout},
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
    /// Means of the runs; microseconds for one lookup.
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
    let mut random = fastrand::Rng::with_seed(1);
    for connections in &settings.connections {
        let mut measured: Vec<Vec<Once>> = ways.iter().map(|_| Vec::new()).collect();
        for _ in 0..settings.runs.max(1) {
            // Opened anew each time: where a system puts a thread first it may stay, and be woken fast or slowly for as long.
            let mut order: Vec<usize> = (0..ways.len()).collect();
            random.shuffle(&mut order);
            for which in order {
                let open = ways[which].open(&server).await?;
                measured[which].push(lookups(&open.address, *connections, settings).await?);
                open.close().await?;
            }
        }
        for (way, runs) in ways.iter().zip(&measured) {
            let added = |of: fn(&Once) -> f64| mean(runs.iter().zip(&measured[0]).map(|(one, direct)| of(one) - of(direct)));
            rows.push(Row {
                way: way.name(),
                connections: *connections,
                p50: mean(runs.iter().map(|once| once.p50)),
                p99: mean(runs.iter().map(|once| once.p99)),
                added_p50: added(|once| once.p50),
                added_p99: added(|once| once.p99),
                per_second: mean(runs.iter().map(|once| once.per_second)),
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

    /// Each but the direct way is a process of its own, as HAProxy is one.
    async fn open(&self, server: &str) -> Result<Open> {
        match self {
            Self::Direct => Ok(Open { address: server.to_owned(), process: None, _folder: None }),
            Self::Forwarder => itself("forwarder", server).await,
            Self::Ours => itself("mongo-proxy", server).await,
            Self::HaProxy(path) => haproxy(path, server).await,
        }
    }
}

/// A way that is open, until it is dropped.
struct Open {
    address: String,
    process: Option<Child>,
    _folder: Option<tempfile::TempDir>,
}

impl Open {
    async fn close(self) -> Result<()> {
        match self.process {
            Some(mut process) => process.kill().await.map_err(no_way),
            None => Ok(()),
        }
    }
}

/// Runs this program once more, to be a way.
async fn itself(way: &str, server: &str) -> Result<Open> {
    let mut process = Command::new(std::env::current_exe().map_err(no_way)?)
        .args(["way", way, server])
        // By whose end it knows that this one has gone.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(no_way)?;
    let says = process.stdout.take().ok_or_else(|| Error::internal("a way to the server says nothing"))?;
    let mut says = BufReader::new(says).lines();
    let address = timeout(Duration::from_secs(10), says.next_line()).await.map_err(|late| no_way(late.into()))?;
    // It says itself why.
    let address = address.map_err(no_way)?.ok_or_else(|| Error::internal("a way to the server cannot be set up"))?;
    Ok(Open { address, process: Some(process), _folder: None })
}

#[derive(Args, Clone)]
pub(crate) struct WayToBe {
    way: String,
    server: String,
}

/// Is a way to the server, and says where.
pub(crate) async fn be(WayToBe { way, server }: WayToBe) -> Result<()> {
    std::thread::spawn(|| {
        let _nobody_says_anything = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    match way.as_str() {
        "forwarder" => forward(server).await,
        "mongo-proxy" => {
            let proxy = Proxy::bind("127.0.0.1:0", ProxySettings::new(server)).await?;
            println!("{}", proxy.address());
            proxy.run(&CancellationToken::new()).await
        }
        _ => Err(Error::invalid("there is no such way")),
    }
}

async fn forward(server: String) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(no_way)?;
    println!("{}", listener.local_addr().map_err(no_way)?);
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

/// Of values of two kinds, as those of a thread that is woken fast or slowly, a median is one of the one or of the other.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let number = values.len() as f64;
    values.sum::<f64>() / number
}

fn no_way(error: std::io::Error) -> Error {
    Error::internal("a way to the server cannot be set up").with_source(error)
}

async fn haproxy(path: &Path, server: &str) -> Result<Open> {
    // Somebody else could take the port in between; then it does not start, and that is told.
    let address = TcpListener::bind("127.0.0.1:0").await.and_then(|listener| listener.local_addr()).map_err(no_way)?;
    let folder = tempfile::tempdir().map_err(no_way)?;
    let file = folder.path().join("haproxy.cfg");
    let configuration = format!(
        "global\n  maxconn 2000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\nlisten mongo\n  bind {address}\n  server one {server}\n"
    );
    tokio::fs::write(&file, configuration).await.map_err(no_way)?;
    let mut process = Command::new(path)
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
    // Or it was somebody else who listens there.
    if process.try_wait().map_err(no_way)?.is_some() {
        return Err(Error::new(ErrorKind::Unavailable, "a peer has ended"));
    }
    Ok(Open { address: address.to_string(), process: Some(process), _folder: Some(folder) })
}

const WARM_UP: Duration = Duration::from_millis(500);
