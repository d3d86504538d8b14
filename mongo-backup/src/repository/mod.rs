//! A repository: snapshots in an archive, sharing what they have in common.

pub(crate) mod block;
pub(crate) mod compare;
pub(crate) mod config;
mod envelope;
pub(crate) mod index;
pub(crate) mod manifest;
pub(crate) mod pack;
pub(crate) mod reader;
pub(crate) mod segment;
pub(crate) mod store;
pub(crate) mod tree;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongo_core::{Error, ErrorKind, Result, bson};

use self::{
    config::Config,
    envelope::Magic,
    index::{Index, IndexPayload},
    manifest::{SnapshotId, SnapshotManifest, SnapshotNamespace},
    pack::{Directory, PackId},
    segment::{Content, SegmentSizes},
};
use crate::archive::{ArchiveSink, ObjectMeta, ObjectName, PutMode, PutOutcome};

/// A place for snapshots on an [`ArchiveSink`]. Clones share it.
///
/// Any number of backups, restores and verifications may run on one repository at the same time, also from different
/// processes: objects are only ever added, each under a name of its own.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> mongo_backup::Result<()> {
/// use mongo_backup::{MemoryArchive, Repository};
///
/// let repository = Repository::open_or_init(MemoryArchive::new()).await?;
/// assert!(repository.snapshots().await?.snapshots.is_empty());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Repository(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    archive: Arc<dyn ArchiveSink>,
    config: RwLock<Arc<Config>>,
    /// Whether the config lies in the archive; the first backup puts it there.
    made: AtomicBool,
    index: RwLock<Arc<Index>>,
    /// Index objects that could not be read when the index was, and what is wrong with them.
    damaged: RwLock<Vec<(String, String)>>,
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
    /// Opens the repository in an archive.
    ///
    /// # Errors
    /// `NotFound` when the archive holds none, `CorruptData` naming the damaged object, `Unsupported` for a newer
    /// format, or the archive's own.
    pub async fn open(archive: impl ArchiveSink) -> Result<Self> {
        Self::open_shared(Arc::new(archive)).await
    }

    /// As [`open`](Self::open), on an archive that others use too.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_shared(archive: Arc<dyn ArchiveSink>) -> Result<Self> {
        let Some(config) = read_config(&*archive).await? else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "there is no backup repository in {}: check the path, or make one with the first backup",
                    archive.describe()
                ),
            ));
        };
        let repository = Self::with_config(archive, config, true);
        repository.reload_index().await?;
        Ok(repository)
    }

    /// Opens the repository in an archive, or prepares a new one in an empty archive.
    ///
    /// Nothing is written yet: the first backup makes the repository when it begins to write.
    ///
    /// # Errors
    /// As [`open`](Self::open), and `Conflict` when the archive holds something else.
    pub async fn open_or_init(archive: impl ArchiveSink) -> Result<Self> {
        Self::open_or_init_shared(Arc::new(archive)).await
    }

    /// As [`open_or_init`](Self::open_or_init), on an archive that others use too.
    ///
    /// # Errors
    /// As [`open_or_init`](Self::open_or_init).
    pub async fn open_or_init_shared(archive: Arc<dyn ArchiveSink>) -> Result<Self> {
        if read_config(&*archive).await?.is_some() {
            return Self::open_shared(archive).await;
        }
        if let Some(object) = archive.list("").next().await {
            object?;
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{} is not empty and is no backup repository: choose an empty one", archive.describe()),
            ));
        }
        let prepared = Config::new(SegmentSizes::new(SEGMENT_MIN, SEGMENT_TARGET, SEGMENT_MAX)?, PACK_BYTES)?;
        Ok(Self::with_config(archive, prepared, false))
    }

    fn with_config(archive: Arc<dyn ArchiveSink>, config: Config, made: bool) -> Self {
        Self(Arc::new(Inner {
            archive,
            config: RwLock::new(Arc::new(config)),
            made: AtomicBool::new(made),
            index: RwLock::default(),
            damaged: RwLock::default(),
        }))
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
        let mut read: Vec<(ObjectName, Result<SnapshotManifest>)> = stream::iter(objects)
            .map(|object| async move {
                let manifest = self.read_manifest(&object.name).await;
                (object.name, manifest)
            })
            .buffer_unordered(READS_AT_ONCE)
            .collect()
            .await;
        read.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut list = SnapshotList::default();
        for (name, manifest) in read {
            match manifest {
                Ok(manifest) => list.snapshots.push(manifest),
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
            SnapshotChoice::Id(id) => {
                let name = ObjectName::new(format!("{SNAPSHOTS}{id}"))?;
                self.read_manifest(&name).await.map_err(|error| match error.kind() {
                    ErrorKind::NotFound => {
                        Error::new(ErrorKind::NotFound, "there is no such snapshot: list the snapshots to see which there are")
                            .with_context("snapshot", id)
                    }
                    _ => error,
                })
            }
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
        let mut walk = self.walk(&snapshot.catalog)?;
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

    async fn read_manifest(&self, name: &ObjectName) -> Result<SnapshotManifest> {
        let object = self.archive().get(name, None).await?;
        let payload = envelope::open(name, Magic::SNAPSHOT, &object)?;
        let manifest: SnapshotManifest = bson::deserialize_from_slice(&payload).map_err(|error| {
            Error::corrupt("a snapshot's manifest is malformed").with_context("object", name).with_source(error)
        })?;
        if name.as_str().strip_prefix(SNAPSHOTS) != Some(manifest.id.as_str()) {
            return Err(Error::corrupt("a snapshot's manifest lies under another snapshot's name").with_context("object", name));
        }
        Ok(manifest)
    }

    /// Writes the manifest: from here on the snapshot exists.
    pub(crate) async fn publish(&self, manifest: &SnapshotManifest) -> Result<()> {
        let name = ObjectName::new(format!("{SNAPSHOTS}{}", manifest.id))?;
        let object = envelope::seal(Magic::SNAPSHOT, &bson::serialize_to_vec(manifest)?);
        match self.archive().put(&name, object, PutMode::CreateOnly).await {
            Ok(PutOutcome::Stored) => Ok(()),
            // A failure whose outcome is unknown: what can be read back was written.
            Err(error) => self.read_manifest(&name).await.map(drop).map_err(|_| error),
            Ok(PutOutcome::AlreadyExists) => {
                Err(Error::new(ErrorKind::Conflict, "a snapshot of this id exists").with_context("snapshot", &manifest.id))
            }
        }
    }

    /// Writes the config if the repository is new.
    pub(crate) async fn make(&self) -> Result<()> {
        if self.0.made.load(SeqCst) {
            return Ok(());
        }
        let object = envelope::seal(Magic::CONFIG, &self.config().to_bytes()?);
        if self.archive().put(&config_name()?, object, PutMode::CreateOnly).await? == PutOutcome::AlreadyExists {
            // Somebody else made it in the meantime: theirs holds.
            let config =
                read_config(&**self.archive()).await?.ok_or_else(|| Error::internal("the config exists and does not"))?;
            *self.0.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        }
        self.0.made.store(true, SeqCst);
        self.reload_index().await
    }

    /// Reads every index object anew, and trusts only what lies in packs that are there with the size they should have.
    pub(crate) async fn reload_index(&self) -> Result<()> {
        // Index objects first: whoever writes at the same time writes packs before the index object that names them.
        let objects: Vec<ObjectMeta> = self.archive().list(index::PREFIX).try_collect().await?;
        let packs: HashMap<PackId, u64> = self
            .archive()
            .list(pack::PREFIX)
            .try_filter_map(|object| async move { Ok(PackId::from_object(&object.name).map(|id| (id, object.size))) })
            .try_collect()
            .await?;
        let read: Vec<(ObjectName, Result<IndexPayload>)> = stream::iter(objects)
            .map(|object| async move {
                let read = self.read_index(&object.name).await;
                (object.name, read)
            })
            .buffer_unordered(READS_AT_ONCE)
            .collect()
            .await;
        let mut payloads = Vec::with_capacity(read.len());
        let mut damaged = Vec::new();
        for (name, read) in read {
            match read {
                Ok(payload) => payloads.push(payload),
                // What a damaged index object says is in the directories of its packs too.
                Err(error) if error.kind() == ErrorKind::CorruptData => damaged.push((name.to_string(), error.report())),
                Err(error) => return Err(error),
            }
        }
        if !damaged.is_empty() {
            tracing::warn!(objects = damaged.len(), "index objects are damaged; the directories of packs are read instead");
            let covered: HashSet<PackId> = payloads.iter().flat_map(|payload| payload.packs.iter().map(|(id, _)| *id)).collect();
            for (id, size) in packs.iter().filter(|(id, _)| !covered.contains(id)) {
                match self.read_directory(*id, *size).await {
                    Ok(directory) => payloads.push(index::decode(&index::encode(&[(*id, *size, directory)]))?),
                    Err(error) if error.kind() == ErrorKind::CorruptData => {
                        damaged.push((id.object()?.to_string(), error.report()))
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        *self.0.damaged.write().unwrap_or_else(PoisonError::into_inner) = damaged;
        let index = Index::join(&payloads, |id, size| {
            let there = packs.get(&id) == Some(&size);
            if !there {
                tracing::warn!(pack = ?id, "a pack that the index names is missing or truncated");
            }
            there
        });
        tracing::debug!(segments = index.len(), packs = packs.len(), "index read");
        *self.0.index.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(index);
        Ok(())
    }

    async fn read_index(&self, name: &ObjectName) -> Result<IndexPayload> {
        let bytes = self.archive().get(name, None).await?;
        let payload = envelope::open(name, Magic::INDEX, &bytes)?;
        index::decode(&payload).map_err(|error| error.with_context("object", name))
    }

    async fn read_directory(&self, id: PackId, size: u64) -> Result<Directory> {
        let object = id.object()?;
        let bytes = self.archive().get(&object, Some(0..size)).await?;
        let directory = tokio::task::spawn_blocking(move || id.check(&bytes).and_then(|()| pack::directory(&bytes))).await?;
        directory.map_err(|error| error.with_context("object", object))
    }

    /// Index objects that cannot be read, and what is wrong with them.
    pub(crate) fn damaged_indexes(&self) -> Vec<(String, String)> {
        self.0.damaged.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn index(&self) -> Arc<Index> {
        Arc::clone(&self.0.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The objects of packs that the index names but that are missing or have another size.
    pub(crate) fn unusable_packs(&self) -> Vec<String> {
        self.index().unusable().iter().filter_map(|id| id.object().ok()).map(|name| name.to_string()).collect()
    }

    pub(crate) fn config(&self) -> Arc<Config> {
        Arc::clone(&self.0.config.read().unwrap_or_else(PoisonError::into_inner))
    }
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

async fn read_config(archive: &dyn ArchiveSink) -> Result<Option<Config>> {
    let name = config_name()?;
    let object = match archive.get(&name, None).await {
        Ok(object) => object,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Config::from_bytes(&envelope::open(&name, Magic::CONFIG, &object)?)
        .map(Some)
        .map_err(|error| error.with_context("object", &name))
}

fn config_name() -> Result<ObjectName> {
    ObjectName::new("config")
}

pub(crate) const SNAPSHOTS: &str = "snapshots/";
const SEGMENT_MIN: u32 = 16 << 10;
const SEGMENT_TARGET: u32 = 64 << 10;
const SEGMENT_MAX: u32 = 256 << 10;
const PACK_BYTES: u32 = 16 << 20;
const READS_AT_ONCE: usize = 8;

/// Entrances to the parsers of stored bytes, for the fuzz targets only.
#[cfg(fuzzing)]
#[allow(missing_docs, reason = "each is named as the parser that it feeds")]
pub mod fuzzing {
    use super::*;

    pub fn config(bytes: &[u8]) {
        let _ = Config::from_bytes(bytes);
    }

    pub fn frame(bytes: &[u8]) {
        let object = bytes::Bytes::copy_from_slice(bytes);
        if let Ok(name) = config_name() {
            let _ = envelope::open(&name, Magic::CONFIG, &object);
        }
    }

    pub fn index(bytes: &[u8]) {
        if let Ok(payload) = index::decode(bytes) {
            let _ = Index::join(&[payload], |_, _| true).len();
        }
    }

    pub fn manifest(bytes: &[u8]) {
        let _ = bson::deserialize_from_slice::<SnapshotManifest>(bytes);
    }

    pub fn pack(bytes: &[u8]) {
        let _ = pack::directory(bytes);
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

    pub fn node(bytes: &[u8]) {
        let _ = tree::decode(bytes);
    }
}
