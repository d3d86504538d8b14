//! Every byte of a small repository is flipped in turn, and every object deleted: damage that matters is found, and what is read is never wrong.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use mongo_core::bson::DateTime;

use super::{
    Repository,
    manifest::SnapshotId,
    testing::{Documents, read, snapshot},
};
use crate::{ArchiveSink as _, Key, MemoryArchive, ObjectName, PutMode, Result, Verify};

struct Sample {
    archive: Arc<MemoryArchive>,
    key: Key,
    objects: Vec<(ObjectName, Bytes)>,
    snapshots: Vec<(SnapshotId, Documents)>,
}

impl Sample {
    async fn new(key: Key) -> Self {
        let archive = Arc::new(MemoryArchive::new());
        let repository = Repository::open_or_init_shared(Arc::<MemoryArchive>::clone(&archive), key.clone()).await.unwrap();
        let mut snapshots = Vec::new();
        for (millis, changed) in [(1_000, 0), (2_000, 1)] {
            let mut documents: Documents = (0..12).map(|id| (id, 0)).collect();
            documents.insert(5, changed);
            let id = snapshot(&repository, DateTime::from_millis(millis), &documents).await.unwrap();
            snapshots.push((id, documents));
        }
        let listed: Vec<_> = archive.list("").try_collect().await.unwrap();
        let mut objects = Vec::new();
        for object in listed {
            let bytes = archive.get(&object.name, None).await.unwrap();
            objects.push((object.name, bytes));
        }
        Self { archive, key, objects, snapshots }
    }

    async fn put(&self, name: &ObjectName, bytes: Bytes) {
        self.archive.put(name, bytes, PutMode::Replace).await.unwrap();
    }

    /// Whether damage is noticed: by opening, or by verifying, or because a snapshot cannot be read. Whatever can be read must be right.
    async fn is_noticed(&self, what: &str) -> (bool, bool) {
        let opened = Repository::open_shared(Arc::<MemoryArchive>::clone(&self.archive), self.key.clone()).await;
        let Ok(repository) = opened else { return (true, true) };
        let mut unreadable = false;
        for (id, documents) in &self.snapshots {
            match read(&repository, id).await {
                Ok(found) => assert_eq!(&found, documents, "{what}: a snapshot reads as something else"),
                Err(_) => unreadable = true,
            }
        }
        let report: Result<_> = Verify::new(&repository).run().await;
        let found = report.map_or(true, |report| !report.is_sound());
        let listed = repository.snapshots().await.unwrap();
        let missing = listed.snapshots.len() < self.snapshots.len();
        (found || missing, unreadable)
    }
}

async fn flip_every_byte(key: Key) {
    let sample = Sample::new(key).await;
    for (name, bytes) in &sample.objects {
        for position in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[position] ^= 1 << (position % 8);
            sample.put(name, flipped.into()).await;
            let what = format!("byte {position} of {} in {name}", bytes.len());
            let (noticed, _) = sample.is_noticed(&what).await;
            assert!(noticed, "{what} was flipped and nobody noticed");
        }
        sample.put(name, bytes.clone()).await;
    }
}

#[tokio::test]
async fn every_flipped_byte_is_noticed_and_nothing_wrong_is_read() {
    flip_every_byte(Key::unencrypted()).await;
}

#[tokio::test]
async fn every_flipped_byte_of_an_encrypted_repository_is_noticed_too() {
    flip_every_byte(Key::host([1; 32])).await;
}

#[tokio::test]
async fn every_deleted_object_is_noticed_or_not_needed() {
    for key in [Key::unencrypted(), Key::host([1; 32])] {
        let sample = Sample::new(key).await;
        for (name, bytes) in &sample.objects {
            sample.archive.delete(name).await.unwrap();
            let (noticed, unreadable) = sample.is_noticed(&format!("{name} deleted")).await;
            // What an index object says stands in the packs too.
            let needed = !name.as_str().starts_with("index/");
            assert_eq!((noticed, unreadable), (needed, needed), "{name} was deleted");
            sample.put(name, bytes.clone()).await;
        }
    }
}

#[tokio::test]
async fn every_truncated_object_is_noticed() {
    let sample = Sample::new(Key::host([1; 32])).await;
    for (name, bytes) in &sample.objects {
        for length in (0..bytes.len()).step_by(7) {
            sample.put(name, bytes.slice(..length)).await;
            let (noticed, _) = sample.is_noticed(&format!("{name} truncated to {length}")).await;
            assert!(noticed, "{name} was truncated to {length} and nobody noticed");
        }
        sample.put(name, bytes.clone()).await;
    }
}
