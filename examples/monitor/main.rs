//! A small monitor: what every member of a deployment is doing, once, again and again, or over HTTP.
//!
//! With no arguments it looks once at a MongoDB of its own.

mod table;

use std::{io::IsTerminal as _, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use mongo_core::{ConnectOptions, Error, Result};
use mongo_examples::{Host, cancel_on_interrupt, print_json, run};
use mongo_monitor::{
    Alert, AlertSink, Alerts, FailoverEvent, FailoverSink, MemberView, Monitor, MonitorSettings, default_rules, router,
};

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
    /// Serve a dashboard, /health, /ready, /metrics, /api/replication/status and /api/dashboard over HTTP, until interrupted
    Serve {
        /// Where to listen
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9216")]
        listen: String,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let interval = Duration::try_from_secs_f64(cli.interval)
            .map_err(|error| Error::invalid("--interval takes seconds, as 10 or 0.5").with_source(error))?;
        // Somebody who names a deployment wants to know what is wrong with it, also if it is all down.
        let embedded = match &cli.uri {
            None => Some(Host::at(None).await?),
            Some(_) => None,
        };
        let uri = embedded.as_ref().map_or_else(|| cli.uri.clone().unwrap_or_default(), |host| host.uri(None));
        let mut settings = MonitorSettings::default();
        settings.interval = interval;
        let monitor = Monitor::start(ConnectOptions::from_uri(uri)?, settings.clone()).await?;
        monitor.alert(Alerts::new(default_rules(&settings))?.with_sink(Arc::new(ToTerminal)));
        monitor.tell_failovers(Arc::new(ToTerminal));
        let is_up = match cli.command.unwrap_or(Command::Once { open_metrics: false }) {
            Command::Once { open_metrics } => once(monitor, cli.json, open_metrics).await?,
            Command::Watch => watch(monitor, interval, cli.json).await?,
            Command::Serve { listen } => serve(monitor, &listen).await?,
        };
        Ok(if is_up { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// Whether anybody is up.
async fn once(monitor: Monitor, json: bool, open_metrics: bool) -> Result<bool> {
    monitor.sampled().await;
    let view = monitor.view();
    if json {
        print_json(&view)?;
    } else if open_metrics {
        print!("{}", view.to_open_metrics());
    } else {
        print!("{}", table::of(&monitor, Duration::ZERO));
    }
    monitor.stop().await;
    Ok(view.members.iter().any(MemberView::is_up))
}

async fn watch(monitor: Monitor, interval: Duration, json: bool) -> Result<bool> {
    monitor.sampled().await;
    let stop = cancel_on_interrupt();
    let mut ticks = tokio::time::interval(interval);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {}
        }
        if json {
            let line = serde_json::to_string(&monitor.view())
                .map_err(|error| Error::internal("what was read cannot be written as JSON").with_source(error))?;
            println!("{line}");
            continue;
        }
        if std::io::stdout().is_terminal() {
            // Clears the screen, and begins at its top.
            print!("\x1b[2J\x1b[H");
        }
        // Long enough for the rate of two readings, whichever way they fall.
        print!("{}", table::of(&monitor, interval * 3));
        println!("{}", table::of_alerts(&monitor.alerts()));
    }
    monitor.stop().await;
    Ok(true)
}

async fn serve(monitor: Monitor, listen: &str) -> Result<bool> {
    let cannot = |error: std::io::Error| {
        Error::invalid("nothing can be served here: give another address with --listen")
            .with_context("address", listen)
            .with_source(error)
    };
    let listener = tokio::net::TcpListener::bind(listen).await.map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?;
    eprintln!(
        "serving http://{address}/dashboard, /metrics, /health, /ready, /api/replication/status and /api/dashboard; interrupt to end"
    );
    let stop = cancel_on_interrupt();
    let server = axum::serve(listener, router(Arc::new(monitor))).with_graceful_shutdown(async move { stop.cancelled().await });
    server.await.map_err(cannot)?;
    Ok(true)
}

/// Tells alerts and failovers as they come, on standard error.
#[derive(Debug)]
struct ToTerminal;

impl AlertSink for ToTerminal {
    fn tell(&self, news: &[Alert]) {
        eprint!("{}", table::of_alerts(news));
    }
}

impl FailoverSink for ToTerminal {
    fn tell_failover(&self, event: &FailoverEvent) {
        eprintln!("{}  {}", event.at.try_to_rfc3339_string().unwrap_or_default(), event.summary);
    }
}
