//! The server, the archive and the caller fail in mid-work: nothing half is ever listed, and everything listed is whole.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::TryStreamExt as _;
use mongo_backup::{
    ArchiveSink, Backup, BackupSettings, FailingArchive, FailureMode, Key, LocalArchive, MemoryArchive, ObjectMeta, Repository,
    Restore, RestoreMode, SnapshotChoice, Verify,
};
use mongo_core::{
    CancellationToken, Deployment, ErrorKind, RetryPolicy,
    bson::{Document, doc},
    progress::{ProgressEvent, ProgressSink},
};
use mongo_testkit::TestDeployment;
use tokio::sync::Notify;

use crate::support::{db_hash, fill, open, own, release, shared, stop_followers, under_way};

/// Every snapshot that the repository lists verifies and restores; gives their number.
async fn everything_listed_is_whole(repository: &Repository, deployment: &Deployment, database: &str, documents: u64) -> usize {
    let listed = repository.snapshots().await.unwrap();
    assert!(listed.damaged.is_empty(), "{:?}", listed.damaged);
    let report = Verify::new(repository).run().await.unwrap();
    assert!(report.is_sound(), "{:?}", report.problems);
    for (number, snapshot) in listed.snapshots.iter().enumerate() {
        let target = format!("{database}_{number}");
        let restore =
            Restore::builder(repository, &snapshot.id).into(deployment).rename(&format!("{database}.*"), &format!("{target}.*"));
        let restored = restore.build().unwrap().run().await.unwrap();
        assert_eq!(restored.documents, documents);
        assert_eq!(db_hash(deployment, database).await, db_hash(deployment, &target).await);
        deployment.database(&target).drop().await.unwrap();
    }
    listed.snapshots.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_fails_at_any_write_never_lists_half_a_snapshot() {
    let (deployment, database) = shared("failing").await;
    fill(&deployment, &database, "c", 2_000).await;
    for mode in [FailureMode::Before, FailureMode::After] {
        for good in 0.. {
            let inner: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
            let failing = Arc::new(FailingArchive::new(Arc::clone(&inner), good, mode));
            let repository =
                Repository::open_or_init_shared(Arc::<FailingArchive>::clone(&failing), Key::unencrypted()).await.unwrap();
            let result = Backup::builder(&deployment, &repository).namespaces(&database).build().unwrap().run().await;
            let Err(error) = result else {
                // A manifest that was written although the write failed is read back, and counts.
                assert!(
                    good >= if mode == FailureMode::After { 3 } else { 4 },
                    "config, pack, index and manifest are four writes"
                );
                break;
            };
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            match Repository::open_shared(Arc::clone(&inner), Key::unencrypted()).await {
                Ok(reopened) => {
                    let snapshots = everything_listed_is_whole(&reopened, &deployment, &database, 2_000).await;
                    assert_eq!(snapshots, 0, "write {good}");
                }
                Err(error) => assert!(error.kind() == ErrorKind::NotFound && good == 0, "write {good}: {error}"),
            }
            // The next backup works on what is there.
            let again = Repository::open_or_init_shared(inner, Key::unencrypted()).await.unwrap();
            Backup::builder(&deployment, &again).namespaces(&database).build().unwrap().run().await.unwrap();
        }
    }
}

/// Calls for a fault when a share of the documents is done.
#[derive(Debug)]
struct AtDocument {
    after: u64,
    fired: AtomicBool,
    notify: Notify,
}

impl AtDocument {
    fn new(after: u64) -> Arc<Self> {
        Arc::new(Self { after, fired: AtomicBool::new(false), notify: Notify::new() })
    }
}

impl ProgressSink for AtDocument {
    fn event(&self, event: &ProgressEvent) {
        if let ProgressEvent::Advanced { documents, .. } = event
            && *documents >= self.after
            && !self.fired.swap(true, SeqCst)
        {
            self.notify.notify_one();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_in_mid_backup_is_an_error_and_no_snapshot() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "orders", 120_000).await;
    let folder = tempfile::tempdir().unwrap();
    let repository =
        Repository::open_or_init(LocalArchive::new(folder.path().join("r")).unwrap(), Key::unencrypted()).await.unwrap();
    // The first batches have come; their successors never will.
    let wait = doc! { "failCommands": ["getMore"], "blockConnection": true, "blockTimeMS": 60_000, "appName": "mongo-core" };
    server.fail_command(0, "alwaysOn", wait).await.unwrap();
    let mut settings = BackupSettings::default();
    settings.retry = RetryPolicy::never();
    let backup = Backup::builder(&deployment, &repository).settings(settings).namespaces("shop.*").build().unwrap();
    let work = tokio::spawn(async move { backup.run().await });
    let next_batch = doc! { "appName": "mongo-core", "command.collection": "orders" };
    under_way(&server.client().await.unwrap(), next_batch, &work).await;
    server.member(0).kill().unwrap();
    let error = work.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.report());
    assert!(repository.snapshots().await.unwrap().snapshots.is_empty());

    server.member(0).restart().await.unwrap();
    server.primary().await.unwrap();
    let deployment = open(&server).await;
    Backup::builder(&deployment, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap();
    assert_eq!(everything_listed_is_whole(&repository, &deployment, "shop", 120_000).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_in_mid_restore_is_an_error_and_dropping_starts_anew() {
    let (_source_server, source) = own().await;
    fill(&source, "shop", "orders", 120_000).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let snapshot = Backup::builder(&source, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap().id;

    let (server, target) = own().await;
    let fault = AtDocument::new(20_000);
    let restore =
        Restore::builder(&repository, &snapshot).into(&target).progress(Arc::<AtDocument>::clone(&fault)).build().unwrap();
    let work = tokio::spawn(async move { restore.run().await });
    fault.notify.notified().await;
    server.member(0).kill().unwrap();
    let error = work.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.report());

    server.member(0).restart().await.unwrap();
    server.primary().await.unwrap();
    let target = open(&server).await;
    let builder = || Restore::builder(&repository, &snapshot).into(&target);
    let refused = builder().build().unwrap().run().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "a half restored collection is not taken for a whole one");
    assert!(builder().drop_existing().build().unwrap().run().await.unwrap().is_complete());
    assert_eq!(db_hash(&source, "shop").await, db_hash(&target, "shop").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_goes_on_over_lost_cursors_and_connections() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "orders", 60_000).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    for data in [
        doc! { "failCommands": ["getMore"], "errorCode": 43, "appName": "mongo-core" },
        doc! { "failCommands": ["getMore"], "closeConnection": true, "appName": "mongo-core" },
        doc! { "failCommands": ["getMore"], "errorCode": 11602, "appName": "mongo-core" },
        doc! { "failCommands": ["find", "aggregate"], "errorCode": 91, "appName": "mongo-core" },
    ] {
        server.fail_command(0, doc! { "times": 2 }, data.clone()).await.unwrap();
        let report = Backup::builder(&deployment, &repository).namespaces("shop.*").build().unwrap().run().await;
        server.fail_command_off(0).await.unwrap();
        assert_eq!(report.unwrap_or_else(|error| panic!("{data}: {}", error.report())).documents, 60_000, "{data}");
    }
    assert_eq!(everything_listed_is_whole(&repository, &deployment, "shop", 60_000).await, 4);
}

/// The capped collection overtakes its reader once; what was cut by then is stored and not cut twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_capped_collection_that_overtakes_its_reader_is_read_anew() {
    let (server, deployment) = own().await;
    deployment.database("logs").run_command(doc! { "create": "log", "capped": true, "size": 64 << 20 }).await.unwrap();
    fill(&deployment, "logs", "log", 40_000).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let overtaken = doc! { "failCommands": ["getMore"], "errorCode": 136, "appName": "mongo-core" };
    server.fail_command(0, doc! { "times": 1 }, overtaken).await.unwrap();
    let report = Backup::builder(&deployment, &repository).namespaces("logs.*").build().unwrap().run().await;
    assert_eq!(report.unwrap_or_else(|error| panic!("{}", error.report())).documents, 40_000);
    assert_eq!(everything_listed_is_whole(&repository, &deployment, "logs", 40_000).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_ends_only_when_a_majority_holds_it() {
    let (_source_server, source) = own().await;
    fill(&source, "shop", "orders", 3_000).await;
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let snapshot = Backup::builder(&source, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap().id;
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let target = open(&server).await;
    // Making a collection waits for the majority by the server's own default: it is there already.
    target.database("shop").create_collection("orders").await.unwrap();
    let followers = stop_followers(&server).await;
    let restore = Restore::builder(&repository, &snapshot).into(&target).mode(RestoreMode::Insert).build().unwrap();
    let work = tokio::spawn(async move { restore.run().await });
    let written = server.client().await.unwrap().database("shop").collection::<Document>("orders");
    while written.estimated_document_count().await.unwrap() < 3_000 {
        assert!(!work.is_finished(), "{:?}", work.await);
    }
    // All is on the primary; a restore that did not wait would need a few round trips more.
    for _ in 0..200 {
        written.estimated_document_count().await.unwrap();
        assert!(!work.is_finished(), "{:?}", work.await);
    }
    release(followers).await;
    assert!(work.await.unwrap().unwrap().is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_at_any_moment_leaves_a_sound_repository() {
    let (deployment, database) = shared("cancel").await;
    fill(&deployment, &database, "c", 40_000).await;
    let folder = tempfile::tempdir().unwrap();
    let repository =
        Repository::open_or_init(LocalArchive::new(folder.path().join("r")).unwrap(), Key::unencrypted()).await.unwrap();
    let mut random = fastrand::Rng::with_seed(17);
    let mut cancelled = 0;
    for _ in 0..15 {
        let token = CancellationToken::new();
        let backup = Backup::builder(&deployment, &repository).namespaces(&database).cancellation(token.clone()).build().unwrap();
        let delay = Duration::from_micros(random.u64(0..120_000));
        let (result, ()) = tokio::join!(backup.run(), async {
            tokio::time::sleep(delay).await;
            token.cancel();
        });
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", error.report());
            cancelled += 1;
        }
    }
    assert!(cancelled > 0, "every backup was faster than its cancellation");
    let listed = everything_listed_is_whole(&repository, &deployment, &database, 40_000).await;
    assert_eq!(listed, 15 - cancelled);

    let snapshot = Backup::builder(&deployment, &repository).namespaces(&database).build().unwrap().run().await.unwrap().id;
    for _ in 0..8 {
        let token = CancellationToken::new();
        let target = format!("{database}_r");
        let builder = Restore::builder(&repository, &snapshot)
            .into(&deployment)
            .rename(&format!("{database}.*"), &format!("{target}.*"))
            .drop_existing();
        let restore = builder.cancellation(token.clone()).build().unwrap();
        let delay = Duration::from_micros(random.u64(0..400_000));
        let (result, ()) = tokio::join!(restore.run(), async {
            tokio::time::sleep(delay).await;
            token.cancel();
        });
        match result {
            Ok(report) => assert!(report.is_complete()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", error.report()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_vanishes_in_mid_restore_names_the_missing_pack() {
    let (deployment, database) = shared("vanish").await;
    fill(&deployment, &database, "c", 5_000).await;
    let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
    let repository = Repository::open_or_init_shared(Arc::clone(&archive), Key::unencrypted()).await.unwrap();
    Backup::builder(&deployment, &repository).namespaces(&database).build().unwrap().run().await.unwrap();
    let restore = Restore::builder(&repository, SnapshotChoice::Latest)
        .into(&deployment)
        .rename(&format!("{database}.*"), &format!("{database}_r.*"))
        .build()
        .unwrap();
    let plan = restore.plan().await.unwrap();
    let packs: Vec<ObjectMeta> = archive.list("packs/").try_collect().await.unwrap();
    for pack in packs {
        archive.delete(&pack.name).await.unwrap();
    }
    let error = plan.execute().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CorruptData);
    assert!(error.to_string().contains("packs/"), "{error}");
}
