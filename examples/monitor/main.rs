//! A small monitor: what every member of a deployment is doing, once or again and again.
//!
//! With no arguments it looks once at a MongoDB of its own.

mod table;

use std::{io::IsTerminal as _, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use mongo_core::{ConnectOptions, Result};
use mongo_examples::{Host, cancel_on_interrupt, print_json, run};
use mongo_monitor::{Alerts, Monitor, MonitorSettings, default_rules};

/// What every member of a MongoDB is doing.
#[derive(Parser)]
#[command(
    name = "monitor",
    after_help = "Without --uri it looks at an embedded MongoDB. The role clusterMonitor is enough; whoever lacks it sees who is up."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// The deployment to look at
    #[arg(long, global = true, value_name = "URI")]
    uri: Option<String>,
    /// How often to look
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10.0)]
    interval: f64,
    /// Print every reading as JSON on standard output; for watch, one document a line
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Look once
    Once {
        /// Print every reading as text for Prometheus
        #[arg(long, conflicts_with = "json")]
        open_metrics: bool,
    },
    /// Look again and again, until interrupted
    Watch,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let interval = Duration::try_from_secs_f64(cli.interval)
            .map_err(|error| mongo_core::Error::invalid("--interval takes seconds, as 10 or 0.5").with_source(error))?;
        // Somebody who names a deployment wants to know what is wrong with it, also if it is all down.
        let embedded = match &cli.uri {
            None => Some(Host::at(None).await?),
            Some(_) => None,
        };
        let uri = embedded.as_ref().map_or_else(|| cli.uri.clone().unwrap_or_default(), |host| host.uri(None));
        let mut settings = MonitorSettings::default();
        settings.interval = interval;
        let monitor = Monitor::start(ConnectOptions::from_uri(uri)?, settings).await?;
        monitor.sampled().await;
        let is_up = match cli.command.unwrap_or(Command::Once { open_metrics: false }) {
            Command::Once { open_metrics } => once(&monitor, cli.json, open_metrics)?,
            Command::Watch => watch(&monitor, interval, cli.json).await?,
        };
        monitor.stop().await;
        Ok(if is_up { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// Whether anybody is up.
fn once(monitor: &Monitor, json: bool, open_metrics: bool) -> Result<bool> {
    let view = monitor.view();
    if json {
        print_json(&view)?;
    } else if open_metrics {
        print!("{}", view.to_open_metrics());
    } else {
        print!("{}", table::of(monitor, Duration::ZERO));
    }
    Ok(view.members.iter().any(|member| member.number("mongodb_up", &[]) == Some(1.0)))
}

async fn watch(monitor: &Monitor, interval: Duration, json: bool) -> Result<bool> {
    let stop = cancel_on_interrupt();
    let mut settings = MonitorSettings::default();
    settings.interval = interval;
    let mut alerts = Alerts::new(default_rules(&settings))?;
    let mut ticks = tokio::time::interval(interval);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(true),
            _ = ticks.tick() => {}
        }
        alerts.evaluate(monitor);
        if json {
            let line = serde_json::to_string(&monitor.view())
                .map_err(|error| mongo_core::Error::internal("what was read cannot be written as JSON").with_source(error))?;
            println!("{line}");
            continue;
        }
        if std::io::stdout().is_terminal() {
            // Clears the screen, and begins at its top.
            print!("\x1b[2J\x1b[H");
        }
        // Long enough for the rate of two readings, whichever way they fall.
        print!("{}", table::of(monitor, interval * 3));
        println!("{}", table::of_alerts(&alerts.active()));
    }
}
