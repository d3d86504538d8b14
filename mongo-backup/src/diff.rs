//! What two snapshots do not have in common, down to the `_id`.

use std::{collections::HashMap, sync::Arc};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Namespace, NamespaceSelection, Result,
    bson::RawDocument,
    progress::{NoProgress, PhaseMeter, ProgressSink, Total},
    transfer::{compare::Fingerprint, partition::Key},
};
use serde::Serialize;

use crate::repository::{
    Repository, SnapshotChoice,
    compare::{Difference, TreeComparison},
    documents_of,
    manifest::{SnapshotId, SnapshotManifest, SnapshotNamespace},
    segment::Content,
    tree::TreeEntry,
};
use crate::setters::conduct_setters;

/// Compares two snapshots of one repository.
///
/// The trees of the snapshots are compared from the top, so only segments that differ are read: of two snapshots that hold
/// the same nothing but their manifests. Documents are matched by the bytes of their `_id` and compared by all their bytes.
/// A namespace that only one of them has is counted and not read.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository, monday: mongo_backup::SnapshotId) -> mongo_backup::Result<()> {
/// use mongo_backup::{Diff, SnapshotChoice};
///
/// let report = Diff::new(&repository, monday, SnapshotChoice::Latest).run().await?;
/// for namespace in &report.namespaces {
///     println!("{}: {} added, {} removed, {} changed", namespace.namespace, namespace.added, namespace.removed, namespace.changed);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Diff {
    repository: Repository,
    older: SnapshotChoice,
    newer: SnapshotChoice,
    selection: NamespaceSelection,
    list: usize,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

/// How two snapshots differ. Namespaces that do not differ are not in it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DiffReport {
    /// The snapshot from which changes are told.
    pub older: SnapshotId,
    /// The snapshot to which they lead.
    pub newer: SnapshotId,
    /// The namespaces that differ, sorted by name.
    pub namespaces: Vec<NamespaceDiff>,
}

impl DiffReport {
    /// Whether the snapshots hold the same.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
    }
}

/// How a namespace differs.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct NamespaceDiff {
    /// Its name.
    pub namespace: Namespace,
    /// Whether it is in both snapshots.
    pub presence: Presence,
    /// Whether its kind, its options or its indexes differ.
    pub definition_changed: bool,
    /// Documents that only the newer snapshot has. Of a time-series collection its buckets are counted.
    pub added: u64,
    /// Documents that only the older snapshot has.
    pub removed: u64,
    /// Documents that both have, with different bytes.
    pub changed: u64,
    /// The first of these documents, as many as were asked for.
    pub listed: Vec<DocumentDiff>,
}

impl NamespaceDiff {
    pub(crate) fn new(namespace: Namespace, presence: Presence) -> Self {
        Self { namespace, presence, definition_changed: false, added: 0, removed: 0, changed: 0, listed: Vec::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.presence == Presence::Both && !self.definition_changed && self.added + self.removed + self.changed == 0
    }

    /// Counts a document, and lists it if fewer than `list` are listed.
    pub(crate) fn note(&mut self, change: DocumentChange, key: &Key, list: usize) {
        *match change {
            DocumentChange::Removed => &mut self.removed,
            DocumentChange::Added => &mut self.added,
            DocumentChange::Changed => &mut self.changed,
        } += 1;
        if self.listed.len() < list {
            self.listed.push(DocumentDiff { id: key.to_extended_json(), change });
        }
    }
}

/// In which of the snapshots a namespace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Presence {
    /// In both.
    Both,
    /// Only in the newer.
    Added,
    /// Only in the older.
    Removed,
}

/// A document that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DocumentDiff {
    /// Its `_id`, as canonical extended JSON; in hexadecimal where it cannot be read.
    pub id: String,
    /// What became of it.
    pub change: DocumentChange,
}

/// What became of a document from the older snapshot to the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DocumentChange {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It has other bytes.
    Changed,
}

impl Diff {
    /// Prepares a comparison that tells what led from `older` to `newer`.
    pub fn new(repository: &Repository, older: impl Into<SnapshotChoice>, newer: impl Into<SnapshotChoice>) -> Self {
        Self {
            repository: repository.clone(),
            older: older.into(),
            newer: newer.into(),
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
    /// Memory: the `_id`s of a stretch on which the snapshots disagree altogether, about 50 bytes and the `_id` for each document.
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot or a pattern that matches nothing, `CorruptData` naming the pack that is damaged
    /// or missing, `Cancelled`, or the archive's own.
    ///
    /// # Cancel safety
    /// Dropping the future ends the comparison.
    #[tracing::instrument(skip_all, name = "diff")]
    pub async fn run(self) -> Result<DiffReport> {
        let (older, newer) = (self.repository.snapshot(&self.older).await?, self.repository.snapshot(&self.newer).await?);
        let report = DiffReport { older: older.id.clone(), newer: newer.id.clone(), namespaces: Vec::new() };
        // A pattern is checked against names even where nothing differs.
        if older.catalog == newer.catalog && self.selection.include.is_empty() {
            return Ok(report);
        }
        let repository = self.repository.clone();
        repository.while_reading(self.compare(older, newer, report)).await
    }

    async fn compare(self, older: SnapshotManifest, newer: SnapshotManifest, mut report: DiffReport) -> Result<DiffReport> {
        for snapshot in [&older, &newer] {
            self.repository.still_there(&snapshot.id).await?;
        }
        // Another process may have written since the repository was opened.
        self.repository.refresh_index().await?;
        let mut left = self.repository.namespaces(&older).await?;
        let mut right = self.repository.namespaces(&newer).await?;
        let names = left.iter().chain(&right).map(SnapshotNamespace::namespace);
        if let [first, ..] = self.selection.unmatched(names).as_slice() {
            return Err(Error::new(ErrorKind::NotFound, "nothing in the snapshots matches the pattern: check its spelling")
                .with_context("pattern", first));
        }
        for namespaces in [&mut left, &mut right] {
            namespaces.retain(|namespace| self.selection.selects(namespace.namespace()));
        }
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "diff", Total::Unknown);
        let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
        loop {
            let pair = match (left.peek(), right.peek()) {
                (None, None) => break,
                (Some(a), Some(b)) if a.namespace() == b.namespace() => (left.next(), right.next()),
                (Some(a), Some(b)) if a.namespace() < b.namespace() => (left.next(), None),
                (Some(_), None) => (left.next(), None),
                _ => (None, right.next()),
            };
            if let Some(difference) = self.namespace(pair, &meter).await? {
                report.namespaces.push(difference);
            }
        }
        meter.finish();
        Ok(report)
    }

    async fn namespace(
        &self,
        pair: (Option<SnapshotNamespace>, Option<SnapshotNamespace>),
        meter: &PhaseMeter,
    ) -> Result<Option<NamespaceDiff>> {
        let (presence, only) = match &pair {
            (Some(left), Some(_)) => (Presence::Both, left),
            (Some(left), None) => (Presence::Removed, left),
            (None, Some(right)) => (Presence::Added, right),
            (None, None) => return Ok(None),
        };
        let mut found = NamespaceDiff::new(only.namespace().clone(), presence);
        match &pair {
            (Some(left), Some(right)) => {
                found.definition_changed = left.kind() != right.kind()
                    || left.entry().options() != right.entry().options()
                    || left.entry().indexes() != right.entry().indexes();
                if left.root == right.root {
                    return Ok(found.definition_changed.then_some(found));
                }
                let mut comparison = TreeComparison::new(&self.repository, &left.root, &right.root)?;
                if same_order(left, right) {
                    while let Some(stretch) = comparison.next().await? {
                        found = self.stretch(found, stretch, meter).await?;
                    }
                } else {
                    found = self.stretch(found, comparison.whole().await?, meter).await?;
                }
            }
            // All of it is new or gone: counted, not read.
            (None, Some(right)) => found.added = right.documents(),
            _ => found.removed = only.documents(),
        }
        Ok((!found.is_empty()).then_some(found))
    }

    /// Compares the documents of a stretch.
    async fn stretch(&self, found: NamespaceDiff, stretch: Difference, meter: &PhaseMeter) -> Result<NamespaceDiff> {
        let mut matching = Matching { older: HashMap::new(), found, list: self.list };
        for (side, entries) in [(Take::Older, &stretch.left), (Take::Newer, &stretch.right)] {
            for group in entries.chunks(SEGMENTS_AT_ONCE) {
                if self.cancel.is_cancelled() {
                    return Err(Error::cancelled());
                }
                let ids: Vec<_> = group.iter().map(|entry| entry.id).collect();
                let segments = self.repository.read_segments(Content::Documents, &ids).await?;
                // Hashing every document is work for a blocking thread.
                matching = tokio::task::spawn_blocking(move || {
                    for segment in &segments {
                        for document in documents_of(segment) {
                            matching.take(side, document?)?;
                        }
                    }
                    Ok::<_, Error>(matching)
                })
                .await??;
                let sum = |of: fn(&TreeEntry) -> u64| group.iter().map(of).sum();
                meter.advance(sum(|entry| entry.documents), sum(|entry| entry.bytes));
            }
        }
        Ok(matching.finish())
    }
}

/// Whether both collections are in the order of their `_id`s under one collation, or both in that of insertion.
fn same_order(left: &SnapshotNamespace, right: &SnapshotNamespace) -> bool {
    let collation = |side: &SnapshotNamespace| side.entry().options().get_document("collation").ok().map(RawDocument::to_owned);
    let by_id = left.in_id_order && right.in_id_order && collation(left) == collation(right);
    by_id || left.entry().is_capped() && right.entry().is_capped()
}

#[derive(Clone, Copy)]
enum Take {
    Older,
    Newer,
}

/// The documents of a stretch, matched by `_id`.
struct Matching {
    /// Documents of the older side that the newer has not shown yet, by the bytes of their `_id`s.
    older: HashMap<Vec<u8>, Fingerprint>,
    found: NamespaceDiff,
    list: usize,
}

impl Matching {
    fn take(&mut self, side: Take, document: &RawDocument) -> Result<()> {
        let document = Fingerprint::of(document)?;
        let id = document.key.as_document().as_bytes();
        match side {
            Take::Older => {
                self.older.insert(id.to_vec(), document);
            }
            Take::Newer => match self.older.remove(id) {
                Some(before) if before.is_like(&document) => {}
                Some(_) => self.found.note(DocumentChange::Changed, &document.key, self.list),
                None => self.found.note(DocumentChange::Added, &document.key, self.list),
            },
        }
        Ok(())
    }

    fn finish(mut self) -> NamespaceDiff {
        let mut gone: Vec<(Vec<u8>, Fingerprint)> = std::mem::take(&mut self.older).into_iter().collect();
        gone.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        for (_, document) in gone {
            self.found.note(DocumentChange::Removed, &document.key, self.list);
        }
        self.found
    }
}

const SEGMENTS_AT_ONCE: usize = 32;
