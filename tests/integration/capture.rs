//! What a capture must stand, and what can be restored with what it has stored.

use std::{
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use mongo_backup::{
    Backup, Capture, Key, LocalArchive, Prune, Repository, Restore, RestorePoint, RestoreReport, RetentionPolicy, SnapshotChoice,
    Verify,
};
use mongo_core::{
    CancellationToken, Deployment, ErrorKind, Result,
    bson::{Document, Timestamp, doc},
    clock::ManualClock,
    mongodb::options::WriteConcern,
    state::{MemoryState, StateStore},
};
use mongo_testkit::TestDeployment;

use crate::{
    point_in_time::{Capturing, repository},
    resume::Interrupting,
    support::{data_hash, example, fill, mark, open, own},
    workload::Workload,
};

/// Restores a database at a position under another name.
async fn restore_at(
    repository: &Repository,
    target: &Deployment,
    from: &str,
    to: &str,
    point: RestorePoint,
) -> Result<RestoreReport> {
    let restore = Restore::builder(repository, SnapshotChoice::Latest).into(target).namespaces(&format!("{from}.*"));
    restore.rename(&format!("{from}.*"), &format!("{to}.*")).at(point).build().unwrap().run().await
}

async fn assert_restored(repository: &Repository, target: &Deployment, from: &str, moments: &[(Timestamp, Document)]) {
    for (position, expected) in moments {
        let to = format!("at_{}_{}", position.time, position.increment);
        let report = restore_at(repository, target, from, &to, RestorePoint::Position(*position)).await.unwrap();
        assert!(report.is_complete());
        assert_eq!(data_hash(target, &to).await, *expected, "{position:?}");
        target.database(&to).drop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_that_is_killed_fifty_times_leaves_no_hole() {
    let (server, source) = own().await;
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("r");
    let repository = Repository::open_or_init(LocalArchive::new(&archive).unwrap(), Key::unencrypted()).await.unwrap();
    let mut workload = Workload::new(&source, "shop", 21);
    workload.begin().await;
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();

    let watch = move || {
        let mut command = Command::new(example("backup"));
        command.args(["watch", "--every", "0", "--uri", &server.uri(), "--archive", archive.to_str().unwrap()]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        (child, server.uri())
    };
    let is_done = Arc::new(AtomicBool::new(false));
    let killing = tokio::task::spawn_blocking({
        let is_done = Arc::clone(&is_done);
        move || {
            let mut random = fastrand::Rng::with_seed(9);
            for _ in 0..50 {
                let (mut child, _) = watch();
                // A kill is to come at a random moment.
                std::thread::sleep(Duration::from_millis(random.u64(100..900)));
                child.kill().unwrap();
                child.wait().unwrap();
            }
            is_done.store(true, SeqCst);
            watch
        }
    });
    let mut moments = Vec::new();
    while !is_done.load(SeqCst) {
        workload.run(60).await;
        moments.push((mark(&source).await, data_hash(&source, "shop").await));
    }
    let watch = killing.await.unwrap();
    // The last one goes on where the killed ones ended, and ends cleanly when it is asked to.
    let (mut child, _uri) = watch();
    workload.run(60).await;
    moments.push((mark(&source).await, data_hash(&source, "shop").await));
    let listed = repository.snapshots().await.unwrap().snapshots;
    let last = moments.last().unwrap().0;
    let is_stored = async {
        while repository.reach(&listed[0]).await.unwrap().expect("the chain begins at the snapshot") < last {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), is_stored).await.expect("there is no hole up to the end");
    let status = tokio::task::spawn_blocking(move || {
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        child.wait().unwrap()
    });
    assert!(status.await.unwrap().success());

    let mut random = fastrand::Rng::with_seed(1);
    random.shuffle(&mut moments);
    moments.truncate(8);
    let (_other, target) = own().await;
    assert_restored(&repository, &target, "shop", &moments).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_outlives_elections_and_a_killed_primary() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let source = open(&server).await;
    let repository = repository().await;
    let majority = WriteConcern::majority();
    let orders = source.database("shop").collection::<Document>("orders");
    orders.insert_one(doc! { "_id": -1 }).write_concern(majority.clone()).await.unwrap();
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    let mut moments = Vec::new();
    for round in 0..6 {
        for number in 0..40 {
            let id = round * 40 + number;
            // Until it is acknowledged: what is done twice is as if done once.
            let filter = doc! { "_id": id };
            let change = doc! { "$set": { "round": round, "list": [id, round] } };
            while orders.update_one(filter.clone(), change.clone()).upsert(true).write_concern(majority.clone()).await.is_err() {
                tokio::task::yield_now().await;
            }
        }
        let position = loop {
            let note = doc! { "appendOplogNote": 1, "data": { "round": round }, "writeConcern": { "w": "majority" } };
            if let Ok(reply) = source.database("admin").run_command(note).await {
                break reply.get_timestamp("operationTime").unwrap();
            }
        };
        moments.push((position, data_hash(&source, "shop").await));
        let primary = server.primary().await.unwrap();
        match round % 3 {
            0 => server.step_down().await.unwrap(),
            1 => {
                server.member(primary).kill().unwrap();
                server.member(primary).restart().await.unwrap();
            }
            _ => {}
        }
    }
    let report = capturing.stop().await;
    assert!(report.gaps.is_empty() && report.until >= moments.last().unwrap().0, "{report:?}");
    let (_other, target) = own().await;
    assert_restored(&repository, &target, "shop", &moments).await;
}

/// Reference f 28: writes of every kind, and the primary killed in the middle of them.
#[tokio::test(flavor = "multi_thread")]
async fn random_writes_and_random_kills_are_restored_as_they_came_to_be() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let source = open(&server).await;
    let repository = repository().await;
    let mut workload = Workload::new(&source, "shop", 34).that_may_fail();
    workload.begin().await;
    workload.run(60).await;
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    let mut random = fastrand::Rng::with_seed(2);
    let mut moments = Vec::new();
    for round in 0..6 {
        if round == 3 {
            // What comes later is rolled forward from here.
            let incremental = Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
            assert!(incremental.parent.is_some(), "{incremental:?}");
        }
        let primary = server.primary().await.unwrap();
        let killing = async {
            // A kill is to come at a random moment.
            tokio::time::sleep(Duration::from_millis(random.u64(10..300))).await;
            server.member(primary).kill().unwrap();
            server.member(primary).restart().await.unwrap();
        };
        tokio::join!(workload.run(150), killing);
        moments.push((agreed(&source).await, data_hash(&source, "shop").await));
    }
    let report = capturing.stop().await;
    assert!(report.gaps.is_empty() && report.until >= moments.last().unwrap().0, "{report:?}");
    let (_other, target) = own().await;
    assert_restored(&repository, &target, "shop", &moments).await;
}

/// The position of a note that a majority has.
async fn agreed(deployment: &Deployment) -> Timestamp {
    loop {
        let note = doc! { "appendOplogNote": 1, "data": { "msg": "agreed" }, "writeConcern": { "w": "majority" } };
        if let Ok(reply) = deployment.database("admin").run_command(note).await {
            return reply.get_timestamp("operationTime").unwrap();
        }
    }
}

/// A prepared transaction takes effect at the time that its commit names, which can be long before the commit is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_takes_effect_when_its_commit_says() {
    let server =
        TestDeployment::replica_set(1).with_arg("--setParameter").with_arg("enableTestCommands=1").start().await.unwrap();
    let source = open(&server).await;
    let repository = repository().await;
    let orders = source.database("shop").collection::<Document>("orders");
    orders.insert_many((0..20).map(|id| doc! { "_id": id, "n": 0 })).await.unwrap();
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let mut moments = vec![(mark(&source).await, data_hash(&source, "shop").await)];
    let admin = source.database("admin");
    for (round, commits) in [(1, true), (2, false), (3, true)] {
        let before = moments.last().unwrap().1.clone();
        let mut session = source.client().start_session().await.unwrap();
        session.start_transaction().await.unwrap();
        orders.update_many(doc! { "_id": { "$lt": 10 } }, doc! { "$inc": { "n": round } }).session(&mut session).await.unwrap();
        orders.insert_one(doc! { "_id": 100 + round }).session(&mut session).await.unwrap();
        orders.delete_one(doc! { "_id": 20 - round }).session(&mut session).await.unwrap();
        admin.run_command(doc! { "prepareTransaction": 1 }).session(&mut session).await.unwrap();
        // A capture that begins and ends while it is open; the next must still know how it began.
        let capturing = Capturing::start(&source, &repository);
        moments.push((mark(&source).await, before.clone()));
        let takes_effect = mark(&source).await;
        let untold = mark(&source).await;
        capturing.stop().await;
        let end = match commits {
            true => doc! { "commitTransaction": 1, "commitTimestamp": takes_effect },
            false => doc! { "abortTransaction": 1 },
        };
        admin.run_command(end).session(&mut session).await.unwrap();
        let capturing = Capturing::start(&source, &repository);
        let told = mark(&source).await;
        let after = data_hash(&source, "shop").await;
        assert_eq!(before != after, commits);
        moments.extend([takes_effect, untold, told].map(|at| (at, after.clone())));
        let report = capturing.stop().await;
        assert!(report.gaps.is_empty(), "{report:?}");
    }
    let (_other, target) = own().await;
    assert_restored(&repository, &target, "shop", &moments).await;
}

/// A replica set whose oplog holds a few seconds.
async fn forgetful() -> (TestDeployment, Deployment) {
    let builder = TestDeployment::replica_set(1).with_arg("--oplogSize").with_arg("1").with_arg("--syncdelay").with_arg("1");
    let server = builder.start().await.unwrap();
    let deployment = open(&server).await;
    (server, deployment)
}

/// Writes until the oplog no longer reaches back to a position.
async fn overrun(deployment: &Deployment, position: Timestamp) {
    let filler = deployment.database("filler").collection::<Document>("c");
    let oplog = mongo_core::transfer::oplog::Oplog::of(deployment).unwrap();
    while oplog.oldest().await.unwrap() <= position {
        filler.insert_many((0..100).map(|_| doc! { "x": "y".repeat(10_000) })).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oplog_that_was_overrun_is_a_gap_and_a_full_scan_recovers() {
    let (_server, source) = forgetful().await;
    let repository = repository().await;
    fill(&source, "shop", "orders", 500).await;
    let shop = |builder: mongo_backup::BackupBuilder| builder.namespaces("shop.*").build().unwrap();
    shop(Backup::builder(&source, &repository)).run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    fill(&source, "shop", "before", 10).await;
    let before = (mark(&source).await, data_hash(&source, "shop").await);
    let until = capturing.stop().await.until;

    overrun(&source, until).await;
    fill(&source, "shop", "in_the_gap", 10).await;
    let in_the_gap = mark(&source).await;
    overrun(&source, in_the_gap).await;
    let incremental = shop(Backup::builder(&source, &repository)).run().await.unwrap();
    assert!(incremental.full_scan.as_ref().is_some_and(|reason| reason.contains("no longer reaches back")), "{incremental:?}");
    let capturing = Capturing::start(&source, &repository);
    fill(&source, "shop", "after", 10).await;
    let after = (mark(&source).await, data_hash(&source, "shop").await);
    let report = capturing.stop().await;
    let [gap] = report.gaps.as_slice() else { panic!("{report:?}") };
    assert!(gap.after == until && gap.before > in_the_gap, "{gap:?}");

    let (_other, target) = own().await;
    assert_restored(&repository, &target, "shop", &[before, after]).await;
    let refused = restore_at(&repository, &target, "shop", "gap", RestorePoint::Position(in_the_gap)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    let nearest = format!("{}:{}", until.time, until.increment);
    assert!(refused.to_string().contains(&nearest) && refused.to_string().contains(" and "), "{refused}");
    assert!(target.database("gap").list_collection_names().await.unwrap().is_empty());
}

/// Money moves between accounts in transactions all the while, and several entries of the oplog make one of them.
#[tokio::test(flavor = "multi_thread")]
async fn every_restored_position_and_every_snapshot_conserves_the_total() {
    let limit = "maxNumberOfTransactionOperationsInSingleOplogEntry=2";
    let server = TestDeployment::replica_set(1).with_arg("--setParameter").with_arg(limit).start().await.unwrap();
    let source = open(&server).await;
    let repository = repository().await;
    let bank = source.database("bank");
    let accounts = |name: &str| bank.collection::<Document>(name);
    for name in ["a", "b"] {
        accounts(name).insert_many((0..ACCOUNTS).map(|id| doc! { "_id": id, "balance": 100 })).await.unwrap();
    }
    let stop = CancellationToken::new();
    let moving = tokio::spawn({
        let (client, stop) = (source.client().clone(), stop.clone());
        async move {
            let mut random = fastrand::Rng::with_seed(3);
            let mut positions = Vec::new();
            let mut session = client.start_session().await.unwrap();
            while !stop.is_cancelled() {
                session.start_transaction().await.unwrap();
                let bank = client.database("bank");
                for _ in 0..3 {
                    let amount = random.i32(1..20);
                    for (name, amount) in [("a", -amount), ("b", amount)] {
                        let filter = doc! { "_id": random.i32(0..ACCOUNTS) };
                        let change =
                            doc! { "$inc": { "balance": amount }, "$push": { "moves": { "$each": [amount], "$slice": -3 } } };
                        bank.collection::<Document>(name).update_one(filter, change).session(&mut session).await.unwrap();
                    }
                }
                session.commit_transaction().await.unwrap();
                positions.extend(session.operation_time());
            }
            positions
        }
    });
    let capturing = Capturing::start(&source, &repository);
    let mut snapshots = Vec::new();
    for _ in 0..3 {
        let report = Backup::builder(&source, &repository).namespaces("bank.*").build().unwrap().run().await.unwrap();
        snapshots.push(report.id);
        let seen = mark(&source).await;
        while mark(&source).await.time <= seen.time + 1 {
            tokio::task::yield_now().await;
        }
    }
    stop.cancel();
    let mut positions = moving.await.unwrap();
    mark(&source).await;
    let until = capturing.stop().await.until;
    let first = repository.snapshots().await.unwrap().snapshots[0].consistent_from().unwrap();
    assert!(positions.len() > 50, "only {} transfers", positions.len());
    fastrand::Rng::with_seed(1).shuffle(&mut positions);
    // Also between the entries of one transaction.
    let between = positions.iter().map(|at| Timestamp { time: at.time, increment: at.increment.saturating_sub(1) });
    let mut points: Vec<RestorePoint> = positions
        .iter()
        .copied()
        .zip(between)
        .take(10)
        .flat_map(|(at, between)| [at, between])
        .filter(|at| *at >= first)
        .map(RestorePoint::Position)
        .collect();
    points.extend((first.time + 1..until.time).map(RestorePoint::Second));
    let (_other, target) = own().await;
    for point in points {
        restore_at(&repository, &target, "bank", "copy", point).await.unwrap();
        assert_eq!(total(&target, "copy").await, i64::from(ACCOUNTS * 200), "{point}");
        target.database("copy").drop().await.unwrap();
    }
    for id in snapshots {
        let restore = Restore::builder(&repository, id).into(&target).rename("bank.*", "copy.*");
        restore.build().unwrap().run().await.unwrap();
        assert_eq!(total(&target, "copy").await, i64::from(ACCOUNTS * 200));
        target.database("copy").drop().await.unwrap();
    }
}

const ACCOUNTS: i32 = 30;

async fn total(deployment: &Deployment, database: &str) -> i64 {
    use futures_util::TryStreamExt as _;
    let mut total = 0;
    for name in ["a", "b"] {
        let all: Vec<Document> =
            deployment.database(database).collection(name).find(doc! {}).await.unwrap().try_collect().await.unwrap();
        assert_eq!(all.len(), ACCOUNTS as usize);
        total += all.iter().map(|account| i64::from(account.get_i32("balance").unwrap())).sum::<i64>();
    }
    total
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_to_a_point_that_is_interrupted_anywhere_goes_on() {
    let (_server, source) = own().await;
    let repository = repository().await;
    let mut workload = Workload::new(&source, "shop", 5);
    workload.begin().await;
    workload.run(100).await;
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    let mut moments = Vec::new();
    for _ in 0..8 {
        workload.run(80).await;
        moments.push((mark(&source).await, data_hash(&source, "shop").await));
    }
    capturing.stop().await;
    let (position, expected) = moments.pop().unwrap();
    let (_other, target) = own().await;
    let (mut interruptions, mut replayed) = (0, Vec::new());
    for at in 1.. {
        let store: Arc<dyn StateStore> = Arc::new(MemoryState::new());
        let to = format!("copy_{at}");
        let run = |store: Arc<dyn StateStore>, token: CancellationToken| {
            let mut settings = mongo_backup::RestoreSettings::default();
            settings.checkpoint_every = Duration::ZERO;
            settings.at = Some(RestorePoint::Position(position));
            let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(&target).settings(settings);
            let restore = restore.namespaces("shop.*").rename("shop.*", &format!("{to}.*"));
            let restore = restore.checkpoints(store).cancellation(token).build().unwrap();
            async move { restore.run().await }
        };
        let token = CancellationToken::new();
        let interrupting: Arc<dyn StateStore> = Arc::new(Interrupting::new(Arc::clone(&store), at, token.clone()));
        match run(interrupting, token).await {
            Ok(_) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}"),
        }
        interruptions += 1;
        let report = run(store, CancellationToken::new()).await.unwrap();
        assert!(report.is_complete());
        assert_eq!(data_hash(&target, &to).await, expected, "interrupted behind save {at}");
        replayed.push(report.replayed);
    }
    assert_eq!(replayed.last(), Some(&0), "once all is applied, nothing is applied again: {replayed:?}");
    assert!(interruptions > 5, "only {interruptions} places to be interrupted at");
}

#[tokio::test]
async fn what_cannot_be_done_again_stops_a_restore_before_it_and_says_so() {
    let (_server, source) = own().await;
    let repository = repository().await;
    fill(&source, "shop", "orders", 50).await;
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    fill(&source, "shop", "more", 50).await;
    let good = (mark(&source).await, data_hash(&source, "shop").await);
    let admin = source.database("admin");
    admin.run_command(doc! { "setFeatureCompatibilityVersion": "5.0" }).await.unwrap();
    admin.run_command(doc! { "setFeatureCompatibilityVersion": "6.0" }).await.unwrap();
    let behind = mark(&source).await;
    capturing.stop().await;
    let (_other, target) = own().await;
    let refused = restore_at(&repository, &target, "shop", "copy", RestorePoint::Position(behind)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(
        refused.to_string().contains("feature compatibility") && refused.to_string().contains(&good.0.time.to_string()),
        "{refused}"
    );
    assert_restored(&repository, &target, "shop", &[good]).await;
}

#[tokio::test]
async fn slices_stay_as_long_as_a_snapshot_can_be_rolled_forward_with_them() {
    let (_server, source) = own().await;
    let repository = repository().await;
    let mut ends = Vec::new();
    for round in 0..3 {
        Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
        for part in 0..2 {
            let capturing = Capturing::start(&source, &repository);
            fill(&source, "shop", &format!("round_{round}_{part}"), 20).await;
            mark(&source).await;
            ends.push(capturing.stop().await.until);
        }
    }
    let policy = RetentionPolicy { keep_last: 2, ..RetentionPolicy::default() };
    let report = Prune::new(&repository, policy.clone()).run().await.unwrap();
    assert_eq!((report.removed.len(), report.removed_slices), (1, 0), "too young to be removed safely");
    let later = std::time::SystemTime::now() + Duration::from_secs(10 * 24 * 3600);
    let prune = || Prune::new(&repository, policy.clone()).clock(Arc::new(ManualClock::at(later)));
    let report = prune().run().await.unwrap();
    assert!(report.removed_slices > 0, "{report:?}");
    for snapshot in repository.snapshots().await.unwrap().snapshots {
        assert_eq!(repository.reach(&snapshot).await.unwrap(), ends.last().copied());
    }
    let report = prune().max_oplog_age(Duration::from_secs(3600)).run().await.unwrap();
    assert!(report.removed_slices > 0);
    let [older, newest] = &repository.snapshots().await.unwrap().snapshots[..] else { panic!() };
    assert_eq!(repository.reach(older).await.unwrap(), None);
    assert_eq!(repository.reach(newest).await.unwrap(), ends.last().copied(), "there is no other way to what came behind it");
}

#[tokio::test]
async fn whoever_may_not_read_the_oplog_is_told_so_and_the_role_backup_is_enough() {
    let server = TestDeployment::replica_set(1).with_auth().start().await.unwrap();
    let root = open(&server).await;
    fill(&root, "shop", "orders", 20).await;
    let create = |name: &str, roles: Vec<&str>| {
        let roles: Vec<Document> = roles.into_iter().map(|role| doc! { "role": role, "db": "admin" }).collect();
        let command = doc! { "createUser": name, "pwd": "secret", "roles": roles };
        let admin = root.database("admin");
        async move { admin.run_command(command).await.unwrap() }
    };
    create("reader", vec!["readAnyDatabase"]).await;
    create("keeper", vec!["backup"]).await;
    let connect = |user: &'static str| {
        let options =
            mongo_core::ConnectOptions::from_uri(server.member(0).uri()).unwrap().with_credentials(user, "secret".to_owned());
        async move { mongo_core::connect(options).await.unwrap() }
    };
    let repository = repository().await;
    let reader = connect("reader").await;
    let error = Capture::builder(&reader, &repository).build().unwrap().run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    let snapshot = Backup::builder(&reader, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap();
    assert!(snapshot.full_scan.unwrap().contains("may not be read"));
    let keeper = connect("keeper").await;
    for incremental in [false, true] {
        let snapshot = Backup::builder(&keeper, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap();
        assert_eq!(snapshot.parent.is_some(), incremental, "{:?}", snapshot.full_scan);
    }
    let capturing = Capturing::start(&keeper, &repository);
    fill(&root, "shop", "more", 20).await;
    mark(&root).await;
    capturing.stop().await;
    let newest = repository.snapshots().await.unwrap().snapshots.pop().unwrap();
    assert!(repository.reach(&newest).await.unwrap().is_some());
}

#[tokio::test]
async fn a_damaged_slice_is_found_and_named_and_nothing_is_restored_with_it() {
    let (_server, source) = own().await;
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::open_or_init(LocalArchive::new(folder.path()).unwrap(), Key::host([4; 32])).await.unwrap();
    fill(&source, "shop", "orders", 20).await;
    Backup::builder(&source, &repository).build().unwrap().run().await.unwrap();
    let capturing = Capturing::start(&source, &repository);
    fill(&source, "shop", "more", 20).await;
    let position = mark(&source).await;
    capturing.stop().await;
    let sound = Verify::new(&repository).run().await.unwrap();
    assert!(sound.is_sound() && sound.slices > 0, "{sound:?}");
    let slices: Vec<_> = walk(&folder.path().join("slices"));
    for slice in &slices {
        let mut bytes = std::fs::read(slice).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(slice, bytes).unwrap();
    }
    let report = Verify::new(&repository).quick().run().await.unwrap();
    assert_eq!(report.problems.len(), slices.len(), "{report:?}");
    assert!(report.problems.iter().all(|problem| problem.object.as_ref().is_some_and(|object| object.starts_with("slices/"))));
    let refused = restore_at(&repository, &source, "shop", "copy", RestorePoint::Position(position)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::CorruptData);
    assert!(source.database("copy").list_collection_names().await.unwrap().is_empty());
}

/// All files below a folder.
fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
