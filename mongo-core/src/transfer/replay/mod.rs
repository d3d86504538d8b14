//! Applying changes in order, many at a time.
//!
//! An oplog is one sequence, but changes to different documents do not care about each other's order. So operations are dealt out to
//! *lanes* by a hash of collection and `_id`; within a lane they keep their order, in batches of some hundreds, and of several changes to one
//! document only those are sent that make a difference. Whoever must not overtake anybody (a change of definitions) waits until all lanes
//! are empty: [`Replay::drain`].
//!
//! Applying is idempotent: a stretch of an oplog may be applied again, wholly or from somewhere in its middle, and leaves the same
//! documents as long as it is applied to its end.
//!
//! Three ways there are to apply an update, of which [`Replay::open`] finds the best that the target allows ([`ApplyPath`]); all give
//! the same bytes. Inserts and replacements are written in place of what has the `_id`, deletes of what is gone are nothing.
//!
//! An update whose document is missing is noted. That is in order if a later operation deletes or inserts the document, as when a copy was
//! made while documents were deleted; what is left at the end was lost: [`Replay::finish`] tells.

mod apply;
mod batch;
mod lane;
mod update;

use std::{collections::BTreeSet, num::NonZeroUsize, sync::Arc};

use mongodb::bson::{RawDocument, RawDocumentBuf};
use tokio_util::sync::CancellationToken;

pub use self::apply::ApplyPath;
use self::{apply::Applier, batch::Change, lane::Lane, update::Update};
use super::{
    majority::PendingMajority,
    oplog::{Operation, OperationKind},
    order::place_hash,
    partition::Key,
};
use crate::{
    connect::Deployment,
    error::{Error, Result},
    namespace::Namespace,
    retry::{RetryBudget, RetryPolicy},
};

/// How hard a replay works.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct ReplaySettings {
    /// How many batches are applied at the same time. Default 4.
    pub lanes: NonZeroUsize,
    /// The most operations in a batch. Default 500: what `applyOps` takes for one grows with how many there are.
    pub batch_operations: usize,
    /// The most bytes in a batch; a larger operation goes alone. Default 4 MiB.
    pub batch_bytes: usize,
    /// How updates are applied. Default the fastest way that the target allows.
    pub path: Option<ApplyPath>,
}

impl Default for ReplaySettings {
    fn default() -> Self {
        Self { lanes: NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN), batch_operations: 500, batch_bytes: 4 << 20, path: None }
    }
}

/// Applies operations to a deployment.
#[derive(Debug)]
pub struct Replay {
    applier: Arc<Applier>,
    lanes: Vec<Lane>,
    settings: ReplaySettings,
    pending: PendingMajority,
    cancel: CancellationToken,
}

/// A collection that operations are applied to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ReplayTarget {
    /// Its name in the target.
    pub namespace: Namespace,
    /// Whether the order of its documents is part of its content, as in capped collections: then they are never reordered.
    pub in_order: bool,
    /// Whether it has a collation: then `_id`s that differ can be one, and all its operations stay in one lane.
    pub collated: bool,
}

impl ReplayTarget {
    /// An ordinary collection.
    pub fn new(namespace: Namespace) -> Self {
        Self { namespace, in_order: false, collated: false }
    }
}

/// A document that an update is for and that is not there.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Missing {
    /// The collection.
    pub namespace: Namespace,
    /// Its `_id`.
    pub id: Key,
}

impl Missing {
    /// A document that is missing.
    pub fn new(namespace: Namespace, id: Key) -> Self {
        Self { namespace, id }
    }
}

impl Replay {
    /// Finds out how updates can be applied to `target`. If that takes trying, it is tried on documents that do not exist.
    ///
    /// # Errors
    /// `Unsupported` when the path that the settings ask for is not to be had; the server's own.
    pub async fn open(target: &Deployment, settings: ReplaySettings, cancel: CancellationToken) -> Result<Self> {
        let path = ApplyPath::choose(target, settings.path).await?;
        let retry = (RetryPolicy::default(), RetryBudget::default());
        let applier = Arc::new(Applier::new(target.clone(), path, retry, cancel.clone()));
        let pending = PendingMajority::new();
        pending.note_latest(target).await?;
        let lanes = (0..settings.lanes.get()).map(|_| Lane::open(Arc::clone(&applier))).collect();
        Ok(Self { applier, lanes, settings, pending, cancel })
    }

    /// How updates are applied.
    pub fn path(&self) -> ApplyPath {
        self.applier.path()
    }

    /// Takes up the missing documents of an earlier stretch, as [`missing`](Self::missing) gave them.
    ///
    /// # Errors
    /// `CorruptData` for an `_id` that cannot be read.
    pub fn expect_missing(&self, missing: impl IntoIterator<Item = Missing>) -> Result<()> {
        missing.into_iter().try_for_each(|missing| self.applier.note_missing(&missing.namespace, &missing.id))
    }

    /// Applies an operation, some time before the next [`drain`](Self::drain) returns. Waits while the lane is full.
    ///
    /// # Errors
    /// Those of operations that were pushed before; `CorruptData` for one that is malformed.
    ///
    /// # Cancel safety
    /// Dropping the future leaves it unknown which operations were applied.
    pub async fn push(&mut self, target: &Arc<ReplayTarget>, operation: &Operation<'_>) -> Result<()> {
        let id = operation.id_element()?;
        let hash = match target.in_order || target.collated {
            true => 0,
            false => place_hash(&id),
        };
        let change = match operation.kind {
            OperationKind::Insert => Change::Insert(operation.object.to_owned()),
            OperationKind::Delete => Change::Delete,
            // A document of a capped collection must be there to be replaced: at the end it would be in the wrong place.
            OperationKind::Update if target.in_order => Change::Update(operation.object.to_owned()),
            OperationKind::Update => Change::of_update(operation.object)?,
        };
        let lane = self.lane_of(&target.namespace, hash);
        let settings = &self.settings;
        let lane = self.lanes.get_mut(lane).ok_or_else(|| Error::internal("a replay without lanes"))?;
        lane.batch().push(Arc::clone(target), id, change);
        if lane.batch().is_full(settings.batch_operations, settings.batch_bytes) {
            lane.send().await?;
        }
        Ok(())
    }

    fn lane_of(&self, namespace: &Namespace, hash: u64) -> usize {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let mut hasher = DefaultHasher::new();
        namespace.hash(&mut hasher);
        hash.hash(&mut hasher);
        let lanes = self.lanes.len() as u64;
        usize::try_from(hasher.finish() % lanes.max(1)).unwrap_or(0)
    }

    /// Waits until everything that was pushed is applied.
    ///
    /// # Errors
    /// The first that happened; then it is unknown which operations were applied.
    pub async fn drain(&mut self) -> Result<()> {
        for lane in &mut self.lanes {
            lane.send().await?;
        }
        for lane in &mut self.lanes {
            lane.empty().await?;
        }
        Ok(())
    }

    /// Waits until everything that was pushed is applied and a majority of the target holds it: what is reported as reached then cannot be rolled
    /// back.
    ///
    /// # Errors
    /// As [`drain`](Self::drain); `Conflict` when another primary was elected since this was last called, and `Timeout` when no majority
    /// follows: then go on from what was settled before.
    pub async fn settle(&mut self) -> Result<()> {
        self.drain().await?;
        self.pending.note_latest(self.applier.target()).await?;
        self.pending.settle(self.applier.target(), &self.cancel).await
    }

    /// The documents that were missing for an update and have neither been deleted nor inserted since. Only meaningful when drained.
    ///
    /// # Errors
    /// `CorruptData` for an `_id` that cannot be read.
    pub fn missing(&self) -> Result<Vec<Missing>> {
        self.applier.missing()
    }

    /// The numbers so far.
    pub fn totals(&self) -> ReplayTotals {
        self.applier.totals()
    }

    /// [`settle`](Self::settle), and the end of all lanes. Gives what is [missing](Self::missing).
    ///
    /// # Errors
    /// As [`settle`](Self::settle).
    pub async fn finish(mut self) -> Result<(ReplayTotals, Vec<Missing>)> {
        self.settle().await?;
        let missing = self.missing()?;
        let collections: BTreeSet<String> = missing.iter().map(|missing| missing.namespace.to_string()).collect();
        if !collections.is_empty() {
            tracing::warn!(?collections, "updates met documents that are not there");
        }
        Ok((self.totals(), missing))
    }
}

/// The document that an update of the oplog, its `o`, makes of another.
///
/// # Errors
/// `Unsupported` for an update of a form that is not known here, `CorruptData` for one that is malformed.
pub fn apply_update(before: &RawDocument, update: &RawDocument) -> Result<RawDocumentBuf> {
    Update::parse(update)?.apply(before)
}

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ReplayTotals {
    /// Operations that were applied, or that later ones made needless.
    pub operations: u64,
    /// Operations that made a difference: they were sent, or done to a document that was.
    pub sent: u64,
}
