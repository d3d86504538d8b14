//! A proxy before a MongoDB.
//!
//! With no arguments it stands before a MongoDB of its own and says where.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use mongo_core::{
    CancellationToken, ConnectOptions, Error, Result,
    mongodb::options::{ServerAddress, Tls},
};
use mongo_examples::{Host, cancel_on_interrupt, run};
use mongo_proxy::{ListenTls, Proxy, ProxyHandle, ProxySettings, RequestLog, Rules, Topology, UpstreamTls, router};

/// A guard at the door of a MongoDB: what is no message of its protocol does not get in, nor what the rules do not allow.
#[derive(Parser)]
#[command(
    name = "proxy",
    after_help = "Without --upstream it stands before an embedded MongoDB.

Clients connect with directConnection=true, with loadBalanced=true, or before a replica set (--replica-set) with replicaSet=NAME.

A file of rules, for example:
  { \"rules\": [
    { \"name\": \"nobody drops\", \"match\": { \"commands\": [\"drop\", \"dropDatabase\"] }, \"actions\": [{ \"deny\": \"unauthorized\" }] },
    { \"name\": \"each client\", \"actions\": [{ \"limit_rate\": { \"per_second\": 500, \"burst\": 100, \"key\": \"client\", \"wait_at_most\": 0.2 } }] }
  ] }
It is read again on SIGHUP, and certificates with it; what is not fit changes nothing."
)]
struct Cli {
    /// Where to listen; port 0 for any that is free. Before a replica set, where the first of its members is reached, and the others at the ports that follow
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: String,
    /// The server, as host:port or as a URI; of several hosts the first is taken, or all for a replica set
    #[arg(long, value_name = "U")]
    upstream: Option<String>,
    /// Stand before the whole replica set that the server belongs to
    #[arg(long)]
    replica_set: bool,
    /// The host by which clients reach the members through the proxy
    #[arg(long, value_name = "HOST", requires = "replica_set")]
    advertise: Option<String>,
    /// What clients may do, as JSON
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
    /// Only check the rules
    #[arg(long, requires = "rules")]
    check: bool,
    /// Where to show statistics, connections, requests and rules, and to take others: GET /health, /api/statistics, /api/connections, /api/requests, /api/rules; PUT /api/rules, /api/drain
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Log one request in so many, beside those that are refused; see /api/requests
    #[arg(long, value_name = "N", default_value_t = 0)]
    log_one_in: u64,
    /// Log requests that take longer than so many seconds
    #[arg(long, value_name = "S")]
    log_slower_than: Option<f64>,
    /// What clients are shown: a PEM file with a certificate and its key; without it they connect without TLS
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let rules = cli.rules.as_deref().map(read_rules).transpose()?.unwrap_or_default();
        if cli.check {
            eprintln!("{} rules, all fit", rules.rules.len());
            return Ok(ExitCode::SUCCESS);
        }
        // Kept: it ends with the program.
        let (_host, uri) = match cli.upstream {
            Some(upstream) if upstream.contains("://") => (None, upstream),
            Some(upstream) => (None, format!("mongodb://{upstream}/")),
            None => {
                let host = Host::at(None).await?;
                let uri = host.uri(None);
                (Some(host), uri)
            }
        };
        let mut log = RequestLog::default();
        log.one_in = cli.log_one_in;
        log.slower_than = cli
            .log_slower_than
            .map(Duration::try_from_secs_f64)
            .transpose()
            .map_err(|error| Error::invalid("--log-slower-than takes a number of seconds, as 0.5").with_source(error))?;
        let mut settings = before(&uri, cli.replica_set).await?.with_rules(rules).with_request_log(log);
        (settings.advertise, settings.listen_tls) = (cli.advertise, cli.certificate.map(ListenTls::new));
        let mut asks = "directConnection=true";
        if cli.replica_set {
            (settings.topology, asks) = (Topology::ReplicaSet, "replicaSet=NAME");
        }
        let upstream = settings.upstream.clone();
        let proxy = Proxy::bind(&cli.listen, settings).await?;
        let stop = cancel_on_interrupt();
        // It shows how the proxy drains, too.
        let stopped = CancellationToken::new();
        if let Some(admin) = &cli.admin {
            serve_admin(admin, proxy.handle(), stopped.clone()).await?;
        }
        read_again(cli.rules, proxy.handle())?;
        eprintln!("mongodb://{}/?{asks} stands before {upstream}; Ctrl-C stops it", proxy.address());
        for (member, shown) in proxy.handle().statistics().members {
            eprintln!("{member} is reached at {shown}");
        }
        proxy.run(&stop).await?;
        stopped.cancel();
        Ok(ExitCode::SUCCESS)
    })
}

/// For the first host of a URI, or for all, with TLS if it says so.
async fn before(uri: &str, replica_set: bool) -> Result<ProxySettings> {
    let options = ConnectOptions::from_uri(uri)?.to_client_options().await?;
    let hosts = options.hosts.iter().filter_map(|host| match host {
        ServerAddress::Tcp { host, port } => Some(format!("{host}:{}", port.unwrap_or(27017))),
        _ => None,
    });
    let hosts: Vec<String> = hosts.take(if replica_set { usize::MAX } else { 1 }).collect();
    if hosts.is_empty() {
        return Err(Error::invalid("--upstream needs a host and a port, as 127.0.0.1:27017"));
    }
    let settings = ProxySettings::new(hosts.join(","));
    let Some(Tls::Enabled(tls)) = options.tls else { return Ok(settings) };
    if tls.allow_invalid_certificates == Some(true) {
        return Err(Error::invalid("the proxy always checks whom it connects to: leave tlsAllowInvalidCertificates out"));
    }
    let mut upstream = UpstreamTls::default();
    (upstream.ca_file, upstream.certificate_file) = (tls.ca_file_path, tls.cert_key_file_path);
    Ok(settings.with_upstream_tls(upstream))
}

fn read_rules(file: &Path) -> Result<Rules> {
    let text = std::fs::read_to_string(file).map_err(|error| {
        Error::invalid("the file of rules cannot be read").with_context("file", file.display()).with_source(error)
    })?;
    Rules::from_json(&text).map_err(|error| error.with_context("file", file.display()))
}

/// Reads rules and certificates again whenever the process is told that they have changed.
fn read_again(rules: Option<PathBuf>, proxy: ProxyHandle) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut hangups =
        signal(SignalKind::hangup()).map_err(|error| Error::internal("SIGHUP cannot be listened for").with_source(error))?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            if let Err(error) = proxy.reload_certificates() {
                eprintln!("the certificates stay as they are: {}", error.report());
            }
            let Some(file) = &rules else { continue };
            match read_rules(file).and_then(|rules| proxy.set_rules(&rules)) {
                Ok(version) => eprintln!("version {version} of the rules is in force"),
                Err(error) => eprintln!("the rules stay as they are: {}", error.report()),
            }
        }
    });
    Ok(())
}

async fn serve_admin(listen: &str, proxy: ProxyHandle, stop: CancellationToken) -> Result<()> {
    let cannot = |error: std::io::Error| {
        Error::invalid("nothing can be served here: give another address with --admin")
            .with_context("address", listen)
            .with_source(error)
    };
    let listener = tokio::net::TcpListener::bind(listen).await.map_err(cannot)?;
    eprintln!("http://{}/api/statistics shows what it does", listener.local_addr().map_err(cannot)?);
    tokio::spawn(async move {
        let serving = axum::serve(listener, router(proxy)).with_graceful_shutdown(async move { stop.cancelled().await });
        if let Err(error) = serving.await {
            eprintln!("statistics are not shown any more: {error}");
        }
    });
    Ok(())
}
