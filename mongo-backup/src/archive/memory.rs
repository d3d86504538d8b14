//! An archive in memory: the reference implementation, for tests.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use mongo_core::{Result, lock::lock};

use super::{ArchiveSink, ObjectMeta, ObjectName, PutMode, PutOutcome, not_found, past_the_end};

/// Keeps objects in memory. Everything is lost with it.
#[derive(Debug, Default)]
pub struct MemoryArchive {
    objects: Mutex<BTreeMap<ObjectName, Bytes>>,
}

impl MemoryArchive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<ObjectName, Bytes>> {
        lock(&self.objects)
    }
}

#[async_trait]
impl ArchiveSink for MemoryArchive {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    async fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<PutOutcome> {
        let mut objects = self.objects();
        if mode == PutMode::CreateOnly && objects.contains_key(name) {
            return Ok(PutOutcome::AlreadyExists);
        }
        objects.insert(name.clone(), bytes);
        Ok(PutOutcome::Stored)
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let object = self.objects().get(name).cloned().ok_or_else(|| not_found(name))?;
        let Some(range) = range else { return Ok(object) };
        let size = object.len() as u64;
        match (usize::try_from(range.start), usize::try_from(range.end)) {
            (Ok(start), Ok(end)) if start <= end && end <= object.len() => Ok(object.slice(start..end)),
            _ => Err(past_the_end(name, range.end, size)),
        }
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta>> {
        let found: Vec<_> = self
            .objects()
            .iter()
            .filter(|(name, _)| name.as_str().starts_with(prefix))
            .map(|(name, bytes)| Ok(ObjectMeta::new(name.clone(), bytes.len() as u64)))
            .collect();
        stream::iter(found).boxed()
    }

    fn listing_lag(&self) -> Duration {
        Duration::ZERO
    }

    async fn delete(&self, name: &ObjectName) -> Result<()> {
        self.objects().remove(name);
        Ok(())
    }

    async fn head(&self, name: &ObjectName) -> Result<ObjectMeta> {
        let size = self.objects().get(name).ok_or_else(|| not_found(name))?.len() as u64;
        Ok(ObjectMeta::new(name.clone(), size))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::archive::conformance;

    #[tokio::test]
    async fn conforms() {
        conformance::check(Arc::new(MemoryArchive::new())).await.unwrap();
    }
}
