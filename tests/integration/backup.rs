//! B1, B5, B17: what a backup takes, shares and reports.

use std::sync::Arc;

use mongo_backup::{Backup, BackupSettings, Consistency, Key, MemoryArchive, Repository, Restore, SnapshotChoice, Verify};
use mongo_core::{
    bson::{Document, doc},
    metrics::MemoryMetrics,
    mongodb::options::ReadPreference,
    progress::{CollectedProgress, ProgressEvent},
    transfer::partition::PartitionSettings,
};
use mongo_testkit::TestDeployment;

use crate::support::{fill, open, shared};

async fn repository() -> Repository {
    Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_collection_is_stored_once_however_it_is_partitioned() {
    let (deployment, database) = shared("dedup").await;
    fill(&deployment, &database, "c", 30_000).await;
    let repository = repository().await;
    let with_ranges = async |target: u64| {
        let mut settings = BackupSettings::default();
        settings.partition = PartitionSettings::default().with_target_bytes(target);
        Backup::builder(&deployment, &repository)
            .settings(settings)
            .namespaces(&format!("{database}.*"))
            .build()
            .unwrap()
            .run()
            .await
            .unwrap()
    };
    let first = with_ranges(u64::MAX).await;
    assert!(first.new_segments > 10, "{}", first.new_segments);
    for target in [200_000, 500_000, 1_300_000] {
        let again = with_ranges(target).await;
        // The catalog's own segment holds nothing that changes either.
        assert_eq!((again.new_segments, again.stored_bytes), (0, 0), "ranges of {target} bytes");
        assert_eq!(again.documents, 30_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_change_stores_little() {
    let (deployment, database) = shared("change").await;
    fill(&deployment, &database, "c", 30_000).await;
    let repository = repository().await;
    let backup = Backup::builder(&deployment, &repository).namespaces(&database).build().unwrap();
    let first = backup.run().await.unwrap();
    deployment
        .database(&database)
        .collection::<Document>("c")
        .update_one(doc! { "_id": 12_345 }, doc! { "$set": { "text": "new" } })
        .await
        .unwrap();
    let second = backup.run().await.unwrap();
    // The segment of the document and perhaps its neighbour, likewise the nodes above them, and the catalog. How many that are depends on where the repository's random key lets
    // segments and nodes end: five as a rule, seven in one of forty.
    assert!(
        second.new_segments <= 12 && first.new_segments > 100,
        "{} new segments of {}",
        second.new_segments,
        first.new_segments
    );
    assert!(second.stored_bytes * 5 < first.stored_bytes, "{} of {}", second.stored_bytes, first.stored_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn selection_takes_and_leaves_out() {
    let (deployment, database) = shared("select").await;
    for collection in ["orders", "orders_old", "users"] {
        fill(&deployment, &database, collection, 10).await;
    }
    let repository = repository().await;
    let backup =
        Backup::builder(&deployment, &repository).namespaces(&format!("{database}.orders*")).exclude("*.*_old").build().unwrap();
    let report = backup.run().await.unwrap();
    let names: Vec<String> = report.namespaces.iter().map(|namespace| namespace.namespace.to_string()).collect();
    assert_eq!(names, [format!("{database}.orders")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_and_metrics_tell_what_was_read() {
    let (deployment, database) = shared("progress").await;
    fill(&deployment, &database, "c", 5_000).await;
    let (progress, metrics) = (Arc::new(CollectedProgress::default()), Arc::new(MemoryMetrics::default()));
    let backup = Backup::builder(&deployment, &repository().await)
        .namespaces(&database)
        .progress(Arc::<CollectedProgress>::clone(&progress))
        .metrics(Arc::<MemoryMetrics>::clone(&metrics))
        .build()
        .unwrap();
    let report = backup.run().await.unwrap();
    assert_eq!(metrics.counter_value(mongo_backup::metrics::BACKUP_DOCUMENTS, &[]), Some(5_000));
    let events = progress.events();
    assert!(matches!(events.first(), Some(ProgressEvent::PhaseStarted { phase: "data", .. })), "{events:?}");
    assert!(
        events
            .iter()
            .any(|event| matches!(event, ProgressEvent::PhaseFinished { documents: 5_000, bytes, .. } if *bytes == report.bytes)),
        "{events:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standalone_is_backed_up_with_best_effort_and_says_so() {
    let server = TestDeployment::standalone().start().await.unwrap();
    let deployment = open(&server).await;
    fill(&deployment, "shop", "orders", 1_000).await;
    let repository = repository().await;
    let report = Backup::builder(&deployment, &repository).build().unwrap().run().await.unwrap();
    assert!(
        matches!(&report.consistency, Consistency::BestEffort { reason, .. } if reason.contains("standalone")),
        "{}",
        report.consistency
    );
    let restored = Restore::builder(&repository, SnapshotChoice::Latest)
        .into(&deployment)
        .rename("shop.*", "copy.*")
        .build()
        .unwrap()
        .run()
        .await
        .unwrap();
    assert_eq!(restored.documents, 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_can_be_read_and_gives_the_same() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let deployment = open(&server).await;
    fill(&deployment, "shop", "orders", 2_000).await;
    let repository = repository().await;
    let preference = ReadPreference::Secondary { options: None };
    let report = Backup::builder(&deployment, &repository).read_preference(preference).build().unwrap().run().await.unwrap();
    assert_eq!(report.documents, 2_000);
    assert!(matches!(report.consistency, Consistency::PointInTime { .. }));
    let from_primary = Backup::builder(&deployment, &repository).build().unwrap().run().await.unwrap();
    assert_eq!(from_primary.new_segments, 0, "the same documents are the same segments");
    assert!(Verify::new(&repository).run().await.unwrap().is_sound());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_backups_at_the_same_time_are_both_whole() {
    let (deployment, database) = shared("twice").await;
    fill(&deployment, &database, "c", 20_000).await;
    let repository = repository().await;
    let backup = Backup::builder(&deployment, &repository).namespaces(&database).build().unwrap();
    let (a, b) = tokio::join!(backup.run(), backup.run());
    assert_eq!((a.unwrap().documents, b.unwrap().documents), (20_000, 20_000));
    let report = Verify::new(&repository).run().await.unwrap();
    assert!(report.is_sound() && report.snapshots.len() == 2, "{report:?}");
}
