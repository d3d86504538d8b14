//! A proxy before a MongoDB.
//!
//! With no arguments it stands before a MongoDB of its own and says where.

use std::process::ExitCode;

use clap::Parser;
use mongo_core::{
    ConnectOptions, Error, Result,
    mongodb::options::{ServerAddress, Tls},
};
use mongo_examples::{Host, cancel_on_interrupt, run};
use mongo_proxy::{Proxy, ProxySettings, UpstreamTls};

/// A guard at the door of a MongoDB: what is no message of its protocol does not get in.
#[derive(Parser)]
#[command(
    name = "proxy",
    after_help = "Clients connect with directConnection=true. Without --upstream it stands before an embedded MongoDB."
)]
struct Cli {
    /// Where to listen; port 0 for any that is free
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: String,
    /// The server, as host:port or as a URI, of which the first host is taken
    #[arg(long, value_name = "U")]
    upstream: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
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
        let settings = before(&uri).await?;
        let upstream = settings.upstream.clone();
        let proxy = Proxy::bind(&cli.listen, settings).await?;
        eprintln!("mongodb://{}/?directConnection=true stands before {upstream}; Ctrl-C stops it", proxy.address());
        proxy.run(&cancel_on_interrupt()).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// For the first host of a URI, with TLS if it says so.
async fn before(uri: &str) -> Result<ProxySettings> {
    let options = ConnectOptions::from_uri(uri)?.to_client_options().await?;
    let host = options.hosts.iter().find_map(|host| match host {
        ServerAddress::Tcp { host, port } => Some(format!("{host}:{}", port.unwrap_or(27017))),
        _ => None,
    });
    let host = host.ok_or_else(|| Error::invalid("--upstream needs a host and a port, as 127.0.0.1:27017"))?;
    let settings = ProxySettings::new(host);
    let Some(Tls::Enabled(tls)) = options.tls else { return Ok(settings) };
    if tls.allow_invalid_certificates == Some(true) {
        return Err(Error::invalid("the proxy always checks whom it connects to: leave tlsAllowInvalidCertificates out"));
    }
    let mut upstream = UpstreamTls::default();
    (upstream.ca_file, upstream.certificate_file) = (tls.ca_file_path, tls.cert_key_file_path);
    Ok(settings.with_upstream_tls(upstream))
}
