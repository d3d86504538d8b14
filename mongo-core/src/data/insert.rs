//! Batched insert: bounded batches, and what became of every document.

use std::{fmt, marker::PhantomData, mem, ops::ControlFlow, pin::pin};

use futures_util::stream::{Stream, StreamExt};
use mongodb::{
    Collection,
    bson::{self, RawDocumentBuf},
    results::InsertManyResult,
};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::insert_outcome::{DocumentFailure, judge};
use crate::error::{Error, ErrorKind, Result};

/// How [`insert_batched`](super::CollectionExt::insert_batched) sends documents.
///
/// ```
/// use mongo_core::data::InsertSettings;
///
/// let settings = InsertSettings::unordered().with_batch_documents(5_000).with_in_flight(4);
/// assert_eq!(settings.batch_documents, 5_000);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct InsertSettings {
    /// Whether a refused document stops the insert. Default [`InsertOrder::Ordered`], as in MongoDB itself.
    pub order: InsertOrder,
    /// Documents a batch at most, 1 to 100,000. Default 2,000.
    pub batch_documents: usize,
    /// Bytes of BSON a batch at most, 1 to 32 MiB; a single larger document makes a batch of its own. Default 2 MiB.
    pub batch_bytes: usize,
    /// Batches on their way at once, 1 to 64, each over its own connection. Ordered inserts send one at a time whatever
    /// this says. Default 2. Memory is about four times `batch_bytes` for each.
    pub in_flight: usize,
    /// How many failures [`InsertReport::failures`] keeps; all are counted. Default 100.
    pub kept_failures: usize,
}

impl Default for InsertSettings {
    fn default() -> Self {
        Self { order: InsertOrder::Ordered, batch_documents: 2_000, batch_bytes: 2 << 20, in_flight: 2, kept_failures: 100 }
    }
}

impl InsertSettings {
    /// The defaults, with [`InsertOrder::Unordered`].
    pub fn unordered() -> Self {
        Self::default().with_order(InsertOrder::Unordered)
    }

    /// Sets whether a refused document stops the insert.
    #[must_use]
    pub fn with_order(mut self, order: InsertOrder) -> Self {
        self.order = order;
        self
    }

    /// Sets the number of documents a batch at most.
    #[must_use]
    pub fn with_batch_documents(mut self, documents: usize) -> Self {
        self.batch_documents = documents;
        self
    }

    /// Sets the bytes of BSON a batch at most.
    #[must_use]
    pub fn with_batch_bytes(mut self, bytes: usize) -> Self {
        self.batch_bytes = bytes;
        self
    }

    /// Sets the number of batches on their way at once.
    #[must_use]
    pub fn with_in_flight(mut self, batches: usize) -> Self {
        self.in_flight = batches;
        self
    }

    /// Sets how many failures the report keeps.
    #[must_use]
    pub fn with_kept_failures(mut self, failures: usize) -> Self {
        self.kept_failures = failures;
        self
    }

    fn validate(&self) -> Result<()> {
        if !(1..=100_000).contains(&self.batch_documents) {
            return Err(Error::invalid("batch_documents must be 1 to 100000: a server takes no more in one command"));
        }
        if !(1..=32 << 20).contains(&self.batch_bytes) {
            return Err(Error::invalid("batch_bytes must be 1 to 33554432: a server takes at most 48 MB in one message"));
        }
        if !(1..=64).contains(&self.in_flight) {
            return Err(Error::invalid("in_flight must be 1 to 64"));
        }
        Ok(())
    }

    fn lanes(&self) -> usize {
        match self.order {
            InsertOrder::Ordered => 1,
            InsertOrder::Unordered => self.in_flight,
        }
    }
}

/// What a refused document does to those after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum InsertOrder {
    /// Documents are inserted in order; the first refusal ends the insert.
    Ordered,
    /// Documents are inserted in any order; refusals are reported and the rest is inserted.
    Unordered,
}

/// What a batched insert did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct InsertReport {
    /// Documents that the server has inserted and acknowledged as the write concern asks.
    pub inserted: u64,
    /// Documents that were refused.
    pub failed: u64,
    /// The first refusals by arrival, at most [`InsertSettings::kept_failures`], in order of their index.
    pub failures: Vec<DocumentFailure>,
    /// Index of the refused document that ended an ordered insert: nothing from there on was inserted.
    pub stopped_at: Option<u64>,
    /// Batches sent.
    pub batches: u64,
    /// Bytes of BSON sent.
    pub bytes: u64,
}

impl InsertReport {
    /// Whether every document was inserted.
    pub fn is_complete(&self) -> bool {
        self.failed == 0
    }

    /// The report, or an error when any document was refused: for callers to whom one refusal is a failure.
    ///
    /// # Errors
    /// [`ErrorKind::Rejected`] with the number of failures and the first of them.
    pub fn into_result(self) -> Result<Self> {
        if self.is_complete() {
            return Ok(self);
        }
        let error = Error::new(ErrorKind::Rejected, "documents were refused")
            .with_context("failed", self.failed)
            .with_context("inserted", self.inserted);
        Err(match self.failures.first() {
            Some(first) => error.with_context("first index", first.index).with_context("first reason", &first.message),
            None => error,
        })
    }
}

/// Inserts documents that are pushed one by one, in bounded batches.
///
/// Made by [`CollectionExt::batch_inserter`](super::CollectionExt::batch_inserter). Call [`finish`](Self::finish) at the
/// end: what has not filled a batch is sent then. When the inserter is dropped instead, those documents are not
/// sent, and whether the batches on their way were applied is unknown.
#[must_use = "documents that have not filled a batch are sent by `finish`"]
pub struct BatchInserter<T> {
    collection: Collection<RawDocumentBuf>,
    settings: InsertSettings,
    cancel: CancellationToken,
    batch: Batch,
    pushed: u64,
    running: JoinSet<Settled>,
    report: InsertReport,
    unknown: u64,
    state: State,
    documents: PhantomData<fn(&T)>,
}

/// One batch of encoded documents, with the index that each of them has in the input.
#[derive(Default)]
struct Batch {
    documents: Vec<RawDocumentBuf>,
    indexes: Vec<u64>,
    bytes: usize,
}

/// A batch that the server has answered, or that was lost.
struct Settled {
    indexes: Vec<u64>,
    result: mongodb::error::Result<InsertManyResult>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// An ordered insert met a refused document.
    Stopped,
    Failed,
}

/// A document as it goes over the wire, or why it cannot.
pub(super) type Encoded = Result<RawDocumentBuf, Refusal>;

/// Why a document is refused on this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    NotADocument,
    TooLarge,
}

/// Every supported server has this limit (`maxBsonObjectSize`).
const MAX_DOCUMENT_BYTES: usize = 16 << 20;
/// What the driver adds to a document without an `_id`: type, `_id` and its terminator, 12 bytes of ObjectId.
const ID_BYTES: usize = 17;

pub(super) fn encode<T: Serialize>(document: &T) -> Encoded {
    // The encoder's message can quote values.
    let encoded = bson::serialize_to_raw_document_buf(document).map_err(|_| Refusal::NotADocument)?;
    let bytes = encoded.as_bytes().len();
    // A document that is too large would make the driver refuse its whole batch.
    if bytes > MAX_DOCUMENT_BYTES || (bytes > MAX_DOCUMENT_BYTES - ID_BYTES && !matches!(encoded.get("_id"), Ok(Some(_)))) {
        return Err(Refusal::TooLarge);
    }
    Ok(encoded)
}

pub(super) async fn insert_all<T: Send + Sync>(
    mut inserter: BatchInserter<T>,
    documents: impl Iterator<Item = Encoded> + Send,
) -> Result<InsertReport> {
    for document in documents {
        if inserter.push_encoded(document).await?.is_break() {
            break;
        }
    }
    inserter.finish().await
}

pub(super) async fn insert_stream<T: Send + Sync>(
    mut inserter: BatchInserter<T>,
    documents: impl Stream<Item = Result<Encoded>> + Send,
) -> Result<InsertReport> {
    let mut documents = pin!(documents);
    while let Some(document) = documents.next().await {
        let document = match document {
            Ok(document) => document,
            Err(error) => return Err(inserter.fail(error).await),
        };
        if inserter.push_encoded(document).await?.is_break() {
            break;
        }
    }
    inserter.finish().await
}

impl<T: Send + Sync> BatchInserter<T> {
    pub(super) fn new(collection: Collection<RawDocumentBuf>, settings: InsertSettings) -> Result<Self> {
        settings.validate()?;
        Ok(Self {
            collection,
            settings,
            cancel: CancellationToken::new(),
            batch: Batch::default(),
            pushed: 0,
            running: JoinSet::new(),
            report: InsertReport::default(),
            unknown: 0,
            state: State::Open,
            documents: PhantomData,
        })
    }

    /// Stops at the next batch once `cancel` is cancelled, with [`ErrorKind::Cancelled`].
    ///
    /// Batches on their way are awaited, so that the numbers in the error are exact.
    pub fn with_cancellation(mut self, cancel: CancellationToken) -> Self {
        self.cancel = cancel;
        self
    }

    /// What is known so far. Documents in batches that are still on their way are not counted.
    pub fn report(&self) -> &InsertReport {
        &self.report
    }

    /// Adds a document, and sends a batch when one is full.
    ///
    /// `Break` means that an ordered insert has stopped: this document and all later ones are not inserted.
    ///
    /// # Errors
    /// As [`insert_batched`](super::CollectionExt::insert_batched), and [`ErrorKind::Cancelled`]. After an error
    /// the inserter takes no more documents.
    ///
    /// # Cancel safety
    /// Not cancel safe: whether the document was taken is unknown when the future is dropped. Drop the inserter too.
    pub async fn push(&mut self, document: &T) -> Result<ControlFlow<()>>
    where
        T: Serialize,
    {
        self.push_encoded(encode(document)).await
    }

    /// Sends what is left, waits for every batch, and reports.
    ///
    /// # Errors
    /// As [`push`](Self::push). After an earlier error, [`ErrorKind::InvalidInput`].
    ///
    /// # Cancel safety
    /// Dropping the future aborts: whether the batches on their way were applied is then unknown.
    pub async fn finish(mut self) -> Result<InsertReport> {
        if self.state == State::Open {
            // Whether it stops here makes no difference: there is nothing after it.
            let _: ControlFlow<()> = self.send().await?;
        }
        while !self.running.is_empty() {
            self.settle().await?;
        }
        if self.state == State::Failed {
            return Err(Error::invalid("the inserter has failed before: its report is not one of success"));
        }
        Ok(self.report)
    }

    pub(super) async fn push_encoded(&mut self, document: Encoded) -> Result<ControlFlow<()>> {
        match self.state {
            State::Open => {}
            State::Stopped => return Ok(ControlFlow::Break(())),
            State::Failed => return Err(Error::invalid("the inserter has failed before and takes no more documents")),
        }
        let index = self.pushed;
        self.pushed += 1;
        let document = match document {
            Ok(document) => document,
            Err(refusal) => return self.refuse(index, refusal).await,
        };
        let bytes = document.as_bytes().len();
        if self.batch.bytes + bytes > self.settings.batch_bytes && self.send().await?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        self.batch.documents.push(document);
        self.batch.indexes.push(index);
        self.batch.bytes += bytes;
        if self.batch.documents.len() >= self.settings.batch_documents || self.batch.bytes >= self.settings.batch_bytes {
            return self.send().await;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Counts a document that is not sent at all.
    async fn refuse(&mut self, index: u64, refusal: Refusal) -> Result<ControlFlow<()>> {
        if self.settings.order == InsertOrder::Ordered {
            // What came before it is still due, and may stop the insert earlier.
            if self.send().await?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            while !self.running.is_empty() {
                self.settle().await?;
            }
            if self.state == State::Stopped {
                return Ok(ControlFlow::Break(()));
            }
        }
        self.record(refusal.failure(index));
        Ok(self.flow())
    }

    /// Sends the batch that is being filled, when there is a free lane and nothing stands against it.
    async fn send(&mut self) -> Result<ControlFlow<()>> {
        if self.batch.documents.is_empty() {
            return Ok(self.flow());
        }
        if self.cancel.is_cancelled() {
            return Err(self.fail(Error::cancelled()).await);
        }
        while self.running.len() >= self.settings.lanes() {
            self.settle().await?;
        }
        if self.state == State::Stopped {
            return Ok(ControlFlow::Break(()));
        }
        let Batch { documents, indexes, bytes } = mem::take(&mut self.batch);
        self.report.batches += 1;
        self.report.bytes += bytes as u64;
        let collection = self.collection.clone();
        let ordered = self.settings.order == InsertOrder::Ordered;
        self.running.spawn(async move {
            let result = collection.insert_many(&documents).ordered(ordered).await;
            Settled { indexes, result }
        });
        Ok(ControlFlow::Continue(()))
    }

    /// Waits for one batch.
    async fn settle(&mut self) -> Result<()> {
        match self.absorb().await {
            Some(error) => Err(self.fail(error).await),
            None => Ok(()),
        }
    }

    /// Waits for one batch, counts what became of it, and returns what is more than a refused document.
    async fn absorb(&mut self) -> Option<Error> {
        let settled = match self.running.join_next().await? {
            Ok(settled) => settled,
            Err(panic) => return Some(panic.into()),
        };
        let outcome = judge(settled.result, settled.indexes.len(), self.settings.order);
        self.report.inserted += outcome.inserted;
        self.unknown += outcome.unknown;
        for mut failure in outcome.failures {
            // The server counts from the start of the batch. An index that is out of bounds would be its mistake.
            let Some(index) = usize::try_from(failure.index).ok().and_then(|at| settled.indexes.get(at)) else {
                return Some(Error::corrupt("the server reported a failure for a document that it was not sent"));
            };
            failure.index = *index;
            self.record(failure);
        }
        outcome.error
    }

    fn record(&mut self, failure: DocumentFailure) {
        self.report.failed += 1;
        if self.settings.order == InsertOrder::Ordered {
            self.state = State::Stopped;
            self.report.stopped_at = Some(failure.index);
        }
        let failures = &mut self.report.failures;
        if failures.len() < self.settings.kept_failures {
            let at = failures.partition_point(|earlier| earlier.index < failure.index);
            failures.insert(at, failure);
        }
    }

    /// Lets the batches on their way end, so that the numbers are right, and dresses the error with them.
    async fn fail(&mut self, error: Error) -> Error {
        self.state = State::Failed;
        while !self.running.is_empty() {
            // The first error is the cause; later ones are most often its echoes.
            drop(self.absorb().await);
        }
        self.state = State::Failed;
        error
            .wrap("the insert did not complete")
            .with_context("namespace", self.collection.namespace())
            .with_context("inserted", self.report.inserted)
            .with_context("failed", self.report.failed)
            .with_context("unknown", self.unknown)
    }

    fn flow(&self) -> ControlFlow<()> {
        if self.state == State::Open { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

impl<T> fmt::Debug for BatchInserter<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchInserter")
            .field("settings", &self.settings)
            .field("report", &self.report)
            .field("in_flight", &self.running.len())
            .finish_non_exhaustive()
    }
}

impl Refusal {
    fn failure(self, index: u64) -> DocumentFailure {
        let (kind, message) = match self {
            Self::NotADocument => (ErrorKind::InvalidInput, "the value cannot be written as a BSON document"),
            Self::TooLarge => (ErrorKind::Rejected, "the document is larger than 16 MiB"),
        };
        DocumentFailure { index, kind, code: None, code_name: None, message: message.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use mongodb::bson::{Bson, doc};

    use super::*;

    #[test]
    fn values_that_are_no_documents_are_refused() {
        assert_eq!(encode(&Bson::Int32(1)).err(), Some(Refusal::NotADocument));
        assert!(encode(&doc! { "a": 1 }).is_ok());
    }

    #[test]
    fn the_size_limit_counts_the_id_that_the_driver_adds() {
        // A document with one string field: 4 length, 1 type, 2 name, 4 length, text, 1 and 1 terminators.
        let with_text = |bytes: usize| doc! { "a": "x".repeat(bytes - 13) };
        assert_eq!(encode(&with_text(MAX_DOCUMENT_BYTES)).err(), Some(Refusal::TooLarge));
        assert!(encode(&with_text(MAX_DOCUMENT_BYTES - ID_BYTES)).is_ok());
        let with_id = |bytes: usize| doc! { "_id": "x".repeat(bytes - 15) };
        assert!(encode(&with_id(MAX_DOCUMENT_BYTES)).is_ok());
        assert_eq!(encode(&with_id(MAX_DOCUMENT_BYTES + 1)).err(), Some(Refusal::TooLarge));
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for settings in [
            InsertSettings::default().with_batch_documents(0),
            InsertSettings::default().with_batch_documents(100_001),
            InsertSettings::default().with_batch_bytes(0),
            InsertSettings::default().with_batch_bytes(33 << 20),
            InsertSettings::default().with_in_flight(0),
        ] {
            assert_eq!(settings.validate().map_err(|error| error.kind()), Err(ErrorKind::InvalidInput), "{settings:?}");
        }
    }
}
