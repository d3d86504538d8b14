//! A shop under a mixed load, and a manager that decides who is served: shares, waits and latencies of each class.
//!
//! With no arguments it loads a MongoDB of its own for ten seconds.

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use mongo_core::{ConnectOptions, Error, Result};
use mongo_examples::{
    Host, cancel_on_interrupt, load_signal, print_json, run,
    shop::{Door, Ledger, Shop, Traffic, offer, press},
};
use mongo_monitor::{Monitor, MonitorSettings};
use mongo_workload::{Access, Manager, ManagerSettings};
use serde::Serialize;

/// Who is served first when everybody wants something of a MongoDB.
#[derive(Parser)]
#[command(
    name = "workload",
    after_help = "Without --uri it loads an embedded MongoDB. Only the database mongo_workload is touched."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Work>,
    /// The deployment to load
    #[arg(long, global = true, value_name = "URI")]
    uri: Option<String>,
    /// Print the figures as one JSON document on standard output
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Work {
    /// Load a shop and show shares, waits and latencies per class
    Run {
        /// For how long
        #[arg(long, value_name = "N", default_value_t = 10)]
        seconds: u64,
        /// How much more work of each lower class than a few: this many times sixteen at once
        #[arg(long, value_name = "N", default_value_t = 1)]
        load: usize,
        /// Orders in the shop
        #[arg(long, value_name = "N", default_value_t = 20_000)]
        documents: i64,
    },
}

/// How it went with a class.
#[derive(Serialize)]
struct Row {
    class: &'static str,
    what: Traffic,
    completed: usize,
    refused: u64,
    timed_out: u64,
    failed: u64,
    /// Of the time that operations were under way, in percent.
    share_percent: f64,
    wait_p50_ms: f64,
    wait_p99_ms: f64,
    latency_p50_ms: f64,
    latency_p99_ms: f64,
}

#[derive(Serialize)]
struct Report {
    seconds: f64,
    read_slots: u32,
    write_slots: u32,
    classes: Vec<Row>,
}

impl Report {
    fn print(&self) {
        println!(
            "{:9} {:9} {:>9} {:>8} {:>9} {:>7} {:>7} {:>19} {:>22}",
            "class", "what", "completed", "refused", "timed out", "failed", "share", "wait p50/p99 ms", "latency p50/p99 ms"
        );
        for row in &self.classes {
            println!(
                "{:9} {:9} {:>9} {:>8} {:>9} {:>7} {:>5.1} % {:>8.1} / {:>8.1} {:>10.1} / {:>9.1}",
                row.class,
                format!("{:?}", row.what).to_lowercase(),
                row.completed,
                row.refused,
                row.timed_out,
                row.failed,
                row.share_percent,
                row.wait_p50_ms,
                row.wait_p99_ms,
                row.latency_p50_ms,
                row.latency_p99_ms
            );
        }
        println!("slots at the end: {} for reads, {} for writes", self.read_slots, self.write_slots);
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let Work::Run { seconds, load, documents } = cli.command.unwrap_or(Work::Run { seconds: 10, load: 1, documents: 20_000 });
        if seconds == 0 || documents < 1 {
            return Err(Error::invalid("--seconds and --documents take a number above zero"));
        }
        let host = Host::at(cli.uri.as_deref()).await?;
        eprintln!("{}", host.describe());
        let shop = Shop::open(&host.deployment, "mongo_workload", documents).await?;
        let options = ConnectOptions::from_uri(host.uri(cli.uri.as_deref()))?;
        let monitor = Arc::new(Monitor::start(options, MonitorSettings::default()).await?);
        let settings = ManagerSettings::default().with_load_signal(Arc::new(load_signal(monitor)));
        let report = under_load(&shop, &Manager::new(settings), Duration::from_secs(seconds), load).await?;
        host.deployment.database("mongo_workload").drop().await?;
        if cli.json {
            print_json(&report)?;
        } else {
            report.print();
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn under_load(shop: &Shop, manager: &Manager, time: Duration, load: usize) -> Result<Report> {
    let door = Door::Managed(manager.clone());
    // At the till comes who comes; the others always want more.
    let guests = load.saturating_mul(16);
    let all = async {
        tokio::join!(
            offer(shop, &door, Traffic::Checkout, 100.0, time, 7),
            press(shop, &door, Traffic::Search, guests, time),
            press(shop, &door, Traffic::Update, guests, time),
            press(shop, &door, Traffic::Report, guests, time),
        )
    };
    let stop = cancel_on_interrupt();
    let ledgers = tokio::select! {
        ledgers = all => ledgers,
        () = stop.cancelled() => return Err(Error::cancelled()),
        () = tell(manager) => return Err(Error::internal("the clock has stopped")),
    };
    let ledgers = [ledgers.0, ledgers.1, ledgers.2, ledgers.3];
    let busy: f64 = ledgers.iter().map(|ledger| ledger.busy).sum();
    let classes = Traffic::ALL.into_iter().zip(&ledgers).map(|(traffic, ledger)| row(traffic, ledger, busy)).collect();
    Ok(Report {
        seconds: time.as_secs_f64(),
        read_slots: manager.slots(Access::Read).total,
        write_slots: manager.slots(Access::Write).total,
        classes,
    })
}

fn row(traffic: Traffic, ledger: &Ledger, busy: f64) -> Row {
    Row {
        class: traffic.class(),
        what: traffic,
        completed: ledger.latencies.len(),
        refused: ledger.refused,
        timed_out: ledger.timed_out,
        failed: ledger.failed,
        share_percent: if busy > 0.0 { ledger.busy * 100.0 / busy } else { 0.0 },
        wait_p50_ms: Ledger::percentile(&ledger.waits, 50),
        wait_p99_ms: Ledger::percentile(&ledger.waits, 99),
        latency_p50_ms: Ledger::percentile(&ledger.latencies, 50),
        latency_p99_ms: Ledger::percentile(&ledger.latencies, 99),
    }
}

/// Says every second how it stands, for ever.
async fn tell(manager: &Manager) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        let of = |access| {
            let slots = manager.slots(access);
            format!("{}/{}", slots.busy, slots.total)
        };
        let classes: Vec<String> =
            manager.status().iter().map(|class| format!("{} {}+{}", class.class, class.running, class.waiting)).collect();
        eprintln!("reads {} writes {}; under way + waiting: {}", of(Access::Read), of(Access::Write), classes.join(", "));
    }
}
