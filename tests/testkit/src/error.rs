//! What can go wrong between a test and its server.

use std::{io, path::Path, time::Duration};

use mongo_core::mongodb;

/// A result whose error is the testkit's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a test did not get its server, or could not break it. `Display` is one line with the cause and the cure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server refused a command, or did not answer it.
    #[error("{what} failed")]
    Command {
        /// What was asked.
        what: String,
        /// The driver's account of it.
        #[source]
        source: Box<mongodb::error::Error>,
    },
    /// A setting of the builder or of the environment cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The operating system refused.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// The reason given.
        #[source]
        source: io::Error,
    },
    /// There is no server for this machine, or it could not be brought.
    #[error("{0}")]
    NoServer(String),
    /// A server was found but does not run, or has ended.
    #[error("{0}")]
    Server(String),
    /// Something did not come about in time.
    #[error("gave up after {} s waiting for {what}", waited.as_secs())]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        waited: Duration,
    },
}

impl Error {
    pub(crate) fn command(what: impl Into<String>) -> impl FnOnce(mongodb::error::Error) -> Self {
        let what = what.into();
        move |source| Self::Command { what, source: Box::new(source) }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn path(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        Self::io(format!("{verb} {}", path.display()))
    }
}

/// The whole chain of causes, on one line.
pub(crate) fn report(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    line
}
