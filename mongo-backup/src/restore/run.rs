//! Carrying a plan out: collections, documents, views, and indexes last.

use std::{collections::BTreeSet, sync::Arc};

use mongo_core::{
    Error, ErrorKind, Namespace, Result, Topology,
    bson::doc,
    clock::{Clock as _, SystemClock},
    progress::{PhaseMeter, ProgressEvent, Total},
    transfer::{
        catalog::{CollectionEntry, CollectionKind},
        majority::PendingMajority,
    },
};

use super::{
    DropExisting, Restore, RestoreItem, RestoreMode, RestorePlan, RestoreReport,
    checkpoint::{Begun, Checkpoint, Resumed},
    documents::{Resuming, Shared},
    plan::Place,
    tally::Tally,
};
use crate::audit::AuditAction;

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
    /// What was written until then stays. Where [checkpoints](super::RestoreBuilder::checkpoints) are kept, the same restore goes on when it is run
    /// again; else run it with `drop_existing`.
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
        let work = restore.repository.while_reading(self.execute_unrecorded());
        restore
            .repository
            .recorded(AuditAction::Restore, subject, work, |report| Some(("documents", report.documents.to_string())))
            .await
    }

    async fn execute_unrecorded(self) -> Result<RestoreReport> {
        let clock = SystemClock::new();
        let Self { restore, manifest, journey, items, authorization, checkpoint, resumed } = &self;
        restore.repository.still_there(&manifest.id).await?;
        // A prune may have moved what the snapshot needs since the plan was made.
        restore.repository.refresh_index().await?;
        if restore.settings.all_or_nothing {
            return self.execute_at_once(&clock).await;
        }
        let data: Vec<&RestoreItem> = items.iter().filter(|item| item.source.kind() != CollectionKind::View).collect();
        if restore.settings.mode == RestoreMode::Mirror || items.iter().any(|item| restore.drops(item)) {
            restore.check_archive(items).await?;
        }
        // Before anything is written: what goes may stand in the way of what comes, in a unique index.
        let deleted = restore.delete_extras(&data).await?;
        let begun = restore.make_collections(items, checkpoint.as_ref(), resumed.as_ref()).await?;
        let pending = Arc::new(PendingMajority::new());
        let waves = waves(items, &data);
        let reached = restore.trusted(resumed.as_ref(), &waves.concat()).await?;
        let tally = Arc::new(Tally::new(restore.settings.list_refused, reached.clone()));
        let meter = Arc::new(PhaseMeter::start(Arc::clone(&restore.progress), "data", self.data_total()));
        meter.advance(unsigned(reached.documents).saturating_add(unsigned(reached.refused)), unsigned(reached.bytes));
        let shared = Shared::new(
            Arc::clone(&meter),
            Arc::clone(&tally),
            restore.notes_places().then(|| Arc::clone(&pending)),
            Resuming { was_begun: resumed.is_some(), is_kept: checkpoint.is_some() },
        );
        let replayed = resumed.as_ref().and_then(|resumed| resumed.replayed.clone());
        let writing = Box::pin(async {
            // Once the oplog is being applied, the documents are no longer those of the snapshot.
            let waves = if replayed.is_none() { &waves[..] } else { &[] };
            for wave in waves {
                restore.write_documents(wave, &shared, reached.position).await?;
            }
            Ok(())
        });
        Box::pin(restore.keep_checkpoints(checkpoint.as_ref().zip(begun.as_ref()), &tally, &pending, writing)).await?;
        drop(shared);
        if let Ok(meter) = Arc::try_unwrap(meter) {
            meter.finish();
        }
        let operations = match journey {
            Some(journey) => {
                // What is rolled forward must not be rolled back underneath.
                if restore.notes_places() {
                    pending.settle(&restore.target, &restore.cancel).await?;
                }
                let checkpoint = checkpoint.as_ref().zip(begun.as_ref());
                Box::pin(restore.roll_forward(journey, items, checkpoint, replayed)).await?
            }
            None => 0,
        };
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
        if let Some(begun) = &begun {
            restore.check_collections(begun, items).await?;
        }
        if let Some(checkpoint) = checkpoint
            && let Err(error) = checkpoint.remove().await
        {
            // All that it does is to make the same restore look once more whether everything is there.
            restore.note(format!("the checkpoint of the restore, which is complete, could not be removed: {error}"));
        }
        let tally = Arc::into_inner(tally).ok_or_else(|| Error::internal("a worker outlived the restore"))?.into_totals();
        Ok(RestoreReport {
            snapshot: manifest.id.clone(),
            consistency: manifest.consistency.clone(),
            point: journey.as_ref().map(|journey| journey.reached),
            replayed: operations,
            namespaces: items.len() as u64,
            documents: unsigned(tally.reached.documents),
            bytes: unsigned(tally.reached.bytes),
            resumed_documents: unsigned(reached.documents),
            deleted,
            indexes: tally.indexes,
            users_and_roles: self.users_and_roles(),
            refused: unsigned(tally.reached.refused),
            refused_documents: tally.reached.refused_documents,
            failures: tally.failures,
            seconds: clock.monotonic().as_secs_f64(),
        })
    }

    async fn execute_at_once(&self, clock: &SystemClock) -> Result<RestoreReport> {
        let committed = self.restore.write_at_once(&self.items).await?;
        Ok(RestoreReport {
            snapshot: self.manifest.id.clone(),
            consistency: self.manifest.consistency.clone(),
            point: None,
            replayed: 0,
            namespaces: self.items.len() as u64,
            documents: committed.documents,
            bytes: committed.bytes,
            resumed_documents: 0,
            deleted: 0,
            indexes: committed.indexes,
            users_and_roles: self.users_and_roles(),
            refused: 0,
            refused_documents: Vec::new(),
            failures: Vec::new(),
            seconds: clock.monotonic().as_secs_f64(),
        })
    }

    fn data_total(&self) -> Total {
        let (documents, bytes) = self.total();
        if self.restore.choice.is_everything() { Total::exact(documents, bytes) } else { Total::Unknown }
    }
}

/// The namespaces with documents in the order in which they are written, each with its number, in parts that are waited for.
fn waves<'a>(items: &[RestoreItem], data: &[&'a RestoreItem]) -> [Vec<(i64, &'a RestoreItem)>; 2] {
    // A reader of GridFS looks for the file first: once it is there, its chunks must be.
    let files = gridfs_files(items);
    let (last, first): (Vec<&RestoreItem>, Vec<&RestoreItem>) =
        data.iter().partition(|item| files.contains(item.source.namespace()));
    let mut numbers = 0..;
    [first, last].map(|wave| numbers.by_ref().zip(wave).collect())
}

impl Restore {
    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }

    /// Whether something that this restore has not made is dropped to make room for an item.
    fn drops(&self, item: &RestoreItem) -> bool {
        item.exists() && self.settings.drop_existing == DropExisting::Yes
    }

    /// Whether an item goes into what is there.
    pub(super) fn merges(&self, item: &RestoreItem) -> bool {
        item.exists() && self.settings.drop_existing == DropExisting::No
    }

    /// Tells the host something worth knowing.
    pub(super) fn note(&self, note: String) {
        tracing::warn!("{note}");
        self.progress.event(&ProgressEvent::Note(note));
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

    /// Makes room and makes the collections that are not there. Gives what was begun, if that is kept.
    async fn make_collections(
        &self,
        items: &[RestoreItem],
        checkpoint: Option<&Checkpoint>,
        resumed: Option<&Resumed>,
    ) -> Result<Option<Begun>> {
        if let Some(resumed) = resumed {
            self.check_collections(&resumed.begun, items).await?;
        }
        let begins = checkpoint.filter(|_| resumed.is_none());
        let beginning = match begins {
            Some(checkpoint) => Some(checkpoint.begin(items, |item| !self.merges(item)).await?),
            None => None,
        };
        for item in items {
            self.check_cancelled()?;
            if self.drops(item) {
                self.drop_namespace(&item.target).await?;
            }
            let is_there = item.place == Place::Begun || self.merges(item);
            if item.source.kind() != CollectionKind::View && !is_there {
                item.source.entry().create(&self.target, &item.target, None).await?;
            }
        }
        if let Some((checkpoint, beginning)) = begins.zip(beginning) {
            if matches!(self.target.topology(), Topology::ReplicaSet(_)) {
                // A collection whose making is rolled back comes back under another UUID.
                let made = PendingMajority::new();
                made.note_latest(&self.target).await?;
                made.settle(&self.target, &self.cancel).await?;
            }
            return self.save_made(checkpoint, beginning, items).await.map(Some);
        }
        Ok(resumed.map(|resumed| resumed.begun.clone()))
    }

    async fn drop_namespace(&self, namespace: &Namespace) -> Result<()> {
        let database = self.target.database(namespace.database());
        database.run_command(doc! { "drop": namespace.collection() }).await.map_err(Error::from).map(drop).or_else(|error| {
            if error.server_code() == Some(26) { Ok(()) } else { Err(error.with_context("dropping", namespace)) }
        })
    }

    async fn make_views(&self, items: &[RestoreItem], tally: &Tally) -> Result<()> {
        // A view on a view is checked against the one below, so make those first; one whose base is missing is made all the same.
        let mut left: Vec<&RestoreItem> = items
            .iter()
            .filter(|item| item.source.kind() == CollectionKind::View && item.place != Place::Begun && !self.merges(item))
            .collect();
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

    #[tracing::instrument(skip_all)]
    async fn build_indexes(&self, items: &[&RestoreItem], tally: &Tally) -> Result<()> {
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
pub(super) fn is_final(error: &Error) -> bool {
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

/// Counts are kept as BSON keeps them.
fn unsigned(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0)
}
