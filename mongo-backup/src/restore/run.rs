//! Carrying a plan out: collections, documents, views, and indexes last.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Namespace, Result, Topology,
    bson::{RawDocument, doc},
    clock::{Clock as _, SystemClock},
    mongodb::options::{Acknowledgment, WriteConcern},
    progress::{PhaseMeter, Total},
    transfer::{
        catalog::{CollectionEntry, CollectionKind},
        majority::PendingMajority,
        write::{Refused, WriteMode, WriteOutcome, WriteTarget},
    },
};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    DefinitionFailure, DropExisting, RefusedDocument, Restore, RestoreItem, RestoreMode, RestorePlan, RestoreReport,
    ids::DocumentChoice,
};
use crate::{
    audit::AuditAction,
    metrics::RestoreMetrics,
    repository::{
        Repository, documents_of,
        reader::TreeWalk,
        segment::{Content, SegmentId},
        tree::TreeEntry,
    },
};

impl RestorePlan<'_> {
    /// Carries the plan out: makes the collections, writes the documents, makes the views, builds the indexes.
    ///
    /// New collections take every document, also those that their own validator would refuse: so they were in the source.
    /// GridFS chunks are written before the files that they belong to. A document that the target refuses is counted and reported and does not
    /// stop the others, and neither does an index that cannot be built.
    ///
    /// # Errors
    /// `CorruptData` naming the pack that is damaged or missing, `Cancelled` by the token, `Conflict` when another primary was
    /// elected before a majority held everything, `Timeout` when no majority follows for a minute, else the server's or the
    /// archive's own.
    /// What was written until then stays: run the restore again with `drop_existing`.
    ///
    /// # Cancel safety
    /// A dropped future leaves the target half restored, as an error does.
    #[tracing::instrument(skip_all, name = "restore", fields(snapshot = %self.manifest.id))]
    pub async fn execute(self) -> Result<RestoreReport> {
        let restore = self.restore;
        let subject = [
            ("snapshot", self.manifest.id.to_string()),
            ("deployment", restore.target.topology().to_string()),
            ("selection", restore.settings.selection.to_string()),
            ("mode", format!("{:?}", restore.settings.mode)),
            ("drop", format!("{:?}", restore.settings.drop_existing)),
        ];
        let work = self.execute_unrecorded();
        restore
            .repository
            .recorded(AuditAction::Restore, subject, work, |report| Some(("documents", report.documents.to_string())))
            .await
    }

    async fn execute_unrecorded(self) -> Result<RestoreReport> {
        let clock = SystemClock::new();
        let Self { restore, manifest, items, authorization } = &self;
        let (documents, bytes) = self.total();
        let tally = Arc::new(Tally::new(restore.settings.list_refused));
        let data: Vec<&RestoreItem> = items.iter().filter(|item| item.source.kind() != CollectionKind::View).collect();
        if restore.settings.mode == RestoreMode::Mirror || items.iter().any(|item| restore.drops(item)) {
            restore.check_archive(items).await?;
        }
        // Before anything is written: what goes may stand in the way of what comes, in a unique index.
        let deleted = restore.delete_extras(&data).await?;
        for item in items {
            restore.check_cancelled()?;
            restore.make_room(item).await?;
            if item.source.kind() != CollectionKind::View {
                restore.create(item).await?;
            }
        }
        let pending = Arc::new(PendingMajority::new());
        let meter = Arc::new(PhaseMeter::start(
            Arc::clone(&restore.progress),
            "data",
            if restore.choice.is_everything() { Total::exact(documents, bytes) } else { Total::Unknown },
        ));
        // A reader of GridFS looks for the file first: once it is there, its chunks must be.
        let files = gridfs_files(items);
        let (last, first): (Vec<&RestoreItem>, Vec<&RestoreItem>) =
            data.iter().partition(|item| files.contains(item.source.namespace()));
        for wave in [first, last] {
            restore.write_documents(&wave, &meter, &tally, &pending).await?;
        }
        if let Ok(meter) = Arc::try_unwrap(meter) {
            meter.finish();
        }
        restore.make_views(items, &tally).await?;
        if restore.settings.users_and_roles {
            restore.merge_users_and_roles(authorization).await?;
        }
        restore.build_indexes(&data, &tally).await?;
        if restore.settles_later() {
            // The definitions too: whatever was written last, by anybody, stands behind all of it.
            pending.note_latest(&restore.target).await?;
            pending.settle(&restore.target, &restore.cancel).await?;
        }
        let tally = Arc::into_inner(tally).ok_or_else(|| Error::internal("a worker outlived the restore"))?;
        let totals = tally.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(RestoreReport {
            snapshot: manifest.id.clone(),
            consistency: manifest.consistency.clone(),
            namespaces: items.len() as u64,
            documents: totals.documents,
            bytes: totals.bytes,
            deleted,
            indexes: totals.indexes,
            users_and_roles: self.users_and_roles(),
            refused: totals.refused,
            refused_documents: totals.refused_documents,
            failures: totals.failures,
            seconds: clock.monotonic().as_secs_f64(),
        })
    }
}

impl Restore {
    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }

    /// Whether something is dropped to make room for this item.
    fn drops(&self, item: &RestoreItem) -> bool {
        item.existing.is_some() && self.settings.drop_existing == DropExisting::Yes
    }

    /// Reads every pack that the restore needs and checks its SHA-256: what is to be dropped may be the only good copy left.
    async fn check_archive(&self, items: &[RestoreItem]) -> Result<()> {
        let mut packs = BTreeSet::new();
        for item in items {
            self.check_cancelled()?;
            packs.extend(self.repository.packs_of(&item.source.root).await?);
        }
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "check", Total::Unknown);
        for pack in packs {
            self.check_cancelled()?;
            let checked = self.repository.check_pack(pack).await;
            meter.advance(0, checked.map_err(|error| error.wrap("nothing was dropped, for the archive is damaged"))?);
        }
        meter.finish();
        Ok(())
    }

    async fn make_room(&self, item: &RestoreItem) -> Result<()> {
        if !self.drops(item) {
            return Ok(());
        }
        let database = self.target.database(item.target.database());
        database.run_command(doc! { "drop": item.target.collection() }).await.map_err(Error::from).map(drop).or_else(|error| {
            if error.server_code() == Some(26) { Ok(()) } else { Err(error.with_context("dropping", &item.target)) }
        })
    }

    async fn create(&self, item: &RestoreItem) -> Result<()> {
        if item.existing.is_some() && self.settings.drop_existing == DropExisting::No {
            return Ok(());
        }
        item.source.entry().create(&self.target, &item.target, None).await
    }

    #[tracing::instrument(skip_all)]
    async fn write_documents(
        &self,
        items: &[&RestoreItem],
        meter: &Arc<PhaseMeter>,
        tally: &Arc<Tally>,
        pending: &Arc<PendingMajority>,
    ) -> Result<()> {
        let mut running: JoinSet<Result<()>> = JoinSet::new();
        let stop = self.cancel.child_token();
        let hands = Arc::new(Semaphore::new(self.settings.parallel_writes.get()));
        let batches = Arc::new(AtomicU64::new(0));
        let feeding = async {
            for item in items {
                let target = self.write_target(item)?;
                let mut paced = target.clone();
                paced.write_concern = self.write_concern.clone();
                let writer = Writer {
                    repository: self.repository.clone(),
                    choice: self.choice.clone(),
                    target: Arc::new(target),
                    paced: Arc::new(paced),
                    name: item.target.clone(),
                    pending: self.settles_later().then(|| Arc::clone(pending)),
                    batches: Arc::clone(&batches),
                    meter: Arc::clone(meter),
                    metrics: self.metrics.clone(),
                    tally: Arc::clone(tally),
                    stop: stop.clone(),
                };
                let by_id = item.source.in_id_order && matches!(item.source.entry().options().get("collation"), Ok(None));
                let walk = self.repository.walk_range(&item.source.root, self.choice.ids.as_ref().filter(|_| by_id))?;
                let mut groups = Groups { repository: self.repository.clone(), walk, ahead: None };
                // The order of a capped collection is part of its content: one batch after the other.
                let in_order = item.source.entry().is_capped();
                while let Some(group) = groups.next().await? {
                    if stop.is_cancelled() {
                        return Err(Error::cancelled());
                    }
                    if in_order {
                        writer.write(group).await?;
                        continue;
                    }
                    let hand = Arc::clone(&hands)
                        .acquire_owned()
                        .await
                        .map_err(|error| Error::internal("the writers are gone").with_source(error))?;
                    while let Some(done) = running.try_join_next() {
                        done??;
                    }
                    let writer = writer.clone();
                    running.spawn(async move {
                        let result = writer.write(group).await;
                        drop(hand);
                        result
                    });
                }
            }
            Ok(())
        };
        let fed: Result<()> = feeding.await;
        if fed.is_err() {
            stop.cancel();
        }
        // Every writer ends before the result is told: nothing is written behind the caller's back.
        let mut result = fed;
        while let Some(done) = running.join_next().await {
            let done = done.map_err(Error::from).and_then(|done| done);
            if let Err(error) = done {
                stop.cancel();
                if result.as_ref().err().is_none_or(|earlier| earlier.kind() == ErrorKind::Cancelled)
                    && !(result.is_err() && error.kind() == ErrorKind::Cancelled)
                {
                    result = Err(error);
                }
            }
        }
        result
    }

    /// Whether batches may be acknowledged by the primary alone, because a majority is waited for at the end of them all.
    fn settles_later(&self) -> bool {
        let concern = &self.write_concern;
        let plain_majority = matches!(concern.w, None | Some(Acknowledgment::Majority)) && concern.journal != Some(true);
        plain_majority && concern.w_timeout.is_none() && matches!(self.target.topology(), Topology::ReplicaSet(_))
    }

    fn write_target(&self, item: &RestoreItem) -> Result<WriteTarget> {
        let entry = item.source.entry();
        let namespace = match entry.kind() {
            CollectionKind::TimeSeries => item.target.sibling(format!("system.buckets.{}", item.target.collection()))?,
            _ => item.target.clone(),
        };
        let mut target = WriteTarget::new(self.target.clone(), namespace);
        let merges = item.existing.is_some() && self.settings.drop_existing == DropExisting::No;
        target.mode = match (merges, self.settings.mode) {
            (true, RestoreMode::Upsert | RestoreMode::Replace | RestoreMode::Mirror) => WriteMode::Upsert,
            _ => WriteMode::Insert,
        };
        target.bypass_validation = !merges || matches!(self.settings.mode, RestoreMode::Replace | RestoreMode::Mirror);
        target.ordered = entry.is_capped() && !merges;
        target.write_concern = if self.settles_later() { WriteConcern::nodes(1) } else { self.write_concern.clone() };
        Ok(target)
    }

    async fn make_views(&self, items: &[RestoreItem], tally: &Tally) -> Result<()> {
        // A view on a view is checked against the one below, so make those first; one whose base is missing is made all the same.
        let mut left: Vec<&RestoreItem> =
            items.iter().filter(|item| item.source.kind() == CollectionKind::View && !self.keeps(item)).collect();
        while !left.is_empty() {
            let waiting: BTreeSet<Namespace> = left.iter().map(|item| item.source.namespace().clone()).collect();
            let base_waits = |item: &&RestoreItem| {
                let base = item.source.entry().options().get_str("viewOn").ok();
                base.and_then(|base| item.source.namespace().sibling(base).ok())
                    .is_some_and(|base| waiting.contains(&base) && base != *item.source.namespace())
            };
            let (mut later, mut now): (Vec<_>, Vec<_>) = left.into_iter().partition(base_waits);
            if now.is_empty() {
                // A circle: the server says what it thinks of it.
                now = std::mem::take(&mut later);
            }
            for item in now {
                self.check_cancelled()?;
                if let Err(error) = item.source.entry().create(&self.target, &item.target, item.view_on.as_deref()).await {
                    tally.definition_failed(&item.target, None, error)?;
                }
            }
            left = later;
        }
        Ok(())
    }

    /// Whether a view that exists stays as it is.
    fn keeps(&self, item: &RestoreItem) -> bool {
        item.existing.is_some() && self.settings.drop_existing == DropExisting::No
    }

    #[tracing::instrument(skip_all)]
    async fn build_indexes(&self, items: &[&RestoreItem], tally: &Arc<Tally>) -> Result<()> {
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "indexes", Total::Unknown);
        for item in items {
            self.check_cancelled()?;
            let definitions = item.source.entry().secondary_indexes()?;
            if definitions.is_empty() {
                continue;
            }
            let all = CollectionEntry::create_indexes(&self.target, &item.target, &definitions).await;
            match all {
                Ok(()) => tally.built(definitions.len() as u64),
                Err(error) if is_final(&error) => return Err(error),
                Err(_) => {
                    // One of them is refused: build the others, and say which.
                    for definition in &definitions {
                        match CollectionEntry::create_indexes(&self.target, &item.target, std::slice::from_ref(definition)).await
                        {
                            Ok(()) => tally.built(1),
                            Err(error) => tally.definition_failed(&item.target, definition.get_str("name").ok(), error)?,
                        }
                    }
                }
            }
            meter.advance(definitions.len() as u64, 0);
        }
        meter.finish();
        Ok(())
    }
}

/// Errors that are about the connection or the caller's rights, not about one definition.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unauthorized | ErrorKind::Cancelled)
}

/// Collections that end in `.files` and have a sibling that ends in `.chunks`.
fn gridfs_files(items: &[RestoreItem]) -> BTreeSet<Namespace> {
    let names: BTreeSet<&Namespace> = items.iter().map(|item| item.source.namespace()).collect();
    names
        .iter()
        .filter_map(|files| {
            let prefix = files.collection().strip_suffix(".files")?;
            let chunks = files.sibling(format!("{prefix}.chunks")).ok()?;
            names.contains(&chunks).then(|| (*files).clone())
        })
        .collect()
}

/// Groups of segments that make a batch worth writing.
struct Groups {
    repository: Repository,
    walk: TreeWalk,
    ahead: Option<TreeEntry>,
}

impl Groups {
    /// The next group. It ends where a block ends, if that is near: two groups that share a block decompress it twice.
    async fn next(&mut self) -> Result<Option<Vec<TreeEntry>>> {
        let mut group = Vec::new();
        let (mut bytes, mut block) = (0, None);
        while let Some(entry) = match self.ahead.take() {
            Some(entry) => Some(entry),
            None => self.walk.next().await?,
        } {
            let lies_in = self.repository.locate(entry.id)?.block_key();
            if bytes >= GROUP_MOST_BYTES || (bytes >= GROUP_BYTES && block != Some(lies_in)) {
                self.ahead = Some(entry);
                break;
            }
            bytes += entry.bytes;
            block = Some(lies_in);
            group.push(entry);
        }
        Ok((!group.is_empty()).then_some(group))
    }
}

/// Reads segments of one collection and writes their documents.
#[derive(Clone)]
struct Writer {
    repository: Repository,
    choice: DocumentChoice,
    target: Arc<WriteTarget>,
    /// The same with the restore's own write concern, for one batch in some: so that the members that follow are never left far behind.
    paced: Arc<WriteTarget>,
    name: Namespace,
    /// Where writes are noted that wait for their majority; none where every batch has its acknowledgement.
    pending: Option<Arc<PendingMajority>>,
    batches: Arc<AtomicU64>,
    meter: Arc<PhaseMeter>,
    metrics: RestoreMetrics,
    tally: Arc<Tally>,
    stop: CancellationToken,
}

impl Writer {
    async fn write(&self, group: Vec<TreeEntry>) -> Result<()> {
        let ids: Vec<SegmentId> = group.iter().map(|entry| entry.id).collect();
        let segments = self.repository.read_segments(Content::Documents, &ids).await?;
        for (segment, entry) in segments.iter().zip(&group) {
            let count = documents_of(segment).count() as u64;
            if count != entry.documents || segment.len() as u64 != entry.bytes {
                return Err(Error::corrupt("a segment does not hold what its tree says")
                    .with_context("segment", format!("{:?}", entry.id)));
            }
        }
        let mut documents: Vec<&RawDocument> =
            segments.iter().flat_map(|segment| documents_of(segment)).collect::<Result<_>>()?;
        if !self.choice.is_everything() {
            let mut chosen = Vec::new();
            for document in documents {
                if self.choice.takes(document)? {
                    chosen.push(document);
                }
            }
            documents = chosen;
        }
        for batch in documents.chunks(BATCH_DOCUMENTS) {
            if self.stop.is_cancelled() {
                return Err(Error::cancelled());
            }
            let mut written = WriteOutcome::default();
            let mut rest = batch;
            let number = self.batches.fetch_add(1, Relaxed);
            let target = if number % PACED_EVERY == PACED_EVERY - 1 { &self.paced } else { &self.target };
            // An ordered batch stops at a refusal; the documents behind it still want to be written.
            loop {
                let offset = batch.len() - rest.len();
                let mut outcome = target.write(rest).await?;
                if let Some(pending) = &self.pending {
                    pending.note_outcome(&outcome)?;
                }
                written.written += outcome.written;
                let stopped_at = if target.ordered { outcome.refused.iter().map(|refused| refused.index).max() } else { None };
                for refused in &mut outcome.refused {
                    refused.index += offset;
                }
                written.refused.append(&mut outcome.refused);
                match stopped_at {
                    Some(stop) if stop + 1 < rest.len() => rest = &rest[stop + 1..],
                    _ => break,
                }
            }
            let refused_bytes: u64 = written
                .refused
                .iter()
                .filter_map(|refused| batch.get(refused.index))
                .map(|document| document.as_bytes().len() as u64)
                .sum();
            let bytes = batch.iter().map(|document| document.as_bytes().len() as u64).sum::<u64>();
            self.meter.advance(batch.len() as u64, bytes);
            self.metrics.wrote(written.written, bytes - refused_bytes, written.refused.len() as u64);
            self.tally.wrote(&self.name, written.written, bytes - refused_bytes, &written.refused);
        }
        Ok(())
    }
}

/// What all writers have done together.
struct Tally(Mutex<Totals>, usize);

#[derive(Default)]
struct Totals {
    documents: u64,
    bytes: u64,
    indexes: u64,
    refused: u64,
    refused_documents: Vec<RefusedDocument>,
    failures: Vec<DefinitionFailure>,
}

impl Tally {
    fn new(listed: usize) -> Self {
        Self(Mutex::default(), listed)
    }

    fn wrote(&self, namespace: &Namespace, documents: u64, bytes: u64, refused: &[Refused]) {
        let mut totals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        totals.documents += documents;
        totals.bytes += bytes;
        totals.refused += refused.len() as u64;
        for refused in refused {
            if totals.refused_documents.len() < self.1 {
                totals.refused_documents.push(describe(namespace, refused));
            }
        }
    }

    fn built(&self, indexes: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).indexes += indexes;
    }

    fn definition_failed(&self, namespace: &Namespace, index: Option<&str>, error: Error) -> Result<()> {
        if is_final(&error) {
            return Err(error);
        }
        let failure = DefinitionFailure { namespace: namespace.clone(), index: index.map(str::to_owned), reason: error.report() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).failures.push(failure);
        Ok(())
    }
}

fn describe(namespace: &Namespace, refused: &Refused) -> RefusedDocument {
    let id = refused.id.to_extended_json();
    let reason = match refused.code {
        11000 if refused.is_duplicate_id() => "a document of this _id exists".to_owned(),
        11000 => match &refused.duplicate {
            Some(duplicate) => format!(
                "another document has its place in the unique index on {}",
                duplicate.pattern.keys().cloned().collect::<Vec<_>>().join(", ")
            ),
            None => "another document has its place in a unique index".to_owned(),
        },
        121 => "the collection's validator refuses it".to_owned(),
        10334 => "it is larger than the server allows".to_owned(),
        code => format!("server error {code}"),
    };
    RefusedDocument { namespace: namespace.clone(), id, code: refused.code, reason }
}

const GROUP_BYTES: u64 = 1 << 20;
const GROUP_MOST_BYTES: u64 = 3 << 20;
const PACED_EVERY: u64 = 16;
const BATCH_DOCUMENTS: usize = 10_000;
