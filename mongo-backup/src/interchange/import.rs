//! Taking in what other tools have dumped, as a snapshot like any other.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::Read,
    path::PathBuf,
    sync::Arc,
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Namespace, NamespaceSelection, Result, Topology,
    bson::DateTime,
    progress::{NoProgress, PhaseMeter, ProgressSink, Total},
    transfer::catalog::{CollectionEntry, LeftOut},
};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{Found, archive, directory, percona};
use crate::{
    audit::AuditAction,
    repository::{
        Repository, TOOL,
        announcement::Session,
        assembly::{Assembly, store_catalog},
        documents_of,
        manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace},
        segment::Segmenter,
        store::{SegmentStore, storing},
        tree::TreeRoot,
    },
    setters::conduct_setters,
};

/// Takes a dump in as a snapshot.
///
/// Every document is checked to be well-formed BSON down to its last field, and archives against their checksums. Directories have none: that one of
/// their files ends early between two documents cannot be told. A dump holds documents in the order in which they were stored, so the snapshot shares nothing with
/// snapshots of the same collections that were read by `_id`, and a single document of it is found by reading its whole collection.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository) -> mongo_backup::Result<()> {
/// use mongo_backup::Import;
///
/// let report = Import::new(&repository).from_archive_file("shop.archive.gz").await?;
/// println!("{} documents as snapshot {}", report.documents, report.id);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Import {
    repository: Repository,
    compression_level: i32,
    tags: BTreeSet<String>,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

/// What an import took in.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ImportReport {
    /// The new snapshot.
    pub id: SnapshotId,
    /// Collections and views.
    pub namespaces: u64,
    /// Documents.
    pub documents: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What the dump held and the snapshot does not, and why.
    pub left_out: Vec<LeftOut>,
    /// The version of the server that was dumped, as the dump says.
    pub server_version: String,
}

/// What a thread does that reads a foreign format.
type Reading = Box<dyn FnOnce(&mut dyn FnMut(Found) -> Result<()>) -> Result<()> + Send>;

impl Import {
    /// Prepares an import into a repository.
    pub fn new(repository: &Repository) -> Self {
        Self {
            repository: repository.clone(),
            compression_level: 1,
            tags: BTreeSet::new(),
            progress: Arc::new(NoProgress),
            cancel: CancellationToken::new(),
        }
    }

    /// Sets zstd's level. Default 1.
    pub fn compression_level(mut self, level: i32) -> Self {
        self.compression_level = level;
        self
    }

    /// Marks the snapshot, for [retention](crate::RetentionPolicy::keep_tags).
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.insert(tag.into());
        self
    }

    conduct_setters!("Stops when `token` is cancelled.");

    /// Takes in an archive of mongodump, compressed or not.
    ///
    /// # Errors
    /// `NotFound` if there is no such file, `CorruptData` naming what is damaged or truncated, `Unsupported` for another version; the archive's own.
    /// In every case no snapshot is listed.
    ///
    /// # Cancel safety
    /// A dropped future makes no snapshot.
    pub async fn from_archive_file(self, path: impl Into<PathBuf>) -> Result<ImportReport> {
        let path = path.into();
        self.take_in(
            "an archive of mongodump",
            Box::new(move |found| archive::read(directory::opened(&path)?, &mut |item| found(item))),
        )
        .await
    }

    /// Takes in an archive of mongodump from a stream, which must not be compressed.
    ///
    /// # Errors
    /// As [`from_archive_file`](Self::from_archive_file).
    ///
    /// # Cancel safety
    /// As [`from_archive_file`](Self::from_archive_file).
    pub async fn from_archive(self, input: impl Read + Send + 'static) -> Result<ImportReport> {
        self.take_in("an archive of mongodump", Box::new(move |found| archive::read(input, &mut |item| found(item)))).await
    }

    /// Takes in a directory of mongodump, compressed or not.
    ///
    /// # Errors
    /// As [`from_archive_file`](Self::from_archive_file).
    ///
    /// # Cancel safety
    /// As [`from_archive_file`](Self::from_archive_file).
    pub async fn from_directory(self, path: impl Into<PathBuf>) -> Result<ImportReport> {
        let path = path.into();
        self.take_in("a directory of mongodump", Box::new(move |found| directory::read(&path, &mut |item| found(item)))).await
    }

    /// Takes in the logical backup of one replica set by Percona Backup for MongoDB, 2.0 or newer, with whatever compression: the folder
    /// `<storage>/<backup>/<replica set>`, which holds a `metadata.json`.
    ///
    /// Its oplog is not replayed: documents are as each was read while the backup ran. Percona's own collections are left out, and so is what it
    /// does not store: of indexes the fields `hidden`, `clustered` and `prepareUnique`.
    ///
    /// # Errors
    /// As [`from_archive_file`](Self::from_archive_file), `Conflict` for a backup that did not end well, and `Unsupported` for one that is not logical.
    ///
    /// # Cancel safety
    /// As [`from_archive_file`](Self::from_archive_file).
    pub async fn from_percona(self, path: impl Into<PathBuf>) -> Result<ImportReport> {
        let path = path.into();
        self.take_in("a logical backup of Percona Backup for MongoDB", Box::new(move |found| percona::read(&path, found))).await
    }

    #[tracing::instrument(skip_all, name = "import")]
    async fn take_in(self, what: &str, reading: Reading) -> Result<ImportReport> {
        let repository = self.repository.clone();
        let work = self.take_in_unrecorded(what, reading);
        let snapshot = |report: &ImportReport| Some(("snapshot", report.id.to_string()));
        repository.recorded(AuditAction::Import, [("from", what.to_owned())], work, snapshot).await
    }

    async fn take_in_unrecorded(self, what: &str, reading: Reading) -> Result<ImportReport> {
        let started = DateTime::now();
        self.repository.make().await?;
        let session = Session::begin(&self.repository, started).await?;
        let taken = self.make_snapshot(started, &session, what, reading).await;
        session.end(taken.is_err()).await;
        taken
    }

    async fn make_snapshot(&self, started: DateTime, session: &Session, what: &str, reading: Reading) -> Result<ImportReport> {
        self.repository.refresh_index().await?;
        let store = SegmentStore::new(&self.repository, self.compression_level)?;
        let ((mut taken, catalog), totals) = storing(store, &self.cancel, |store| self.store(store, reading)).await?;
        taken.left_out.sort();
        let sum = |of: fn(&SnapshotNamespace) -> u64| taken.namespaces.iter().map(of).sum::<u64>();
        let manifest = SnapshotManifest {
            id: session.snapshot().clone(),
            started,
            finished: DateTime::now(),
            server_version: taken.server,
            topology: Topology::Standalone,
            consistency: Consistency::BestEffort {
                reason: format!("taken in from {what}: documents are as each was read when that was made"),
            },
            resume_point: None,
            replica_set: None,
            read_until: None,
            defined_at: None,
            parent: None,
            is_transformed: false,
            selection: NamespaceSelection::all(),
            left_out: taken.left_out,
            namespaces: taken.namespaces.len() as u64,
            documents: sum(SnapshotNamespace::documents),
            bytes: sum(SnapshotNamespace::bytes),
            new_segments: totals.new_segments,
            reused_segments: totals.reused_segments,
            stored_bytes: totals.stored_bytes,
            tool: TOOL.to_owned(),
            source: Some("import".to_owned()),
            tags: self.tags.clone(),
            catalog,
        };
        session.publish(&manifest).await?;
        if let Err(error) = self.repository.refresh_index().await {
            tracing::warn!(error = %error.report(), "the index could not be read anew");
        }
        Ok(ImportReport {
            id: manifest.id,
            namespaces: manifest.namespaces,
            documents: manifest.documents,
            bytes: manifest.bytes,
            left_out: manifest.left_out,
            server_version: manifest.server_version,
        })
    }

    /// Stores what a thread reads.
    async fn store(&self, store: Arc<SegmentStore>, reading: Reading) -> Result<(Taken, TreeRoot)> {
        let (sender, mut receiver) = mpsc::channel(PIECES);
        // A thread of its own: the runtime may have few for blocking work, and this one waits for others of them.
        let (ended, thread) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            // Nobody listens when the import was dropped.
            let _ = ended.send(reading(&mut |found| sender.blocking_send(found).map_err(|_| Error::cancelled())));
        });
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "import", Total::Unknown);
        let mut taken = Taken { server: "unknown".to_owned(), ..Taken::default() };
        let mut open: HashMap<Namespace, Open> = HashMap::new();
        let mut entries: BTreeMap<Namespace, CollectionEntry> = BTreeMap::new();
        let mut roots: HashMap<Namespace, (TreeRoot, u8)> = HashMap::new();
        while let Some(found) = receiver.recv().await {
            if self.cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            match found {
                Found::Server(version) => taken.server = version,
                Found::LeftOut(namespace, reason) => taken.left_out.push(LeftOut::new(namespace, reason)),
                Found::Collection(entry) => {
                    let name = entry.namespace().clone();
                    if entries.insert(name.clone(), entry).is_some() {
                        return Err(Error::corrupt("the dump has a collection twice").with_context("namespace", name));
                    }
                }
                Found::End(namespace) => {
                    // A collection that is through leaves memory.
                    let root = match open.remove(&namespace) {
                        Some(Open { assembly, bits }) => (assembly.finish().await?, bits),
                        None => (self.begin(&store, &[]).assembly.finish().await?, 0),
                    };
                    store.send_full().await?;
                    roots.insert(namespace, root);
                }
                Found::Documents(namespace, documents) => {
                    let mut collection = match open.remove(&namespace) {
                        Some(collection) => collection,
                        None => self.begin(&store, &documents),
                    };
                    let bytes = documents.len() as u64;
                    let (returned, count) =
                        tokio::task::spawn_blocking(move || collection.take(&documents).map(|count| (collection, count)))
                            .await??;
                    store.send_full().await?;
                    meter.advance(count, bytes);
                    open.insert(namespace, returned);
                }
            }
        }
        // What was wrong with the dump, if it ended early.
        thread.await.map_err(|error| Error::internal("the reader of the dump has died").with_source(error))??;
        for (name, entry) in entries {
            let (root, boundary_bits) = roots
                .remove(&name)
                .ok_or_else(|| Error::corrupt("the dump ends before a collection does").with_context("namespace", &name))?;
            taken.namespaces.push(SnapshotNamespace { entry, root, boundary_bits, in_id_order: false });
        }
        if taken.namespaces.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                "there is no collection in what should be a dump: name the directory that mongodump wrote, or its archive",
            ));
        }
        if let Some(stranger) = open.into_keys().chain(roots.into_keys()).next() {
            return Err(Error::corrupt("the dump has documents of a collection that it does not describe")
                .with_context("namespace", stranger));
        }
        let catalog = store_catalog(&store, &self.repository.config(), taken.namespaces.iter().cloned()).await?;
        meter.finish();
        Ok((taken, catalog))
    }

    /// Begins a collection, whose boundaries are as fine as its first documents suggest.
    fn begin(&self, store: &Arc<SegmentStore>, first: &[u8]) -> Open {
        let config = self.repository.config();
        let count = documents_of(first).count().max(1);
        let bits = config.cutting.boundary_bits((first.len() / count) as u64);
        Open { assembly: Assembly::new(Arc::clone(store), Segmenter::new(&config.keys, config.cutting, bits), bits), bits }
    }
}

#[derive(Default)]
struct Taken {
    server: String,
    namespaces: Vec<SnapshotNamespace>,
    left_out: Vec<LeftOut>,
}

/// A collection whose documents are being stored.
struct Open {
    assembly: Assembly,
    bits: u8,
}

impl Open {
    fn take(&mut self, documents: &[u8]) -> Result<u64> {
        let mut count = 0;
        for document in documents_of(documents) {
            self.assembly.push(document?)?;
            count += 1;
        }
        Ok(count)
    }
}

const PIECES: usize = 4;
