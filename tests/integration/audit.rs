//! B13: every operation is recorded, with who did it and how it ended.

use std::sync::Arc;

use async_trait::async_trait;
use mongo_backup::{
    AuditAction, AuditRecord, AuditSink, Backup, Key, MemoryArchive, MemoryAudit, OperationState, Prune, Repository,
    RepositoryAudit, Restore, RetentionPolicy, SnapshotChoice, Verify,
};
use mongo_core::{CancellationToken, Error, ErrorKind, Result};

use crate::support::{fill, shared};

fn in_short(records: &[AuditRecord]) -> Vec<(AuditAction, OperationState)> {
    records.iter().map(|record| (record.action, record.state)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_leaves_two_records_that_tell_how_it_ended() {
    let (deployment, database) = shared("audit").await;
    fill(&deployment, &database, "c", 100).await;
    let pattern = format!("{database}.*");
    let plain = Repository::open_or_init(MemoryArchive::new(), Key::host([4; 32])).await.unwrap();
    let audit = Arc::new(MemoryAudit::new());
    let repository = plain.audited("anna", Arc::<MemoryAudit>::clone(&audit));
    let report = Backup::builder(&deployment, &repository).namespaces(&pattern).build().unwrap().run().await.unwrap();
    Verify::new(&repository).run().await.unwrap();
    let restore = || Restore::builder(&repository, SnapshotChoice::Latest).into(&deployment);
    restore().rename(&pattern, &format!("{database}_copy.*")).build().unwrap().run().await.unwrap();
    let policy = RetentionPolicy { keep_last: 1, ..RetentionPolicy::default() };
    Prune::new(&repository, policy).run().await.unwrap();
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let restoring = restore().drop_existing().cancellation(cancelled).build().unwrap().run().await;
    assert_eq!(restoring.unwrap_err().kind(), ErrorKind::Cancelled);

    let records = audit.records();
    let done = |action, end| [(action, OperationState::InProgress), (action, end)];
    let expected = [
        done(AuditAction::Backup, OperationState::Completed),
        done(AuditAction::Verify, OperationState::Completed),
        done(AuditAction::Restore, OperationState::Completed),
        done(AuditAction::Prune, OperationState::Completed),
        done(AuditAction::Restore, OperationState::Cancelled),
    ];
    assert_eq!(in_short(&records), expected.concat());
    assert!(records.iter().all(|record| record.actor == "anna"));
    assert_eq!(records[1].subject["snapshot"], report.id.to_string());
    assert_eq!(records[0].operation, records[1].operation);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_repository_keeps_its_own_records_sealed_like_everything_else() {
    let (deployment, database) = shared("audited").await;
    fill(&deployment, &database, "c", 10).await;
    let plain = Repository::open_or_init(MemoryArchive::new(), Key::host([4; 32])).await.unwrap();
    let repository = plain.audited("bert", Arc::new(RepositoryAudit::new(&plain)));
    Backup::builder(&deployment, &repository).namespaces(&format!("{database}.*")).build().unwrap().run().await.unwrap();
    let records = plain.audit_records().await.unwrap();
    assert_eq!(
        in_short(&records),
        [(AuditAction::Backup, OperationState::InProgress), (AuditAction::Backup, OperationState::Completed)]
    );
}

#[derive(Debug)]
struct Broken;

#[async_trait]
impl AuditSink for Broken {
    async fn append(&self, _: &AuditRecord) -> Result<()> {
        Err(Error::new(ErrorKind::Unavailable, "the audit is broken on purpose"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_recorded_does_not_begin() {
    let (deployment, database) = shared("unaudited").await;
    fill(&deployment, &database, "c", 10).await;
    let plain = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
    let repository = plain.audited("carl", Arc::new(Broken));
    let refused = Backup::builder(&deployment, &repository).namespaces(&format!("{database}.*")).build().unwrap().run().await;
    let refused = refused.unwrap_err();
    assert!(refused.kind() == ErrorKind::Unavailable && refused.report().contains("nothing was done"), "{}", refused.report());
    assert!(plain.snapshots().await.unwrap().snapshots.is_empty());
}
