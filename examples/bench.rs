//! Side-by-side figures, on a MongoDB of the program's own or one that `--uri` names.
//!
//! Data come from a seed. What is compared runs in the same process run, alternating, and medians are printed.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use mongo_backup::{Backup, BackupSettings, Key, LocalArchive, Repository, Restore};
use mongo_core::{
    Deployment, Error, Result,
    bson::{RawDocumentBuf, doc, rawdoc},
    clock::{Clock as _, SystemClock},
    transfer::{
        partition::{PartitionSettings, partition},
        scan::{MemoryBudget, ScanSource},
    },
};
use mongo_examples::{Host, human_bytes, print_json, run};
use serde::Serialize;
use tokio::task::JoinSet;

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

#[derive(Subcommand)]
enum Command {
    /// Full backup against a bare parallel scan, and against mongodump with --peer mongodump=PATH
    Backup(Settings),
    /// Restore, and against mongorestore with --peer mongorestore=PATH --peer mongodump=PATH
    Restore(Settings),
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
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let defaults = Settings { documents: 200_000, peer: Vec::new(), runs: 3, level: 1, folder: None };
        let (settings, restore) = match cli.command {
            None => (defaults, false),
            Some(Command::Backup(settings)) => (settings, false),
            Some(Command::Restore(settings)) => (settings, true),
        };
        let host = match &cli.uri {
            Some(_) => Host::at(cli.uri.as_deref()).await?,
            None => Host::embedded(2.0).await?,
        };
        eprintln!("{}", host.describe());
        let bench =
            Bench { deployment: host.deployment.clone(), uri: host.uri(cli.uri.as_deref()), settings, clock: SystemClock::new() };
        let figures = bench.run(restore).await?;
        if cli.json {
            print_json(&figures)?
        } else {
            figures.print()
        }
        Ok(ExitCode::SUCCESS)
    })
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
    async fn run(&self, restore: bool) -> Result<Figures> {
        let bytes = self.fill().await?;
        let temporary =
            tempfile::tempdir().map_err(|error| Error::internal("no temporary folder to be had").with_source(error))?;
        let folder = self.settings.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
        let rows = if restore { self.restores(&folder, bytes).await } else { self.backups(&folder, bytes).await }?;
        self.deployment.database(DATABASE).drop().await?;
        self.deployment.database(COPY).drop().await?;
        Ok(Figures { documents: self.settings.documents, bytes, rows })
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
        let repository = Repository::open_or_init(LocalArchive::new(archive)?, Key::host(BENCH_KEY)).await?;
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
        let repository = Repository::open(LocalArchive::new(archive)?, Key::host(BENCH_KEY)).await?;
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
    let mut seconds: Vec<f64> = measured.iter().map(|measured| measured.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Makes orders as a shop keeps them: repeated field names and structure, values from small and large sets (status, address,
/// phrases), and a share of pure randomness (tokens, prices). What real data compress to lies around this: judge by the row of gzip.
struct Orders {
    random: fastrand::Rng,
    addresses: Vec<RawDocumentBuf>,
    phrases: Vec<String>,
    number: i64,
}

impl Orders {
    fn new() -> Self {
        let mut random = fastrand::Rng::with_seed(11);
        let words: Vec<String> =
            (0..2_000).map(|_| (0..random.usize(1..4)).map(|_| random.choice(SYLLABLES).unwrap_or("a")).collect()).collect();
        let mut word = |among: usize| words[random.usize(..among)].clone();
        let phrases = (0..500).map(|_| (0..14).map(|_| word(2_000)).collect::<Vec<_>>().join(" ")).collect();
        let addresses = (0..20_000)
            .map(|number| {
                rawdoc! {
                    "name": format!("{} {}", word(2_000), word(2_000)),
                    "street": format!("{number} {} Street", word(500)),
                    "city": word(200),
                    "postcode": format!("{:05}", number * 7 % 99_999),
                    "country": COUNTRIES[number % COUNTRIES.len()],
                }
            })
            .collect();
        Self { random, addresses, phrases, number: 0 }
    }

    fn next(&mut self) -> RawDocumentBuf {
        let Self { random, addresses, phrases, number } = self;
        *number += 1;
        let mut customer = [0; 12];
        random.fill(&mut customer);
        let placed = 1_600_000_000_000 + *number * 731 + random.i64(..1_000_000);
        let item = |random: &mut fastrand::Rng| {
            rawdoc! {
                "sku": format!("sku-{:06}", random.u32(..5_000)),
                "image": format!("https://cdn.example.com/images/products/{:016x}.jpg", random.u64(..)),
                "quantity": random.i32(1..9),
                "unitPrice": f64::from(random.u32(..10_000)) / 100.0,
            }
        };
        rawdoc! {
            "_id": *number,
            "customerId": mongo_core::bson::oid::ObjectId::from_bytes(customer),
            "status": STATES[random.usize(..STATES.len())],
            "placedAt": mongo_core::bson::DateTime::from_millis(placed),
            "updatedAt": mongo_core::bson::DateTime::from_millis(placed + random.i64(..100_000_000)),
            "shippingAddress": addresses[random.usize(..addresses.len())].clone(),
            "items": [item(random), item(random)],
            "total": f64::from(random.u32(..1_000_000)) / 100.0,
            "payment": { "provider": PROVIDERS[random.usize(..PROVIDERS.len())], "token": hexadecimal(random, 5) },
            "session": hexadecimal(random, 2),
            "note": phrases[random.usize(..phrases.len())].clone(),
        }
    }
}

/// Sixteen random digits, some times over.
fn hexadecimal(random: &mut fastrand::Rng, times: usize) -> String {
    (0..times).map(|_| format!("{:016x}", random.u64(..))).collect()
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

const SYLLABLES: [&str; 20] =
    ["an", "be", "co", "der", "el", "fi", "gor", "ha", "in", "ju", "ka", "lo", "mi", "nor", "os", "pe", "qui", "ra", "sto", "ty"];
const STATES: [&str; 4] = ["open", "paid", "shipped", "returned"];
const COUNTRIES: [&str; 5] = ["DE", "FR", "GB", "NL", "US"];
const PROVIDERS: [&str; 3] = ["visa", "mastercard", "sepa"];
const DATABASE: &str = "mongo_bench";
const COPY: &str = "mongo_bench_copy";

/// Encryption is on, as it should be for a backup; the key is no secret.
const BENCH_KEY: [u8; 32] = [7; 32];
