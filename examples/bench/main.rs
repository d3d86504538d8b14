//! Side-by-side figures, on a MongoDB of the program's own or one that `--uri` names.
//!
//! Data come from a seed. What is compared runs in the same process run, alternating, and medians are printed, or means where a median would jump.

mod monitor;
mod orders;
mod proxy;
mod replay;
mod rounds;
mod workload;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use mongo_backup::{Backup, BackupSettings, Key, LocalArchive, Repository, Restore};
use mongo_core::{
    Deployment, Error, Result,
    bson::{RawDocumentBuf, doc},
    clock::{Clock as _, SystemClock},
    transfer::{
        partition::{PartitionSettings, partition},
        scan::{MemoryBudget, ScanSource},
    },
};
use mongo_examples::{Host, human_bytes, print_json, run};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::{
    monitor::WatchSettings,
    orders::Orders,
    proxy::{ProxyBench, WayToBe},
    replay::Speed,
    rounds::Round,
    workload::EntrySettings,
};

/// Measures this family against the bare server, and against other programs given by --peer.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// A deployment to use instead of an embedded one; only the databases mongo_bench* are touched
    #[arg(long, global = true, value_name = "URI")]
    uri: Option<String>,
    /// Print the figures as one JSON document on standard output
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand, Clone)]
enum Command {
    /// Full backup against a bare parallel scan, and against mongodump with --peer mongodump=PATH
    Backup(Settings),
    /// Restore, and against mongorestore with --peer mongorestore=PATH --peer mongodump=PATH
    Restore(Settings),
    /// Apply an oplog of half as many operations as there are documents, and against mongorestore with --peer mongorestore=PATH
    Replay(Settings),
    /// What watching a server costs it and how long a scrape takes, and against the common exporter with --peer mongodb_exporter=PATH
    Monitor(WatchSettings),
    /// What it costs to let an operation in; then what the till feels of five times too many reports, shares, goodput and steps, beside no control and a semaphore
    Workload(EntrySettings),
    /// What a lookup takes through the proxy, beside the direct way and a plain forwarder, and against HAProxy with --peer haproxy=PATH
    Proxy(ProxyBench),
    /// Is one of these ways, as a process of its own
    #[command(hide = true)]
    Way(WayToBe),
}

#[derive(Args, Clone)]
struct Settings {
    /// Documents of about 800 bytes
    #[arg(long, value_name = "N", default_value_t = 200_000)]
    documents: u64,
    /// Another program to measure in the same run, as mongodump=/usr/bin/mongodump
    #[arg(long, value_name = "NAME=PATH")]
    peer: Vec<String>,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// zstd's compression level
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    level: i32,
    /// Where archives and dumps are written; a temporary folder by default
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Backup only: measure instead what the next backup costs after some of the documents changed
    #[arg(long)]
    rounds: bool,
    /// With --rounds: how many of the documents change
    #[arg(long, value_name = "PERCENT", default_values_t = [0.1, 1.0, 10.0])]
    changed: Vec<f64>,
    /// Measure without encryption
    #[arg(long)]
    unencrypted: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let defaults = Settings {
            documents: 200_000,
            peer: Vec::new(),
            runs: 3,
            level: 1,
            folder: None,
            rounds: false,
            changed: Vec::new(),
            unencrypted: false,
        };
        let (settings, work) = match cli.command.clone() {
            None => (defaults, Work::Backup),
            Some(Command::Backup(settings)) => (settings, Work::Backup),
            Some(Command::Restore(settings)) => (settings, Work::Restore),
            Some(Command::Replay(settings)) => (settings, Work::Replay),
            Some(Command::Monitor(settings)) => return watch(&cli, &settings).await,
            Some(Command::Workload(settings)) => return enter(&cli, &settings).await,
            Some(Command::Way(way)) => return proxy::be(way).await.map(|()| ExitCode::SUCCESS),
            Some(Command::Proxy(settings)) => return pass_through(&cli, &settings).await,
        };
        let host = match &cli.uri {
            Some(_) => Host::at(cli.uri.as_deref()).await?,
            // An oplog changes documents all over: with a cache in which more than a twentieth of them do not fit, what is measured is how
            // often the server writes its pages out.
            None => Host::embedded(if work == Work::Replay { 8.0 } else { 2.0 }).await?,
        };
        eprintln!("{}", host.describe());
        let bench =
            Bench { deployment: host.deployment.clone(), uri: host.uri(cli.uri.as_deref()), settings, clock: SystemClock::new() };
        let figures = bench.run(work).await?;
        if cli.json {
            print_json(&figures)?
        } else {
            figures.print()
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn watch(cli: &Cli, settings: &WatchSettings) -> Result<ExitCode> {
    let host = Host::at(cli.uri.as_deref()).await?;
    eprintln!("{}", host.describe());
    let rows = monitor::watch(&host, &host.uri(cli.uri.as_deref()), settings).await?;
    if cli.json {
        print_json(&rows)?;
    } else {
        rows.iter().for_each(monitor::Watching::print);
    }
    Ok(ExitCode::SUCCESS)
}

async fn enter(cli: &Cli, settings: &EntrySettings) -> Result<ExitCode> {
    let figures = workload::figures(cli.uri.as_deref(), settings).await?;
    if cli.json {
        print_json(&figures)?;
    } else {
        figures.print();
    }
    Ok(ExitCode::SUCCESS)
}

async fn pass_through(cli: &Cli, settings: &ProxyBench) -> Result<ExitCode> {
    let rows = proxy::rows(cli.uri.as_deref(), settings).await?;
    if cli.json {
        print_json(&rows)?;
    } else {
        rows.iter().for_each(proxy::Row::print);
    }
    Ok(ExitCode::SUCCESS)
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Backup,
    Restore,
    Replay,
}

struct Bench {
    deployment: Deployment,
    uri: String,
    settings: Settings,
    clock: SystemClock,
}

#[derive(Serialize)]
struct Figures {
    documents: u64,
    bytes: u64,
    rows: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rounds: Vec<Round>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replays: Vec<Speed>,
}

#[derive(Serialize)]
struct Row {
    what: String,
    seconds: Vec<f64>,
    median_seconds: f64,
    megabytes_per_second: f64,
    /// Size of what it wrote, as a share of the data.
    archive_ratio: Option<f64>,
    /// This program's throughput over that of the row.
    ours_over_this: f64,
    peak_memory_bytes: Option<u64>,
}

impl Figures {
    fn print(&self) {
        println!("{} documents, {}", self.documents, human_bytes(self.bytes));
        for round in &self.rounds {
            println!(
                "{:18} first {:>6.2} s {:>12}   next {:>6.2} s {:>6.1} % {:>12}  {:>7.2} %",
                round.what,
                round.first_seconds,
                human_bytes(round.first_bytes),
                round.next_seconds,
                round.next_seconds / round.first_seconds * 100.0,
                human_bytes(round.grown_bytes),
                round.grown_share * 100.0
            );
        }
        for speed in &self.replays {
            println!(
                "{:28} {:>9} operations {:>10.0} a second {:>8.2}x",
                speed.what, speed.operations, speed.operations_per_second, speed.ours_over_this
            );
        }
        if self.rows.is_empty() {
            return;
        }
        println!("{:28} {:>9} {:>10} {:>9} {:>11} {:>12}", "", "median", "MB/s", "archive", "ours/this", "peak memory");
        for row in &self.rows {
            println!(
                "{:28} {:>7.2} s {:>10.0} {:>9} {:>10.2}x {:>12}",
                row.what,
                row.median_seconds,
                row.megabytes_per_second,
                row.archive_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
                row.ours_over_this,
                row.peak_memory_bytes.map_or_else(|| "-".to_owned(), human_bytes),
            );
        }
    }
}

/// One measurement: seconds, and bytes written where that means something.
struct Measured {
    seconds: f64,
    written: Option<u64>,
    /// The most memory that this process had meanwhile.
    memory: Option<u64>,
}

impl Bench {
    async fn run(&self, work: Work) -> Result<Figures> {
        let bytes = self.fill().await?;
        let temporary =
            tempfile::tempdir().map_err(|error| Error::internal("no temporary folder to be had").with_source(error))?;
        let folder = self.settings.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
        if self.settings.rounds {
            let rounds = self.rounds(&folder).await?;
            self.deployment.database(DATABASE).drop().await?;
            return Ok(Figures { documents: self.settings.documents, bytes, rows: Vec::new(), rounds, replays: Vec::new() });
        }
        let (mut rows, mut replays) = (Vec::new(), Vec::new());
        match work {
            Work::Backup => rows = self.backups(&folder, bytes).await?,
            Work::Restore => rows = self.restores(&folder, bytes).await?,
            Work::Replay => replays = self.replays(&folder).await?,
        }
        self.deployment.database(DATABASE).drop().await?;
        self.deployment.database(COPY).drop().await?;
        Ok(Figures { documents: self.settings.documents, bytes, rows, rounds: Vec::new(), replays })
    }

    async fn fill(&self) -> Result<u64> {
        let database = self.deployment.database(DATABASE);
        database.drop().await?;
        let collection = database.collection::<RawDocumentBuf>("orders");
        let mut orders = Orders::new();
        let mut left = self.settings.documents;
        while left > 0 {
            let count = left.min(2_000);
            let batch: Vec<RawDocumentBuf> = (0..count).map(|_| orders.next()).collect();
            collection.insert_many(batch).await?;
            left -= count;
        }
        database
            .run_command(doc! { "createIndexes": "orders", "indexes": [{ "key": { "customerId": 1 }, "name": "customerId_1" }] })
            .await?;
        let stats = database.run_command(doc! { "collStats": "orders" }).await?;
        let size = stats.get("size").and_then(|size| size.as_i64().or_else(|| size.as_i32().map(i64::from)));
        Ok(size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0))
    }

    async fn backups(&self, folder: &Path, bytes: u64) -> Result<Vec<Row>> {
        let peer = self.peer("mongodump")?;
        let (mut scans, mut ours, mut plain, mut gzip) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        // One of each that does not count, to warm the server's cache.
        self.scan(bytes).await?;
        for _ in 0..self.settings.runs {
            scans.push(Measured { seconds: self.scan(bytes).await?, written: None, memory: None });
            let archive = folder.join("archive");
            ours.push(self.backup(&archive).await?);
            remove(&archive)?;
            if let Some(peer) = &peer {
                for (gzipped, rows) in [(false, &mut plain), (true, &mut gzip)] {
                    let out = folder.join("dump");
                    let seconds = self.dump(peer, &out, gzipped).await?;
                    rows.push(Measured { seconds, written: Some(size_of(&out)?), memory: None });
                    remove(&out)?;
                }
            }
        }
        let mut table = Table::new(bytes, &ours);
        table.row("bare parallel scan", &scans);
        table.row("mongo-backup", &ours);
        table.row("mongodump", &plain);
        table.row("mongodump --gzip", &gzip);
        Ok(table.rows)
    }

    async fn restores(&self, folder: &Path, bytes: u64) -> Result<Vec<Row>> {
        let (dump, restore) = (self.peer("mongodump")?, self.peer("mongorestore")?);
        let archive = folder.join("archive");
        self.backup(&archive).await?;
        let dumped = folder.join("dump");
        if let (Some(dump), Some(_)) = (&dump, &restore) {
            self.dump(dump, &dumped, false).await?;
        }
        let (mut ours, mut relaxed, mut theirs, mut theirs_relaxed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.settings.runs {
            for (concern, rows) in [("majority", &mut ours), ("1", &mut relaxed)] {
                rows.push(self.restore(&archive, concern).await?);
            }
            if let (Some(restore), Some(_)) = (&restore, &dump) {
                for (concern, workers, rows) in [("majority", "1", &mut theirs), ("1", "4", &mut theirs_relaxed)] {
                    rows.push(Measured {
                        seconds: self.peer_restore(restore, &dumped, concern, workers).await?,
                        written: None,
                        memory: None,
                    });
                }
            }
        }
        let mut table = Table::new(bytes, &ours);
        table.row("mongo-backup", &ours);
        table.row("mongorestore", &theirs);
        // Like is compared with like: four writers each, acknowledged by the primary.
        table.ours = median(&relaxed);
        table.row("mongo-backup, w:1", &relaxed);
        table.row("mongorestore, w:1, 4 workers", &theirs_relaxed);
        Ok(table.rows)
    }

    /// The limit: two `_id` ranges read as raw batches and thrown away.
    async fn scan(&self, bytes: u64) -> Result<f64> {
        let started = self.clock.monotonic();
        let namespace = format!("{DATABASE}.orders").parse()?;
        let settings = PartitionSettings::default().with_target_bytes((bytes / 8).max(1));
        let ranges = partition(&self.deployment, &namespace, (self.settings.documents, bytes), settings, None).await?;
        let mut source = ScanSource::new(self.deployment.clone(), namespace);
        source.average_document_bytes = u32::try_from(bytes / self.settings.documents.max(1)).unwrap_or(1000);
        source.budget = MemoryBudget::new(128 << 20);
        let mut seen = 0;
        let mut pending = ranges.into_iter();
        let mut running = JoinSet::new();
        loop {
            while running.len() < 2 {
                let Some(range) = pending.next() else { break };
                let mut scan = source.scan(range);
                running.spawn(async move {
                    let mut documents = 0_u64;
                    while let Some(batch) = scan.next().await? {
                        documents += batch.documents()?.count() as u64;
                    }
                    Ok::<_, Error>(documents)
                });
            }
            let Some(done) = running.join_next().await else { break };
            seen += done??;
        }
        if seen != self.settings.documents {
            return Err(Error::internal("the scan did not see every document").with_context("seen", seen));
        }
        Ok(self.since(started))
    }

    async fn backup(&self, archive: &Path) -> Result<Measured> {
        forget_peak_memory();
        let started = self.clock.monotonic();
        let repository = Repository::open_or_init(LocalArchive::new(archive)?, self.key()).await?;
        let mut settings = BackupSettings::default();
        settings.compression_level = self.settings.level;
        let report = Backup::builder(&self.deployment, &repository)
            .settings(settings)
            .namespaces(&format!("{DATABASE}.*"))
            .build()?
            .run()
            .await?;
        if report.documents != self.settings.documents {
            return Err(Error::internal("the backup did not see every document"));
        }
        Ok(Measured { seconds: self.since(started), memory: peak_memory(), written: Some(size_of(archive)?) })
    }

    async fn restore(&self, archive: &Path, concern: &str) -> Result<Measured> {
        use mongo_core::mongodb::options::WriteConcern;
        self.deployment.database(COPY).drop().await?;
        let repository = Repository::open(LocalArchive::new(archive)?, self.key()).await?;
        let concern = if concern == "1" { WriteConcern::nodes(1) } else { WriteConcern::majority() };
        let restore = Restore::builder(&repository, mongo_backup::SnapshotChoice::Latest)
            .into(&self.deployment)
            .rename(&format!("{DATABASE}.*"), &format!("{COPY}.*"))
            .write_concern(concern)
            .build()?;
        forget_peak_memory();
        let started = self.clock.monotonic();
        let report = restore.run().await?;
        if report.documents != self.settings.documents || !report.is_complete() {
            return Err(Error::internal("the restore is not complete"));
        }
        Ok(Measured { seconds: self.since(started), written: None, memory: peak_memory() })
    }

    async fn dump(&self, peer: &Path, out: &Path, gzip: bool) -> Result<f64> {
        let mut command = tokio::process::Command::new(peer);
        command.args(["--quiet", "--uri", &self.uri, "--db", DATABASE, "--out"]).arg(out);
        if gzip {
            command.arg("--gzip");
        }
        self.time(command).await
    }

    async fn peer_restore(&self, peer: &Path, dump: &Path, concern: &str, workers: &str) -> Result<f64> {
        self.deployment.database(COPY).drop().await?;
        let mut command = tokio::process::Command::new(peer);
        let concern = if concern == "1" { "{w:1}" } else { "{w:'majority'}" };
        command
            .args(["--quiet", "--uri", &self.uri, "--writeConcern", concern, "--numInsertionWorkersPerCollection", workers])
            .args(["--nsFrom", &format!("{DATABASE}.*"), "--nsTo", &format!("{COPY}.*")])
            .arg(dump);
        self.time(command).await
    }

    async fn time(&self, mut command: tokio::process::Command) -> Result<f64> {
        let started = self.clock.monotonic();
        let output =
            command.output().await.map_err(|error| Error::invalid("a peer cannot be run: check its path").with_source(error))?;
        if !output.status.success() {
            return Err(Error::invalid(format!(
                "a peer failed: {}",
                String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default()
            )));
        }
        Ok(self.since(started))
    }

    fn peer(&self, name: &str) -> Result<Option<PathBuf>> {
        for peer in &self.settings.peer {
            let (given, path) =
                peer.split_once('=').ok_or_else(|| Error::invalid("a peer is written NAME=PATH").with_context("got", peer))?;
            if given == name {
                return Ok(Some(PathBuf::from(path)));
            }
        }
        Ok(None)
    }

    fn key(&self) -> Key {
        if self.settings.unencrypted { Key::unencrypted() } else { Key::host(BENCH_KEY) }
    }

    fn since(&self, started: Duration) -> f64 {
        (self.clock.monotonic() - started).as_secs_f64()
    }
}

struct Table {
    bytes: u64,
    ours: f64,
    rows: Vec<Row>,
}

impl Table {
    fn new(bytes: u64, ours: &[Measured]) -> Self {
        Self { bytes, ours: median(ours), rows: Vec::new() }
    }

    #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
    fn row(&mut self, what: &str, measured: &[Measured]) {
        if measured.is_empty() {
            return;
        }
        let median = median(measured);
        let written = measured.iter().filter_map(|measured| measured.written).next_back();
        self.rows.push(Row {
            what: what.to_owned(),
            seconds: measured.iter().map(|measured| measured.seconds).collect(),
            median_seconds: median,
            megabytes_per_second: self.bytes as f64 / 1e6 / median,
            archive_ratio: written.map(|written| written as f64 / self.bytes as f64),
            ours_over_this: median / self.ours,
            peak_memory_bytes: measured.iter().filter_map(|measured| measured.memory).max(),
        });
    }
}

fn median(measured: &[Measured]) -> f64 {
    middle(measured.iter().map(|measured| measured.seconds))
}

fn middle(seconds: impl Iterator<Item = f64>) -> f64 {
    let mut seconds: Vec<f64> = seconds.collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Bytes of all files below a folder.
fn size_of(folder: &Path) -> Result<u64> {
    let failed = |error: std::io::Error| Error::internal("a folder cannot be measured").with_source(error);
    let mut size = 0;
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let metadata = entry.metadata().map_err(failed)?;
            if metadata.is_dir() { folders.push(entry.path()) } else { size += metadata.len() }
        }
    }
    Ok(size)
}

fn remove(folder: &Path) -> Result<()> {
    std::fs::remove_dir_all(folder).map_err(|error| Error::internal("a folder cannot be removed").with_source(error))
}

/// The most memory that this process has had since [`forget_peak_memory`], by the kernel's account; Linux only.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())?;
    Some(kilobytes << 10)
}

/// Lets the kernel count anew. Where it cannot, the figure is that of the whole run, which is no less.
fn forget_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

const DATABASE: &str = "mongo_bench";
const COPY: &str = "mongo_bench_copy";

/// Encryption is on, as it should be for a backup; the key is no secret.
const BENCH_KEY: [u8; 32] = [7; 32];
