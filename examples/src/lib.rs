//! What the examples share: a deployment to work on, progress for a person, a report for a program, one-line failures.

mod load;
mod progress;
pub mod shop;

use std::{path::Path, process::ExitCode, sync::Arc};

use mongo_backup::{ArchiveSink, Key, LocalArchive, MemoryArchive, ObjectStoreArchive, Repository};
use mongo_core::{CancellationToken, ConnectOptions, Deployment, Error, Result, connect, progress::ProgressSink};
use mongo_testkit::TestDeployment;
use serde::Serialize;

pub use load::load_signal;
pub use progress::{TerminalProgress, human_bytes};

/// Runs an example: prints a failure on one line to standard error and turns it into the exit code.
pub fn run(work: impl Future<Output = Result<ExitCode>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(work);
    // Connections that are still being closed need not hold the exit up.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", error.report());
        ExitCode::FAILURE
    })
}

/// A deployment: the one at a URI, or a MongoDB of the example's own.
#[derive(Debug)]
pub struct Host {
    /// The deployment.
    pub deployment: Deployment,
    embedded: Option<TestDeployment>,
}

impl Host {
    /// Connects to `uri`, or starts a one-member replica set that ends with this value.
    ///
    /// # Errors
    /// Those of connecting, or what the machine lacks to bring a MongoDB.
    pub async fn at(uri: Option<&str>) -> Result<Self> {
        match uri {
            Some(uri) => Ok(Self {
                deployment: connect(ConnectOptions::from_uri(uri)?.with_app_name("mongo-examples")).await?,
                embedded: None,
            }),
            None => Self::embedded(0.25).await,
        }
    }

    /// Starts a one-member replica set with a cache of this many gigabytes.
    ///
    /// # Errors
    /// What the machine lacks to bring a MongoDB.
    pub async fn embedded(cache_gb: f64) -> Result<Self> {
        let started = TestDeployment::replica_set(1).with_cache_gb(cache_gb).start().await;
        let embedded = started
            .map_err(|error| Error::invalid(format!("cannot bring a MongoDB of its own, give one with --uri: {error}")))?;
        let deployment = connect(ConnectOptions::from_uri(embedded.uri())?.with_app_name("mongo-examples")).await?;
        Ok(Self { deployment, embedded: Some(embedded) })
    }

    /// The URI given, or that of the embedded deployment.
    pub fn uri(&self, given: Option<&str>) -> String {
        match (&self.embedded, given) {
            (Some(embedded), _) => embedded.uri(),
            (None, given) => given.unwrap_or_default().to_owned(),
        }
    }

    /// The process of the embedded server.
    pub fn process_id(&self) -> Option<u32> {
        self.embedded.as_ref()?.members().first()?.process_id()
    }

    /// Where it came from, for a person.
    pub fn describe(&self) -> String {
        let deployment = &self.deployment;
        match &self.embedded {
            Some(embedded) => {
                format!("MongoDB {}, {}, {}", deployment.server_version(), deployment.topology(), embedded.source())
            }
            None => format!("MongoDB {}, {}", deployment.server_version(), deployment.topology()),
        }
    }
}

/// The repository that `--archive` names: a folder, a bucket (`s3://`, `gs://`, `az://`, with credentials from the environment), or
/// `mem:` for one that ends with the program.
///
/// # Errors
/// Those of [`Repository::open_or_init`] and [`Repository::open`].
pub async fn repository(archive: &str, key: Key, access: Access) -> Result<Repository> {
    if archive == "mem:" {
        return Repository::open_or_init(MemoryArchive::new(), key).await;
    }
    let archive: Arc<dyn ArchiveSink> = if archive.contains("://") {
        Arc::new(ObjectStoreArchive::from_env(archive)?)
    } else {
        Arc::new(LocalArchive::new(archive)?)
    };
    match access {
        Access::Existing => Repository::open_shared(archive, key).await,
        Access::MayCreate => Repository::open_or_init_shared(archive, key).await,
    }
}

/// The key whose passphrase is the first line of a file; without a file no encryption.
///
/// # Errors
/// `InvalidInput` when the file cannot be read or begins with an empty line.
pub fn key(file: Option<&Path>) -> Result<Key> {
    let Some(file) = file else { return Ok(Key::unencrypted()) };
    let wrong = |what: &str| {
        Error::invalid(format!("{what}: give a file whose first line is the passphrase")).with_context("file", file.display())
    };
    let bytes = std::fs::read(file).map_err(|error| wrong("the key file cannot be read").with_source(error))?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let passphrase = line.strip_suffix(b"\r").unwrap_or(line);
    if passphrase.is_empty() { Err(wrong("the key file has no passphrase")) } else { Ok(Key::passphrase(passphrase)) }
}

/// Whether a repository must exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// It must.
    Existing,
    /// It may be made.
    MayCreate,
}

/// Prints a report as one JSON document on standard output.
///
/// # Errors
/// A report that JSON cannot hold.
pub fn print_json(report: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(report)
        .map_err(|error| Error::internal("the report cannot be written as JSON").with_source(error))?;
    println!("{text}");
    Ok(())
}

/// Progress on standard error.
pub fn terminal_progress() -> Arc<dyn ProgressSink> {
    Arc::new(TerminalProgress::new())
}

async fn interrupted() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// A token that the first Ctrl-C, or a request to terminate, cancels; the second ends the program at once.
pub fn cancel_on_interrupt() -> CancellationToken {
    let token = CancellationToken::new();
    let canceller = token.clone();
    tokio::spawn(async move {
        if interrupted().await.is_ok() {
            eprintln!("stopping; interrupt again to stop at once");
            canceller.cancel();
            if interrupted().await.is_ok() {
                std::process::exit(130);
            }
        }
    });
    token
}
