//! Writing the documents: segments are read in order, and several batches are on their way at a time.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Namespace, Result, Topology,
    bson::RawDocument,
    gate::Background,
    mongodb::options::{Acknowledgment, WriteConcern},
    progress::PhaseMeter,
    transfer::{
        majority::PendingMajority,
        write::{Refused, WriteMode, WriteTarget},
        written::Marred,
    },
    transform::Transform,
};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    Restore, RestoreItem, RestoreMode,
    ids::DocumentChoice,
    tally::{Position, Tally, Written},
};
use crate::{
    metrics::RestoreMetrics,
    repository::{
        Repository,
        assembly::Changing,
        documents_of,
        reader::TreeWalk,
        segment::{Content, SegmentId},
        tree::TreeEntry,
    },
};

impl Restore {
    /// Writes the documents of namespaces, each given with its number, from a position on.
    #[tracing::instrument(skip_all)]
    pub(super) async fn write_documents(&self, items: &[(i64, &RestoreItem)], shared: &Shared, from: Position) -> Result<()> {
        let mut running: JoinSet<Result<()>> = JoinSet::new();
        let stop = self.cancel.child_token();
        let hands = Arc::new(Semaphore::new(self.settings.parallel_writes.get()));
        let feeding = async {
            for (namespace, item) in items.iter().filter(|(namespace, _)| *namespace >= from.namespace) {
                let target = self.write_target(item)?;
                let mut paced = target.clone();
                paced.write_concern = self.batch_concern();
                let writer = Writer {
                    repository: self.repository.clone(),
                    choice: self.choice.clone(),
                    changing: self.changing(item),
                    target: Arc::new(target),
                    paced: Arc::new(paced),
                    name: item.target.clone(),
                    shared: shared.clone(),
                    doubts: shared.resuming.doubts(self.merges(item)),
                    metrics: self.metrics.clone(),
                    stop: stop.clone(),
                    background: self.background.clone(),
                };
                let by_id = item.source.in_id_order && matches!(item.source.entry().options().get("collation"), Ok(None));
                let walk = self.repository.walk_range(&item.source.root, self.choice.ids.as_ref().filter(|_| by_id))?;
                let mut groups = Groups { repository: self.repository.clone(), walk, ahead: None };
                let mut position = Position { namespace: *namespace, segments: 0 };
                if *namespace == from.namespace {
                    groups.skip(from.segments).await?;
                    position = from;
                }
                // The order of a capped collection is part of its content: one batch after the other.
                let in_order = item.source.entry().is_capped();
                while let Some(group) = groups.next().await? {
                    if stop.is_cancelled() {
                        return Err(Error::cancelled());
                    }
                    position.segments += group.len() as i64;
                    let number = shared.groups.fetch_add(1, Relaxed);
                    if in_order {
                        writer.write(number, position, group).await?;
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
                        let result = writer.write(number, position, group).await;
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
    pub(super) fn settles_later(&self) -> bool {
        let concern = &self.write_concern;
        let plain_majority = matches!(concern.w, None | Some(Acknowledgment::Majority)) && concern.journal != Some(true);
        plain_majority && concern.w_timeout.is_none() && matches!(self.target.topology(), Topology::ReplicaSet(_))
    }

    /// Whether it is noted where in the oplog writes stand.
    pub(super) fn notes_places(&self) -> bool {
        self.settles_later() || (self.checkpoints.is_some() && matches!(self.target.topology(), Topology::ReplicaSet(_)))
    }

    /// What changes the documents of an item.
    fn changing(&self, item: &RestoreItem) -> Vec<Changing> {
        let namespace = item.source.namespace();
        let of = |transform: &Arc<dyn Transform>| Changing { transform: Arc::clone(transform), namespace: namespace.clone() };
        self.transforms.iter().map(of).collect()
    }

    /// Gives a document to `take`, if it is wanted, and as it is wanted.
    pub(super) fn choose(
        &self,
        item: &RestoreItem,
        document: &RawDocument,
        mut take: impl FnMut(&RawDocument) -> Result<()>,
    ) -> Result<()> {
        choose(&self.choice, &self.changing(item), document, &mut take)
    }

    fn write_target(&self, item: &RestoreItem) -> Result<WriteTarget> {
        let entry = item.source.entry();
        let namespace = item.data_namespace()?.ok_or_else(|| Error::internal("a view has no documents to write"))?;
        let mut target = WriteTarget::new(self.target.clone(), namespace);
        let merges = self.merges(item);
        target.mode = match (merges, self.settings.mode) {
            (true, RestoreMode::Upsert | RestoreMode::Replace | RestoreMode::Mirror) => WriteMode::Upsert,
            _ => WriteMode::Insert,
        };
        target.bypass_validation = !merges || matches!(self.settings.mode, RestoreMode::Replace | RestoreMode::Mirror);
        target.ordered = entry.is_capped() && !merges;
        target.write_concern = if self.settles_later() { WriteConcern::nodes(1) } else { self.batch_concern() };
        Ok(target)
    }

    /// The write concern of a batch that is waited for.
    fn batch_concern(&self) -> WriteConcern {
        let mut concern = self.write_concern.clone();
        // A checkpoint must not survive what it speaks of, and a standalone has only its journal.
        if self.checkpoints.is_some() && *self.target.topology() == Topology::Standalone {
            concern.journal = concern.journal.or(Some(true));
        }
        concern
    }
}

fn choose(
    choice: &DocumentChoice,
    changing: &[Changing],
    document: &RawDocument,
    take: &mut dyn FnMut(&RawDocument) -> Result<()>,
) -> Result<()> {
    if choice.takes(document)? { change(changing, document, take) } else { Ok(()) }
}

fn change(changing: &[Changing], document: &RawDocument, take: &mut dyn FnMut(&RawDocument) -> Result<()>) -> Result<()> {
    match changing.split_first() {
        None => take(document),
        Some((first, rest)) => first.change(document, |document| change(rest, document, take)),
    }
}

/// What all writers of a restore share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) meter: Arc<PhaseMeter>,
    pub(super) tally: Arc<Tally>,
    /// Where writes are noted that wait for their majority; none where every batch has its acknowledgement.
    pub(super) pending: Option<Arc<PendingMajority>>,
    resuming: Resuming,
    groups: Arc<AtomicU64>,
    batches: Arc<AtomicU64>,
}

impl Shared {
    pub(super) fn new(
        meter: Arc<PhaseMeter>,
        tally: Arc<Tally>,
        pending: Option<Arc<PendingMajority>>,
        resuming: Resuming,
    ) -> Self {
        Self { meter, tally, pending, resuming, groups: Arc::default(), batches: Arc::default() }
    }
}

/// Whether documents may be there already that this restore has written, in an earlier run or in another that runs as well.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resuming {
    pub(super) was_begun: bool,
    pub(super) is_kept: bool,
}

impl Resuming {
    /// What to do with those that an interruption has left half written; none if a document that is there cannot be the restore's own.
    fn doubts(self, merges: bool) -> Option<Marred> {
        match merges {
            // The same document but for a time may be its owner's.
            true => self.was_begun.then_some(Marred::Leave),
            false => self.is_kept.then_some(Marred::PutRight),
        }
    }
}

/// Groups of segments that make a batch worth writing.
struct Groups {
    repository: Repository,
    walk: TreeWalk,
    ahead: Option<TreeEntry>,
}

impl Groups {
    /// Passes over so many segments.
    async fn skip(&mut self, segments: i64) -> Result<()> {
        for _ in 0..segments {
            if self.walk.next().await?.is_none() {
                return Err(Error::corrupt("a checkpoint is further than the collection is long: begin anew"));
            }
        }
        Ok(())
    }

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
    changing: Vec<Changing>,
    target: Arc<WriteTarget>,
    /// The same with the restore's own write concern, for one batch in some: so that the members that follow are never left far behind.
    paced: Arc<WriteTarget>,
    name: Namespace,
    shared: Shared,
    doubts: Option<Marred>,
    metrics: RestoreMetrics,
    stop: CancellationToken,
    background: Background,
}

impl Writer {
    async fn write(&self, number: u64, position: Position, group: Vec<TreeEntry>) -> Result<()> {
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
        let mut changed: Vec<Vec<u8>> = Vec::new();
        if !self.choice.is_everything() || !self.changing.is_empty() {
            for document in documents {
                choose(&self.choice, &self.changing, document, &mut |document| {
                    changed.push(document.as_bytes().to_vec());
                    Ok(())
                })?;
            }
            documents = changed.iter().map(|document| RawDocument::from_bytes(document)).collect::<Result<_, _>>()?;
        }
        let mut all = Written::default();
        for batch in documents.chunks(BATCH_DOCUMENTS) {
            self.background.pass(&self.stop).await?;
            if self.stop.is_cancelled() {
                return Err(Error::cancelled());
            }
            let (written, refused) = self.write_batch(batch).await?;
            let refused_bytes: u64 = refused
                .iter()
                .filter_map(|refused| batch.get(refused.index))
                .map(|document| document.as_bytes().len() as u64)
                .sum();
            let bytes = batch.iter().map(|document| document.as_bytes().len() as u64).sum::<u64>();
            self.shared.meter.advance(batch.len() as u64, bytes);
            self.metrics.wrote(written, bytes - refused_bytes, refused.len() as u64);
            all.documents += written;
            all.bytes += bytes - refused_bytes;
            all.refused.extend(refused.into_iter().map(|refused| (self.name.clone(), refused)));
        }
        self.shared.tally.wrote(number, position, all);
        Ok(())
    }

    /// Writes some documents. Gives how many are there now, and those that were refused.
    async fn write_batch(&self, batch: &[&RawDocument]) -> Result<(u64, Vec<Refused>)> {
        let number = self.shared.batches.fetch_add(1, Relaxed);
        let target = if number % PACED_EVERY == PACED_EVERY - 1 { &self.paced } else { &self.target };
        let mut written = 0;
        let mut refused = Vec::new();
        let mut rest: Vec<(usize, &RawDocument)> = batch.iter().copied().enumerate().collect();
        // An ordered batch stops at a refusal; the documents behind it still want to be written.
        while !rest.is_empty() {
            let documents: Vec<&RawDocument> = rest.iter().map(|(_, document)| *document).collect();
            let outcome = target.write(&documents).await?;
            if let Some(pending) = &self.shared.pending {
                pending.note_outcome(&outcome)?;
            }
            written += outcome.written;
            let stopped_at = outcome.refused.iter().map(|refused| refused.index).max().filter(|_| target.ordered);
            let mut behind = stopped_at.map(|stop| rest.split_off((stop + 1).min(rest.len()))).unwrap_or_default();
            let (doubtful, mut refusals): (Vec<Refused>, Vec<Refused>) =
                outcome.refused.into_iter().partition(|refused| self.doubts.is_some() && refused.code == DUPLICATE);
            if let (false, Some(marred)) = (doubtful.is_empty(), self.doubts) {
                // What comes behind in an ordered batch is asked for with it, instead of being refused one by one.
                let asked: Vec<&RawDocument> = doubtful
                    .iter()
                    .filter_map(|refused| documents.get(refused.index).copied())
                    .chain(behind.iter().map(|(_, document)| *document))
                    .collect();
                let found = target.find_written(&asked, marred).await?;
                if let (Some(pending), Some(op_time)) = (&self.shared.pending, found.op_time) {
                    pending.note(op_time);
                }
                let mut there = found.there.into_iter();
                for refused in doubtful {
                    if there.next() == Some(true) {
                        written += 1;
                    } else {
                        refusals.push(refused);
                    }
                }
                let before = behind.len();
                behind.retain(|_| there.next() != Some(true));
                written += (before - behind.len()) as u64;
            }
            for mut refusal in refusals {
                refusal.index = rest.get(refusal.index).map_or(refusal.index, |(index, _)| *index);
                refused.push(refusal);
            }
            rest = behind;
        }
        Ok((written, refused))
    }
}

const GROUP_BYTES: u64 = 1 << 20;
const GROUP_MOST_BYTES: u64 = 3 << 20;
const PACED_EVERY: u64 = 16;
const BATCH_DOCUMENTS: usize = 10_000;
/// DuplicateKey.
const DUPLICATE: i32 = 11000;
