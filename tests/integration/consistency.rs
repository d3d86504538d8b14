//! One cluster time, and what happens when the server cannot give it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use futures_util::TryStreamExt as _;
use mongo_backup::{Backup, Consistency, Key, MemoryArchive, Repository, Restore};
use mongo_core::{
    Deployment, ErrorKind,
    bson::{Document, doc},
    mongodb::Client,
};

use crate::support::{fill, own, under_way};

async fn repository() -> Repository {
    Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap()
}

const ACCOUNTS: i32 = 3_000;

async fn open_accounts(deployment: &Deployment) {
    for collection in ["a", "b"] {
        let accounts = (0..ACCOUNTS).map(|number| doc! { "_id": number, "balance": 100, "filling": "x".repeat(500) });
        deployment.database("bank").collection::<Document>(collection).insert_many(accounts).await.unwrap();
    }
}

/// Moves money between accounts of two collections in transactions. Gives how often.
async fn move_money(client: Client, stop: Arc<AtomicBool>) -> i32 {
    let bank = client.database("bank");
    let (a, b) = (bank.collection::<Document>("a"), bank.collection::<Document>("b"));
    let mut session = client.start_session().await.unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    let mut moved = 0;
    while !stop.load(SeqCst) {
        session.start_transaction().await.unwrap();
        let amount = random.i32(1..50);
        for (collection, amount) in [(&a, -amount), (&b, amount)] {
            let change = doc! { "$inc": { "balance": amount } };
            let filter = doc! { "_id": random.i32(0..ACCOUNTS) };
            let updated = collection.update_one(filter, change).session(&mut session).await.unwrap();
            assert_eq!(updated.modified_count, 1);
        }
        session.commit_transaction().await.unwrap();
        moved += 1;
    }
    moved
}

async fn total(deployment: &Deployment, database: &str) -> i32 {
    let mut total = 0;
    for collection in ["a", "b"] {
        let accounts = deployment.database(database).collection::<Document>(collection).find(doc! {}).await.unwrap();
        let accounts: Vec<Document> = accounts.try_collect().await.unwrap();
        total += accounts.iter().map(|account| account.get_i32("balance").unwrap()).sum::<i32>();
    }
    total
}

/// Money moves between accounts of two collections in transactions all the while: every snapshot conserves the total.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_under_load_is_one_point_in_time() {
    let (_server, deployment) = own().await;
    open_accounts(&deployment).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mover = tokio::spawn(move_money(deployment.client().clone(), Arc::clone(&stop)));
    let repository = repository().await;
    let backup = Backup::builder(&deployment, &repository).namespaces("bank.*").build().unwrap();
    let mut snapshots = Vec::new();
    for _ in 0..4 {
        let report = backup.run().await.unwrap();
        assert!(
            matches!(&report.consistency, Consistency::PointInTime { exceptions, .. } if exceptions.is_empty()),
            "{}",
            report.consistency
        );
        snapshots.push(report.id);
    }
    stop.store(true, SeqCst);
    assert!(mover.await.unwrap() > 10, "nothing moved while the backups ran");
    for (number, id) in snapshots.into_iter().enumerate() {
        let target = format!("copy{number}");
        Restore::builder(&repository, id)
            .into(&deployment)
            .rename("bank.*", &format!("{target}.*"))
            .build()
            .unwrap()
            .run()
            .await
            .unwrap();
        assert_eq!(total(&deployment, &target).await, ACCOUNTS * 100 * 2, "snapshot {number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_outlasts_the_servers_history_reads_what_has_changed_until_it_fits() {
    let (server, deployment) = own().await;
    fill(&deployment, "shop", "orders", 5_000).await;
    let too_old = doc! { "failCommands": ["find"], "errorCode": 239, "appName": "mongo-core", "namespace": "shop.orders" };
    let repository = repository().await;

    server.fail_command(0, doc! { "times": 1 }, too_old.clone()).await.unwrap();
    let report = Backup::builder(&deployment, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap();
    assert!(
        matches!(&report.consistency, Consistency::PointInTime { exceptions, .. } if exceptions.is_empty()),
        "{}",
        report.consistency
    );
    assert_eq!(report.documents, 5_000);

    server.fail_command(0, doc! { "times": 100 }, too_old).await.unwrap();
    let backup = Backup::builder(&deployment, &repository).namespaces("shop.*").full_scan().build().unwrap();
    assert_eq!(backup.run().await.unwrap_err().server_code(), Some(239));
    assert_eq!(repository.snapshots().await.unwrap().snapshots.len(), 1);
}

/// Where not even what has changed can be read in time, what was read is stored with the oplog of the while.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_never_fits_into_the_servers_history_is_made_one_state_when_it_is_restored() {
    let (server, deployment) = own().await;
    open_accounts(&deployment).await;
    let forget = doc! { "setParameter": 1, "minSnapshotHistoryWindowInSeconds": 0 };
    deployment.database("admin").run_command(forget).await.unwrap();
    // So long that the server, which keeps no history, has none left of the cluster time.
    let wait = doc! { "failCommands": ["find"], "blockConnection": true, "blockTimeMS": 1_000, "appName": "mongo-core", "namespace": "bank.a" };
    server.fail_command(0, doc! { "times": 100 }, wait).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mover = tokio::spawn(move_money(server.client().await.unwrap(), Arc::clone(&stop)));
    let repository = repository().await;
    let report = Backup::builder(&deployment, &repository).namespaces("bank.*").build().unwrap().run().await.unwrap();
    stop.store(true, SeqCst);
    assert!(mover.await.unwrap() > 10, "nothing moved while the backup ran");
    server.fail_command_off(0).await.unwrap();
    assert!(matches!(&report.consistency, Consistency::Window { .. }), "{}", report.consistency);
    assert!(report.full_scan.is_some() && report.parent.is_none() && report.documents_read > 6_000, "{report:?}");
    let restore = Restore::builder(&repository, report.id).into(&deployment).rename("bank.*", "copy.*");
    let restored = restore.build().unwrap().run().await.unwrap();
    assert!(restored.is_complete() && restored.point.is_some(), "{restored:?}");
    assert_eq!(total(&deployment, "copy").await, ACCOUNTS * 100 * 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capped_collection_is_told_as_an_exception() {
    let (_server, deployment) = own().await;
    deployment.database("shop").create_collection("log").capped(true).size(1 << 20).await.unwrap();
    fill(&deployment, "shop", "log", 10).await;
    let report = Backup::builder(&deployment, &repository().await).namespaces("shop.*").build().unwrap().run().await.unwrap();
    assert!(
        matches!(&report.consistency, Consistency::PointInTime { exceptions, .. } if exceptions.contains_key("shop.log")),
        "{}",
        report.consistency
    );
}

/// A cursor on a name that is gone finds nothing, without an error, even at a cluster time at which there were documents.
#[tokio::test(flavor = "multi_thread")]
async fn a_collection_dropped_or_renamed_underneath_is_a_conflict_and_no_snapshot() {
    let (server, deployment) = own().await;
    let foreign = server.client().await.unwrap();
    let repository = repository().await;
    for command in [doc! { "drop": "orders" }, doc! { "renameCollection": "shop.orders", "to": "shop.elsewhere" }] {
        fill(&deployment, "shop", "orders", 5_000).await;
        // Every `find` of the backup waits for two seconds, and then for us.
        let wait = doc! { "failCommands": ["find"], "blockConnection": true, "blockTimeMS": 2_000, "appName": "mongo-core" };
        server.fail_command(0, doc! { "times": 1 }, wait).await.unwrap();
        let backup = Backup::builder(&deployment, &repository).namespaces("shop.*").build().unwrap();
        let work = tokio::spawn(async move { backup.run().await });
        under_way(&foreign, doc! { "appName": "mongo-core", "command.find": "orders" }, &work).await;
        let database = if command.contains_key("drop") { "shop" } else { "admin" };
        foreign.database(database).run_command(command.clone()).await.unwrap();
        let error = work.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{command}: {}", error.report());
    }
    assert!(repository.snapshots().await.unwrap().snapshots.is_empty());
}
