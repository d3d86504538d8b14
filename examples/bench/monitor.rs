//! What watching costs the server, and how long a scrape takes.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use mongo_core::{
    ConnectOptions, Error, Result,
    bson::doc,
    clock::{Clock as _, SystemClock},
};
use mongo_examples::Host;
use mongo_monitor::{Monitor, MonitorSettings, router};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::MissedTickBehavior,
};

use crate::middle;

#[derive(Args, Clone)]
pub(crate) struct WatchSettings {
    /// Collections that there are
    #[arg(long, value_name = "N", default_value_t = 100)]
    collections: u32,
    /// The common exporter, to measure it in the same run, as mongodb_exporter=/usr/bin/mongodb_exporter
    #[arg(long, value_name = "NAME=PATH")]
    peer: Vec<String>,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// How long each is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    seconds: u64,
}

/// What one way of watching costs. Medians of all runs.
#[derive(Serialize)]
pub(crate) struct Watching {
    what: String,
    /// Processor time of the server for each round, that of an idle one taken off.
    server_milliseconds: f64,
    scrape_p50_milliseconds: Option<f64>,
    scrape_p99_milliseconds: Option<f64>,
    scrape_bytes: Option<usize>,
    /// The server's processor time over ours.
    over_ours: f64,
}

impl Watching {
    pub(crate) fn print(&self) {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2} ms"));
        println!(
            "{:44} {:>7.2} ms of the server a round {:>7.2}x   scrape p50 {:>10} p99 {:>10} {:>9} bytes",
            self.what,
            self.server_milliseconds,
            self.over_ours,
            number(self.scrape_p50_milliseconds),
            number(self.scrape_p99_milliseconds),
            self.scrape_bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
        );
    }
}

/// One measurement.
struct Measured {
    server_milliseconds: f64,
    scrapes: Vec<f64>,
    bytes: usize,
}

/// Ways to run the exporter: as much as ours tells of a member, in the cheapest way there is and in the usual one; and everything.
const PEERS: [(&str, &[&str]); 3] = [
    (
        "mongodb_exporter, status, pooled",
        &["--collector.diagnosticdata", "--collector.replicasetstatus", "--mongodb.global-conn-pool"],
    ),
    ("mongodb_exporter, status", &["--collector.diagnosticdata", "--collector.replicasetstatus"]),
    ("mongodb_exporter --collect-all", &["--collect-all"]),
];

pub(crate) async fn watch(host: &Host, uri: &str, settings: &WatchSettings) -> Result<Vec<Watching>> {
    let process = host
        .process_id()
        .ok_or_else(|| Error::invalid("what watching costs is measured on a MongoDB of the program's own: leave --uri out"))?;
    for number in 0..settings.collections {
        let create = doc! { "create": format!("collection_{number}"), "clusteredIndex": { "key": { "_id": 1 }, "unique": true } };
        host.deployment.database(&format!("mongo_bench_{}", number % 4)).run_command(create).await?;
    }
    // As on every server that is not one of a test.
    let collect = doc! { "setParameter": 1, "diagnosticDataCollectionEnabled": true };
    host.deployment.database("admin").run_command(collect).await?;
    let peer = settings.peer.iter().find_map(|peer| peer.strip_prefix("mongodb_exporter=").map(PathBuf::from));
    let bench = Bench { uri, process, seconds: Duration::from_secs(settings.seconds.max(1)), clock: SystemClock::new() };
    let mut names = vec!["mongo-monitor".to_owned(), format!("mongo-monitor, a look at {} collections", settings.collections)];
    names.extend(peer.iter().flat_map(|_| PEERS.iter().map(|(name, _)| (*name).to_owned())));
    let mut measured: Vec<Vec<Measured>> = names.iter().map(|_| Vec::new()).collect();
    for run in 0..settings.runs.max(1) {
        eprintln!("run {} of {}", run + 1, settings.runs.max(1));
        let mut ours = f64::NAN;
        for (position, all) in measured.iter_mut().enumerate() {
            let one = match (position, &peer) {
                (0, _) => bench.ours(None).await?,
                (1, _) => bench.ours(Some(ours)).await?,
                (other, Some(peer)) => bench.theirs(peer, PEERS.get(other - 2).map_or(&[], |(_, flags)| flags)).await?,
                (_, None) => continue,
            };
            if position == 0 {
                ours = one.server_milliseconds;
            }
            all.push(one);
        }
    }
    let cost = |measured: &[Measured]| middle(measured.iter().map(|measured| measured.server_milliseconds));
    let ours = measured.first().map_or(f64::NAN, |measured| cost(measured));
    let row = |(what, measured): (String, Vec<Measured>)| {
        let mut scrapes: Vec<f64> = measured.iter().flat_map(|measured| measured.scrapes.iter().copied()).collect();
        scrapes.sort_by(f64::total_cmp);
        let server_milliseconds = cost(&measured);
        Watching {
            what,
            server_milliseconds,
            scrape_p50_milliseconds: scrapes.get(scrapes.len() / 2).copied(),
            scrape_p99_milliseconds: scrapes.get(scrapes.len() * 99 / 100).copied(),
            scrape_bytes: measured.iter().map(|measured| measured.bytes).max().filter(|bytes| *bytes > 0),
            over_ours: server_milliseconds / ours,
        }
    };
    Ok(names.into_iter().zip(measured).map(row).collect())
}

struct Bench<'a> {
    uri: &'a str,
    process: u32,
    seconds: Duration,
    clock: SystemClock,
}

impl Bench<'_> {
    /// Our monitor. Databases and collections have an interval of their own: for what a look at them costs it is made short, and what the
    /// rounds cost besides is taken off.
    async fn ours(&self, rounds_cost: Option<f64>) -> Result<Measured> {
        let idle = self.idle().await?;
        let mut settings = MonitorSettings::default();
        settings.interval = ROUND;
        if rounds_cost.is_some() {
            settings.namespace_interval = ROUND;
        }
        let monitor = Arc::new(Monitor::start(ConnectOptions::from_uri(self.uri)?, settings).await?);
        monitor.sampled().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(cannot_listen)?;
        let address = listener.local_addr().map_err(cannot_listen)?.to_string();
        let app = router(Arc::clone(&monitor));
        let serving = tokio::spawn(async move { axum::serve(listener, app).await });
        let (seconds, scrapes, bytes) = self.scrape_all(&address).await?;
        let view = monitor.view();
        let host = view.members.first().map(|member| member.host.clone()).unwrap_or_default();
        let count = |metric: &str, labels: &[&str]| {
            let summary = monitor.summary(&host, metric, labels, self.seconds);
            #[expect(clippy::cast_precision_loss, reason = "a count of rounds")]
            summary.map_or(f64::NAN, |summary| summary.readings as f64)
        };
        let (rounds, looks) = (count("mongodb_up", &[]), count("mongodb_namespaces", &["collection"]));
        let cost = (seconds - idle * self.seconds.as_secs_f64()) * 1e3;
        let server_milliseconds = match rounds_cost {
            None => cost / rounds,
            Some(of_round) => (cost - of_round * rounds) / looks,
        };
        serving.abort();
        // Its router goes with the task that serves it.
        let _ = serving.await;
        if let Ok(monitor) = Arc::try_unwrap(monitor) {
            monitor.stop().await;
        }
        Ok(Measured { server_milliseconds, scrapes, bytes })
    }

    async fn theirs(&self, peer: &Path, flags: &[&str]) -> Result<Measured> {
        let idle = self.idle().await?;
        let free =
            std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).map_err(cannot_listen)?;
        let address = free.to_string();
        let mut exporter = tokio::process::Command::new(peer)
            .arg(format!("--mongodb.uri={}", self.uri))
            .arg(format!("--web.listen-address={address}"))
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Error::invalid("a peer cannot be run: check its path").with_source(error))?;
        let listens = async {
            while TcpStream::connect(&address).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), listens)
            .await
            .map_err(|error| Error::invalid("a peer does not serve").with_source(error))?;
        scrape(&address).await?;
        let (seconds, scrapes, bytes) = self.scrape_all(&address).await?;
        // It may have ended by itself.
        let _ = exporter.kill().await;
        #[expect(clippy::cast_precision_loss, reason = "a count of scrapes")]
        let server_milliseconds = (seconds - idle * self.seconds.as_secs_f64()) * 1e3 / scrapes.len() as f64;
        Ok(Measured { server_milliseconds, scrapes, bytes })
    }

    /// Scrapes as often as ours has rounds, for the while of a measurement. Gives the server's processor seconds, the milliseconds of each scrape, and
    /// the bytes of the last.
    async fn scrape_all(&self, address: &str) -> Result<(f64, Vec<f64>, usize)> {
        let (mut scrapes, mut bytes) = (Vec::new(), 0);
        let mut ticks = tokio::time::interval(ROUND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (began, before) = (self.clock.monotonic(), processor_seconds(self.process)?);
        while self.clock.monotonic() - began < self.seconds {
            ticks.tick().await;
            let asked = self.clock.monotonic();
            bytes = scrape(address).await?;
            scrapes.push((self.clock.monotonic() - asked).as_secs_f64() * 1e3);
        }
        Ok((processor_seconds(self.process)? - before, scrapes, bytes))
    }

    /// The server's processor seconds in each second in which nobody asks it anything.
    async fn idle(&self) -> Result<f64> {
        // What came before may have left it something to do.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = processor_seconds(self.process)?;
        tokio::time::sleep(self.seconds / 2).await;
        Ok((processor_seconds(self.process)? - before) / (self.seconds / 2).as_secs_f64())
    }
}

/// The bytes of an answer of `/metrics`.
async fn scrape(address: &str) -> Result<usize> {
    let failed = |error: std::io::Error| Error::internal("a scrape failed").with_source(error);
    let mut stream = TcpStream::connect(address).await.map_err(failed)?;
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.map_err(failed)?;
    if !answer.starts_with(b"HTTP/1.1 200") {
        let line = String::from_utf8_lossy(answer.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
        return Err(Error::internal("a scrape failed").with_context("answer", line));
    }
    Ok(answer.len())
}

/// Processor time that a process has used; Linux only.
fn processor_seconds(process: u32) -> Result<f64> {
    let failed = || Error::internal("the processor time of the server cannot be read from /proc");
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).map_err(|error| failed().with_source(error))?;
    // The name of the program, in brackets, may hold anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |position: usize| fields.get(position).and_then(|field| field.parse::<f64>().ok());
    let (user, system) = ticks(11).zip(ticks(12)).ok_or_else(failed)?;
    Ok((user + system) / TICKS_PER_SECOND)
}

fn cannot_listen(error: std::io::Error) -> Error {
    Error::internal("no port can be had").with_source(error)
}

/// More often than anybody would: a server that nobody asks is not idle at all, and by how much that differs from second to second must not matter.
const ROUND: Duration = Duration::from_millis(50);
/// Of Linux, on every machine since 2.6.
const TICKS_PER_SECOND: f64 = 100.0;
