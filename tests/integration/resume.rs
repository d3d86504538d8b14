//! B18: a restore that is interrupted goes on where it was.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use mongo_backup::{
    Backup, DropExisting, Key, MemoryArchive, Repository, Restore, RestoreAction, RestoreBuilder, RestoreMode, RestoreReport,
    RestoreSettings, SnapshotChoice,
};
use mongo_core::{
    CancellationToken, Deployment, ErrorKind, Namespace, NamespaceSelection, Result,
    bson::{Document, RawDocumentBuf, Timestamp, doc, rawdoc},
    state::{FailingState, FileState, MemoryState, MongoState, SaveFailure, StateName, StateStore, conformance},
    transfer::{write::WriteTarget, written::Marred},
};

use mongo_testkit::TestDeployment;

use crate::{
    awkward,
    support::{Fingerprint, data_hash, fill, fingerprints, open, own, shared},
};

/// Cancels a token behind the `n`-th save: an interruption at a place of the test's choosing.
#[derive(Debug)]
pub(crate) struct Interrupting {
    inner: Arc<dyn StateStore>,
    saves: AtomicU64,
    at: u64,
    token: CancellationToken,
}

impl Interrupting {
    pub(crate) fn new(inner: Arc<dyn StateStore>, at: u64, token: CancellationToken) -> Self {
        Self { inner, saves: AtomicU64::new(0), at, token }
    }
}

#[async_trait]
impl StateStore for Interrupting {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn load(&self, name: &StateName) -> Result<Option<Vec<u8>>> {
        self.inner.load(name).await
    }

    async fn save(&self, name: &StateName, state: Vec<u8>) -> Result<()> {
        self.inner.save(name, state).await?;
        if self.saves.fetch_add(1, SeqCst) + 1 == self.at {
            self.token.cancel();
        }
        Ok(())
    }

    async fn remove(&self, name: &StateName) -> Result<()> {
        self.inner.remove(name).await
    }
}

fn settings(selection: &str) -> RestoreSettings {
    let mut settings = RestoreSettings::default();
    settings.checkpoint_every = Duration::from_millis(1);
    settings.selection = NamespaceSelection::all().including(selection).unwrap();
    settings
}

/// Runs a restore that is cancelled behind the `n`-th save; `None` if it has ended before.
async fn interrupted(builder: RestoreBuilder, states: &Arc<MemoryState>, at: u64) -> Option<RestoreReport> {
    let token = CancellationToken::new();
    let inner: Arc<dyn StateStore> = Arc::<MemoryState>::clone(states);
    let store = Interrupting { inner, saves: AtomicU64::new(0), at, token: token.clone() };
    let run = builder.checkpoints(Arc::new(store)).cancellation(token).build().unwrap();
    match run.run().await {
        Ok(report) => Some(report),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", error.report());
            None
        }
    }
}

async fn snapshot_of(deployment: &Deployment, database: &str) -> Repository {
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([1; 32])).await.unwrap();
    let pattern = format!("{database}.*");
    Backup::builder(deployment, &repository).namespaces(&pattern).build().unwrap().run().await.unwrap();
    repository
}

#[tokio::test(flavor = "multi_thread")]
async fn states_in_a_collection_keep_the_promises_of_state_stores() {
    let (deployment, database) = shared("states").await;
    conformance::check(&MongoState::new(&deployment, Namespace::new(database, "states").unwrap())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_interrupted_behind_any_checkpoint_goes_on_and_nothing_is_lost_or_doubled() {
    let (deployment, database) = shared("resumed").await;
    fill(&deployment, &database, "orders", 20_000).await;
    fill(&deployment, &database, "users", 3_000).await;
    let db = deployment.database(&database);
    db.run_command(doc! { "create": "log", "capped": true, "size": 4 << 20 }).await.unwrap();
    fill(&deployment, &database, "log", 2_000).await;
    db.run_command(doc! { "create": "view", "viewOn": "orders", "pipeline": [{ "$match": { "group": 3 } }] }).await.unwrap();
    let index = doc! { "key": { "text": 1, "_id": 1 }, "name": "text", "unique": true };
    db.run_command(doc! { "createIndexes": "orders", "indexes": [index] }).await.unwrap();
    let repository = snapshot_of(&deployment, &database).await;
    let hash = data_hash(&deployment, &database).await;
    let before = everything(&deployment, &database).await;

    let (mut interruptions, mut furthest) = (0, 0);
    for (round, drop) in [DropExisting::No, DropExisting::Yes].into_iter().enumerate() {
        for at in 1.. {
            let target = format!("{database}_{round}_{at}");
            let restore = || {
                let mut settings = settings(&format!("{database}.*"));
                settings.drop_existing = drop;
                let builder = Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment).settings(settings);
                builder.rename(&format!("{database}.*"), &format!("{target}.*"))
            };
            let states = Arc::new(MemoryState::new());
            if interrupted(restore(), &states, at).await.is_some() {
                break;
            }
            interruptions += 1;
            // Interrupted once more, a little later.
            let twice = interrupted(restore(), &states, 2).await;
            let report = match twice {
                Some(report) => report,
                None => restore().checkpoints(Arc::<MemoryState>::clone(&states)).build().unwrap().run().await.unwrap(),
            };
            assert!(report.is_complete(), "{report:?}");
            assert_eq!(report.documents, 25_000);
            furthest = furthest.max(report.resumed_documents);
            assert_eq!(data_hash(&deployment, &target).await, hash, "interrupted at save {at}");
            // With indexes, views and the order of the capped collection.
            assert_eq!(everything(&deployment, &target).await, before, "interrupted at save {at}");
            assert!(states.names().is_empty(), "a restore that is complete leaves no checkpoint");
            deployment.database(&target).drop().await.unwrap();
            // Behind the first saves nothing but the time differs.
            if at >= 12 {
                break;
            }
        }
    }
    // The beginning is saved twice, and what was reached at least at the end.
    assert!(interruptions >= 6 && furthest > 0, "{interruptions} interruptions, {furthest} documents were not written again");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_tools_get_wrong_survives_an_interrupted_restore() {
    let (_from, source) = own().await;
    awkward::write(&source).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([1; 32])).await.unwrap();
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let before = fingerprints(&source, &awkward::DATABASES).await;
    let (_to, target) = own().await;
    let mut goes_on = false;
    for at in 1..6 {
        let states = Arc::new(MemoryState::new());
        let restore = || {
            let mut settings = RestoreSettings::default();
            settings.checkpoint_every = Duration::from_millis(1);
            Restore::builder(&repository, SnapshotChoice::Latest).into(&target).settings(settings)
        };
        if interrupted(restore(), &states, at).await.is_none() {
            let last = restore().checkpoints(states).build().unwrap();
            let plan = last.plan().await.unwrap();
            goes_on |= plan.summary().namespaces.iter().any(|namespace| namespace.action == RestoreAction::GoOn);
            let report = plan.execute().await.unwrap();
            assert!(report.is_complete(), "{report:?}");
        }
        let after = fingerprints(&target, &awkward::DATABASES).await;
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        for (name, expected) in &before {
            assert_eq!(&after[name], expected, "{name}, interrupted at save {at}");
        }
        for database in awkward::DATABASES {
            target.database(database).drop().await.unwrap();
        }
    }
    assert!(goes_on, "no plan went on with what was begun");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merging_restore_that_was_interrupted_merges_everything_again() {
    for mode in [RestoreMode::Insert, RestoreMode::Upsert, RestoreMode::Replace, RestoreMode::Mirror] {
        let (deployment, database) = shared("merged").await;
        fill(&deployment, &database, "c", 10_000).await;
        let repository = snapshot_of(&deployment, &database).await;
        let before = everything(&deployment, &database).await;
        let c = deployment.database(&database).collection::<Document>("c");
        c.delete_many(doc! { "_id": { "$gte": 5_000 } }).await.unwrap();
        let restore = || {
            let mut settings = settings(&format!("{database}.*"));
            settings.mode = mode;
            Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment).settings(settings)
        };
        let states = Arc::new(MemoryState::new());
        assert!(interrupted(restore(), &states, 3).await.is_none());
        // What its owner does meanwhile to what the restore has passed.
        c.update_one(doc! { "_id": 1 }, doc! { "$set": { "text": "changed" } }).await.unwrap();
        c.delete_one(doc! { "_id": 2 }).await.unwrap();
        c.insert_one(doc! { "_id": -1 }).await.unwrap();
        let report = restore().checkpoints(states).build().unwrap().run().await.unwrap();
        let after = everything(&deployment, &database).await;
        match mode {
            // Those that are the same count as there; the changed one stays and is told.
            RestoreMode::Insert => {
                assert_eq!((report.documents, report.refused), (9_999, 1), "{report:?}");
                let changed = c.find_one(doc! { "_id": 1 }).await.unwrap().unwrap();
                assert_eq!(changed.get_str("text").unwrap(), "changed");
                assert_eq!(c.count_documents(doc! {}).await.unwrap(), 10_001);
            }
            RestoreMode::Mirror => assert_eq!((report.deleted, after == before), (1, true)),
            _ => {
                assert_eq!((report.documents, report.refused), (10_000, 0), "{mode:?}");
                assert!(after != before, "what the snapshot does not have stays");
                c.delete_one(doc! { "_id": -1 }).await.unwrap();
                assert_eq!(everything(&deployment, &database).await, before, "{mode:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_behind_an_interrupted_restore_is_written_again() {
    let (deployment, database) = shared("deleted").await;
    fill(&deployment, &database, "c", 10_000).await;
    let repository = snapshot_of(&deployment, &database).await;
    let target = format!("{database}_r");
    let restore = || {
        let builder = Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment);
        let builder = builder.settings(settings(&format!("{database}.*")));
        builder.rename(&format!("{database}.*"), &format!("{target}.*"))
    };
    let states = Arc::new(MemoryState::new());
    assert!(interrupted(restore(), &states, 3).await.is_none());
    deployment.database(&target).collection::<Document>("c").delete_many(doc! {}).await.unwrap();
    let report = restore().checkpoints(states).build().unwrap().run().await.unwrap();
    assert_eq!((report.documents, report.resumed_documents), (10_000, 0));
    assert_eq!(data_hash(&deployment, &target).await, data_hash(&deployment, &database).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_from_elsewhere_drops_nothing() {
    let (deployment, database) = shared("elsewhere").await;
    fill(&deployment, &database, "c", 100).await;
    let db = deployment.database(&database);
    db.run_command(doc! { "create": "view", "viewOn": "c", "pipeline": [] }).await.unwrap();
    let repository = snapshot_of(&deployment, &database).await;
    let target = format!("{database}_r");
    let restore = |mode| {
        let mut settings = settings(&format!("{database}.*"));
        settings.mode = mode;
        let builder = Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment).settings(settings);
        builder.rename(&format!("{database}.*"), &format!("{target}.*"))
    };
    for mode in [RestoreMode::Create, RestoreMode::Upsert] {
        // Interrupted before anything was made: as if it had been on another deployment.
        let states = Arc::new(MemoryState::new());
        assert!(interrupted(restore(mode), &states, 1).await.is_none());
        let there = deployment.database(&target);
        there.drop().await.unwrap();
        there.run_command(doc! { "create": "c", "validator": { "x": 1 } }).await.unwrap();
        there.run_command(doc! { "createIndexes": "c", "indexes": [{ "key": { "own": 1 }, "name": "own" }] }).await.unwrap();
        there.run_command(doc! { "create": "view", "viewOn": "other", "pipeline": [] }).await.unwrap();
        let before = everything(&deployment, &target).await;
        let result = restore(mode).checkpoints(states).build().unwrap().run().await;
        match mode {
            RestoreMode::Create => assert_eq!(result.unwrap_err().kind(), ErrorKind::Conflict),
            _ => assert_eq!(result.unwrap().refused, 100, "the validator that was there holds"),
        }
        assert_eq!(everything(&deployment, &target).await, before, "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_goes_on_under_another_primary() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    fill(&deployment, "shop", "c", 20_000).await;
    let repository = snapshot_of(&deployment, "shop").await;
    let restore = || {
        let builder = Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment).settings(settings("shop.*"));
        builder.rename("shop.*", "copy.*")
    };
    let states = Arc::new(MemoryState::new());
    assert!(interrupted(restore(), &states, 3).await.is_none());
    server.member(server.primary().await.unwrap()).kill().unwrap();
    server.primary().await.unwrap();
    let report = restore().checkpoints(states).build().unwrap().run().await.unwrap();
    assert!(report.is_complete() && report.resumed_documents > 0, "{report:?}");
    assert_eq!(data_hash(&deployment, "copy").await, data_hash(&deployment, "shop").await);
}

/// Fingerprints of a database, by the names of its collections.
async fn everything(deployment: &Deployment, database: &str) -> BTreeMap<String, Fingerprint> {
    let all = fingerprints(deployment, &[database]).await.into_iter();
    all.map(|(name, found)| (name.replace(&format!("{database}."), ""), found)).collect()
}

struct Begun {
    deployment: Deployment,
    database: String,
    target: String,
    repository: Repository,
    states: Arc<MemoryState>,
}

impl Begun {
    /// A restore that was interrupted when all its collections were made.
    async fn new(prefix: &str) -> Self {
        let (deployment, database) = shared(prefix).await;
        fill(&deployment, &database, "c", 20_000).await;
        let repository = snapshot_of(&deployment, &database).await;
        let target = format!("{database}_r");
        let this = Self { deployment, database, target, repository, states: Arc::default() };
        assert!(interrupted(this.restore(), &this.states, 2).await.is_none());
        this
    }

    fn restore(&self) -> RestoreBuilder {
        let builder = Restore::builder(&self.repository, SnapshotChoice::Latest).into(&self.deployment);
        let builder = builder.settings(settings(&format!("{}.*", self.database)));
        builder.rename(&format!("{}.*", self.database), &format!("{}.*", self.target))
    }

    async fn again(&self) -> Result<RestoreReport> {
        self.restore().checkpoints(Arc::<MemoryState>::clone(&self.states)).build().unwrap().run().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_that_was_dropped_meanwhile_is_not_taken_for_what_was_begun() {
    let begun = Begun::new("dropped").await;
    let target = begun.deployment.database(&begun.target);
    target.collection::<Document>("c").drop().await.unwrap();
    target.collection::<Document>("c").insert_one(doc! { "_id": "of somebody else" }).await.unwrap();
    let before = data_hash(&begun.deployment, &begun.target).await;
    let error = begun.again().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.report());
    assert_eq!(data_hash(&begun.deployment, &begun.target).await, before, "nothing was written");

    target.drop().await.unwrap();
    let report = begun.again().await.unwrap();
    assert_eq!((report.documents, report.resumed_documents), (20_000, 0));
    assert_eq!(data_hash(&begun.deployment, &begun.target).await, data_hash(&begun.deployment, &begun.database).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_somebody_wrote_meanwhile_is_kept_and_reported() {
    let begun = Begun::new("meanwhile").await;
    let c = begun.deployment.database(&begun.target).collection::<Document>("c");
    let theirs = doc! { "_id": 19_999, "text": "of somebody else" };
    c.replace_one(doc! { "_id": 19_999 }, &theirs).upsert(true).await.unwrap();
    let report = begun.again().await.unwrap();
    assert_eq!((report.documents, report.refused), (19_999, 1));
    assert_eq!(report.refused_documents[0].code, 11000);
    assert_eq!(c.find_one(doc! { "_id": 19_999 }).await.unwrap(), Some(theirs));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_restore_is_gone_on_with_only_by_the_same_one() {
    let begun = Begun::new("another").await;
    let with = |builder: RestoreBuilder| builder.checkpoints(Arc::<MemoryState>::clone(&begun.states)).build().unwrap();
    for other in [begun.restore().anew(), begun.restore().namespaces("*.c")] {
        let error = with(other).plan().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.report());
    }
    let anew = with(begun.restore().drop_existing()).run().await.unwrap();
    assert_eq!(anew.resumed_documents, 0, "dropping is another restore than not dropping");
    let merged = with(begun.restore().mode(RestoreMode::Upsert)).plan().await.unwrap().summary();
    assert_eq!((merged.namespaces[0].action, merged.resumes), (RestoreAction::MergeInto, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_states_that_fails_stops_a_restore_before_it_begins_and_not_later() {
    let (deployment, database) = shared("failing_state").await;
    fill(&deployment, &database, "c", 5_000).await;
    let repository = snapshot_of(&deployment, &database).await;
    for failure in [SaveFailure::Before, SaveFailure::After] {
        let target = format!("{database}_{failure:?}");
        let states = Arc::new(MemoryState::new());
        for good in 0..4 {
            let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment);
            let restore = restore.settings(settings(&format!("{database}.*")));
            let restore = restore.rename(&format!("{database}.*"), &format!("{target}.*"));
            let store = FailingState::new(Arc::<MemoryState>::clone(&states), good, failure);
            let result = restore.checkpoints(Arc::new(store)).build().unwrap().run().await;
            match result {
                Ok(report) => {
                    // The beginning is saved twice; what was reached need not be.
                    assert!(good >= 2, "{good} {failure:?}");
                    assert!(report.is_complete());
                    assert_eq!(data_hash(&deployment, &target).await, data_hash(&deployment, &database).await);
                    deployment.database(&target).drop().await.unwrap();
                }
                Err(error) => {
                    assert!(good < 2, "{good} {failure:?}");
                    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.report());
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_found_byte_for_byte_and_a_half_written_timestamp_is_put_right() {
    let (deployment, database) = shared("found").await;
    let c = deployment.database(&database).collection::<RawDocumentBuf>("c");
    let zero = Timestamp { time: 0, increment: 0 };
    let some = Timestamp { time: 7, increment: 1 };
    let operator = rawdoc! { "_id": { "$gt": 1 }, "a": 1 };
    let given = [
        rawdoc! { "_id": 1, "a": 1 },
        rawdoc! { "_id": 2, "a": 1 },
        rawdoc! { "_id": 3, "a": 1 },
        rawdoc! { "_id": 4, "at": zero, "b": 1 },
        rawdoc! { "_id": 5, "at": zero, "b": 1 },
        rawdoc! { "_id": { "a": 1 }, "x": 1 },
        operator.clone(),
        rawdoc! { "_id": 7 },
    ];
    // As a server writes it that does not keep zeros.
    let there = [
        rawdoc! { "_id": 1, "a": 1 },
        rawdoc! { "_id": 2.0, "a": 1 },
        rawdoc! { "_id": 3, "a": 2 },
        rawdoc! { "_id": 4, "at": some, "b": 1 },
        rawdoc! { "_id": 5, "at": some, "b": 2 },
        rawdoc! { "_id": { "a": 1 }, "x": 1 },
    ];
    c.insert_many(there).await.unwrap();
    let target = WriteTarget::new(deployment.clone(), Namespace::new(database, "c").unwrap());
    let references: Vec<_> = given.iter().map(AsRef::as_ref).collect();
    let left = target.find_written(&references, Marred::Leave).await.unwrap();
    assert_eq!((left.there, left.op_time), (vec![true, false, false, false, false, true, false, false], None));
    // As on a server that does not keep zeros, whichever this one is.
    let mut target = target;
    target.keeps_empty_timestamps = false;
    let found = target.find_written(&references, Marred::PutRight).await.unwrap();
    assert_eq!(found.there, [true, false, false, true, false, true, false, false]);
    assert!(found.op_time.is_some());
    let corrected = c.find_one(doc! { "_id": 4 }).await.unwrap().unwrap();
    assert_eq!(corrected, given[3]);
    let theirs = c.find_one(doc! { "_id": 5 }).await.unwrap().unwrap();
    assert_eq!(theirs.get_timestamp("at").unwrap(), some, "not ours");
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_in_files_and_on_a_standalone_server_do_as_well() {
    let server = TestDeployment::standalone().start().await.unwrap();
    let deployment = open(&server).await;
    fill(&deployment, "shop", "c", 20_000).await;
    let repository = snapshot_of(&deployment, "shop").await;
    let folder = tempfile::tempdir().unwrap();
    let restore = || {
        let builder = Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment).settings(settings("shop.*"));
        builder.rename("shop.*", "copy.*")
    };
    let token = CancellationToken::new();
    let inner: Arc<dyn StateStore> = Arc::new(FileState::new(folder.path()));
    let store = Interrupting { inner, saves: AtomicU64::new(0), at: 3, token: token.clone() };
    let first = restore().checkpoints(Arc::new(store)).cancellation(token).build().unwrap().run().await;
    assert_eq!(first.unwrap_err().kind(), ErrorKind::Cancelled);
    let report = restore().checkpoints(Arc::new(FileState::new(folder.path()))).build().unwrap().run().await.unwrap();
    assert!(report.is_complete() && report.resumed_documents > 0, "{report:?}");
    assert_eq!(data_hash(&deployment, "copy").await, data_hash(&deployment, "shop").await);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
