//! From a URI, a builder or the environment to a deployment that answers.

mod environment;
mod uri;

use std::{fmt, path::PathBuf, time::Duration};

use mongodb::{
    Client, Database,
    bson::{Document, doc},
    options::{ClientOptions, Credential, ServerAddress, Tls, TlsOptions},
};

pub use uri::validate_uri;

use crate::{
    error::{Error, ErrorKind, Result},
    redact::{Secret, redact_uris},
};

/// How to reach a deployment.
///
/// Start from a URI ([`from_uri`](Self::from_uri)), from a host ([`from_host`](Self::from_host)) or from the
/// environment ([`from_env`](Self::from_env), the only function of the family that reads it); every setter overrides what the URI says.
/// `Debug` shows no password.
///
/// ```no_run
/// # async fn f() -> mongo_core::Result<()> {
/// use mongo_core::{ConnectOptions, connect};
///
/// let deployment = connect(ConnectOptions::from_uri("mongodb://app:secret@db.example/?replicaSet=rs0")?).await?;
/// println!("{} {}", deployment.topology(), deployment.server_version());
/// # Ok(()) }
/// ```
#[derive(Clone)]
#[must_use]
pub struct ConnectOptions {
    uri: Secret<String>,
    username: Option<String>,
    password: Option<Secret<String>>,
    auth_source: Option<String>,
    replica_set: Option<String>,
    tls: Option<bool>,
    ca_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    certificates_optional: bool,
    accept_invalid_certificates: bool,
    app_name: Option<String>,
    default_database: Option<String>,
    max_pool_size: Option<u32>,
    min_pool_size: Option<u32>,
    max_idle_time: Option<Duration>,
    connect_timeout: Option<Duration>,
    server_selection_timeout: Option<Duration>,
    direct: Option<bool>,
}

impl ConnectOptions {
    /// Options from a connection string, checked by [`validate_uri`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] naming the part that is wrong, never with the password.
    pub fn from_uri(uri: impl Into<String>) -> Result<Self> {
        let uri = uri.into();
        validate_uri(&uri)?;
        Ok(Self::new(uri))
    }

    /// Options for one host name or address.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if `host` is no host name.
    pub fn from_host(host: &str, port: u16) -> Result<Self> {
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
        Self::from_uri(format!("mongodb://{host}:{port}/"))
    }

    /// Options from the environment: `MONGO_URI`, or `MONGO_HOST` (default `localhost`) and `MONGO_PORT` (default 27017);
    /// on top of either `MONGO_DB`, `MONGO_USERNAME`, `MONGO_PASSWORD`, `MONGO_AUTH_SOURCE`, `MONGO_REPLICA_SET`,
    /// `MONGO_USE_SSL`, `MONGO_SSL_CERT_REQS` (`required`, `optional`, `none`), `MONGO_SSL_CA_CERTS`,
    /// `MONGO_MAX_POOL_SIZE`, `MONGO_MIN_POOL_SIZE`, `MONGO_MAX_IDLE_TIME_MS`, `MONGO_CONNECT_TIMEOUT_MS` and
    /// `MONGO_SERVER_SELECTION_TIMEOUT_MS`. Unset and empty variables change nothing.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] naming the variable.
    pub fn from_env() -> Result<Self> {
        environment::read(|name| std::env::var(name).ok())
    }

    /// The same from any look-up of variables, for hosts that keep them elsewhere.
    ///
    /// ```
    /// let options = mongo_core::ConnectOptions::from_variables(|name| match name {
    ///     "MONGO_HOST" => Some("db.example".to_owned()),
    ///     "MONGO_PASSWORD" => Some("secret".to_owned()),
    ///     "MONGO_USERNAME" => Some("app".to_owned()),
    ///     _ => None,
    /// })?;
    /// assert!(!format!("{options:?}").contains("secret"));
    /// # Ok::<(), mongo_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        environment::read(variable)
    }

    fn new(uri: String) -> Self {
        Self {
            uri: Secret::new(uri),
            username: None,
            password: None,
            auth_source: None,
            replica_set: None,
            tls: None,
            ca_file: None,
            client_certificate: None,
            certificates_optional: false,
            accept_invalid_certificates: false,
            app_name: None,
            default_database: None,
            max_pool_size: None,
            min_pool_size: None,
            max_idle_time: None,
            connect_timeout: None,
            server_selection_timeout: None,
            direct: None,
        }
    }

    /// Authenticates as `username`.
    pub fn with_credentials(mut self, username: impl Into<String>, password: impl Into<Secret<String>>) -> Self {
        self.username = Some(username.into());
        self.password = Some(password.into());
        self
    }

    /// Sets the database that holds the user. The server's default is `admin`, or the database in the URI.
    pub fn with_auth_source(mut self, database: impl Into<String>) -> Self {
        self.auth_source = Some(database.into());
        self
    }

    /// Expects the replica set to have this name.
    pub fn with_replica_set(mut self, name: impl Into<String>) -> Self {
        self.replica_set = Some(name.into());
        self
    }

    /// Turns TLS on, with the system's roots unless a CA file is given.
    pub fn with_tls(mut self) -> Self {
        self.tls = Some(true);
        self
    }

    /// Turns TLS on and trusts the authorities in this PEM file only.
    pub fn with_ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.tls = Some(true);
        self.ca_file = Some(path.into());
        self
    }

    /// Turns TLS on and presents the certificate and key in this PEM file.
    pub fn with_client_certificate(mut self, path: impl Into<PathBuf>) -> Self {
        self.tls = Some(true);
        self.client_certificate = Some(path.into());
        self
    }

    /// Accepts any server certificate: whoever sits between reads and changes everything, the password first.
    ///
    /// Without this call, options that turn verification off (`tlsInsecure`, `tlsAllowInvalidCertificates`,
    /// `MONGO_SSL_CERT_REQS=none`) are refused by [`connect`].
    pub fn danger_accept_invalid_certificates(mut self) -> Self {
        self.accept_invalid_certificates = true;
        self
    }

    /// Sets the name that the server shows in its logs and current operations. Default `mongo-core`.
    pub fn with_app_name(mut self, name: impl Into<String>) -> Self {
        self.app_name = Some(name.into());
        self
    }

    /// Sets the database that [`Deployment::default_database`] gives.
    pub fn with_default_database(mut self, name: impl Into<String>) -> Self {
        self.default_database = Some(name.into());
        self
    }

    /// Sets the most connections to one server. The driver's default is 10.
    pub fn with_max_pool_size(mut self, connections: u32) -> Self {
        self.max_pool_size = Some(connections);
        self
    }

    /// Sets the connections kept open to each server. Default 0.
    pub fn with_min_pool_size(mut self, connections: u32) -> Self {
        self.min_pool_size = Some(connections);
        self
    }

    /// Closes connections that were idle for this long. Default: never.
    pub fn with_max_idle_time(mut self, time: Duration) -> Self {
        self.max_idle_time = Some(time);
        self
    }

    /// Sets how long one connection may take to come up. The driver's default is 10 s.
    pub fn with_connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// Sets how long to look for a suitable server. The driver's default is 30 s.
    pub fn with_server_selection_timeout(mut self, timeout: Duration) -> Self {
        self.server_selection_timeout = Some(timeout);
        self
    }

    /// Talks to exactly the server named and to no other member of its set.
    pub fn with_direct_connection(mut self) -> Self {
        self.direct = Some(true);
        self
    }

    /// The driver's options: for hosts that make the client themselves.
    ///
    /// Resolves SRV records where the URI asks for it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what the driver refuses, and when certificate verification is off without
    /// [`danger_accept_invalid_certificates`](Self::danger_accept_invalid_certificates);
    /// [`ErrorKind::Unavailable`] when name resolution fails.
    pub async fn to_client_options(&self) -> Result<ClientOptions> {
        let mut options = ClientOptions::parse(self.uri.expose()).await.map_err(|error| {
            let error = Error::from(error);
            // What the driver quotes of a URI may be the very part that was a password.
            Error::new(error.kind(), redact_uris(&error.to_string())).with_context("uri", redact_uris(self.uri.expose()))
        })?;
        if let (Some(username), Some(password)) = (&self.username, &self.password) {
            let mut credential = options.credential.take().unwrap_or_else(|| Credential::builder().build());
            credential.username = Some(username.clone());
            credential.password = Some(password.expose().clone());
            options.credential = Some(credential);
        }
        if let (Some(source), Some(credential)) = (&self.auth_source, &mut options.credential) {
            credential.source = Some(source.clone());
        }
        self.set_tls(&mut options)?;
        options.app_name = self.app_name.clone().or(options.app_name).or_else(|| Some("mongo-core".to_owned()));
        options.default_database = self.default_database.clone().or(options.default_database);
        options.repl_set_name = self.replica_set.clone().or(options.repl_set_name);
        options.max_pool_size = self.max_pool_size.or(options.max_pool_size);
        options.min_pool_size = self.min_pool_size.or(options.min_pool_size);
        options.max_idle_time = self.max_idle_time.or(options.max_idle_time);
        options.connect_timeout = self.connect_timeout.or(options.connect_timeout);
        options.server_selection_timeout = self.server_selection_timeout.or(options.server_selection_timeout);
        options.direct_connection = self.direct.or(options.direct_connection);
        if options.min_pool_size.zip(options.max_pool_size).is_some_and(|(min, max)| max > 0 && min > max) {
            return Err(Error::invalid("the minimum pool size is above the maximum: lower one or raise the other"));
        }
        Ok(options)
    }

    fn set_tls(&self, options: &mut ClientOptions) -> Result<()> {
        if self.tls == Some(true) || self.ca_file.is_some() || self.client_certificate.is_some() {
            let mut tls = match options.tls.take() {
                Some(Tls::Enabled(tls)) => tls,
                _ => TlsOptions::default(),
            };
            tls.ca_file_path = self.ca_file.clone().or(tls.ca_file_path);
            tls.cert_key_file_path = self.client_certificate.clone().or(tls.cert_key_file_path);
            options.tls = Some(Tls::Enabled(tls));
        } else if self.tls == Some(false) {
            options.tls = Some(Tls::Disabled);
        }
        let Some(Tls::Enabled(tls)) = &mut options.tls else { return Ok(()) };
        for path in [&tls.ca_file_path, &tls.cert_key_file_path].into_iter().flatten() {
            std::fs::File::open(path).map_err(|error| {
                Error::invalid("a TLS file cannot be read: correct the path or its permissions")
                    .with_context("file", path.display())
                    .with_source(error)
            })?;
        }
        // `tlsInsecure` sets the same field; `tlsAllowInvalidHostnames` alone has no effect with rustls: names are verified.
        let verification_off = self.certificates_optional || tls.allow_invalid_certificates == Some(true);
        if self.accept_invalid_certificates {
            tls.allow_invalid_certificates = Some(true);
        } else if verification_off {
            return Err(Error::invalid(
                "certificate verification is off: give a CA file, or call danger_accept_invalid_certificates if you mean it",
            ));
        }
        Ok(())
    }
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("uri", &redact_uris(self.uri.expose()))
            .field("username", &self.username)
            .field("replica_set", &self.replica_set)
            .field("tls", &self.tls)
            .field("app_name", &self.app_name)
            .finish_non_exhaustive()
    }
}

/// What kind of deployment answered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Topology {
    /// One server without replication: no oplog, no snapshot reads.
    Standalone,
    /// A replica set, by name.
    ReplicaSet(String),
    /// A sharded cluster behind a mongos.
    Sharded,
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standalone => f.write_str("standalone"),
            Self::ReplicaSet(name) => write!(f, "replica set {name}"),
            Self::Sharded => f.write_str("sharded cluster"),
        }
    }
}

/// A server's version, ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ServerVersion {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number.
    pub patch: u32,
}

impl ServerVersion {
    /// A version from its numbers.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Reads `buildInfo.version`, for example `6.0.5` or `8.0.0-rc1`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(['.', '-', '+']).map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        Some(Self { major: next()?, minor: next()?, patch: next().unwrap_or(0) })
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A deployment that answered: the driver's client, and what the server said of itself.
///
/// Clones share the client. The client belongs to the tokio runtime in which [`connect`] ran.
#[derive(Clone, Debug)]
pub struct Deployment {
    client: Client,
    topology: Topology,
    version: ServerVersion,
    hosts: Vec<ServerAddress>,
    default_database: Option<String>,
    max_bson_bytes: usize,
}

impl Deployment {
    /// Learns what it needs about the deployment behind a client that the host made itself.
    ///
    /// Runs `hello` and `buildInfo`, which need no privilege.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when no server can be selected in time, [`ErrorKind::Unauthorized`] when
    /// authentication fails, [`ErrorKind::Unsupported`] for servers older than 4.2.
    pub async fn from_client(client: Client) -> Result<Self> {
        let admin = client.database("admin");
        // `hello` exists from 4.4.2 and 4.2.10 on; older ones fail with CommandNotFound.
        let hello = admin.run_command(doc! { "hello": 1 }).await.map_err(first_contact)?;
        let build = admin.run_command(doc! { "buildInfo": 1 }).await?;
        let version = build
            .get_str("version")
            .ok()
            .and_then(ServerVersion::parse)
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "the server does not tell its version"))?;
        Ok(Self {
            topology: topology_of(&hello),
            version,
            hosts: Vec::new(),
            default_database: client.default_database().map(|database| database.name().to_owned()),
            max_bson_bytes: usize::try_from(integer(&hello, "maxBsonObjectSize").unwrap_or(0))
                .ok()
                .filter(|size| *size > 0)
                .unwrap_or(16 << 20),
            client,
        })
    }

    /// The driver's client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A database of it.
    pub fn database(&self, name: &str) -> Database {
        self.client.database(name)
    }

    /// The database that the options or the URI name.
    pub fn default_database(&self) -> Option<Database> {
        self.default_database.as_deref().map(|name| self.client.database(name))
    }

    /// What kind of deployment it is.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The version of the server that was asked first.
    pub fn server_version(&self) -> ServerVersion {
        self.version
    }

    /// The seed addresses, for messages.
    pub fn hosts(&self) -> &[ServerAddress] {
        &self.hosts
    }

    /// The largest document that the server takes, in bytes.
    pub fn max_bson_bytes(&self) -> usize {
        self.max_bson_bytes
    }

    /// Whether reads can be made at one chosen cluster time outside transactions: replica sets and sharded clusters from 5.0 on.
    pub fn can_read_snapshots(&self) -> bool {
        self.topology != Topology::Standalone && self.version >= ServerVersion::new(5, 0, 0)
    }
}

/// Connects, authenticates and asks the deployment what it is.
///
/// # Errors
/// Those of [`ConnectOptions::to_client_options`] and [`Deployment::from_client`]. An unreachable host is reported
/// within the server selection timeout.
///
/// # Cancel safety
/// Dropping the future drops the client; its background tasks end by themselves.
///
/// # Examples
/// ```no_run
/// # async fn f() -> mongo_core::Result<()> {
/// let deployment = mongo_core::connect(mongo_core::ConnectOptions::from_env()?).await?;
/// # Ok(()) }
/// ```
#[tracing::instrument(skip_all, name = "connect")]
pub async fn connect(options: ConnectOptions) -> Result<Deployment> {
    let client_options = options.to_client_options().await?;
    let hosts = client_options.hosts.clone();
    let deployment = Deployment::from_client(Client::with_options(client_options)?).await;
    match deployment {
        Ok(deployment) => Ok(Deployment { hosts, ..deployment }),
        Err(error) => {
            let hosts: Vec<_> = hosts.iter().map(ToString::to_string).collect();
            Err(error.with_context("hosts", hosts.join(",")))
        }
    }
}

/// The driver reports a failed authentication of the first connection as a network or command error.
fn first_contact(error: mongodb::error::Error) -> Error {
    let error = Error::from(error);
    match error.server_code() {
        Some(59) => Error::new(ErrorKind::Unsupported, "the server is too old: 4.2.10 or newer is needed").with_source(error),
        _ => error,
    }
}

fn topology_of(hello: &Document) -> Topology {
    if hello.get_str("msg").is_ok_and(|msg| msg == "isdbgrid") {
        return Topology::Sharded;
    }
    match hello.get_str("setName") {
        Ok(name) => Topology::ReplicaSet(name.to_owned()),
        Err(_) => Topology::Standalone,
    }
}

/// The code of an error within a reply; 0 if the server sent none.
pub(crate) fn error_code(error: &Document) -> i32 {
    integer(error, "code").and_then(|code| i32::try_from(code).ok()).unwrap_or(0)
}

/// A number of any BSON numeric type: servers differ in which one they send.
pub(crate) fn integer(document: &Document, key: &str) -> Option<i64> {
    match document.get(key)? {
        bson::Bson::Int32(number) => Some(i64::from(*number)),
        bson::Bson::Int64(number) => Some(*number),
        #[expect(clippy::cast_possible_truncation, reason = "statistics sent as doubles are whole numbers")]
        bson::Bson::Double(number) if number.is_finite() => Some(*number as i64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_and_read_with_suffixes() {
        assert_eq!(ServerVersion::parse("8.0.0-rc1"), Some(ServerVersion::new(8, 0, 0)));
        assert!(ServerVersion::parse("6.0.27") > ServerVersion::parse("6.0.5"));
        assert_eq!(ServerVersion::parse("unknown"), None);
    }

    #[tokio::test]
    async fn verification_is_only_switched_off_by_saying_so() {
        let uri = "mongodb://localhost/?tls=true&tlsAllowInvalidCertificates=true";
        let error = ConnectOptions::from_uri(uri).unwrap().to_client_options().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        insta::assert_snapshot!(error, @"certificate verification is off: give a CA file, or call danger_accept_invalid_certificates if you mean it");
        let accepted = ConnectOptions::from_uri(uri).unwrap().danger_accept_invalid_certificates();
        assert!(accepted.to_client_options().await.is_ok());
    }

    #[tokio::test]
    async fn setters_override_the_uri() {
        let options = ConnectOptions::from_uri("mongodb://a:b@h/?maxPoolSize=3&appName=x")
            .unwrap()
            .with_credentials("user", "pass")
            .with_auth_source("other")
            .with_max_pool_size(7)
            .with_server_selection_timeout(Duration::from_millis(5))
            .to_client_options()
            .await
            .unwrap();
        let credential = options.credential.unwrap();
        assert_eq!(credential.username.as_deref(), Some("user"));
        assert_eq!(credential.password.as_deref(), Some("pass"));
        assert_eq!(credential.source.as_deref(), Some("other"));
        assert_eq!(options.max_pool_size, Some(7));
        assert_eq!(options.app_name.as_deref(), Some("x"));
    }

    #[test]
    fn debug_shows_no_password() {
        let options = ConnectOptions::from_uri("mongodb://app:hunter2@h/").unwrap().with_credentials("u", "swordfish");
        let shown = format!("{options:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("swordfish"), "{shown}");
    }
}
