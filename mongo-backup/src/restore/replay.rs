//! Rolling what was restored forward, by the oplog.

use std::{collections::HashMap, sync::Arc};

use mongo_core::{
    Error, Namespace, Result,
    bson::{RawDocumentBuf, Timestamp},
    progress::{PhaseMeter, Total},
    transfer::{
        oplog::{Action, OperationKind},
        partition::Key,
        replay::{Missing, Replay, ReplayTarget},
    },
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    Restore, RestoreItem,
    capped::{Grown, PassedOver, is_in_doubt},
    checkpoint::{Begun, Checkpoint},
    ids::IdRange,
};
use crate::{
    repository::manifest::{SnapshotManifest, SnapshotNamespace},
    timeline::{Ended, History, Listener, Subject, Timeline},
};

/// The way from a snapshot to the point that is restored, and what there is at its end.
#[derive(Debug)]
pub(super) struct Journey {
    timeline: Timeline,
    manifest: SnapshotManifest,
    in_snapshot: Vec<SnapshotNamespace>,
    grown: Grown,
    /// The last position that counts.
    pub(super) reached: Timestamp,
}

/// How far a replay is, for a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Replayed {
    /// Everything that takes effect up to here was applied; none if nothing was yet, but all documents of the snapshot are there.
    pub(super) reached: Option<Timestamp>,
    /// Documents that were missing for an update, and have not been deleted or inserted since.
    missing: Vec<StoredMissing>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredMissing {
    namespace: Namespace,
    id: RawDocumentBuf,
}

impl Replayed {
    pub(super) fn nothing() -> Self {
        Self { reached: None, missing: Vec::new() }
    }
}

impl Journey {
    /// Looks at everything on the way. Gives it, and what there is at its end.
    pub(super) async fn explore(
        restore: &Restore,
        timeline: Timeline,
        manifest: &SnapshotManifest,
        in_snapshot: Vec<SnapshotNamespace>,
    ) -> Result<(Self, Vec<Ended>)> {
        let (grown, reached) = (Grown::default(), Timestamp { time: 0, increment: 0 });
        let mut journey = Self { timeline, manifest: manifest.clone(), in_snapshot, grown, reached };
        let read_until = manifest.read_until;
        let mut exploring = Exploring { history: journey.history()?, read_until, grown: Grown::default() };
        journey.reached = journey.timeline.tell(&mut exploring, &restore.cancel).await?;
        journey.grown = exploring.grown;
        Ok((journey, exploring.history.end()?))
    }

    fn history(&self) -> Result<History> {
        let defined_at = self.manifest.defined_at.or(self.manifest.resume_point);
        let defined_at = defined_at.ok_or_else(|| Error::internal("a snapshot without a place in the oplog"))?;
        History::of(self.manifest.selection.clone(), self.in_snapshot.clone(), defined_at)
    }
}

struct Exploring {
    history: History,
    read_until: Option<Timestamp>,
    grown: Grown,
}

impl Listener for Exploring {
    async fn take(&mut self, at: Timestamp, action: Action<'_>) -> Result<()> {
        match action {
            Action::Operation(operation) => {
                if let Subject::Collection(number) = self.history.operation(at, &operation)?
                    && operation.kind == OperationKind::Insert
                    && is_in_doubt(at, self.read_until)
                    && self.history.is_capped(number)
                {
                    self.grown.note(number, Key::of_element(&operation.id()?)?);
                }
                Ok(())
            }
            Action::Command(command) => self.history.command(at, &command),
            _ => Ok(()),
        }
    }
}

impl Restore {
    /// Applies the oplog up to the point that is restored. Gives how many operations that took.
    pub(super) async fn roll_forward(
        &self,
        journey: &Journey,
        items: &[RestoreItem],
        checkpoint: Option<(&Checkpoint, &Begun)>,
        replayed: Option<Replayed>,
    ) -> Result<u64> {
        let mut targets = HashMap::new();
        for item in items {
            let (Some(number), Some(namespace)) = (item.followed, item.data_namespace()?) else { continue };
            let entry = item.source.entry();
            let mut target = ReplayTarget::new(namespace);
            target.in_order = entry.is_capped();
            target.collated = entry.options().get("collation")?.is_some();
            targets.insert(number, Arc::new(target));
        }
        let settings = self.settings.replay.clone();
        let replay = Replay::open(&self.target, settings, self.cancel.clone()).await?;
        let replayed = match replayed {
            Some(replayed) => replayed,
            None => {
                // From here on the documents are no longer those of the snapshot.
                let nothing = Replayed::nothing();
                self.save_replayed(checkpoint, &nothing).await?;
                nothing
            }
        };
        for missing in replayed.missing {
            replay.expect_missing([Missing::new(missing.namespace, Key::of(&missing.id)?)])?;
        }
        let names = targets.iter().map(|(number, target)| (*number, target.namespace.clone())).collect();
        let passed_over = journey.grown.pass_over(self, &names).await?;
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "oplog", Total::Unknown);
        let mut applying = Applying {
            restore: self,
            history: journey.history()?,
            targets,
            ids: self.choice.ids.clone(),
            passed_over,
            read_until: journey.manifest.read_until,
            replay,
            applied: replayed.reached,
            checkpoint,
            saved: Instant::now(),
            until_gate: 0,
            meter: &meter,
        };
        journey.timeline.tell(&mut applying, &self.cancel).await?;
        let (totals, missing) = applying.replay.finish().await?;
        meter.finish();
        if missing.is_empty() {
            // When the indexes stand, what is unique would be in the way of what was there for a while.
            let all = Replayed { reached: Some(journey.reached), missing: Vec::new() };
            self.save_replayed(checkpoint, &all).await?;
            return Ok(totals.operations);
        }
        let mut collections: Vec<String> = missing.iter().map(|missing| missing.namespace.to_string()).collect();
        collections.sort();
        collections.dedup();
        Err(Error::corrupt(
            "the oplog changes documents that the snapshot should hold and does not: restore from another snapshot",
        )
        .with_context("documents", missing.len())
        .with_context("in", collections.join(", ")))
    }

    async fn save_replayed(&self, checkpoint: Option<(&Checkpoint, &Begun)>, replayed: &Replayed) -> Result<()> {
        let Some((checkpoint, begun)) = checkpoint else { return Ok(()) };
        checkpoint.save_replayed(begun, replayed).await
    }
}

struct Applying<'a> {
    restore: &'a Restore,
    history: History,
    targets: HashMap<usize, Arc<ReplayTarget>>,
    ids: Option<IdRange>,
    passed_over: PassedOver,
    read_until: Option<Timestamp>,
    replay: Replay,
    /// What takes effect up to here was applied by an earlier run.
    applied: Option<Timestamp>,
    checkpoint: Option<(&'a Checkpoint, &'a Begun)>,
    saved: Instant,
    /// Operations until the gate is asked again.
    until_gate: u32,
    meter: &'a PhaseMeter,
}

impl Listener for Applying<'_> {
    async fn take(&mut self, at: Timestamp, action: Action<'_>) -> Result<()> {
        let operation = match action {
            Action::Operation(operation) => operation,
            Action::Command(command) => return self.history.command(at, &command),
            _ => return Ok(()),
        };
        let Subject::Collection(number) = self.history.operation(at, &operation)? else { return Ok(()) };
        if operation.kind == OperationKind::Insert
            && is_in_doubt(at, self.read_until)
            && self.history.is_capped(number)
            && self.passed_over.take(number)
        {
            return Ok(());
        }
        if self.applied.is_some_and(|applied| at <= applied) {
            return Ok(());
        }
        let Some(target) = self.targets.get(&number) else { return Ok(()) };
        if let Some(ids) = &self.ids
            && !ids.contains(&Key::of_element(&operation.id()?)?)
        {
            return Ok(());
        }
        match self.until_gate.checked_sub(1) {
            Some(left) => self.until_gate = left,
            None => {
                self.restore.background.pass(&self.restore.cancel).await?;
                self.until_gate = BATCH_OPERATIONS;
            }
        }
        self.meter.advance(1, operation.object.as_bytes().len() as u64);
        self.replay.push(target, &operation).await
    }

    async fn reached(&mut self, at: Timestamp) -> Result<()> {
        if self.checkpoint.is_none() || self.saved.elapsed() < self.restore.settings.checkpoint_every {
            return Ok(());
        }
        self.replay.settle().await?;
        self.saved = Instant::now();
        let missing = self.replay.missing()?;
        if missing.len() > MISSING_KEPT {
            // What is saved has to stay small. An interruption costs more then.
            tracing::warn!(
                missing = missing.len(),
                "so many documents are missing that how far the oplog was applied is not saved"
            );
            return Ok(());
        }
        let missing = missing.into_iter().map(|missing| {
            let id = missing.id.as_document().to_owned();
            StoredMissing { namespace: missing.namespace, id }
        });
        let replayed = Replayed { reached: Some(at), missing: missing.collect() };
        self.restore.save_replayed(self.checkpoint, &replayed).await
    }
}

const MISSING_KEPT: usize = 10_000;

/// So many operations are about what is applied at once.
const BATCH_OPERATIONS: u32 = 1000;
