//! An encrypted repository: nothing of the data can be read in the archive, and only its keys open it (B12).

use std::{fs, path::Path};

use mongo_backup::{Backup, Key, LocalArchive, Repository, Restore, SnapshotChoice, Verify};
use mongo_core::{
    ErrorKind,
    bson::{Binary, Document, doc, spec::BinarySubtype},
};

use crate::support::{db_hash, own, run_example, shared};

/// Every file below a folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_data_stands_in_the_archive_and_all_of_it_comes_back() {
    let (deployment, name) = shared("vault").await;
    let database = deployment.database(&name);
    // Too random to be compressed: without encryption it stands there as it is.
    let noise: Vec<u8> = (0..4096).map(|_| fastrand::u8(..)).collect();
    let marker = &noise[2000..2064];
    let value = Binary { subtype: BinarySubtype::Generic, bytes: noise.clone() };
    database.collection::<Document>("secrets").insert_one(doc! { "_id": 1, "noise": value }).await.unwrap();
    let before = db_hash(&deployment, &name).await;

    for (key, readable) in [(Key::unencrypted(), true), (Key::passphrase("correct horse"), false)] {
        let folder = tempfile::tempdir().unwrap();
        let repository = Repository::open_or_init(LocalArchive::new(folder.path()).unwrap(), key.clone()).await.unwrap();
        Backup::builder(&deployment, &repository).namespaces(&format!("{name}.*")).build().unwrap().run().await.unwrap();
        let found = files(folder.path()).iter().any(|file| {
            let bytes = fs::read(file).unwrap();
            bytes.windows(marker.len()).any(|window| window == marker)
        });
        assert_eq!(found, readable, "what stands in the archive of {key:?}");

        let again = Repository::open(LocalArchive::new(folder.path()).unwrap(), key).await.unwrap();
        assert!(Verify::new(&again).run().await.unwrap().is_sound());
        database.drop().await.unwrap();
        Restore::builder(&again, SnapshotChoice::Latest).into(&deployment).build().unwrap().run().await.unwrap();
        assert_eq!(db_hash(&deployment, &name).await, before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_of_another_snapshot_or_repository_is_refused() {
    let (deployment, name) = shared("swapped").await;
    deployment.database(&name).collection::<Document>("c").insert_one(doc! { "_id": 1 }).await.unwrap();
    let key = Key::host([3; 32]);
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut manifests = Vec::new();
    for folder in &folders {
        let repository = Repository::open_or_init(LocalArchive::new(folder.path()).unwrap(), key.clone()).await.unwrap();
        let backup = Backup::builder(&deployment, &repository).namespaces(&format!("{name}.*")).build().unwrap();
        for _ in 0..2 {
            let id = backup.run().await.unwrap().id;
            manifests.push(folder.path().join("snapshots").join(id.as_str()));
        }
    }
    let original = fs::read(&manifests[1]).unwrap();
    // Another snapshot of the same repository under this one's name, one of another repository, and a shorter one.
    let other = fs::read(&manifests[0]).unwrap();
    let foreign = fs::read(&manifests[3]).unwrap();
    for exchanged in [&other[..], &foreign[..], &original[..original.len() - 1]] {
        fs::write(&manifests[1], exchanged).unwrap();
        let repository = Repository::open(LocalArchive::new(folders[0].path()).unwrap(), key.clone()).await.unwrap();
        let list = repository.snapshots().await.unwrap();
        assert_eq!((list.snapshots.len(), list.damaged.len()), (1, 1));
        assert!(manifests[1].ends_with(&list.damaged[0].0), "{} is named", list.damaged[0].0);
        assert_eq!(list.damaged[0].1.kind(), ErrorKind::CorruptData);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_makes_opens_and_rekeys_an_encrypted_repository() {
    let (host, deployment) = own().await;
    deployment.database("keyed").collection::<Document>("c").insert_one(doc! { "_id": 1 }).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("old"), "old passphrase\n").unwrap();
    fs::write(path("new"), "new passphrase\n").unwrap();
    let (archive, uri) = (path("archive"), host.uri());
    let backup = |arguments: &[&str]| run_example("backup", &[arguments, &["--archive", &archive]].concat());
    let error = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let (old, new) = (path("old"), path("new"));
    assert!(backup(&["create", "--uri", &uri, "--ns", "keyed.*", "--key-file", &old]).status.success());
    let refused = backup(&["list"]);
    assert!(!refused.status.success() && error(&refused).contains("is encrypted"), "{}", error(&refused));
    assert!(backup(&["key", "rotate", "--key-file", &old, "--new-key-file", &new]).status.success());
    let refused = backup(&["list", "--key-file", &old]);
    assert!(!refused.status.success() && error(&refused).contains("check it"), "{}", error(&refused));
    assert!(backup(&["verify", "--key-file", &new]).status.success());
}
