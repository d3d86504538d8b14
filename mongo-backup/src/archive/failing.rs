//! An archive that fails on purpose.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use mongo_core::{Error, ErrorKind, Result};

use super::{ArchiveSink, ObjectMeta, ObjectName, PutMode, PutOutcome};

/// What a failing `put` does to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureMode {
    /// Nothing is stored.
    Before,
    /// The object is stored, but the caller does not learn it.
    After,
}

/// Wraps an archive and lets the `n`-th `put`, and every one after it, fail.
#[derive(Debug)]
pub struct FailingArchive {
    inner: Arc<dyn ArchiveSink>,
    fail_from: AtomicU64,
    puts: AtomicU64,
    mode: FailureMode,
}

impl FailingArchive {
    /// Lets the first `good` puts through.
    pub fn new(inner: Arc<dyn ArchiveSink>, good: u64, mode: FailureMode) -> Self {
        Self { inner, fail_from: AtomicU64::new(good), puts: AtomicU64::new(0), mode }
    }

    /// How many puts were asked for.
    pub fn puts(&self) -> u64 {
        self.puts.load(SeqCst)
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl ArchiveSink for FailingArchive {
    fn describe(&self) -> String {
        format!("failing {}", self.inner.describe())
    }

    async fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<PutOutcome> {
        let fails = self.puts.fetch_add(1, SeqCst) >= self.fail_from.load(SeqCst);
        if !fails || self.mode == FailureMode::After {
            let outcome = self.inner.put(name, bytes, mode).await?;
            if !fails {
                return Ok(outcome);
            }
        }
        Err(Error::new(ErrorKind::Unavailable, "the archive fails on purpose").with_context("object", name))
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        self.inner.get(name, range).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn listing_lag(&self) -> Duration {
        self.inner.listing_lag()
    }

    async fn delete(&self, name: &ObjectName) -> Result<()> {
        self.inner.delete(name).await
    }

    async fn head(&self, name: &ObjectName) -> Result<ObjectMeta> {
        self.inner.head(name).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{MemoryArchive, conformance};

    #[tokio::test]
    async fn conforms_while_it_does_not_fail() {
        let archive = FailingArchive::new(Arc::new(MemoryArchive::new()), u64::MAX, FailureMode::Before);
        conformance::check(Arc::new(archive)).await.unwrap();
    }

    #[tokio::test]
    async fn fails_from_the_given_put_on() {
        let inner = Arc::new(MemoryArchive::new());
        let archive = FailingArchive::new(Arc::<MemoryArchive>::clone(&inner), 1, FailureMode::After);
        let put = |name: &str| {
            let name = ObjectName::new(name).unwrap();
            let archive = &archive;
            async move { archive.put(&name, Bytes::new(), PutMode::CreateOnly).await }
        };
        assert!(put("a").await.is_ok());
        assert!(put("b").await.is_err());
        assert!(inner.head(&ObjectName::new("b").unwrap()).await.is_ok(), "stored without the caller's knowledge");
    }
}
