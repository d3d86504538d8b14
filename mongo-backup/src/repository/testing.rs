//! Snapshots of documents in memory, for tests that need no server.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mongo_core::{
    NamespaceSelection, Topology,
    bson::{DateTime, rawdoc},
    transfer::catalog::{CollectionEntry, CollectionKind},
};

use super::{
    Repository,
    announcement::Purpose,
    documents_of,
    manifest::{Consistency, SnapshotId, SnapshotManifest, SnapshotNamespace},
    segment::{Content, Segmenter},
    store::{BlockWriter, SegmentStore},
    tree::{TreeBuilder, TreeEntry, TreeRoot},
};
use crate::Result;

/// Values by `_id`.
pub(crate) type Documents = BTreeMap<i32, i32>;

/// Few documents to a segment: mostly anchors cut.
pub(crate) const BITS: u8 = 2;

/// Stores documents as a collection; gives its root.
pub(crate) async fn store(repository: &Repository, documents: &Documents) -> Result<TreeRoot> {
    let raw = documents.iter().map(|(id, value)| rawdoc! { "_id": *id, "value": *value }).collect();
    store_raw(repository, raw).await
}

async fn store_raw(repository: &Repository, documents: Vec<mongo_core::bson::RawDocumentBuf>) -> Result<TreeRoot> {
    let (store, uploader) = SegmentStore::new(repository, 1)?;
    let store = Arc::new(store);
    let config = repository.config();
    let mut segmenter = Segmenter::new(&config.keys, config.cutting, BITS);
    let mut blocks = BlockWriter::new(Arc::clone(&store));
    let mut entries = Vec::new();
    let mut emit = |segment: super::segment::Segment<'_>| {
        entries.push(TreeEntry::of(blocks.put(Content::Documents, segment.plain)?, segment));
        Ok(())
    };
    for document in &documents {
        let hash = segmenter.hasher().hash(document);
        segmenter.push(document.as_bytes(), hash, &mut emit)?;
    }
    segmenter.finish(&mut emit)?;
    let mut tree = TreeBuilder::new(BITS);
    for entry in entries {
        tree.push(entry, &mut |node| blocks.put(Content::Node, &node))?;
    }
    let root = tree.finish(&mut |node| blocks.put(Content::Node, &node))?;
    blocks.flush()?;
    drop(blocks);
    let (stored, uploaded) = tokio::join!(Arc::into_inner(store).unwrap().finish(), uploader.run());
    stored?;
    uploaded?;
    Ok(root)
}

/// A backup in three steps, as [`crate::Backup`] makes them.
pub(crate) struct Steps {
    repository: Repository,
    pub(crate) id: SnapshotId,
    started: DateTime,
    manifest: Option<SnapshotManifest>,
}

impl Steps {
    /// Announces the backup and reads the index.
    pub(crate) async fn begin(repository: &Repository, started: DateTime) -> Result<Self> {
        let id = SnapshotId::generate(started)?;
        repository.make().await?;
        repository.announce(&id, started, 0, Purpose::Backup).await?;
        repository.refresh_index().await?;
        Ok(Self { repository: repository.clone(), id, started, manifest: None })
    }

    pub(crate) async fn store(&mut self, documents: &Documents) -> Result<()> {
        let root = store(&self.repository, documents).await?;
        let info = rawdoc! { "name": "c", "type": "collection", "options": {} };
        let entry = CollectionEntry::from_parts("db.c".parse()?, CollectionKind::Collection, info, Vec::new())?;
        let record = SnapshotNamespace { entry, root: root.clone(), boundary_bits: BITS, in_id_order: true };
        let catalog = store_raw(&self.repository, vec![record.to_document()?]).await?;
        self.manifest = Some(SnapshotManifest {
            id: self.id.clone(),
            started: self.started,
            finished: self.started,
            server_version: "6.0.5".to_owned(),
            topology: Topology::Standalone,
            consistency: Consistency::BestEffort { reason: "test".to_owned() },
            resume_point: None,
            replica_set: None,
            read_until: None,
            defined_at: None,
            parent: None,
            is_transformed: false,
            selection: NamespaceSelection::all(),
            left_out: Vec::new(),
            namespaces: 1,
            documents: record.documents(),
            bytes: record.bytes(),
            new_segments: 0,
            reused_segments: 0,
            stored_bytes: 0,
            tool: "test".to_owned(),
            source: None,
            tags: BTreeSet::new(),
            catalog,
        });
        Ok(())
    }

    pub(crate) async fn publish(&self) -> Result<()> {
        self.repository.publish(self.manifest.as_ref().unwrap()).await
    }

    pub(crate) async fn end(&self) -> Result<()> {
        self.repository.conclude(&self.id).await
    }
}

/// Makes a snapshot.
pub(crate) async fn snapshot(repository: &Repository, started: DateTime, documents: &Documents) -> Result<SnapshotId> {
    let mut steps = Steps::begin(repository, started).await?;
    steps.store(documents).await?;
    steps.publish().await?;
    steps.end().await?;
    Ok(steps.id)
}

/// All documents of a snapshot.
pub(crate) async fn read(repository: &Repository, id: &SnapshotId) -> Result<Documents> {
    let manifest = repository.snapshot(&id.into()).await?;
    let mut documents = Documents::new();
    for namespace in repository.namespaces(&manifest).await? {
        let mut walk = repository.walk(&namespace.root)?;
        while let Some(entry) = walk.next().await? {
            for segment in repository.read_segments(Content::Documents, &[entry.id]).await? {
                for document in documents_of(&segment) {
                    let document = document?;
                    documents.insert(document.get_i32("_id").unwrap(), document.get_i32("value").unwrap());
                }
            }
        }
    }
    Ok(documents)
}
