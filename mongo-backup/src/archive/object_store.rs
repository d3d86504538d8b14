//! An archive in a bucket: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

use std::{fmt, ops::Range, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use mongo_core::{Error, ErrorKind, Result};
use object_store::{
    GetOptions, ObjectStore, ObjectStoreExt as _, ObjectStoreScheme, PutOptions, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    client::{ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    path::Path,
};
use tokio::sync::OnceCell;
use url::Url;

use super::{ArchiveSink, ObjectMeta, ObjectName, PutMode, PutOutcome, not_found, past_the_end};

/// Keeps each object under a prefix of a bucket.
///
/// Create-only is the store's own conditional put (`If-None-Match: *`, on Google `x-goog-if-generation-match: 0`). Before the first one it is
/// tried on an object named `probe-…`, which is deleted again: a store that overlooks the condition is refused, for two
/// hosts could then destroy each other's snapshots. [`unconditional`](Self::unconditional) accepts such a store.
///
/// What the store answers with 408, 429 or 5xx, and what breaks on the way, is tried again for up to a minute; after that the
/// error is `Unavailable`.
///
/// ```no_run
/// # fn f() -> mongo_backup::Result<()> {
/// use mongo_backup::ObjectStoreArchive;
///
/// let archive = ObjectStoreArchive::from_env("s3://backups/mongo")?;
/// let minio = ObjectStoreArchive::new(
///     "s3://backups/mongo",
///     [("endpoint", "http://10.0.0.7:9000"), ("access_key_id", "backup"), ("secret_access_key", "…"), ("region", "us-east-1")],
/// )?;
/// # let _ = (archive, minio);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct ObjectStoreArchive {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    description: String,
    conditional: Condition,
}

#[derive(Clone)]
enum Condition {
    /// The store's conditional put, once it was tried.
    Probed(Arc<OnceCell<()>>),
    /// A look before the put.
    Unconditional,
}

impl fmt::Debug for ObjectStoreArchive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectStoreArchive").field("at", &self.description).finish_non_exhaustive()
    }
}

impl ObjectStoreArchive {
    /// The bucket and prefix at `url` (`s3://bucket/prefix`, `gs://…`, `az://container/…`), with these options.
    ///
    /// Options have the names of the `object_store` crate: `endpoint`, `region`, `access_key_id`, `secret_access_key`, `service_account`,
    /// `account_name`, `account_key` and so on. The environment is not read. Nothing is asked of the store yet.
    ///
    /// # Errors
    /// `InvalidInput` for a URL of another kind, an unknown option, or options that do not make sense together.
    pub fn new<K: AsRef<str>, V: Into<String>>(url: &str, options: impl IntoIterator<Item = (K, V)>) -> Result<Self> {
        Self::build(url, Origin::Given, options)
    }

    /// As [`new`](Self::new), with what the environment says: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`,
    /// `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY` and their siblings.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_env(url: &str) -> Result<Self> {
        Self::build::<&str, &str>(url, Origin::Environment, [])
    }

    /// Accepts a store that has no conditional put: create-only is then a look before the put.
    ///
    /// Two hosts that create the same object at the same time can then both believe that they did. Let one host at a time back up and prune.
    #[must_use]
    pub fn unconditional(mut self) -> Self {
        self.conditional = Condition::Unconditional;
        self
    }

    fn build<K: AsRef<str>, V: Into<String>>(
        url: &str,
        origin: Origin,
        options: impl IntoIterator<Item = (K, V)>,
    ) -> Result<Self> {
        // A query can be a signature.
        let description = mongo_core::redact_uris(url.split(['?', '#']).next().unwrap_or_default());
        let wrong = |what: String| Error::invalid(what).with_context("url", &description);
        let parsed = Url::parse(url).map_err(|error| wrong("this is no URL of a bucket".to_owned()).with_source(error))?;
        let (scheme, prefix) = ObjectStoreScheme::parse(&parsed)
            .map_err(|error| wrong("this is no URL of a bucket: give s3://, gs:// or az://".to_owned()).with_source(error))?;
        let options: Vec<(String, String)> =
            options.into_iter().map(|(key, value)| (key.as_ref().to_ascii_lowercase(), value.into())).collect();
        let unknown = |key: &str| wrong(format!("the store knows of no option {key}: check its spelling"));
        let misconfigured = |error: object_store::Error| {
            wrong("the store cannot be used with these options".to_owned()).with_source(error.to_string())
        };
        // Each builder has its own types of keys.
        macro_rules! configure {
            ($builder:ident, $key:ty) => {{
                let builder = match origin {
                    Origin::Given => $builder::new(),
                    Origin::Environment => $builder::from_env(),
                };
                let mut builder = builder.with_url(url).with_http_connector(Connector).with_retry(retries());
                for (key, value) in options {
                    builder = builder.with_config(key.parse::<$key>().map_err(|_| unknown(&key))?, value);
                }
                Arc::new(builder.build().map_err(misconfigured)?) as Arc<dyn ObjectStore>
            }};
        }
        let store = match scheme {
            ObjectStoreScheme::AmazonS3 => configure!(AmazonS3Builder, AmazonS3ConfigKey),
            ObjectStoreScheme::GoogleCloudStorage => configure!(GoogleCloudStorageBuilder, GoogleConfigKey),
            ObjectStoreScheme::MicrosoftAzure => configure!(MicrosoftAzureBuilder, AzureConfigKey),
            _ => return Err(wrong("this is no URL of a bucket: give s3://, gs:// or az://".to_owned())),
        };
        Ok(Self { store, prefix, description, conditional: Condition::Probed(Arc::default()) })
    }

    fn path(&self, name: &str) -> Result<Path> {
        let full = if self.prefix.as_ref().is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) };
        Path::parse(full).map_err(|error| Error::internal("an object's name is no path").with_source(error))
    }

    /// Makes sure, once, that the store honours a conditional put.
    async fn probe(&self) -> Result<()> {
        let Condition::Probed(probed) = &self.conditional else { return Ok(()) };
        let probe = async {
            let mut random = [0; 12];
            getrandom::fill(&mut random).map_err(|error| Error::internal(format!("no randomness to be had: {error}")))?;
            let name = ObjectName::new(format!("probe-{}", hex::encode(random)))?;
            let first = self.create(&name, Bytes::from_static(b"1")).await;
            let second = self.create(&name, Bytes::from_static(b"2")).await;
            let deleted = self.delete(&name).await;
            match (first, second) {
                (Ok(_), Ok(PutOutcome::AlreadyExists)) => deleted,
                (Err(error), _) | (_, Err(error)) => Err(error),
                _ => Err(Error::new(
                    ErrorKind::Unsupported,
                    "the store overlooks the condition of a conditional put, so hosts could overwrite each other's objects: use another store, or accept it as unconditional with one host at a time",
                )
                .with_context("archive", self.describe())),
            }
        };
        probed.get_or_try_init(|| probe).await.copied()
    }

    /// Creates an object by a conditional put.
    async fn create(&self, name: &ObjectName, bytes: Bytes) -> Result<PutOutcome> {
        let path = self.path(name.as_str())?;
        for _ in 0..CONFLICTS {
            let put = self.store.put_opts(&path, bytes.clone().into(), PutOptions::from(object_store::PutMode::Create)).await;
            match put {
                Ok(_) => return Ok(PutOutcome::Stored),
                // S3 answers 409 also while another request for the name is under way, and then there may be nothing.
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                    match self.store.head(&path).await {
                        Ok(_) => return Ok(PutOutcome::AlreadyExists),
                        Err(object_store::Error::NotFound { .. }) => {}
                        Err(error) => return Err(self.wrong(error, name.as_str())),
                    }
                }
                Err(error) => return Err(self.wrong(error, name.as_str())),
            }
        }
        Err(Error::new(ErrorKind::Unavailable, "the store is busy with other requests for this object: try again later")
            .with_context("object", name))
    }

    fn wrong(&self, error: object_store::Error, name: &str) -> Error {
        use object_store::Error as Store;
        let (kind, what) = match &error {
            Store::NotFound { .. } => (ErrorKind::NotFound, "the archive has no such object"),
            Store::PermissionDenied { .. } => {
                (ErrorKind::Unauthorized, "the store denies this: grant the credentials to list, read, write and delete there")
            }
            Store::Unauthenticated { .. } => (ErrorKind::Unauthorized, "the store does not accept the credentials: check them"),
            Store::NotImplemented { .. } | Store::NotSupported { .. } => {
                (ErrorKind::Unsupported, "the store cannot do this: if it is the conditional put, accept it as unconditional")
            }
            _ => match status(&error) {
                Some(403 | 401) => {
                    (ErrorKind::Unauthorized, "the store denies this: check the credentials and what they are allowed")
                }
                Some(404) => (ErrorKind::NotFound, "there is no such bucket, or no such object in it"),
                Some(400..=499) if status(&error) != Some(408) && status(&error) != Some(429) => {
                    (ErrorKind::InvalidInput, "the store refuses the request: check bucket, region and endpoint")
                }
                _ if is_lasting(&error) => (ErrorKind::Internal, "the store's answer is not understood"),
                _ => (ErrorKind::Unavailable, "the store cannot be reached or is overloaded: try again later"),
            },
        };
        // The crate's own text names URLs, and those can carry a signature.
        Error::new(kind, what)
            .with_context("archive", self.describe())
            .with_context("object", name)
            .with_source(mongo_core::redact_uris(&without_queries(&error.to_string())))
    }
}

/// Where credentials and settings come from.
#[derive(Clone, Copy)]
enum Origin {
    Given,
    Environment,
}

#[async_trait]
impl ArchiveSink for ObjectStoreArchive {
    fn describe(&self) -> String {
        format!("bucket {}", self.description)
    }

    async fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<PutOutcome> {
        match (mode, &self.conditional) {
            (PutMode::CreateOnly, Condition::Probed(_)) => {
                self.probe().await?;
                return self.create(name, bytes).await;
            }
            (PutMode::CreateOnly, Condition::Unconditional) => match self.head(name).await {
                Ok(_) => return Ok(PutOutcome::AlreadyExists),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            },
            (PutMode::Replace, _) => {}
        }
        let put = self.store.put_opts(&self.path(name.as_str())?, bytes.into(), PutOptions::default()).await;
        put.map(|_| PutOutcome::Stored).map_err(|error| self.wrong(error, name.as_str()))
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let path = self.path(name.as_str())?;
        let Some(range) = range else {
            let read = async { self.store.get_opts(&path, GetOptions::default()).await?.bytes().await };
            return read.await.map_err(|error| self.wrong(error, name.as_str()));
        };
        // Stores answer an empty range, and one that begins at the end, each in their own way.
        if range.start >= range.end {
            let size = self.head(name).await?.size;
            return if range.end <= size && range.start <= range.end {
                Ok(Bytes::new())
            } else {
                Err(past_the_end(name, range.end, size))
            };
        }
        let options = GetOptions { range: Some(range.clone().into()), ..GetOptions::default() };
        let read = async { self.store.get_opts(&path, options).await?.bytes().await };
        match read.await {
            Ok(bytes) if bytes.len() as u64 == range.end - range.start => Ok(bytes),
            // A range that reaches past the end is cut off without a word.
            Ok(bytes) => Err(past_the_end(name, range.end, range.start + bytes.len() as u64)),
            Err(object_store::Error::NotFound { .. }) => Err(not_found(name)),
            Err(error) => match self.head(name).await {
                Ok(object) if object.size < range.end => Err(past_the_end(name, range.end, object.size)),
                _ => Err(self.wrong(error, name.as_str())),
            },
        }
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta>> {
        let this = self.clone();
        let full = [self.prefix.as_ref(), prefix.trim_end_matches('/')];
        let full: Vec<&str> = full.into_iter().filter(|part| !part.is_empty()).collect();
        let full = match Path::parse(full.join("/")) {
            Ok(full) => full,
            Err(error) => {
                let error = Error::internal("a prefix is no path").with_source(error);
                return stream::iter([Err(error)]).boxed();
            }
        };
        let (store, prefix) = (Arc::clone(&self.store), self.prefix.clone());
        store
            .list((!full.as_ref().is_empty()).then_some(&full))
            .map(move |object| {
                let object = object.map_err(|error| this.wrong(error, full.as_ref()))?;
                let location = object.location.as_ref();
                let name = match prefix.as_ref() {
                    "" => location,
                    prefix => location.strip_prefix(prefix).and_then(|name| name.strip_prefix('/')).unwrap_or(location),
                };
                // Foreign objects do no harm, but whoever asks whether the prefix is empty must hear of them.
                let name = ObjectName::new(name).or_else(|_| ObjectName::new("foreign-file"))?;
                Ok(ObjectMeta::new(name, object.size))
            })
            .boxed()
    }

    /// Zero: S3, Google Cloud Storage and Azure list at once what was put and deleted.
    fn listing_lag(&self) -> Duration {
        Duration::ZERO
    }

    async fn delete(&self, name: &ObjectName) -> Result<()> {
        match self.store.delete(&self.path(name.as_str())?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.wrong(error, name.as_str())),
        }
    }

    async fn head(&self, name: &ObjectName) -> Result<ObjectMeta> {
        match self.store.head(&self.path(name.as_str())?).await {
            Ok(object) => Ok(ObjectMeta::new(name.clone(), object.size)),
            Err(object_store::Error::NotFound { .. }) => Err(not_found(name)),
            Err(error) => Err(self.wrong(error, name.as_str())),
        }
    }
}

fn retries() -> RetryConfig {
    RetryConfig { max_retries: 8, retry_timeout: Duration::from_secs(60), ..RetryConfig::default() }
}

/// The HTTP status in an error, which the crate gives as text only.
fn status(error: &object_store::Error) -> Option<u16> {
    chain(error).find_map(|error| {
        let text = error.to_string();
        let (_, rest) = text.split_once("Server returned non-2xx status code: ")?;
        rest.get(..3)?.parse().ok()
    })
}

/// Whether what went wrong on the way will go wrong again.
fn is_lasting(error: &object_store::Error) -> bool {
    chain(error).filter_map(|error| error.downcast_ref::<HttpError>()).any(|error| matches!(error.kind(), HttpErrorKind::Decode))
}

fn chain(error: &object_store::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |error| error.source())
}

/// Cuts the queries off the URLs in a text.
fn without_queries(text: &str) -> String {
    text.split(' ').map(|word| word.split('?').next().unwrap_or(word)).collect::<Vec<_>>().join(" ")
}

/// Makes HTTP clients that use ring for TLS whatever the process has chosen, and end when the store falls silent, not when an object is large.
#[derive(Debug)]
struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
            store: "HTTP client",
            source: error,
        };
        let tls = mongo_core::tls::client_config().map_err(|error| failed(error.into()))?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            .build()
            .map_err(|error| failed(error.into()))?;
        Ok(HttpClient::new(client))
    }
}

const CONNECT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(60);
const CONFLICTS: usize = 5;
