//! Raw batches of one range of a collection.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use mongodb::{
    bson::{RawBson, RawDocument, RawDocumentBuf, Timestamp, cstr, rawdoc},
    options::SelectionCriteria,
    raw_batch_cursor::{RawBatch, RawBatchCursor},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::{
    partition::{Key, KeyRange, ScanOrder},
    raw,
};
use crate::{
    connect::Deployment,
    error::{Error, ErrorKind, Result},
    gate::Background,
    namespace::Namespace,
    retry::{RetryBudget, RetryPolicy, retry},
};

/// A bound, in bytes, on the batches that are held at once by everybody who shares it.
///
/// A reader takes room for the largest batch that a server can send *before* it asks, and gives back what the batch did
/// not need when it has come; the rest is given back when the batch is dropped. So the bound holds whatever the documents' size.
#[derive(Clone, Debug)]
pub struct MemoryBudget {
    semaphore: Arc<Semaphore>,
    total: u32,
}

impl MemoryBudget {
    /// A budget of `bytes`, rounded up to what one batch can need (about 17 MiB).
    pub fn new(bytes: u64) -> Self {
        let total = kib(bytes).max(LARGEST_BATCH_KIB);
        Self { semaphore: Arc::new(Semaphore::new(total as usize)), total }
    }

    /// Bytes in use now.
    pub fn in_use(&self) -> u64 {
        (self.total as u64 - self.semaphore.available_permits() as u64) << 10
    }

    async fn for_one_batch(&self) -> Result<OwnedSemaphorePermit> {
        Arc::clone(&self.semaphore)
            .acquire_many_owned(LARGEST_BATCH_KIB)
            .await
            .map_err(|error| Error::internal("the memory budget is closed").with_source(error))
    }
}

/// Where and how to read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ScanSource {
    /// The deployment.
    pub deployment: Deployment,
    /// The collection; for a time-series collection that of its buckets.
    pub namespace: Namespace,
    /// The order.
    pub order: ScanOrder,
    /// Reads at this cluster time (servers from 5.0 in a replica set; not for capped collections), else what is current.
    pub at: Option<Timestamp>,
    /// Where nothing is said of a cluster time: reads nothing older than this. A member that lags is waited for.
    pub not_before: Option<Timestamp>,
    /// Which member to read from; the primary by default.
    pub from: Option<SelectionCriteria>,
    /// The most bytes that a batch should hold. Default 1 MiB; a larger document comes alone.
    pub batch_bytes: u32,
    /// The size of an average document, by which the number of documents in a batch is chosen.
    pub average_document_bytes: u32,
    /// The memory that it shares with other scans.
    pub budget: MemoryBudget,
    /// How to go on after a failure.
    pub retry: RetryPolicy,
    /// The retries that it shares with other scans.
    pub retry_budget: RetryBudget,
    /// Ends the scan.
    pub cancel: CancellationToken,
    /// What it asks before each batch. Default: nobody.
    pub background: Background,
}

impl ScanSource {
    /// Reads `namespace` from the primary in `_id` order, with a budget of its own of 64 MiB.
    pub fn new(deployment: Deployment, namespace: Namespace) -> Self {
        Self {
            deployment,
            namespace,
            order: ScanOrder::Id,
            at: None,
            not_before: None,
            from: None,
            batch_bytes: 1 << 20,
            average_document_bytes: 1024,
            budget: MemoryBudget::new(64 << 20),
            retry: RetryPolicy::default(),
            retry_budget: RetryBudget::default(),
            cancel: CancellationToken::new(),
            background: Background::ungated(),
        }
    }

    /// Starts reading a range. Nothing is sent before [`RangeScan::next`].
    pub fn scan(&self, range: KeyRange) -> RangeScan {
        RangeScan { source: self.clone(), last: None, step: Step::first(&range), range, cursor: None }
    }

    fn set_read_concern(&self, command: &mut RawDocumentBuf) {
        match self.at {
            Some(at) => command.append(cstr!("readConcern"), rawdoc! { "level": "snapshot", "atClusterTime": at }),
            // What is not majority committed can still be rolled back; a backup must not hold it. A standalone takes "local" only.
            None if *self.deployment.topology() != crate::connect::Topology::Standalone => {
                let mut concern = rawdoc! { "level": "majority" };
                if let Some(not_before) = self.not_before {
                    concern.append(cstr!("afterClusterTime"), not_before);
                }
                command.append(cstr!("readConcern"), concern);
            }
            None => {}
        }
    }

    /// Runs a `find` of another form, with the source's own read concern, preference and memory.
    pub(super) async fn open(&self, mut command: RawDocumentBuf) -> Result<Opened<'_>> {
        self.set_read_concern(&mut command);
        let permit = self.budget.for_one_batch().await?;
        let (cursor, batch) = open(self, command).await?;
        Ok(Opened { source: self, first: batch, cursor, _permit: permit })
    }

    fn batch_documents(&self) -> i32 {
        let documents = self.batch_bytes / self.average_document_bytes.max(16);
        i32::try_from(documents.clamp(16, 100_000)).unwrap_or(100_000)
    }
}

/// A cursor that is not restarted.
pub(super) struct Opened<'a> {
    source: &'a ScanSource,
    first: Option<RawBatch>,
    cursor: RawBatchCursor,
    _permit: OwnedSemaphorePermit,
}

impl Opened<'_> {
    pub(super) async fn next(&mut self) -> Result<Option<RawBatch>> {
        match self.first.take() {
            Some(first) => Ok(Some(first)),
            None => one_batch(&mut self.cursor, &self.source.cancel).await,
        }
    }
}

/// A batch of documents, as the server sent it, and its share of the memory budget.
#[derive(Debug)]
pub struct ScanBatch {
    batch: RawBatch,
    /// How many documents at the front were delivered before a restart.
    skip: usize,
    _permit: OwnedSemaphorePermit,
}

impl ScanBatch {
    /// The documents, in order, borrowed from the server's reply.
    ///
    /// # Errors
    /// [`ErrorKind::CorruptData`] when the reply is malformed.
    pub fn documents(&self) -> Result<impl Iterator<Item = Result<&RawDocument>>> {
        Ok(raw::documents_in(self.batch.doc_slices()?)?.skip(self.skip))
    }
}

/// A scan of one range: a pipeline stage that is asked for one batch after the other.
///
/// After a network failure, a lost cursor or a change of primary it opens a new cursor at the last `_id` that it delivered
/// (the driver's cursor, asked again after an error, may skip documents). At a cluster time the result is exactly as if
/// nothing had happened; without one, documents changed in between may be seen in their newer state. A scan in
/// natural order has no place to restart from: there, a failure is final.
pub struct RangeScan {
    source: ScanSource,
    range: KeyRange,
    /// The `_id` of the last document delivered.
    last: Option<Key>,
    step: Step,
    cursor: Option<RawBatchCursor>,
}

impl fmt::Debug for RangeScan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Bounds and the last key are values of documents.
        f.debug_struct("RangeScan").field("namespace", &self.source.namespace).field("step", &self.step).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Reading the range; an open-ended range that has a lower bound does not reach `MaxKey`.
    Range {
        then_max_key: bool,
    },
    /// Reading the document whose `_id` is `MaxKey`, if there is one.
    MaxKey,
    Done,
}

impl Step {
    /// The index knows no bound beyond `MinKey` and `MaxKey`: the server refuses a range from the one to itself.
    fn first(range: &KeyRange) -> Self {
        match (&range.lower, &range.upper) {
            (_, Some(upper)) if upper.is(Key::MIN_KEY) => Self::Done,
            (Some(lower), None) if lower.is(Key::MAX_KEY) => Self::MaxKey,
            (lower, upper) => Self::Range { then_max_key: lower.is_some() && upper.is_none() },
        }
    }
}

impl RangeScan {
    /// The next batch that holds a document, or `None` at the end.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] by the token; the server's own otherwise, after the retries of the source's policy.
    /// [`is_snapshot_lost`] tells whether the cluster time has left the server's history. After an error the scan is over.
    ///
    /// # Cancel safety
    /// Not cancel safe: when the future is dropped, drop the scan too. Use the token to stop in good order.
    pub async fn next(&mut self) -> Result<Option<ScanBatch>> {
        while self.step != Step::Done {
            // While it is held it holds no memory.
            self.source.background.pass(&self.source.cancel).await?;
            let permit = tokio::select! {
                biased;
                () = self.source.cancel.cancelled() => return Err(Error::cancelled()),
                permit = self.source.budget.for_one_batch() => permit?,
            };
            match self.next_reply().await {
                Ok(Some((batch, skip))) => {
                    if let Some(batch) = self.accept(batch, skip, permit)? {
                        return Ok(Some(batch));
                    }
                }
                Ok(None) => {
                    self.cursor = None;
                    self.step = match self.step {
                        Step::Range { then_max_key: true } => Step::MaxKey,
                        _ => Step::Done,
                    };
                }
                Err(error) => {
                    self.step = Step::Done;
                    self.cursor = None;
                    return Err(error.with_context("namespace", &self.source.namespace));
                }
            }
        }
        Ok(None)
    }

    /// One reply of the server; the number says how many of its documents were delivered before.
    async fn next_reply(&mut self) -> Result<Option<(RawBatch, usize)>> {
        let first_error = match self.cursor.as_mut() {
            Some(cursor) => match one_batch(cursor, &self.source.cancel).await {
                Ok(batch) => return Ok(batch.map(|batch| (batch, 0))),
                Err(error) => error,
            },
            None => return self.reopen().await,
        };
        self.cursor = None;
        // Not QueryPlanKilled (175): that is what a drop or a rename says, and a new cursor on the name then finds nothing,
        // without an error, even at a cluster time at which there were documents (5.0.4, 6.0.5, 6.0.27).
        let cursor_lost = matches!(first_error.server_code(), Some(43 | 237));
        let restartable =
            self.source.order == ScanOrder::Id && (first_error.is_retryable() || cursor_lost) && !is_snapshot_lost(&first_error);
        if !restartable || !self.source.retry_budget.withdraw() {
            return Err(first_error);
        }
        tracing::warn!(namespace = %self.source.namespace, kind = ?first_error.kind(), "a scan lost its cursor and starts again at its last key");
        self.reopen().await
    }

    async fn reopen(&mut self) -> Result<Option<(RawBatch, usize)>> {
        if let (Some(last), Step::Range { .. }, None) = (&self.last, self.step, &self.range.upper) {
            // From its last key on, a range without an end no longer reaches `MaxKey` by itself.
            if last.is(Key::MAX_KEY) {
                return Ok(None);
            }
            self.step = Step::Range { then_max_key: true };
        }
        let (source, command) = (&self.source, self.find_command()?);
        // At the start nothing was delivered, so a scan in natural order can be tried again as well.
        let (cursor, batch) =
            retry(&source.retry, &source.retry_budget, &source.cancel, |_| open(source, command.clone())).await?;
        self.cursor = Some(cursor);
        let Some(batch) = batch else { return Ok(None) };
        // A range restarted at its last key begins with the document that was delivered last, unless it is gone.
        let mut skip = 0;
        if let (Some(last), Step::Range { .. }) = (&self.last, self.step)
            && let Some(first) = raw::documents_in(batch.doc_slices()?)?.next()
            && Key::of(first?)? == *last
        {
            skip = 1;
        }
        Ok(Some((batch, skip)))
    }

    fn accept(&mut self, batch: RawBatch, skip: usize, mut permit: OwnedSemaphorePermit) -> Result<Option<ScanBatch>> {
        let needed = kib(batch.as_raw_document().as_bytes().len() as u64) as usize;
        // Dropping the second half of a split permit gives it back.
        drop(permit.split(permit.num_permits().saturating_sub(needed)));
        let mut last = None;
        let mut count = 0;
        for document in raw::documents_in(batch.doc_slices()?)? {
            last = Some(document?);
            count += 1;
        }
        let Some(last) = last.filter(|_| count > skip) else {
            // A first batch can be empty, and so can any other: only the cursor's end is the end.
            return Ok(None);
        };
        if self.source.order == ScanOrder::Id {
            self.last = Some(Key::of(last)?);
        }
        Ok(Some(ScanBatch { batch, skip, _permit: permit }))
    }

    fn find_command(&self) -> Result<RawDocumentBuf> {
        let source = &self.source;
        let mut command = rawdoc! { "find": source.namespace.collection() };
        match (self.step, source.order) {
            (Step::MaxKey, _) => {
                command.append(cstr!("filter"), rawdoc! { "_id": RawBson::MaxKey });
            }
            (_, ScanOrder::Id) => {
                command.append(cstr!("hint"), rawdoc! { "_id": 1 });
                if let Some(lower) = self.last.as_ref().or(self.range.lower.as_ref()) {
                    command.append(cstr!("min"), lower.as_document().to_owned());
                }
                if let Some(upper) = &self.range.upper {
                    command.append(cstr!("max"), upper.as_document().to_owned());
                }
            }
            (_, ScanOrder::Natural) => command.append(cstr!("hint"), rawdoc! { "$natural": 1 }),
        }
        command.append(cstr!("batchSize"), source.batch_documents());
        command.append(cstr!("noCursorTimeout"), false);
        source.set_read_concern(&mut command);
        Ok(command)
    }
}

/// Whether the error means that the server no longer keeps, or never kept, the history of the cluster time asked for:
/// `SnapshotTooOld` (239) or `SnapshotUnavailable` (246).
pub fn is_snapshot_lost(error: &Error) -> bool {
    matches!(error.server_code(), Some(239 | 246))
}

async fn open(source: &ScanSource, command: RawDocumentBuf) -> Result<(RawBatchCursor, Option<RawBatch>)> {
    let database = source.deployment.database(source.namespace.database());
    let mut action = database.run_raw_cursor_command(command).batch_size(u32::try_from(source.batch_documents()).unwrap_or(1000));
    if let Some(criteria) = &source.from {
        action = action.selection_criteria(criteria.clone());
    }
    let mut cursor = tokio::select! {
        biased;
        () = source.cancel.cancelled() => return Err(Error::cancelled()),
        cursor = action.batch() => cursor?,
        // A read waits for the majority to reach its cluster time, for ever if need be. `maxTimeMS` is no way to bound that: it would
        // bound the whole scan too.
        () = tokio::time::sleep(FIRST_ANSWER_WITHIN) => {
            return Err(Error::new(ErrorKind::Unavailable, "the server does not begin to answer: does a majority of the replica set follow the primary?"));
        }
    };
    let batch = one_batch(&mut cursor, &source.cancel).await?;
    Ok((cursor, batch))
}

async fn one_batch(cursor: &mut RawBatchCursor, cancel: &CancellationToken) -> Result<Option<RawBatch>> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(Error::new(ErrorKind::Cancelled, "cancelled")),
        batch = cursor.next() => Ok(batch.transpose()?),
    }
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX >> 1)
}

const FIRST_ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// A reply holds at most 16 MiB of documents, a little over for the last one, and the reply's own fields.
const LARGEST_BATCH_KIB: u32 = (16 << 10) + 64;
