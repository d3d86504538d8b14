//! Reading the oplog of a replica set: what has changed, in order, without a hole.
//!
//! Only what a majority holds is read, so nothing that was read can be rolled back. Every reading begins with an entry that is known
//! already: if it is still there, no entry between it and the next is missing.
//!
//! Privileges: `find` on `local.oplog.rs` and on `config.transactions`, and `listCollections` on `admin`; the built-in role `backup`
//! has them.

mod entry;
mod transactions;

use std::fmt;

use futures_util::StreamExt as _;
use mongodb::{
    bson::{Document, RawDocument, RawDocumentBuf, Timestamp, cstr, doc, rawdoc},
    options::ReadConcern,
    raw_batch_cursor::{RawBatch, RawBatchCursor},
};
use tokio_util::sync::CancellationToken;

pub use self::{
    entry::{Action, Command, Entry, Operation, OperationKind},
    transactions::{Carried, Effect, Group, Transactions},
};
use super::{catalog::collection_uuids, majority::majority_time, raw};
use crate::{
    connect::{Deployment, Topology},
    error::{Error, ErrorKind, Result},
    retry::{RetryBudget, RetryPolicy, retry},
};

/// The oplog of a replica set.
#[derive(Clone, Debug)]
pub struct Oplog {
    deployment: Deployment,
    retry: RetryPolicy,
    retry_budget: RetryBudget,
    cancel: CancellationToken,
}

/// Which replica set an oplog belongs to: the UUID of its `admin.system.version`, which is made with the set and which all members have.
///
/// (The set's own id, in its configuration, may not be read by the role `backup`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(try_from = "String", into = "String"))]
pub struct ReplicaSetId([u8; 16]);

impl fmt::Display for ReplicaSetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl TryFrom<String> for ReplicaSetId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ReplicaSetId> for String {
    fn from(id: ReplicaSetId) -> Self {
        id.to_string()
    }
}

impl std::str::FromStr for ReplicaSetId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong =
            || Error::invalid("the id of a replica set has 32 hexadecimal digits").with_context("got", text.escape_debug());
        let mut id = [0; 16];
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            return Err(wrong());
        }
        for (position, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[position * 2..position * 2 + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self(id))
    }
}

impl Oplog {
    /// The oplog of `deployment`. Nothing is sent.
    ///
    /// # Errors
    /// `Unsupported` for a standalone server, which has none, and for a sharded cluster, which has one for each shard.
    pub fn of(deployment: &Deployment) -> Result<Self> {
        let why_not = match deployment.topology() {
            Topology::ReplicaSet(_) => {
                return Ok(Self {
                    deployment: deployment.clone(),
                    retry: RetryPolicy::default(),
                    retry_budget: RetryBudget::default(),
                    cancel: CancellationToken::new(),
                });
            }
            Topology::Standalone => "a standalone server has no oplog: make it a replica set of one member",
            Topology::Sharded => "a sharded cluster has no oplog of its own: connect to each shard's replica set",
        };
        Err(Error::new(ErrorKind::Unsupported, why_not))
    }

    /// The same with other retries and a token that ends readings.
    #[must_use]
    pub fn with(mut self, retry: RetryPolicy, retry_budget: RetryBudget, cancel: CancellationToken) -> Self {
        (self.retry, self.retry_budget, self.cancel) = (retry, retry_budget, cancel);
        self
    }

    /// Which replica set this is.
    ///
    /// # Errors
    /// `Unauthorized` without `listCollections` on `admin`, or the server's own.
    pub async fn replica_set_id(&self) -> Result<ReplicaSetId> {
        let uuids =
            retry(&self.retry, &self.retry_budget, &self.cancel, |_| collection_uuids(&self.deployment, "admin", None)).await?;
        let id = uuids.get("system.version").copied().map(ReplicaSetId);
        id.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the replica set has no admin.system.version to be known by"))
    }

    /// The position of the newest entry that a majority holds. Nothing up to it can be rolled back.
    ///
    /// # Errors
    /// The server's own.
    pub async fn newest(&self) -> Result<Timestamp> {
        retry(&self.retry, &self.retry_budget, &self.cancel, |_| majority_time(&self.deployment)).await
    }

    /// The position of the oldest entry that the primary has.
    ///
    /// # Errors
    /// The server's own; `Unauthorized` without `find` on `local.oplog.rs`.
    pub async fn oldest(&self) -> Result<Timestamp> {
        let oldest = self.find_one("oplog.rs", doc! {}, doc! { "$natural": 1 }).await?;
        position_of(oldest.as_ref())
    }

    /// From where an oplog must be read to know everything that takes effect from now on: the first entry of the oldest transaction that is open and
    /// has written to the oplog already, or the newest entry that a majority holds.
    ///
    /// # Errors
    /// The server's own; `Unauthorized` without `find` on `config.transactions`.
    pub async fn beginning(&self) -> Result<Timestamp> {
        // The newest first: a transaction that begins behind it has all its entries behind it too.
        let newest = self.newest().await?;
        let transactions = self.deployment.database("config").collection::<Document>("transactions");
        let open = doc! { "state": { "$in": ["prepared", "inProgress"] } };
        let oldest = retry(&self.retry, &self.retry_budget, &self.cancel, |_| async {
            let find = transactions.find_one(open.clone()).sort(doc! { "startOpTime.ts": 1 });
            // Of the primary as it is: what a majority does not have yet may be what it is about to have.
            find.read_concern(ReadConcern::local()).await.map_err(Error::from)
        })
        .await?;
        let begun = oldest.and_then(|oldest| oldest.get_document("startOpTime").ok()?.get_timestamp("ts").ok());
        Ok(begun.map_or(newest, |begun| begun.min(newest)))
    }

    /// Reads the entries from `first`, which must be an entry, up to `last`, both included. `last` must not be later than
    /// [`newest`](Self::newest) was at some time. Nothing is sent before [`OplogScan::next`].
    pub fn read(&self, first: Timestamp, last: Timestamp) -> OplogScan {
        OplogScan { oplog: self.clone(), reached: first, delivered: false, last, cursor: None }
    }

    async fn find_one(&self, collection: &str, filter: Document, sort: Document) -> Result<Option<Document>> {
        let collection = self.deployment.database("local").collection::<Document>(collection);
        retry(&self.retry, &self.retry_budget, &self.cancel, |_| async {
            collection.find_one(filter.clone()).sort(sort.clone()).await.map_err(Error::from)
        })
        .await
    }
}

fn position_of(entry: Option<&Document>) -> Result<Timestamp> {
    let position = entry.and_then(|entry| entry.get_timestamp("ts").ok());
    position.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the oplog is empty"))
}

/// A reading of a part of an oplog.
pub struct OplogScan {
    oplog: Oplog,
    /// The entry that was delivered last, or with which the reading begins.
    reached: Timestamp,
    /// Whether it was delivered.
    delivered: bool,
    last: Timestamp,
    cursor: Option<RawBatchCursor>,
}

impl fmt::Debug for OplogScan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OplogScan").field("reached", &self.reached).field("last", &self.last).finish_non_exhaustive()
    }
}

/// What a reading of an oplog comes to.
#[derive(Debug)]
#[non_exhaustive]
pub enum OplogRead {
    /// The next entries.
    Entries(OplogBatch),
    /// All were read.
    End,
    /// The entry behind which to go on is no longer there, and neither is what came behind it: the oplog was overrun, or is another one.
    Lost {
        /// The oldest entry that the oplog has.
        oldest: Timestamp,
    },
}

/// Some entries of an oplog.
#[derive(Debug)]
pub struct OplogBatch {
    batch: RawBatch,
    skip: usize,
}

impl OplogBatch {
    /// The entries in order, borrowed from the server's reply.
    ///
    /// # Errors
    /// `CorruptData` when the reply is malformed.
    pub fn documents(&self) -> Result<impl Iterator<Item = Result<&RawDocument>>> {
        Ok(raw::documents_in(self.batch.doc_slices()?)?.skip(self.skip))
    }
}

impl OplogScan {
    /// The next entries.
    ///
    /// After a network failure or an election it goes on behind the last entry that it delivered, if that is still there.
    ///
    /// # Errors
    /// `Cancelled` by the token, or the server's own after retries.
    ///
    /// # Cancel safety
    /// Not cancel safe: when the future is dropped, drop the reading too.
    pub async fn next(&mut self) -> Result<OplogRead> {
        loop {
            let batch = match self.cursor.as_mut() {
                Some(cursor) => one_batch(cursor, &self.oplog.cancel).await,
                None if self.delivered && self.reached >= self.last => return Ok(OplogRead::End),
                None => match self.open().await? {
                    Some(batch) => Ok(Some(batch)),
                    None => return self.lost().await,
                },
            };
            let batch = match batch {
                Ok(Some(batch)) => batch,
                Ok(None) => {
                    self.cursor = None;
                    return Ok(OplogRead::End);
                }
                // CappedPositionLost, CursorNotFound and the like: whether anything is missing, the next cursor shows.
                Err(error) if error.is_retryable() || matches!(error.server_code(), Some(43 | 136 | 237)) => {
                    self.cursor = None;
                    if !self.oplog.retry_budget.withdraw() {
                        return Err(error);
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Some(batch) = self.accept(batch)? {
                return Ok(OplogRead::Entries(batch));
            }
        }
    }

    async fn lost(&mut self) -> Result<OplogRead> {
        Ok(OplogRead::Lost { oldest: self.oplog.oldest().await? })
    }

    /// Opens a cursor whose first entry is the one that was reached; none if that is no longer there.
    async fn open(&mut self) -> Result<Option<RawBatch>> {
        let command = rawdoc! { "find": "oplog.rs", "filter": { "ts": { "$gte": self.reached, "$lte": self.last } } };
        let oplog = &self.oplog;
        for _ in 0..OVERTAKEN_AT_MOST {
            let opened = retry(&oplog.retry, &oplog.retry_budget, &oplog.cancel, |_| open(oplog, command.clone())).await;
            let (cursor, batch) = match opened {
                Ok(opened) => opened,
                // CappedPositionLost: the oldest entries went while the cursor was being opened. That is no proof that the one wanted did.
                Err(error) if error.server_code() == Some(136) => continue,
                Err(error) => return Err(error),
            };
            let Some(batch) = batch else { return Ok(None) };
            let first = raw::documents_in(batch.doc_slices()?)?.next().transpose()?;
            if first.map(position_in).transpose()? != Some(self.reached) {
                return Ok(None);
            }
            self.cursor = Some(cursor);
            return Ok(Some(batch));
        }
        Ok(None)
    }

    /// None if all its entries were delivered before.
    fn accept(&mut self, batch: RawBatch) -> Result<Option<OplogBatch>> {
        let (mut skip, mut count, mut last) = (0, 0, None);
        for document in raw::documents_in(batch.doc_slices()?)? {
            let document = document?;
            if count == 0 && self.delivered && position_in(document)? == self.reached {
                skip = 1;
            }
            count += 1;
            last = Some(document);
        }
        if let Some(last) = last {
            self.reached = position_in(last)?;
            self.delivered = true;
        }
        Ok((count > skip).then_some(OplogBatch { batch, skip }))
    }
}

/// The position of an entry, whatever it does: also of one that [`Entry::parse`] does not know.
///
/// # Errors
/// `CorruptData` for what is no entry.
pub fn position_in(document: &RawDocument) -> Result<Timestamp> {
    let field = raw::elements(document).find_map(|element| element.ok().filter(|element| element.name == b"ts"));
    field.and_then(|field| field.as_timestamp()).ok_or_else(|| Error::corrupt("an entry of the oplog has no timestamp"))
}

async fn open(oplog: &Oplog, mut command: RawDocumentBuf) -> Result<(RawBatchCursor, Option<RawBatch>)> {
    command.append(cstr!("batchSize"), BATCH_ENTRIES);
    let local = oplog.deployment.database("local");
    let action = local.run_raw_cursor_command(command);
    let mut cursor = tokio::select! {
        biased;
        () = oplog.cancel.cancelled() => return Err(Error::cancelled()),
        cursor = action.batch_size(u32::try_from(BATCH_ENTRIES).unwrap_or(1000)).batch() => cursor?,
    };
    let batch = one_batch(&mut cursor, &oplog.cancel).await?;
    Ok((cursor, batch))
}

async fn one_batch(cursor: &mut RawBatchCursor, cancel: &CancellationToken) -> Result<Option<RawBatch>> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(Error::cancelled()),
        batch = cursor.next() => Ok(batch.transpose()?),
    }
}

/// A reply holds 16 MiB at most; more entries than this are worth no larger reply.
const BATCH_ENTRIES: i32 = 10_000;
const OVERTAKEN_AT_MOST: u32 = 5;
