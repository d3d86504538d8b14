//! Backups that read only what has changed.

use mongo_backup::{Backup, BackupReport, Consistency, Diff, Key, MemoryArchive, Repository, Restore, SnapshotChoice};
use mongo_core::{
    Deployment,
    bson::{Bson, Document, doc},
};

use crate::{
    support::{data_hash, fill, own, own_of},
    workload::Workload,
};

async fn repository() -> Repository {
    Repository::open_or_init(MemoryArchive::new(), Key::host([5; 32])).await.unwrap()
}

async fn back_up(deployment: &Deployment, repository: &Repository) -> BackupReport {
    Backup::builder(deployment, repository).build().unwrap().run().await.unwrap()
}

/// Reads everything and stores hardly anything new, if the snapshot before is what is there.
async fn assert_exact(deployment: &Deployment, repository: &Repository, incremental: &BackupReport, what: &str) {
    let full = Backup::builder(deployment, repository).full_scan().build().unwrap().run().await.unwrap();
    assert!(full.parent.is_none() && full.documents_read == full.documents, "{what}: {full:?}");
    let diff = Diff::new(repository, incremental.id.clone(), full.id.clone()).run().await.unwrap();
    assert!(diff.is_empty(), "{what}: {diff:?}");
    // Where a segment had to end because it got too long, its end depends on what comes behind it.
    assert!(
        full.new_segments <= 10,
        "{what}: a tree that grew from another is nearly the one that a scan makes, but for {}",
        full.new_segments
    );
}

#[tokio::test]
async fn what_is_taken_over_and_what_is_read_make_the_tree_that_a_scan_makes() {
    let (_server, source) = own().await;
    let repository = repository().await;
    fill(&source, "shop", "orders", 60_000).await;
    fill(&source, "shop", "quiet", 5_000).await;
    let orders = source.database("shop").collection::<Document>("orders");
    let first = back_up(&source, &repository).await;
    assert!(first.full_scan.is_some() && first.parent.is_none());
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..6 {
        for _ in 0..40 {
            let id = random.i32(0..60_000);
            orders
                .update_one(doc! { "_id": id }, doc! { "$set": { "changed": round, "text": "x".repeat(random.usize(0..400)) } })
                .await
                .unwrap();
        }
        let begin = random.i32(0..58_000);
        orders.delete_many(doc! { "_id": { "$gte": begin, "$lt": begin + random.i32(0..900) } }).await.unwrap();
        let between = (0..100).map(|_| doc! { "_id": Bson::Double(f64::from(random.i32(0..60_000)) + 0.5), "between": round });
        drop(orders.insert_many(between).ordered(false).await);
        match round {
            1 => drop(orders.insert_many((0..3_000).map(|id| doc! { "_id": 70_000 + id, "behind": true })).await.unwrap()),
            2 => drop(orders.insert_many((0..50).map(|id| doc! { "_id": -50 + id, "before": true })).await.unwrap()),
            3 => drop(orders.insert_one(doc! { "_id": Bson::MinKey }).await.unwrap()),
            4 => drop(
                orders
                    .insert_many([doc! { "_id": Bson::MaxKey }, doc! { "_id": "text" }, doc! { "_id": Bson::Null }])
                    .await
                    .unwrap(),
            ),
            _ => {}
        }
        let incremental = back_up(&source, &repository).await;
        assert!(incremental.parent.is_some() && incremental.full_scan.is_none(), "{incremental:?}");
        assert!(incremental.documents_read < incremental.documents / 2, "round {round}: {} read", incremental.documents_read);
        assert_exact(&source, &repository, &incremental, &format!("round {round}")).await;
    }
    let idle = back_up(&source, &repository).await;
    assert_eq!(idle.documents_read, 0, "nothing has changed");
}

#[tokio::test]
async fn every_kind_of_write_is_seen() {
    let (_server, source) = own().await;
    let (_other, target) = own().await;
    let repository = repository().await;
    let mut workload = Workload::new(&source, "shop", 11);
    workload.begin().await;
    let admin = source.database("admin");
    for round in 0..5 {
        workload.run(150).await;
        match round {
            1 => {
                fill(&source, "shop", "made", 100).await;
                admin.run_command(doc! { "renameCollection": "shop.made", "to": "shop.renamed" }).await.unwrap();
            }
            2 => {
                let capped = source.database("shop").create_collection("capped").capped(true).size(1 << 20).await;
                capped.unwrap();
                admin.run_command(doc! { "renameCollection": "shop.renamed", "to": "other.renamed" }).await.unwrap();
            }
            3 => {
                source.database("shop").collection("capped").insert_one(doc! { "_id": 1 }).await.unwrap();
                source.database("other").drop().await.unwrap();
                fill(&source, "other", "renamed", 10).await;
            }
            _ => {}
        }
        let report = back_up(&source, &repository).await;
        assert_eq!(report.parent.is_some(), round > 0, "{report:?}");
        for database in ["shop", "other"] {
            target.database(database).drop().await.unwrap();
        }
        let restored = Restore::builder(&repository, report.id.clone()).into(&target).build().unwrap().run().await.unwrap();
        assert!(restored.is_complete());
        for database in ["shop", "other"] {
            assert_eq!(data_hash(&target, database).await, data_hash(&source, database).await, "round {round} {database}");
        }
        assert_exact(&source, &repository, &report, &format!("round {round}")).await;
    }
}

#[tokio::test]
async fn a_snapshot_of_an_older_server_is_made_one_state_when_it_is_restored() {
    let (_server, source) = own_of("4.4").await;
    let repository = repository().await;
    let mut workload = Workload::new(&source, "shop", 3);
    workload.begin().await;
    for round in 0..3 {
        workload.run(200).await;
        let report = back_up(&source, &repository).await;
        assert!(matches!(report.consistency, Consistency::Window { .. }), "{report:?}");
        assert_eq!(report.parent.is_some(), round > 0);
        let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(&source).namespaces("shop.*");
        let to = format!("copy_{round}");
        let restored = restore.rename("shop.*", &format!("{to}.*")).build().unwrap().run().await.unwrap();
        assert!(restored.is_complete() && restored.point.is_some(), "{restored:?}");
        assert_eq!(data_hash(&source, &to).await, data_hash(&source, "shop").await);
    }
}

/// B2 on a standalone.
#[tokio::test]
async fn on_a_standalone_a_field_tells_what_has_changed_and_the_report_what_it_does_not() {
    let server = mongo_testkit::TestDeployment::standalone().start().await.unwrap();
    let source = crate::support::open(&server).await;
    let repository = repository().await;
    let orders = source.database("shop").collection::<Document>("orders");
    let old = mongo_core::bson::DateTime::from_millis(0);
    orders.insert_many((0..5_000).map(|id| doc! { "_id": id, "updated_at": old, "text": "x".repeat(200) })).await.unwrap();
    let back_up = || {
        let backup = Backup::builder(&source, &repository).since_field("updated_at").build().unwrap();
        async move { backup.run().await.unwrap() }
    };
    assert!(back_up().await.full_scan.unwrap().contains("first"));
    let now = mongo_core::bson::DateTime::now();
    orders.update_one(doc! { "_id": 17 }, doc! { "$set": { "updated_at": now, "new": true } }).await.unwrap();
    orders.insert_one(doc! { "_id": 2_000.5, "updated_at": now }).await.unwrap();
    orders.delete_one(doc! { "_id": 4_000 }).await.unwrap();
    fill(&source, "shop", "made", 10).await;
    let report = back_up().await;
    assert!(report.parent.is_some() && report.documents_read < 1_000, "{report:?}");
    let Consistency::BestEffort { reason, .. } = &report.consistency else { panic!("{report:?}") };
    assert!(reason.contains("updated_at") && reason.contains("deleted"), "{reason}");
    Restore::builder(&repository, SnapshotChoice::Latest)
        .into(&source)
        .rename("shop", "copy")
        .build()
        .unwrap()
        .run()
        .await
        .unwrap();
    let copy = source.database("copy").collection::<Document>("orders");
    assert!(copy.find_one(doc! { "_id": 17 }).await.unwrap().unwrap().get_bool("new").unwrap());
    assert_eq!(copy.count_documents(doc! {}).await.unwrap(), 5_001, "the deleted one is still there, as the report says");
    let full = Backup::builder(&source, &repository).namespaces("shop.*").full_scan().build().unwrap().run().await.unwrap();
    assert_eq!(full.documents, 5_010);
}
