//! Exchange with mongodump's formats (B19): what goes out comes in again, and what mongodump itself wrote comes in.

use std::path::{Path, PathBuf};

use mongo_backup::{Backup, Export, Import, Key, MemoryArchive, Repository, Restore, SnapshotChoice, SnapshotId, Verify};
use mongo_core::{
    Deployment, ErrorKind,
    bson::{Document, doc},
};
use mongo_testkit::TestDeployment;

use crate::{
    awkward,
    support::{differing, fill, fingerprints, open, run_example, shared},
};

async fn repository() -> Repository {
    Repository::open_or_init(MemoryArchive::new(), Key::host([2; 32])).await.unwrap()
}

async fn awkward_snapshot() -> (TestDeployment, Deployment, Repository) {
    let server = TestDeployment::replica_set(1).with_arg("--setParameter=ttlMonitorEnabled=false").start().await.unwrap();
    let deployment = open(&server).await;
    awkward::write(&deployment).await;
    let repository = repository().await;
    Backup::builder(&deployment, &repository).build().unwrap().run().await.unwrap();
    (server, deployment, repository)
}

/// Restores a snapshot on the server that it came from, whose data is dropped, and compares.
async fn comes_back(deployment: &Deployment, repository: &Repository, id: SnapshotId, what: &str) {
    let before = fingerprints(deployment, &awkward::DATABASES).await;
    for database in awkward::DATABASES {
        deployment.database(database).drop().await.unwrap();
    }
    let restored = Restore::builder(repository, id).into(deployment).build().unwrap().run().await.unwrap();
    assert!(restored.is_complete(), "{what}: {restored:?}");
    let after = fingerprints(deployment, &awkward::DATABASES).await;
    assert_eq!(differing(&before, &after), Vec::<String>::new(), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_awkward_case_goes_out_and_comes_in_again_in_every_format() {
    let (_server, deployment, repository) = awkward_snapshot().await;
    let folder = tempfile::tempdir().unwrap();
    for gzip in [false, true] {
        let export = || Export::new(&repository, SnapshotChoice::Latest).gzip(gzip);
        let (directory, archive) = (folder.path().join(format!("dump-{gzip}")), folder.path().join(format!("archive-{gzip}")));
        let written = export().to_directory(&directory).await.unwrap();
        assert_eq!(export().to_archive_file(&archive).await.unwrap().documents, written.documents);
        let again = export().to_directory(&directory).await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Conflict, "nothing is overwritten");

        let other = self::repository().await;
        for (what, imported) in [
            ("directory", Import::new(&other).from_directory(&directory).await.unwrap()),
            ("archive", Import::new(&other).from_archive_file(&archive).await.unwrap()),
        ] {
            assert_eq!((imported.documents, imported.bytes), (written.documents, written.bytes), "{what}");
            assert!(Verify::new(&other).run().await.unwrap().is_sound());
            comes_back(&deployment, &other, imported.id, &format!("{what}, compressed: {gzip}")).await;
        }
    }
}

/// What mongodump 100.18 wrote of a small deployment: see the README beside it.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/mongodump")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_mongodump_wrote_comes_in() {
    let (deployment, _) = shared("unused").await;
    let repository = repository().await;
    for (what, imported) in [
        ("archive", Import::new(&repository).from_archive_file(fixtures().join("archive.gz")).await.unwrap()),
        ("directory", Import::new(&repository).from_directory(fixtures().join("dump")).await.unwrap()),
    ] {
        let snapshot = repository.snapshot(&imported.id.clone().into()).await.unwrap();
        let namespaces = repository.namespaces(&snapshot).await.unwrap();
        let documents = |name: &str| {
            let found = namespaces.iter().find(|namespace| namespace.namespace().to_string() == name);
            found.map(|namespace| (namespace.documents(), namespace.entry().indexes().len()))
        };
        assert_eq!(documents("dumped.orders"), Some((120, 2)), "{what}");
        assert_eq!(documents("dumped.a b/%c"), Some((1, 1)), "{what}");
        assert_eq!(documents("dumped.empty"), Some((0, 1)), "{what}");
        assert_eq!(documents("dumped.view"), Some((0, 0)), "{what}");
        assert_eq!(documents(&format!("dumped.{}", "é".repeat(90))), Some((2, 1)), "{what}");
        let (buckets, _) = documents("dumped.weather").unwrap();
        assert!(buckets > 0, "{what}");
        let target = mongo_testkit::unique_name("dumped");
        let restored = Restore::builder(&repository, imported.id)
            .into(&deployment)
            .namespaces("dumped.*")
            .rename("dumped.*", &format!("{target}.*"))
            .build()
            .unwrap()
            .run()
            .await
            .unwrap();
        assert!(restored.is_complete(), "{what}: {restored:?}");
        for (name, documents) in [("weather", 40), ("view", 60)] {
            let collection = deployment.database(&target).collection::<Document>(name);
            assert_eq!(collection.count_documents(doc! {}).await.unwrap(), documents, "{what}: {name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_foreign_dumps_are_refused_and_leave_no_snapshot() {
    let repository = repository().await;
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("dump");
    std::fs::create_dir_all(dump.join("db")).unwrap();
    std::fs::write(dump.join("db/c.bson"), [9, 0, 0, 0, 1]).unwrap();
    let truncated = Import::new(&repository).from_directory(&dump).await.unwrap_err();
    assert!(truncated.kind() == ErrorKind::CorruptData && truncated.report().contains("c.bson"), "{}", truncated.report());
    let plain = Import::new(&repository).from_archive_file(dump.join("db/c.bson")).await.unwrap_err();
    assert_eq!(plain.kind(), ErrorKind::CorruptData);
    let missing = Import::new(&repository).from_directory(folder.path().join("nothing")).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(repository.snapshots().await.unwrap().snapshots.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_percona_logical_backup_comes_in() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (
        mongo_core::bson::serialize_to_vec(&doc! { "_id": 1 }).unwrap(),
        mongo_core::bson::serialize_to_vec(&doc! { "_id": 2 }).unwrap(),
    );
    let metadata = serde_json::json!({
        "concurrent_collections": 1, "version": "0.1", "server_version": "6.0.5", "tool_version": "pbm",
        "namespaces": [
            { "db": "shop", "collection": "orders", "metadata": "{\"indexes\":[],\"collectionName\":\"orders\",\"type\":\"collection\"}", "size": 0, "type": "collection" },
        ],
    });
    std::fs::write(folder.path().join("metadata.json"), metadata.to_string()).unwrap();
    std::fs::write(folder.path().join("shop.orders"), [one, two].concat()).unwrap();
    let repository = repository().await;
    let imported = Import::new(&repository).from_percona(folder.path()).await.unwrap();
    assert_eq!((imported.documents, imported.server_version.as_str()), (2, "6.0.5"));
    std::fs::rename(folder.path().join("shop.orders"), folder.path().join("shop.orders.s2")).unwrap();
    let unsupported = Import::new(&repository).from_percona(folder.path()).await.unwrap_err();
    assert_eq!(unsupported.kind(), ErrorKind::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_exports_and_imports() {
    let (deployment, name) = shared("exchange").await;
    fill(&deployment, &name, "c", 300).await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let uri = mongo_testkit::shared().await.unwrap().uri();
    let (archive, out, other) = (path("repository"), path("out.archive"), path("other"));
    let pattern = format!("{name}.*");
    for arguments in [
        &["create", "--archive", &archive, "--uri", &uri, "--ns", &pattern][..],
        &["export", "--archive", &archive, "--format", "archive", "--out", &out, "--gzip"],
        &["import", "--archive", &other, "--format", "archive", "--in", &out],
        &["verify", "--archive", &other],
    ] {
        let output = run_example("backup", arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
