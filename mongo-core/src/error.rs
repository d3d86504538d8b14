//! The one error type of the family, and what a driver error means to a caller.

use std::{borrow::Cow, fmt};

use mongodb::error::{ErrorKind as DriverKind, WriteFailure};

use crate::redact::redact_uris;

/// A result whose error is the family's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A boxed foreign error, as a seam's implementor returns it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// An error of any `mongo-*` crate.
///
/// Match on [`kind`](Self::kind), which names what the caller can do next; the text is for people and may change.
/// `Display` is one line, holds no document, no key value and no credential, and does not repeat the
/// [`source`](std::error::Error::source): a reporter walks the chain (see [`Error::report`]).
///
/// ```
/// use mongo_core::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::NotFound, "no snapshot has this id").with_context("snapshot", "20260101T000000Z");
/// assert_eq!(error.kind(), ErrorKind::NotFound);
/// assert_eq!(error.to_string(), "no snapshot has this id (snapshot: 20260101T000000Z)");
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: Cow<'static, str>,
    context: Vec<(&'static str, String)>,
    source: Option<BoxError>,
    driver: Option<Box<mongodb::error::Error>>,
}

/// What the caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum ErrorKind {
    /// The work was cancelled, by a token or by the server's `killOp`: nothing to do, unless it was not you.
    Cancelled,
    /// Something stands where the result should go: choose another target, or ask for it to be replaced.
    Conflict,
    /// Stored bytes are not what was written: restore them from another copy; never retry blindly.
    CorruptData,
    /// A bug, in this crate or in the server: report it.
    Internal,
    /// A setting, an argument or a connection string is wrong: correct it.
    InvalidInput,
    /// What was named does not exist: name another.
    NotFound,
    /// The server refused documents (a validator, a unique index, a size): correct the documents or the target.
    Rejected,
    /// The time allowed was not enough: allow more, or do less at a time.
    Timeout,
    /// The credentials or the privileges are not enough: use others, or grant the role that the message names.
    Unauthorized,
    /// The deployment, a member or a store cannot be reached or is overloaded: try again later.
    Unavailable,
    /// This server version or topology cannot do it: use another, or another way.
    Unsupported,
}

impl Error {
    /// Makes an error of `kind` with a one-line message in lower case that names the cause and, where there is one, the cure.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), context: Vec::new(), source: None, driver: None }))
    }

    /// A wrong setting or argument: [`ErrorKind::InvalidInput`].
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }

    /// Stored bytes that are not what was written: [`ErrorKind::CorruptData`].
    pub fn corrupt(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::CorruptData, message)
    }

    /// A broken invariant: [`ErrorKind::Internal`].
    pub fn internal(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// The work was cancelled: [`ErrorKind::Cancelled`].
    pub fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "cancelled")
    }

    /// Adds one fact about where it happened. Values must not come from a document or a credential.
    #[must_use]
    pub fn with_context(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((key, value.to_string()));
        self
    }

    /// Sets the underlying cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Puts another message in front of this error's own kind, which becomes the source.
    #[must_use]
    pub fn wrap(self, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(self.kind(), message).with_source(self)
    }

    /// What the caller can do next.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The facts added by [`with_context`](Self::with_context), outermost last.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(key, value)| (*key, value.as_str()))
    }

    /// Whether the same call may succeed a little later with nothing changed.
    ///
    /// True for [`ErrorKind::Unavailable`]. It says nothing about whether the failed attempt took effect: a write
    /// whose reply was lost may have been applied, so retry only what is idempotent.
    pub fn is_retryable(&self) -> bool {
        self.0.kind == ErrorKind::Unavailable
    }

    /// Whether a server refused the work because it has too much of it: what follows should be less.
    ///
    /// That is the label `SystemOverloadedError` (8.2, 8.0.20 and later) or one of the codes of its admission control.
    pub fn is_overload(&self) -> bool {
        // AdmissionQueueOverflow, RateLimitExceeded, PooledConnectionAcquisitionRejected, IngressRequestRateLimitExceeded.
        self.has_label(mongodb::error::SYSTEM_OVERLOADED_ERROR) || matches!(self.server_code(), Some(433 | 449 | 450 | 462))
    }

    /// The server's error code, where a server answered.
    pub fn server_code(&self) -> Option<i32> {
        self.driver().and_then(server_code)
    }

    /// Whether the driver or the server put `label` on the error, for example `"RetryableWriteError"`.
    pub fn has_label(&self, label: &str) -> bool {
        self.driver().is_some_and(|error| error.contains_label(label))
    }

    /// The driver's own error, here or further down the chain.
    ///
    /// Its `Display` can hold documents and key values: do not log it.
    pub fn driver(&self) -> Option<&mongodb::error::Error> {
        self.0.driver.as_deref().or_else(|| self.0.source.as_ref()?.downcast_ref::<Self>()?.driver())
    }

    /// The whole chain on one line, `message: cause: deeper cause`, for a log or a terminal.
    pub fn report(&self) -> String {
        let mut line = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            let text = cause.to_string();
            line.push_str(": ");
            line.push_str(text.lines().next().unwrap_or_default());
            next = cause.source();
        }
        line
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        for (position, (key, value)) in self.0.context.iter().enumerate() {
            write!(f, "{}{key}: {value}", if position == 0 { " (" } else { ", " })?;
        }
        if self.0.context.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The driver's error is left out on purpose: its `Debug` holds server replies, which hold documents.
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("message", &self.0.message)
            .field("context", &self.0.context)
            .field("source", &self.0.source)
            .finish_non_exhaustive()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

impl From<mongodb::error::Error> for Error {
    fn from(error: mongodb::error::Error) -> Self {
        let mut result = Self::new(classify(&error), summarise(&error));
        result.0.driver = Some(Box::new(error));
        result
    }
}

impl From<bson::error::Error> for Error {
    fn from(error: bson::error::Error) -> Self {
        Self::corrupt("malformed BSON").with_source(error)
    }
}

impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        if error.is_cancelled() {
            return Self::cancelled();
        }
        // The payload of a panic may quote data; the panic hook has printed it where the host wants it.
        Self::internal("a background task panicked")
    }
}

fn server_code(error: &mongodb::error::Error) -> Option<i32> {
    match &*error.kind {
        DriverKind::Command(command) => Some(command.code),
        DriverKind::Write(WriteFailure::WriteError(write)) => Some(write.code),
        DriverKind::Write(WriteFailure::WriteConcernError(concern)) => Some(concern.code),
        DriverKind::InsertMany(insert) => insert
            .write_errors
            .as_ref()
            .and_then(|errors| errors.first().map(|write| write.code))
            .or_else(|| insert.write_concern_error.as_ref().map(|concern| concern.code)),
        DriverKind::BulkWrite(bulk) => bulk
            .write_errors
            .values()
            .next()
            .map(|write| write.code)
            .or_else(|| bulk.write_concern_errors.first().map(|concern| concern.code)),
        // An authentication failure and a failed heartbeat carry the server's answer one level down.
        _ => std::error::Error::source(error)
            .and_then(|source| source.downcast_ref::<mongodb::error::Error>())
            .and_then(server_code),
    }
}

fn classify(error: &mongodb::error::Error) -> ErrorKind {
    if error.contains_label(mongodb::error::SYSTEM_OVERLOADED_ERROR) {
        return ErrorKind::Unavailable;
    }
    match &*error.kind {
        DriverKind::InvalidArgument { .. } | DriverKind::InvalidTlsConfig { .. } => ErrorKind::InvalidInput,
        DriverKind::Authentication { .. } => ErrorKind::Unauthorized,
        DriverKind::DnsResolve { .. }
        | DriverKind::Io(_)
        | DriverKind::ConnectionPoolCleared { .. }
        | DriverKind::ServerSelection { .. } => ErrorKind::Unavailable,
        DriverKind::SessionsNotSupported | DriverKind::IncompatibleServer { .. } => ErrorKind::Unsupported,
        DriverKind::Bson(_) | DriverKind::InvalidResponse { .. } => ErrorKind::CorruptData,
        DriverKind::Shutdown => ErrorKind::Cancelled,
        DriverKind::GridFs(_) => ErrorKind::NotFound,
        _ => server_code(error).map_or(ErrorKind::Internal, classify_code),
    }
}

/// What a server error code means to a caller; codes are those of the server's `error_codes.yml`.
pub fn classify_code(code: i32) -> ErrorKind {
    match code {
        // NodeNotFound, HostUnreachable, HostNotFound, NetworkTimeout, ShutdownInProgress, FailedToSatisfyReadPreference,
        // ReadConcernMajorityNotAvailableYet, StaleConfig family, InterruptedAtShutdown, InterruptedDueToReplStateChange,
        // NotWritablePrimary, NotPrimaryNoSecondaryOk, NotPrimaryOrSecondary, PrimarySteppedDown, ExceededTimeLimit (262:
        // the server's own deadline, retryable by the drivers' read list), the admission control's (433, 449, 450, 462), SocketException.
        6 | 7 | 74 | 89 | 91 | 133 | 134 | 189 | 262 | 433 | 449 | 450 | 462 | 9001 | 10058 | 10107 | 11600 | 11602 | 13435
        | 13436 => ErrorKind::Unavailable,
        // LockTimeout, WriteConflict, NoSuchTransaction: transient by design.
        24 | 112 | 251 => ErrorKind::Unavailable,
        // MaxTimeMSExpired, WriteConcernTimeout (64: WriteConcernFailed).
        50 | 64 => ErrorKind::Timeout,
        // Unauthorized, AuthenticationFailed, ReauthenticationRequired, UserNotFound.
        11 | 13 | 18 | 391 => ErrorKind::Unauthorized,
        // NamespaceNotFound, IndexNotFound, CursorNotFound, CursorKilled; SnapshotTooOld, SnapshotUnavailable: asking again
        // for the same cluster time does not bring its history back.
        26 | 27 | 43 | 237 | 239 | 246 => ErrorKind::NotFound,
        // UnknownReplWriteConcern, CannotSatisfyWriteConcern (here: a mode that is not defined), NodeNotFound in a config.
        79 | 100 | 104 | 260 | 280 => ErrorKind::InvalidInput,
        // NotYetInitialized, ChangeStreamHistoryLost, no text index.
        94 | 286 | 291 | 40280 => ErrorKind::NotFound,
        // ConfigurationInProgress, a reconfiguration that races, CappedPositionLost (a capped collection overtook its reader),
        // OutOfDiskSpace.
        109 | 136 | 308 | 14031 => ErrorKind::Unavailable,
        // NamespaceExists, IndexOptionsConflict, IndexKeySpecsConflict, AlreadyInitialized.
        23 | 48 | 85 | 86 => ErrorKind::Conflict,
        // DocumentValidationFailure, DuplicateKey (three codes), BSONObjectTooLarge, immutable or invalid `_id`.
        121 | 11000 | 11001 | 12582 | 10334 => ErrorKind::Rejected,
        // BadValue, FailedToParse, TypeMismatch, InvalidOptions, InvalidNamespace, InvalidReplicaSetConfig, NewReplicaSetConfigurationIncompatible.
        2 | 9 | 14 | 72 | 73 | 93 | 103 => ErrorKind::InvalidInput,
        // IllegalOperation, CommandNotFound, CommandNotSupported, CommandNotSupportedOnView, UnsupportedFormat, unknown field (40415).
        20 | 59 | 76 | 115 | 166 | 235 | 40324 | 40415 | 40573 => ErrorKind::Unsupported,
        // Interrupted, ClientMarkedKilled.
        11601 | 46841 => ErrorKind::Cancelled,
        _ => ErrorKind::Internal,
    }
}

/// One line about a driver error without what it may quote of documents, keys and credentials.
fn summarise(error: &mongodb::error::Error) -> String {
    match &*error.kind {
        DriverKind::Command(command) => server_line(command.code, &command.code_name, &command.message),
        DriverKind::Write(WriteFailure::WriteError(write)) => {
            server_line(write.code, write.code_name.as_deref().unwrap_or_default(), &write.message)
        }
        DriverKind::Write(WriteFailure::WriteConcernError(concern)) => {
            format!("the write concern was not satisfied: {}", server_line(concern.code, &concern.code_name, &concern.message))
        }
        DriverKind::InsertMany(insert) => {
            let errors = insert.write_errors.as_deref().unwrap_or_default();
            match (errors.first(), &insert.write_concern_error) {
                (Some(first), _) => format!(
                    "the server refused {} document(s), the first with {}",
                    errors.len(),
                    server_line(first.code, first.code_name.as_deref().unwrap_or_default(), &first.message)
                ),
                (None, Some(concern)) => format!(
                    "the write concern was not satisfied: {}",
                    server_line(concern.code, &concern.code_name, &concern.message)
                ),
                (None, None) => "an insert failed".to_owned(),
            }
        }
        DriverKind::BulkWrite(bulk) => format!("a bulk write failed for {} operation(s)", bulk.write_errors.len()),
        DriverKind::Authentication { .. } => match server_code(error) {
            Some(code) => format!("authentication failed (code {code}): check user, password and authSource"),
            None => "authentication failed: check user, password, authSource and mechanism".to_owned(),
        },
        DriverKind::ServerSelection { message, .. } => selection_line(message),
        DriverKind::Io(io) => format!("network error: {}", one_line(&io.to_string())),
        DriverKind::ConnectionPoolCleared { .. } => {
            "the connection pool was cleared because another operation on it failed".to_owned()
        }
        DriverKind::InvalidArgument { message, .. } => format!("invalid argument: {}", one_line(message)),
        DriverKind::InvalidTlsConfig { message, .. } => format!("invalid TLS configuration: {}", one_line(message)),
        DriverKind::DnsResolve { message, .. } => format!("name resolution failed: {}", one_line(message)),
        DriverKind::IncompatibleServer { message, .. } => one_line(message),
        DriverKind::Transaction { message, .. } => format!("transaction: {}", one_line(message)),
        DriverKind::SessionsNotSupported => "the deployment does not support sessions".to_owned(),
        DriverKind::Bson(_) => "the server's reply could not be read as BSON".to_owned(),
        DriverKind::InvalidResponse { .. } => "the server's reply was malformed".to_owned(),
        DriverKind::Shutdown => "the client has been shut down".to_owned(),
        DriverKind::GridFs(_) => "GridFS: no such file, or its chunks are incomplete".to_owned(),
        _ => "the driver failed".to_owned(),
    }
}

fn server_line(code: i32, name: &str, message: &str) -> String {
    let name = if name.is_empty() { "unnamed" } else { name };
    // The text of these codes describes the request or the deployment and never quotes documents; any other text may.
    const SPEAKABLE: [i32; 20] = [9, 18, 20, 23, 26, 40, 48, 59, 67, 72, 73, 76, 85, 86, 93, 94, 103, 115, 166, 197];
    if SPEAKABLE.contains(&code) {
        format!("server error {code} ({name}): {}", one_line(message))
    } else {
        format!("server error {code} ({name})")
    }
}

/// `Server selection timeout: No available servers. Topology: { Type: …, Servers: [ { Address: a, Type: …, Error: … } ] }`
/// becomes a line with the addresses and the innermost causes.
fn selection_line(message: &str) -> String {
    let mut parts = Vec::new();
    for server in message.split("Address: ").skip(1) {
        let address = server.split([',', ' ']).next().unwrap_or_default();
        let lower = server.to_ascii_lowercase();
        let cause = [
            ("connection refused", "connection refused"),
            ("timed out", "timed out"),
            ("timeout", "timed out"),
            ("failed to lookup", "unknown host"),
            ("name or service not known", "unknown host"),
            ("invalidcertificate", "certificate not accepted"),
            ("invalid peer certificate", "certificate not accepted"),
            ("tls", "TLS handshake failed"),
            ("authentication", "authentication failed"),
            ("connection reset", "connection reset"),
            ("unexpected end of file", "connection closed"),
            ("network is unreachable", "network unreachable"),
        ]
        .iter()
        .find(|(needle, _)| lower.contains(needle))
        .map_or("not eligible", |(_, cause)| cause);
        parts.push(format!("{address}: {cause}"));
    }
    if parts.is_empty() {
        return one_line(message);
    }
    format!("no server could be selected in time ({}): check host, port, TLS and network", parts.join("; "))
}

fn one_line(text: &str) -> String {
    redact_uris(text.lines().next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_one_line_with_context_and_without_the_source() {
        let error = Error::corrupt("pack is truncated")
            .with_context("pack", "packs/ab/abcd")
            .with_context("expected_bytes", 10)
            .with_source(std::io::Error::other("disk says no"));
        insta::assert_snapshot!(error, @"pack is truncated (pack: packs/ab/abcd, expected_bytes: 10)");
        insta::assert_snapshot!(error.report(), @"pack is truncated (pack: packs/ab/abcd, expected_bytes: 10): disk says no");
    }

    #[test]
    fn wrapping_keeps_the_kind() {
        let error = Error::new(ErrorKind::Timeout, "inner").wrap("outer");
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert_eq!(error.report(), "outer: inner");
    }

    #[test]
    fn selection_failures_name_address_and_cause() {
        let text = "Kind: Server selection timeout: No available servers. Topology: { Type: Unknown, Servers: [ { Address: localhost:1, Type: Unknown, Error: Kind: I/O error: Connection refused (os error 111), labels: {} } ] }";
        insta::assert_snapshot!(selection_line(text), @"no server could be selected in time (localhost:1: connection refused): check host, port, TLS and network");
    }

    #[test]
    fn messages_that_may_quote_documents_are_not_repeated() {
        assert_eq!(
            server_line(11000, "DuplicateKey", "E11000 duplicate key error dup key: { email: \"a@b\" }"),
            "server error 11000 (DuplicateKey)"
        );
        assert!(server_line(26, "NamespaceNotFound", "ns does not exist").ends_with("ns does not exist"));
    }

    #[test]
    fn codes_say_what_to_do_next() {
        for (code, kind) in [
            (10107, ErrorKind::Unavailable),
            (11000, ErrorKind::Rejected),
            (121, ErrorKind::Rejected),
            (18, ErrorKind::Unauthorized),
            (13, ErrorKind::Unauthorized),
            (50, ErrorKind::Timeout),
            (48, ErrorKind::Conflict),
            (26, ErrorKind::NotFound),
            (2, ErrorKind::InvalidInput),
            (59, ErrorKind::Unsupported),
        ] {
            assert_eq!(classify_code(code), kind, "code {code}");
        }
    }
}
