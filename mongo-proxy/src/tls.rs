//! TLS towards clients and towards the server.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use mongo_core::{Error, Result, lock};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::stream::Stream;

/// What the proxy shows to its clients. They see this certificate and not the server's; SCRAM and the other ways to log in pass through all the same, but not X.509, for which the server would have to see the
/// client's own.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenTls {
    /// A PEM file with the certificate and those that it needs, and its key.
    pub certificate_file: PathBuf,
}

impl ListenTls {
    /// With the certificate, those that it needs, and its key in this PEM file, as mongod's own `certificateKeyFile`.
    pub fn new(certificate_file: impl Into<PathBuf>) -> Self {
        Self { certificate_file: certificate_file.into() }
    }
}

/// How the proxy knows its server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UpstreamTls {
    /// A PEM file with the authorities that are trusted. Default: those that the machine trusts.
    pub ca_file: Option<PathBuf>,
    /// The name in the server's certificate. Default: the host by which it is connected to.
    pub server_name: Option<String>,
    /// A PEM file with a certificate and its key, for a server that wants one of each client. Needs `ca_file`.
    pub certificate_file: Option<PathBuf>,
}

impl UpstreamTls {
    /// Trusts only the authorities in this PEM file.
    #[must_use]
    pub fn with_ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// Expects this name in the server's certificate.
    #[must_use]
    pub fn with_server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Shows the certificate in this PEM file.
    #[must_use]
    pub fn with_certificate_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.certificate_file = Some(path.into());
        self
    }
}

/// Takes TLS connections of clients.
#[derive(Debug)]
pub(crate) struct Listening {
    file: PathBuf,
    config: RwLock<Arc<ServerConfig>>,
}

impl Listening {
    pub(crate) fn new(tls: &ListenTls) -> Result<Self> {
        Ok(Self { file: tls.certificate_file.clone(), config: RwLock::new(listening(&tls.certificate_file)?) })
    }

    /// Reads the file again, for the connections to come; what clients remember of the old certificate is forgotten with it. If the file is not fit, all stays as it is.
    pub(crate) fn reload(&self) -> Result<()> {
        let config = listening(&self.file)?;
        *lock::write(&self.config) = config;
        Ok(())
    }

    pub(crate) async fn accept(&self, client: TcpStream) -> io::Result<Stream> {
        let config = Arc::clone(&lock::read(&self.config));
        let stream = TlsAcceptor::from(config).accept(client).await?;
        Ok(Stream::Tls(Box::new(stream.into())))
    }
}

fn listening(file: &Path) -> Result<Arc<ServerConfig>> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(without_tls)?
        .with_no_client_auth()
        .with_single_cert(certificates(file)?, key(file)?)
        .map_err(|error| unfit(file, "the key is not that of the certificate").with_source(error))?;
    Ok(Arc::new(config))
}

/// Makes TLS connections to the server.
pub(crate) struct Connecting {
    tls: UpstreamTls,
    config: RwLock<Arc<ClientConfig>>,
    /// The name of every server, if it is given.
    name: Option<ServerName<'static>>,
}

impl std::fmt::Debug for Connecting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connecting").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Connecting {
    pub(crate) fn new(tls: &UpstreamTls) -> Result<Self> {
        let name = tls.server_name.as_ref().map(|name| {
            ServerName::try_from(name.clone()).map_err(|error| {
                Error::invalid("no server has this name: correct server_name").with_context("name", name).with_source(error)
            })
        });
        let name = name.transpose()?;
        Ok(Self { config: RwLock::new(connecting(tls)?), tls: tls.clone(), name })
    }

    /// Reads the files again, for the connections to come. If they are not fit, all stays as it is.
    pub(crate) fn reload(&self) -> Result<()> {
        let config = connecting(&self.tls)?;
        *lock::write(&self.config) = config;
        Ok(())
    }

    pub(crate) async fn connect(&self, server: TcpStream, upstream: &str) -> io::Result<Stream> {
        // An IPv6 address is in brackets.
        let host = || upstream.rsplit_once(':').map_or(upstream, |(host, _)| host).trim_matches(['[', ']']).to_owned();
        let name = match &self.name {
            Some(name) => name.clone(),
            None => ServerName::try_from(host()).map_err(io::Error::other)?,
        };
        let config = Arc::clone(&lock::read(&self.config));
        let stream = TlsConnector::from(config).connect(name, server).await?;
        Ok(Stream::Tls(Box::new(stream.into())))
    }
}

fn connecting(tls: &UpstreamTls) -> Result<Arc<ClientConfig>> {
    let mut config = match &tls.ca_file {
        None if tls.certificate_file.is_none() => mongo_core::tls::client_config()?,
        ca_file => {
            let mut roots = RootCertStore::empty();
            for certificate in ca_file.iter().map(|file| certificates(file)).collect::<Result<Vec<_>>>()?.into_iter().flatten() {
                roots
                    .add(certificate)
                    .map_err(|error| Error::invalid("the authorities' file holds no authority").with_source(error))?;
            }
            if roots.is_empty() {
                return Err(Error::invalid(
                    "a certificate of one's own is shown only to who is known by an authority: set ca_file, too",
                ));
            }
            let config = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(without_tls)?
                .with_root_certificates(roots);
            match &tls.certificate_file {
                None => config.with_no_client_auth(),
                Some(file) => config
                    .with_client_auth_cert(certificates(file)?, key(file)?)
                    .map_err(|error| unfit(file, "the key is not that of the certificate").with_source(error))?,
            }
        }
    };
    // A server that was replaced has to show its certificate again.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| unfit(file, "certificates cannot be read").with_source(error))?;
    if certificates.is_empty() { Err(unfit(file, "there is no certificate in the file")) } else { Ok(certificates) }
}

fn key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(file).map_err(|error| unfit(file, "there is no key in the file").with_source(error))
}

fn unfit(file: &Path, why: &'static str) -> Error {
    Error::invalid(why).with_context("file", file.display())
}

fn without_tls(error: rustls::Error) -> Error {
    Error::internal("TLS cannot be set up").with_source(error)
}
