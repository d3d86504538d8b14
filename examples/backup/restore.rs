//! `backup restore`: bring a snapshot back.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Args, ValueEnum};
use mongo_backup::{IdRange, NewIds, Reference, Repository, Restore, RestoreMode, RestorePoint, SnapshotChoice};
use mongo_core::{
    Deployment, Error, ErrorKind, NamespaceSelection, Result,
    bson::Bson,
    state::{FileState, MongoState, StateStore},
};
use mongo_examples::{Access, cancel_on_interrupt, human_bytes, print_json, terminal_progress};

use crate::{inspect::Chosen, place::deployment};

#[derive(Args)]
pub(crate) struct Restoration {
    #[command(flatten)]
    chosen: Chosen,
    /// Restore everything as it was at the end of a second, as 2026-02-28T14:03:26Z or in seconds since 1970, or right behind an operation of the
    /// oplog, as SECONDS:NUMBER; takes the newest snapshot that can be rolled forward to there, unless --snapshot names one
    #[arg(long, value_name = "RFC3339|SECS[:ORD]")]
    at: Option<RestorePoint>,
    /// Restore the namespaces that match, by their names in the snapshot, or with --at by their names then
    #[arg(long = "ns", value_name = "PATTERN")]
    namespaces: Vec<String>,
    /// Leave out the namespaces that match
    #[arg(long = "exclude-ns", value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Restore under another name, as shop.*=shop_copy.*
    #[arg(long, value_name = "FROM=TO")]
    rename: Vec<String>,
    /// Merge into collections that exist: insert adds what is missing, upsert replaces too, replace overrules the validator, mirror also
    /// deletes what the snapshot does not have
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Restore one document of a single collection, by its _id: extended JSON as 5 or {"$oid": "…"}, anything else is a string
    #[arg(long, value_name = "ID", conflicts_with_all = ["id_from", "id_to"])]
    id: Option<String>,
    /// Restore the documents of a single collection from this _id on
    #[arg(long, value_name = "ID")]
    id_from: Option<String>,
    /// Restore the documents of a single collection up to this _id
    #[arg(long, value_name = "ID")]
    id_to: Option<String>,
    /// Drop each target collection before it is made anew
    #[arg(long)]
    drop: bool,
    /// Restore everything in one transaction, or nothing: for small sets
    #[arg(long)]
    all_or_nothing: bool,
    /// Give documents new _ids, so that they can stand beside their originals; fields that refer to documents by ObjectId or UUID are found and
    /// follow
    #[arg(long)]
    new_ids: bool,
    /// With --new-ids: a field that refers to documents of a collection, as shop.orders/customer=shop.customers; may be given several times
    #[arg(long, value_name = "NS/FIELD=NS", requires = "new_ids")]
    reference: Vec<String>,
    /// Also add the users and roles of the snapshot that the target does not have
    #[arg(long)]
    users: bool,
    /// Keep how far the restore is in this folder, not in admin.mongo_backup.restores of the target: the same command goes on where it was
    /// interrupted
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Begin anew instead of going on where the same command was interrupted
    #[arg(long)]
    anew: bool,
    /// Show what would be done and write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    Insert,
    Upsert,
    Replace,
    Mirror,
}

impl Restoration {
    pub(crate) async fn run(&self, uri: Option<&str>, json: bool) -> Result<ExitCode> {
        let snapshot: SnapshotChoice = self.chosen.snapshot.parse()?;
        // The archive first: a wrong path is found without waiting for a server.
        let repository = self.chosen.place.open(Access::Existing).await?;
        let deployment = deployment(uri).await?;
        let mut builder = Restore::builder(&repository, snapshot.clone())
            .into(&deployment)
            .progress(terminal_progress())
            .cancellation(cancel_on_interrupt());
        for pattern in &self.namespaces {
            builder = builder.namespaces(pattern);
        }
        for pattern in &self.exclude {
            builder = builder.exclude(pattern);
        }
        for rename in &self.rename {
            let (from, to) = rename
                .split_once('=')
                .ok_or_else(|| Error::invalid("a rename is written FROM=TO").with_context("got", rename))?;
            builder = builder.rename(from, to);
        }
        if let Some(mode) = self.mode {
            builder = builder.mode(match mode {
                Mode::Insert => RestoreMode::Insert,
                Mode::Upsert => RestoreMode::Upsert,
                Mode::Replace => RestoreMode::Replace,
                Mode::Mirror => RestoreMode::Mirror,
            });
        }
        let by_id = self.id.is_some() || self.id_from.is_some() || self.id_to.is_some();
        if by_id {
            let (from, to) = (self.id.as_ref().or(self.id_from.as_ref()), self.id.as_ref().or(self.id_to.as_ref()));
            let value = |text: &String| id_value(text);
            builder = builder.ids(IdRange::between(from.map(value), to.map(value))?);
        }
        if let Some(point) = self.at {
            builder = builder.at(point);
        }
        if self.all_or_nothing {
            builder = builder.all_or_nothing();
        }
        if self.new_ids {
            builder = builder.transform(Arc::new(self.new_ids(&repository, &snapshot).await?));
        }
        if self.users {
            builder = builder.users_and_roles();
        }
        if self.drop {
            builder = builder.drop_existing();
        }
        if self.anew {
            builder = builder.anew();
        }
        if let Some(store) = self.checkpoints(&deployment).await? {
            builder = builder.checkpoints(store);
        }
        let restore = builder.build()?;
        let plan = restore.plan().await?;
        if self.dry_run {
            let summary = plan.summary();
            if json {
                print_json(&summary)?;
            } else {
                println!("snapshot     {} ({})", summary.snapshot, summary.consistency);
                if let Some(point) = summary.point {
                    println!("rolled on    to {}:{}", point.time, point.increment);
                }
                if let Some(begun) = summary.resumes {
                    println!("goes on with the restore of {}", begun.try_to_rfc3339_string().unwrap_or_default());
                }
                for namespace in &summary.namespaces {
                    println!(
                        "{:>12} {:>12}  {} -> {} ({:?})",
                        namespace.documents,
                        human_bytes(namespace.bytes),
                        namespace.from,
                        namespace.to,
                        namespace.action
                    );
                }
            }
            return Ok(ExitCode::SUCCESS);
        }
        let report = plan.execute().await?;
        if json {
            print_json(&report)?;
        } else {
            println!(
                "restored     {} documents in {} namespaces, {}, and {} indexes in {:.1} s",
                report.documents,
                report.namespaces,
                human_bytes(report.bytes),
                report.indexes,
                report.seconds
            );
            if let Some(point) = report.point {
                println!("rolled on    to {}:{}, with {} operations", point.time, point.increment, report.replayed);
            }
            if report.resumed_documents > 0 {
                println!(
                    "resumed      {} of the documents were there from the run that was interrupted",
                    report.resumed_documents
                );
            }
            if report.deleted > 0 {
                println!("deleted      {} documents that the snapshot does not have", report.deleted);
            }
            for refused in &report.refused_documents {
                println!("refused      {} {}: {}", refused.namespace, refused.id, refused.reason);
            }
            for failure in &report.failures {
                println!(
                    "failed       {} {}: {}",
                    failure.namespace,
                    failure.index.as_deref().unwrap_or_default(),
                    failure.reason
                );
            }
        }
        if by_id && report.documents + report.refused == 0 {
            return Err(Error::new(ErrorKind::NotFound, "the snapshot has no document with such an _id in this collection"));
        }
        if report.is_complete() {
            return Ok(ExitCode::SUCCESS);
        }
        let first = report
            .refused_documents
            .first()
            .map(|refused| format!("{} {}: {}", refused.namespace, refused.id, refused.reason))
            .or_else(|| {
                report.failures.first().map(|failure| {
                    format!("{} {}: {}", failure.namespace, failure.index.as_deref().unwrap_or_default(), failure.reason)
                })
            });
        eprintln!(
            "error: the target refused {} document(s) and {} definition(s), first {}: correct the target or choose another mode, and restore again",
            report.refused,
            report.failures.len(),
            first.unwrap_or_default()
        );
        Ok(ExitCode::FAILURE)
    }
}

impl Restoration {
    /// New `_id`s, with the references that are declared and those that are found.
    async fn new_ids(&self, repository: &Repository, snapshot: &SnapshotChoice) -> Result<NewIds> {
        let mut selection = NamespaceSelection::all();
        for pattern in &self.namespaces {
            selection = selection.including(pattern)?;
        }
        for pattern in &self.exclude {
            selection = selection.excluding(pattern)?;
        }
        let mut references = Vec::new();
        for declared in &self.reference {
            let parsed = declared.split_once('=').and_then(|(from, to)| Some((from.split_once('/')?, to)));
            let ((from, field), to) = parsed.ok_or_else(|| {
                Error::invalid("a reference is written NAMESPACE/FIELD=NAMESPACE, as shop.orders/customer=shop.customers")
                    .with_context("got", declared)
            })?;
            references.push(Reference::new(from.parse()?, field, to.parse()?));
        }
        for found in repository.find_references(snapshot, &selection).await? {
            if !references.iter().any(|declared| declared.from == found.from && declared.field == found.field) {
                eprintln!("note: {}/{} refers to {}", found.from, found.field, found.to);
                references.push(found);
            }
        }
        // With the same secret an interrupted restore goes on, and with the same snapshot the same _ids come out.
        let secret = repository.snapshot(snapshot).await?.id;
        references.into_iter().try_fold(NewIds::new(secret.as_str()), NewIds::with)
    }

    /// Where to keep how far the restore is; nowhere if the user may not write there.
    async fn checkpoints(&self, target: &Deployment) -> Result<Option<Arc<dyn StateStore>>> {
        if let Some(folder) = &self.state {
            return Ok(Some(Arc::new(FileState::new(folder))));
        }
        if self.dry_run {
            // A plan only reads; whoever may not do that has none either.
            let store = MongoState::new(target, CHECKPOINTS.parse()?);
            let readable = store.load(&PROBE.parse()?).await.is_ok();
            return Ok(if readable { Some(Arc::new(store)) } else { None });
        }
        let (store, probe) = (MongoState::new(target, CHECKPOINTS.parse()?), PROBE.parse()?);
        let tried = async {
            store.load(&probe).await?;
            store.save(&probe, Vec::new()).await?;
            store.remove(&probe).await
        };
        match tried.await {
            Ok(()) => Ok(Some(Arc::new(store))),
            Err(error) if error.kind() == ErrorKind::Unauthorized => {
                eprintln!(
                    "note: this user may not write {CHECKPOINTS}: if the restore is interrupted, it begins anew (--state keeps it elsewhere)"
                );
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// In the target: so it is there, and as new as the data, from wherever the restore is run again.
const CHECKPOINTS: &str = "admin.mongo_backup.restores";
const PROBE: &str = "probe";

/// An `_id` as it is written on a command line.
fn id_value(text: &str) -> Bson {
    let parsed = serde_json::from_str::<serde_json::Value>(text).ok().and_then(|json| Bson::try_from(json).ok());
    parsed.unwrap_or_else(|| Bson::String(text.to_owned()))
}
