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
    support::{data_hash, differing, fill, fingerprints, open, run_example, shared},
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

fn percona(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/percona").join(name)
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to)
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_percona_has_backed_up_comes_back_whatever_its_compression() {
    let (deployment, database) = shared("percona").await;
    let expected = std::fs::read_to_string(percona("dbhash.json")).unwrap();
    let expected: std::collections::BTreeMap<String, String> = serde_json::from_str(&expected).unwrap();
    for compression in ["none", "gzip", "s2", "snappy", "lz4", "zstd"] {
        let repository = repository().await;
        let imported = Import::new(&repository).from_percona(percona(compression).join("rs0")).await.unwrap();
        assert_eq!((imported.documents, imported.server_version.as_str()), (274, "6.0.5"), "{compression}");
        let left_out: Vec<&str> = imported.left_out.iter().map(|left_out| left_out.namespace.as_str()).collect();
        assert!(left_out.contains(&"oplog") && left_out.contains(&"admin.pbmConfig"), "{left_out:?}");
        let target = format!("{database}_{compression}");
        let restore = Restore::builder(&repository, &imported.id).into(&deployment).namespaces("shop.*");
        let restored = restore.rename("shop.*", &format!("{target}.*")).build().unwrap().run().await.unwrap();
        assert!(restored.is_complete(), "{restored:?}");
        let hash = data_hash(&deployment, &target).await;
        let hash: std::collections::BTreeMap<String, String> =
            hash.iter().map(|(name, hash)| (name.clone(), hash.as_str().unwrap().to_owned())).collect();
        assert_eq!(hash, expected, "{compression}");
        deployment.database(&target).drop().await.unwrap();
    }
}

#[tokio::test]
async fn a_percona_backup_that_is_not_whole_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let take = async |path: &Path| Import::new(&repository().await).from_percona(path.join("rs0")).await;
    let (backup, about) = (folder.path().join("b"), folder.path().join("b.pbm.json"));
    copy_folder(&percona("s2"), &backup);
    let done = std::fs::read_to_string(percona("s2.pbm.json")).unwrap();

    // Copied alone it tells by its files how it is compressed.
    assert_eq!(take(&backup).await.unwrap().documents, 274);
    let orders = backup.join("rs0/shop.orders.s2");
    let whole = std::fs::read(&orders).unwrap();
    std::fs::write(&orders, &whole[..1000]).unwrap();
    std::fs::write(backup.join("rs0/shop.orders.s2.pbmpart.1"), &whole[1000..]).unwrap();
    assert_eq!(take(&backup).await.unwrap().documents, 274, "in parts");
    std::fs::remove_file(backup.join("rs0/shop.orders.s2.pbmpart.1")).unwrap();
    assert_eq!(take(&backup).await.unwrap_err().kind(), ErrorKind::CorruptData, "without its second part");
    let mut refused = 0;
    for position in (0..whole.len()).step_by(97) {
        let mut flipped = whole.clone();
        flipped[position] ^= 4;
        std::fs::write(&orders, &flipped).unwrap();
        // A copy can be taken from elsewhere and be the same: then the checksum says so.
        match take(&backup).await {
            Ok(imported) => assert_eq!(imported.documents, 274, "byte {position}"),
            Err(error) => {
                refused += 1;
                assert_eq!(error.kind(), ErrorKind::CorruptData, "byte {position}");
            }
        }
    }
    assert!(refused > 10, "{refused} flipped bytes were noticed");
    std::fs::remove_file(&orders).unwrap();
    std::fs::write(&about, &done).unwrap();
    assert_eq!(take(&backup).await.unwrap_err().kind(), ErrorKind::CorruptData, "without a file");
    std::fs::write(&orders, &whole).unwrap();
    assert_eq!(take(&backup).await.unwrap().documents, 274);

    for (from, to, kind) in [
        ("\"done\"", "\"running\"", ErrorKind::Conflict),
        ("\"logical\"", "\"physical\"", ErrorKind::Unsupported),
        ("\"s2\"", "\"lzma\"", ErrorKind::Unsupported),
        ("\"s2\"", "\"zstd\"", ErrorKind::CorruptData),
    ] {
        std::fs::write(&about, done.replace(from, to)).unwrap();
        assert_eq!(take(&backup).await.unwrap_err().kind(), kind, "{to}");
    }
    std::fs::write(&about, &done).unwrap();
    let metadata = std::fs::read_to_string(backup.join("rs0/metadata.json")).unwrap();
    std::fs::write(
        backup.join("rs0/metadata.json"),
        metadata.replace("\"collection\": \"orders\"", "\"collection\": \"o/../../../x\""),
    )
    .unwrap();
    let error = take(&backup).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CorruptData, "{}", error.report());
    assert!(error.report().contains("leads out"), "{}", error.report());
}

#[tokio::test]
async fn a_first_document_that_begins_like_gzip_is_a_document() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("shop")).unwrap();
    // Its length is 0x8b1f, the magic of gzip.
    let document = doc! { "_id": 1, "text": "x".repeat(0x8b1f - 25) };
    let bytes = mongo_core::bson::serialize_to_vec(&document).unwrap();
    assert_eq!(bytes[..2], [0x1f, 0x8b]);
    std::fs::write(folder.path().join("shop/c.bson"), bytes).unwrap();
    std::fs::write(folder.path().join("shop/c.metadata.json"), r#"{"indexes":[],"collectionName":"c","type":"collection"}"#)
        .unwrap();
    assert_eq!(Import::new(&repository().await).from_directory(folder.path()).await.unwrap().documents, 1);
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
