//! Where a repository's objects lie: the [`ArchiveSink`] seam and its implementations.

#[cfg(any(test, feature = "testkit"))]
pub mod conformance;
#[cfg(any(test, feature = "testkit"))]
mod failing;
mod local;
mod memory;
#[cfg(feature = "object-store")]
mod object_store;
mod uncached;

use std::{fmt, ops::Range, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use mongo_core::{Error, Result};

#[cfg(any(test, feature = "testkit"))]
pub use failing::{FailingArchive, FailureMode};
pub use local::LocalArchive;
pub use memory::MemoryArchive;
#[cfg(feature = "object-store")]
pub use object_store::ObjectStoreArchive;

/// A store of small immutable objects: a folder, a bucket, memory.
///
/// Objects are at most 64 MiB, so there is neither multipart nor append. What an implementation promises:
///
/// - **Atomicity.** An object appears whole or not at all, also when the process or the machine dies in mid-`put`.
/// - **Durability.** When `put` has returned, the object survives a crash of the machine.
/// - **Create-only.** Of several `put`s of one name with [`PutMode::CreateOnly`] exactly one creates; the others learn it.
/// - **Read after write.** What `put` has acknowledged, `get`, `head` and `list` see at once.
/// - **Idempotence.** Every method can be called again after a failure whose outcome is unknown.
///
/// Errors carry a kind: `NotFound` for a missing object, `Unavailable` for what may pass, `Unauthorized` for missing
/// rights. All methods may be called concurrently. A dropped future may or may not have taken effect, wholly.
/// An implementation can be checked with the suite in `conformance` (feature `testkit`).
#[async_trait]
pub trait ArchiveSink: fmt::Debug + Send + Sync + 'static {
    /// A short name for messages, without credentials, for example `folder /backups`.
    fn describe(&self) -> String;

    /// Stores an object.
    async fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<PutOutcome>;

    /// Reads an object, or the bytes of `range` in it.
    ///
    /// A range that reaches past the end is an error of kind `CorruptData`: the object is shorter than the reader knows it to be.
    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes>;

    /// The objects whose names begin with `prefix` (empty, or ending in `/`), in no particular order.
    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta>>;

    /// Deletes an object. One that does not exist is no error.
    async fn delete(&self, name: &ObjectName) -> Result<()>;

    /// For how long a listing may still miss what was put, or show what was deleted.
    ///
    /// A [prune](crate::Prune) deletes nothing sooner than so long after it was condemned. A store that lists at once says zero; the default
    /// is a careful hour.
    fn listing_lag(&self) -> Duration {
        Duration::from_secs(3600)
    }

    /// What is known of an object without reading it.
    async fn head(&self, name: &ObjectName) -> Result<ObjectMeta>;
}

/// The name of an object: `/`-separated parts of lower-case letters, digits, `-`, `.` and `_`.
///
/// ```
/// use mongo_backup::ObjectName;
///
/// assert!(ObjectName::new("packs/ab/abcdef").is_ok());
/// assert!(ObjectName::new("../etc/passwd").is_err());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(String);

impl ObjectName {
    /// A checked name.
    ///
    /// # Errors
    /// `InvalidInput` for anything that is not of the form above.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let good = name.len() <= 512
            && name.split('/').all(|part| {
                !part.is_empty()
                    && !part.starts_with('.')
                    && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_'))
            });
        if good {
            Ok(Self(name))
        } else {
            Err(Error::invalid("this is no object name").with_context("name", name.escape_debug()))
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What to do when the name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PutMode {
    /// Leave the existing object as it is.
    CreateOnly,
    /// Replace it.
    Replace,
}

/// What a `put` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PutOutcome {
    /// The object is now the one given.
    Stored,
    /// Create-only, and the name was taken: nothing changed.
    AlreadyExists,
}

/// An object's name and size.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectMeta {
    /// Its name.
    pub name: ObjectName,
    /// Its size in bytes.
    pub size: u64,
}

impl ObjectMeta {
    /// What an implementation found.
    pub fn new(name: ObjectName, size: u64) -> Self {
        Self { name, size }
    }
}

pub(crate) fn not_found(name: &ObjectName) -> Error {
    Error::new(mongo_core::ErrorKind::NotFound, "the archive has no such object").with_context("object", name)
}

pub(crate) fn past_the_end(name: &ObjectName, wanted: u64, size: u64) -> Error {
    Error::corrupt("an object is shorter than it should be: it was truncated")
        .with_context("object", name)
        .with_context("bytes", size)
        .with_context("wanted", wanted)
}
