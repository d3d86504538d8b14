//! B6: collections come back exactly.

use mongo_backup::{Backup, Key, MemoryArchive, Repository, Restore, Verify};
use mongo_testkit::TestDeployment;

use crate::{
    awkward,
    support::{Fingerprint, db_hash, differing, fingerprints, open},
};

async fn comes_back_exactly(from: &str, to: &str) {
    // A TTL monitor that wakes up in between would change what is compared.
    let start =
        |version| TestDeployment::replica_set(1).version(version).with_arg("--setParameter=ttlMonitorEnabled=false").start();
    let (source, target) = (start(from).await.unwrap(), start(to).await.unwrap());
    let (a, b) = (open(&source).await, open(&target).await);
    awkward::write(&a).await;

    let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([7; 32])).await.unwrap();
    let report = Backup::builder(&a, &repository).build().unwrap().run().await.unwrap();
    let verified = Verify::new(&repository).run().await.unwrap();
    assert!(verified.is_sound(), "{:?}", verified.problems);
    let restored = Restore::builder(&repository, report.id).into(&b).build().unwrap().run().await.unwrap();
    assert!(restored.is_complete(), "{restored:?}");
    assert_eq!(restored.documents, report.documents);

    let (mut before, mut after) = (fingerprints(&a, &awkward::DATABASES).await, fingerprints(&b, &awkward::DATABASES).await);
    if from != to {
        // 4.4 lists the fields of a unique index in another order than 6.0 does, whatever they were created in.
        before.values_mut().chain(after.values_mut()).for_each(Fingerprint::forget_order_in_indexes);
    }
    assert_eq!(differing(&before, &after), Vec::<String>::new());
    assert!(before.len() >= 35, "{} namespaces", before.len());
    if from == to {
        for database in awkward::DATABASES {
            assert_eq!(db_hash(&a, database).await, db_hash(&b, database).await, "{database}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_awkward_case_comes_back_byte_for_byte() {
    comes_back_exactly("6.0.5", "6.0.5").await;
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn every_awkward_case_of_4_4_comes_back_on_6_0() {
    comes_back_exactly("4.4.2", "6.0.27").await;
}
