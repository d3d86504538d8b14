//! A repository: snapshots in an archive, sharing what they have in common.

pub(crate) mod announcement;
pub(crate) mod assembly;
pub(crate) mod block;
mod cipher;
pub(crate) mod compare;
pub(crate) mod condemned;
pub(crate) mod config;
#[cfg(test)]
mod damage_tests;
pub(crate) mod envelope;
pub(crate) mod index;
pub(crate) mod indexes;
pub(crate) mod key;
pub(crate) mod manifest;
mod marks;
mod opening;
pub(crate) mod pack;
pub(crate) mod reader;
pub(crate) mod segment;
pub(crate) mod slice;
pub(crate) mod store;
#[cfg(test)]
pub(crate) mod testing;
mod tombstone;
pub(crate) mod tree;

use std::sync::{Arc, RwLock, atomic::AtomicU64};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongo_core::{Error, ErrorKind, Result, bson, lock};

use self::{
    config::Config,
    envelope::Magic,
    indexes::CurrentIndex,
    key::{Key, KeyId},
    manifest::{SnapshotId, SnapshotManifest, SnapshotNamespace},
    segment::Content,
};
use crate::{
    archive::{ArchiveSink, ObjectMeta, ObjectName, PutMode, PutOutcome},
    audit::{AuditSink, Auditor},
};

/// A place for snapshots on an [`ArchiveSink`]. Clones share it.
///
/// Any number of backups, restores and verifications may run on one repository at the same time, also from different
/// processes: objects are only ever added, each under a name of its own.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> mongo_backup::Result<()> {
/// use mongo_backup::{Key, MemoryArchive, Repository};
///
/// let repository = Repository::open_or_init(MemoryArchive::new(), Key::passphrase("correct horse")).await?;
/// assert!(repository.snapshots().await?.snapshots.is_empty());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Repository(Arc<Inner>, Option<Arc<Auditor>>);

#[derive(Debug)]
struct Inner {
    archive: Arc<dyn ArchiveSink>,
    config: RwLock<Arc<Config>>,
    /// The key of a repository that is not in the archive yet; the first backup puts it there.
    unmade: tokio::sync::Mutex<Option<Key>>,
    opened_with: RwLock<Option<KeyId>>,
    index: RwLock<CurrentIndex>,
    readings: AtomicU64,
}

/// The snapshots of a repository.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct SnapshotList {
    /// Those that can be read, oldest first.
    pub snapshots: Vec<SnapshotManifest>,
    /// Manifests that are damaged: the object's name, and what is wrong.
    pub damaged: Vec<(String, Error)>,
}

impl Repository {
    /// The same repository, with every operation on it recorded: `actor` names whoever is responsible.
    #[must_use]
    pub fn audited(&self, actor: impl Into<String>, sink: Arc<dyn AuditSink>) -> Self {
        Self(Arc::clone(&self.0), Some(Arc::new(Auditor::new(actor, sink))))
    }

    pub(crate) fn auditor(&self) -> Option<&Auditor> {
        self.1.as_deref()
    }

    /// The archive that it lies on.
    pub fn archive(&self) -> &Arc<dyn ArchiveSink> {
        &self.0.archive
    }

    /// Lists the snapshots. A snapshot that was interrupted is none and is not listed.
    ///
    /// # Errors
    /// The archive's own. A damaged manifest is no error but is listed as such.
    pub async fn snapshots(&self) -> Result<SnapshotList> {
        let objects: Vec<ObjectMeta> = self.archive().list(SNAPSHOTS).try_collect().await?;
        let mut read: Vec<(ObjectName, Result<Option<SnapshotManifest>>)> = stream::iter(objects)
            .map(|object| async move {
                let manifest = self.find_manifest(&object.name).await;
                (object.name, manifest)
            })
            .buffer_unordered(READS_AT_ONCE)
            .collect()
            .await;
        read.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut list = SnapshotList::default();
        for (name, manifest) in read {
            match manifest {
                Ok(Some(manifest)) => list.snapshots.push(manifest),
                // Revoked, or removed since it was listed.
                Ok(None) => {}
                Err(error) if matches!(error.kind(), ErrorKind::CorruptData | ErrorKind::Unsupported) => {
                    list.damaged.push((name.to_string(), error))
                }
                Err(error) => return Err(error),
            }
        }
        Ok(list)
    }

    /// The manifest of one snapshot, or of the newest.
    ///
    /// # Errors
    /// `NotFound` when there is none, `CorruptData` when the manifest is damaged.
    pub async fn snapshot(&self, which: &SnapshotChoice) -> Result<SnapshotManifest> {
        match which {
            SnapshotChoice::Id(id) => self.find_snapshot(id).await?.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, "there is no such snapshot: list the snapshots to see which there are")
                    .with_context("snapshot", id)
            }),
            SnapshotChoice::Latest => {
                let mut list = self.snapshots().await?;
                // A damaged newest snapshot is not passed over in silence: whoever asks for the latest means that one.
                let newest_good = list.snapshots.last().map(|manifest| format!("{SNAPSHOTS}{}", manifest.id));
                if let Some((name, _)) = list.damaged.last()
                    && newest_good.as_ref().is_none_or(|good| name > good)
                    && let Some((_, error)) = list.damaged.pop()
                {
                    return Err(error.wrap("the newest snapshot is damaged: name an older one"));
                }
                list.snapshots.pop().ok_or_else(|| Error::new(ErrorKind::NotFound, "the repository holds no snapshot"))
            }
        }
    }

    /// The namespaces of a snapshot, sorted by name.
    ///
    /// # Errors
    /// `CorruptData` naming the pack that is damaged or missing.
    pub async fn namespaces(&self, snapshot: &SnapshotManifest) -> Result<Vec<SnapshotNamespace>> {
        self.namespaces_in(&snapshot.catalog).await
    }

    /// The namespaces of a catalog.
    pub(crate) async fn namespaces_in(&self, catalog: &tree::TreeRoot) -> Result<Vec<SnapshotNamespace>> {
        let mut walk = self.walk(catalog)?;
        let mut records = Vec::new();
        while let Some(entry) = walk.next().await? {
            for segment in self.read_segments(Content::Documents, &[entry.id]).await? {
                for record in documents_of(&segment) {
                    records.push(SnapshotNamespace::from_document(record?)?);
                }
            }
        }
        Ok(records)
    }

    /// A snapshot's manifest, if there is such a snapshot.
    pub(crate) async fn find_snapshot(&self, id: &SnapshotId) -> Result<Option<SnapshotManifest>> {
        self.find_manifest(&snapshot_name(id)?).await
    }

    async fn find_manifest(&self, name: &ObjectName) -> Result<Option<SnapshotManifest>> {
        let object = match self.archive().get(name, None).await {
            Ok(object) => object,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if Magic::TOMBSTONE.is_of(&object) {
            return envelope::open(Magic::TOMBSTONE, name, self.config().cipher.as_ref(), &object).map(|_| None);
        }
        let payload = envelope::open(Magic::SNAPSHOT, name, self.config().cipher.as_ref(), &object)?;
        let manifest: SnapshotManifest = bson::deserialize_from_slice(&payload).map_err(|error| {
            Error::corrupt("a snapshot's manifest is malformed").with_context("object", name).with_source(error)
        })?;
        if name.as_str().strip_prefix(SNAPSHOTS) != Some(manifest.id.as_str()) {
            return Err(Error::corrupt("a snapshot's manifest lies under another snapshot's name").with_context("object", name));
        }
        Ok(Some(manifest))
    }

    /// Looks for a snapshot that was there a while ago.
    pub(crate) async fn still_there(&self, id: &SnapshotId) -> Result<()> {
        match self.find_snapshot(id).await? {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::NotFound, "the snapshot was removed meanwhile").with_context("snapshot", id)),
        }
    }

    /// Removes a snapshot. What only it needed stays until a prune finds it unused.
    pub(crate) async fn forget(&self, id: &SnapshotId) -> Result<()> {
        // While its backup has not ended, a repeated request could publish it once more: nothing may be free under its name.
        if self.sign_of_life(id).await?.is_some() {
            self.bury(id).await
        } else {
            self.archive().delete(&snapshot_name(id)?).await
        }
    }

    /// Writes the manifest: from here on the snapshot exists.
    pub(crate) async fn publish(&self, manifest: &SnapshotManifest) -> Result<()> {
        let name = snapshot_name(&manifest.id)?;
        let payload = bson::serialize_to_vec(manifest)?;
        let object = envelope::seal(Magic::SNAPSHOT, Some(&name), self.config().cipher.as_ref(), &payload)?;
        match self.archive().put(&name, object, PutMode::CreateOnly).await {
            Ok(PutOutcome::Stored) => Ok(()),
            // A failure whose outcome is unknown, or a second attempt within the archive: what can be read back was written.
            outcome => match (self.find_manifest(&name).await, outcome) {
                (Ok(Some(there)), _) if there.catalog == manifest.catalog => Ok(()),
                (_, Err(error)) => Err(error),
                (found, Ok(_)) => Err(found.err().unwrap_or_else(|| {
                    Error::new(
                        ErrorKind::Conflict,
                        "the backup stood still for so long that a prune took it for dead: run it again, what it stored is used as far as it is still there",
                    )
                    .with_context("snapshot", &manifest.id)
                })),
            },
        }
    }

    pub(crate) fn config(&self) -> Arc<Config> {
        Arc::clone(&lock::read(&self.0.config))
    }
}

pub(crate) fn snapshot_name(id: &SnapshotId) -> Result<ObjectName> {
    ObjectName::new(format!("{SNAPSHOTS}{id}"))
}

/// Which snapshot is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotChoice {
    /// The newest.
    #[default]
    Latest,
    /// This one.
    Id(SnapshotId),
}

impl From<SnapshotId> for SnapshotChoice {
    fn from(id: SnapshotId) -> Self {
        Self::Id(id)
    }
}

impl From<&SnapshotId> for SnapshotChoice {
    fn from(id: &SnapshotId) -> Self {
        Self::Id(id.clone())
    }
}

impl std::str::FromStr for SnapshotChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "latest" { Ok(Self::Latest) } else { text.parse().map(Self::Id) }
    }
}

/// The documents of a segment, which stand back to back.
pub(crate) fn documents_of(segment: &[u8]) -> impl Iterator<Item = Result<&bson::RawDocument>> {
    let mut rest = segment;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length =
            rest.first_chunk::<4>().map(|bytes| i32::from_le_bytes(*bytes)).and_then(|length| usize::try_from(length).ok());
        let Some((document, behind)) = length.filter(|length| *length >= 5).and_then(|length| rest.split_at_checked(length))
        else {
            rest = &[];
            return Some(Err(Error::corrupt("a segment holds something that is no document")));
        };
        rest = behind;
        Some(bson::RawDocument::from_bytes(document).map_err(Error::from))
    })
}

pub(crate) const SNAPSHOTS: &str = "snapshots/";
/// What manifests, announcements and exports name as their maker.
pub(crate) const TOOL: &str = concat!("mongo-backup ", env!("CARGO_PKG_VERSION"));
const READS_AT_ONCE: usize = 8;

/// Entrances to the parsers of stored bytes, for the fuzz targets only.
#[cfg(fuzzing)]
#[allow(missing_docs, reason = "each is named as the parser that it feeds")]
pub mod fuzzing {
    use super::*;

    pub fn config(bytes: &[u8]) {
        let _ = config::StoredConfig::from_bytes(bytes).map(|stored| stored.unlock([0; 32]));
    }

    pub fn frame(bytes: &[u8]) {
        let object = bytes::Bytes::copy_from_slice(bytes);
        if let Ok(name) = ObjectName::new("config") {
            let cipher = cipher::Cipher::new(&[1; 32], [2; 16]);
            let _ = envelope::open(Magic::CONFIG, &name, None, &object);
            let _ = envelope::open(Magic::CONFIG, &name, Some(&cipher), &object);
        }
    }

    pub fn index(bytes: &[u8]) {
        if let Ok(payload) = index::decode(bytes) {
            let _ = index::Index::join([&payload], |_, _| true, |_| false).len();
        }
    }

    pub fn manifest(bytes: &[u8]) {
        let _ = bson::deserialize_from_slice::<SnapshotManifest>(bytes);
    }

    pub fn pack(bytes: &[u8]) {
        let _ = pack::directory(bytes, None);
        let _ = pack::directory(bytes, Some(&cipher::Cipher::new(&[1; 32], [2; 16])));
    }

    pub fn segment(bytes: &[u8]) {
        for document in documents_of(bytes) {
            if let Ok(document) = document {
                let _ = SnapshotNamespace::from_document(document);
                let _ = mongo_core::transfer::leading_id(document.as_bytes());
            }
        }
    }

    pub fn block(bytes: &[u8]) {
        if let Some((plain, stored)) = bytes.split_first_chunk()
            && let Ok(mut decompressor) = block::Decompressor::new()
        {
            let _ = decompressor.decompress(stored, u32::from_le_bytes(*plain) % (4 << 20));
        }
    }

    pub fn archive(bytes: &[u8]) {
        crate::interchange::fuzzing::archive(bytes);
    }

    pub fn metadata(text: &str) {
        crate::interchange::fuzzing::metadata(text);
    }

    pub fn slice(bytes: &[u8]) {
        slice::fuzz(bytes);
    }

    pub fn mark(bytes: &[u8]) {
        condemned::parse_any(bytes);
        announcement::parse(bytes);
    }

    pub fn key(bytes: &[u8]) {
        if let Ok(record) = key::KeyRecord::from_bytes(bytes) {
            let _ = record.unwrap(&Key::host([1; 32]));
        }
    }

    pub fn node(bytes: &[u8]) {
        let _ = tree::decode(&bytes::Bytes::copy_from_slice(bytes));
    }
}
