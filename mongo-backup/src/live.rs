//! What a snapshot and a live deployment do not have in common, down to the `_id`.

use std::sync::Arc;

use async_trait::async_trait;
use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, NamespaceSelection, Result,
    progress::{NoProgress, PhaseMeter, ProgressSink, Total},
    transfer::{
        catalog::{Catalog, CollectionEntry},
        compare::{ComparedSide, Finding, Fingerprint, compare_ordered, compare_unordered},
        partition::{Key, KeyRange, ScanOrder},
        scan::ScanSource,
    },
};
use serde::Serialize;

use crate::{
    diff::{DocumentChange, NamespaceDiff, Presence},
    repository::{
        Repository, SnapshotChoice, documents_of,
        manifest::{SnapshotId, SnapshotNamespace},
        reader::TreeWalk,
        segment::Content,
    },
    setters::conduct_setters,
};

/// Compares a snapshot with what a deployment holds now.
///
/// Every document of both is read. What was written since the snapshot was made is a difference like any other: compare
/// while nothing writes, or with a deployment that was just restored. Documents are matched by `_id` and compared by all their bytes.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository, deployment: mongo_core::Deployment) -> mongo_backup::Result<()> {
/// use mongo_backup::{LiveDiff, SnapshotChoice};
///
/// let report = LiveDiff::new(&repository, SnapshotChoice::Latest, &deployment).run().await?;
/// assert!(report.is_empty(), "{:?}", report.namespaces);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use]
pub struct LiveDiff {
    repository: Repository,
    snapshot: SnapshotChoice,
    deployment: Deployment,
    selection: NamespaceSelection,
    list: usize,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

/// How a deployment differs from a snapshot. Namespaces that do not differ are not in it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct LiveDiffReport {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Documents that are alike.
    pub alike: u64,
    /// The namespaces that differ, sorted by name. What only the deployment has counts as added.
    pub namespaces: Vec<NamespaceDiff>,
}

impl LiveDiffReport {
    /// Whether the deployment holds what the snapshot does.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
    }
}

impl LiveDiff {
    /// Prepares a comparison.
    pub fn new(repository: &Repository, snapshot: impl Into<SnapshotChoice>, deployment: &Deployment) -> Self {
        Self {
            repository: repository.clone(),
            snapshot: snapshot.into(),
            deployment: deployment.clone(),
            selection: NamespaceSelection::all(),
            list: 100,
            progress: Arc::new(NoProgress),
            cancel: CancellationToken::new(),
        }
    }

    /// Compares only the namespaces of `selection`.
    pub fn selection(mut self, selection: NamespaceSelection) -> Self {
        self.selection = selection;
        self
    }

    /// Lists so many documents of each namespace, each with its `_id`. All are counted. Default 100.
    pub fn list(mut self, documents: usize) -> Self {
        self.list = documents;
        self
    }

    conduct_setters!("Ends the comparison when `token` is cancelled.");

    /// Compares. Nothing is written.
    ///
    /// Memory is flat but for collections with a collation, capped ones and imports: of these the `_id`s are held.
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot or a pattern that matches nothing, `CorruptData` naming the pack that is damaged
    /// or missing, `Cancelled`, or the server's and the archive's own.
    ///
    /// # Cancel safety
    /// Dropping the future ends the comparison.
    #[tracing::instrument(skip_all, name = "live_diff")]
    pub async fn run(self) -> Result<LiveDiffReport> {
        let repository = self.repository.clone();
        repository.while_reading(self.compare()).await
    }

    async fn compare(self) -> Result<LiveDiffReport> {
        let manifest = self.repository.snapshot(&self.snapshot).await?;
        self.repository.refresh_index().await?;
        let mut stored = self.repository.namespaces(&manifest).await?;
        // Users and roles are no data, and every deployment has its own.
        stored.retain(|namespace| !crate::restore::is_authorization(namespace.namespace()));
        // What the backup was not asked for is no difference.
        let covered = |name: &mongo_core::Namespace| manifest.selection.selects(name) && self.selection.selects(name);
        let live = Catalog::read(&self.deployment, &self.selection, None).await?;
        let names = stored.iter().map(SnapshotNamespace::namespace).chain(live.entries.iter().map(CollectionEntry::namespace));
        if let [first, ..] = self.selection.unmatched(names).as_slice() {
            return Err(Error::new(
                ErrorKind::NotFound,
                "nothing in the snapshot or the deployment matches the pattern: check its spelling",
            )
            .with_context("pattern", first));
        }
        stored.retain(|namespace| self.selection.selects(namespace.namespace()));
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "compare", Total::estimate(manifest.documents, manifest.bytes));
        let mut report = LiveDiffReport { snapshot: manifest.id.clone(), alike: 0, namespaces: Vec::new() };
        for namespace in &stored {
            let (found, alike) = match live.get(namespace.namespace()) {
                Some(entry) => self.namespace(namespace, entry, &meter).await?,
                None => {
                    let mut gone = NamespaceDiff::new(namespace.namespace().clone(), Presence::Removed);
                    gone.removed = namespace.documents();
                    (gone, 0)
                }
            };
            report.alike += alike;
            if !found.is_empty() {
                report.namespaces.push(found);
            }
        }
        let known = |entry: &&CollectionEntry| stored.iter().any(|namespace| namespace.namespace() == entry.namespace());
        for entry in live.entries.iter().filter(|entry| covered(entry.namespace()) && !known(entry)) {
            let mut added = NamespaceDiff::new(entry.namespace().clone(), Presence::Added);
            added.added = match entry.estimate(&self.deployment).await {
                Ok((documents, _)) => documents,
                // Dropped since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error.with_context("namespace", entry.namespace())),
            };
            report.namespaces.push(added);
        }
        report.namespaces.sort_by(|a, b| a.namespace.cmp(&b.namespace));
        meter.finish();
        Ok(report)
    }

    async fn namespace(
        &self,
        stored: &SnapshotNamespace,
        live: &CollectionEntry,
        meter: &PhaseMeter,
    ) -> Result<(NamespaceDiff, u64)> {
        let mut diff = NamespaceDiff::new(stored.namespace().clone(), Presence::Both);
        let entry = stored.entry();
        diff.definition_changed =
            entry.kind() != live.kind() || entry.options() != live.options() || entry.indexes() != live.indexes();
        if entry.kind() != live.kind() {
            return Ok((diff, 0));
        }
        let list = self.list;
        let mut note = |finding, key: &Key| {
            let change = match finding {
                Finding::OnlyLeft => DocumentChange::Removed,
                Finding::OnlyRight => DocumentChange::Added,
                _ => DocumentChange::Changed,
            };
            diff.note(change, key, list);
        };
        let alike = compare_with_live(&self.repository, stored, &self.deployment, live, &self.cancel, meter, &mut note).await?;
        Ok((diff, alike))
    }
}

/// Compares the documents of a namespace with those of a collection of a deployment, the left side being the snapshot's.
pub(crate) async fn compare_with_live(
    repository: &Repository,
    stored: &SnapshotNamespace,
    deployment: &Deployment,
    live: &CollectionEntry,
    cancel: &CancellationToken,
    meter: &PhaseMeter,
    found: &mut (dyn FnMut(Finding, &Key) + Send),
) -> Result<u64> {
    let Some(data) = live.data_namespace() else { return Ok(0) };
    let mut source = ScanSource::new(deployment.clone(), data);
    source.order = ScanOrder::of(live, deployment.server_version());
    source.cancel = cancel.clone();
    let ordered =
        stored.in_id_order && source.order == ScanOrder::Id && has_simple_order(stored.entry()) && has_simple_order(live);
    let mut right = source.scan(KeyRange::everything());
    let mut left = SnapshotSide { repository: repository.clone(), walk: repository.walk(&stored.root)?, meter };
    if ordered {
        compare_ordered(&mut left, &mut right, found).await
    } else {
        compare_unordered(&mut left, &mut right, found).await
    }
}

/// Whether `_id`s are ordered by their values alone.
fn has_simple_order(entry: &CollectionEntry) -> bool {
    matches!(entry.options().get("collation"), Ok(None))
}

/// The documents of a namespace in a snapshot.
struct SnapshotSide<'a> {
    repository: Repository,
    walk: TreeWalk,
    meter: &'a PhaseMeter,
}

#[async_trait]
impl ComparedSide for SnapshotSide<'_> {
    async fn next(&mut self) -> Result<Option<Vec<Fingerprint>>> {
        let mut ids = Vec::new();
        while ids.len() < SEGMENTS_AT_ONCE
            && let Some(entry) = self.walk.next().await?
        {
            ids.push(entry.id);
        }
        if ids.is_empty() {
            return Ok(None);
        }
        let segments = self.repository.read_segments(Content::Documents, &ids).await?;
        let bytes = segments.iter().map(|segment| segment.len() as u64).sum();
        let fingerprints = tokio::task::spawn_blocking(move || {
            segments
                .iter()
                .flat_map(|segment| documents_of(segment))
                .map(|document| Fingerprint::of(document?))
                .collect::<Result<Vec<_>>>()
        });
        let fingerprints = fingerprints.await??;
        self.meter.advance(fingerprints.len() as u64, bytes);
        Ok(Some(fingerprints))
    }
}

const SEGMENTS_AT_ONCE: usize = 32;
