//! Repositories that an earlier version has written restore for ever.

use std::path::Path;

use mongo_backup::{Diff, Key, LocalArchive, Repository, Restore, Verify};
use mongo_core::bson::{Document, doc};

use crate::support::shared;

#[tokio::test(flavor = "multi_thread")]
async fn repositories_of_version_1_restore() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/repository-v1");
    let passphrase = std::fs::read_to_string(folder.join("passphrase")).unwrap();
    for (name, key) in [("plain", Key::unencrypted()), ("encrypted", Key::passphrase(passphrase.trim_end()))] {
        let (deployment, target) = shared("golden").await;
        let repository = Repository::open(LocalArchive::new(folder.join(name)).unwrap(), key).await.unwrap();
        assert!(Verify::new(&repository).run().await.unwrap().is_sound(), "{name}");
        let snapshots = repository.snapshots().await.unwrap().snapshots;
        assert_eq!(snapshots.len(), 2, "{name}");
        let diff = Diff::new(&repository, &snapshots[0].id, &snapshots[1].id).run().await.unwrap();
        assert_eq!((diff.namespaces.len(), diff.namespaces[0].changed), (1, 1), "{name}");
        let restore =
            Restore::builder(&repository, &snapshots[1].id).into(&deployment).rename("dumped.*", &format!("{target}.*"));
        let report = restore.build().unwrap().run().await.unwrap();
        assert!(report.is_complete() && report.documents == 163, "{name}: {report:?}");
        let orders = deployment.database(&target).collection::<Document>("orders");
        let changed = orders.find_one(doc! { "_id": 5 }).await.unwrap().unwrap();
        assert_eq!(changed, doc! { "_id": 5, "n": 5, "v": "xxxxx", "changed": true }, "{name}");
        assert_eq!(orders.count_documents(doc! {}).await.unwrap(), 120, "{name}");
        let weather = deployment.database(&target).collection::<Document>("weather");
        assert_eq!(weather.count_documents(doc! {}).await.unwrap(), 40, "{name}");
    }
}
