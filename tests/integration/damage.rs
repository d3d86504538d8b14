//! Stored objects are damaged: it is found, and named.

use std::{
    fs,
    path::{Path, PathBuf},
};

use mongo_backup::{Backup, Key, LocalArchive, Repository, Restore, SnapshotChoice, Verify};
use mongo_core::{Deployment, ErrorKind};

use crate::support::{fill, shared};

struct Damaged {
    deployment: Deployment,
    database: String,
    folder: tempfile::TempDir,
}

impl Damaged {
    async fn new(prefix: &str) -> Self {
        let (deployment, database) = shared(prefix).await;
        fill(&deployment, &database, "c", 5_000).await;
        let folder = tempfile::tempdir().unwrap();
        let this = Self { deployment, database, folder };
        let repository = Repository::open_or_init(LocalArchive::new(this.root()).unwrap(), Key::unencrypted()).await.unwrap();
        Backup::builder(&this.deployment, &repository).namespaces(&this.database).build().unwrap().run().await.unwrap();
        this
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("r")
    }

    async fn open(&self) -> mongo_core::Result<Repository> {
        Repository::open(LocalArchive::new(self.root()).unwrap(), Key::unencrypted()).await
    }

    fn objects(&self, below: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.root().join(below)];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { folders.push(path) } else { found.push(path) }
            }
        }
        found
    }

    async fn restore(&self) -> mongo_core::Result<mongo_backup::RestoreReport> {
        let repository = self.open().await?;
        let target = mongo_testkit::unique_name("restored");
        let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(&self.deployment);
        restore.rename(&format!("{}.*", self.database), &format!("{target}.*")).build()?.run().await
    }
}

fn flip(path: &Path, position: usize) {
    let mut bytes = fs::read(path).unwrap();
    let position = position % bytes.len();
    bytes[position] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_anywhere_in_a_pack_is_found_and_the_pack_is_named() {
    let damaged = Damaged::new("flip").await;
    let pack = damaged.objects("packs").pop().unwrap();
    let whole = fs::read(&pack).unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..25 {
        flip(&pack, random.usize(..whole.len()));
        let report = Verify::new(&damaged.open().await.unwrap()).run().await.unwrap();
        assert!(!report.is_sound());
        let problem = &report.problems[0];
        assert!(
            report.problems.iter().any(|problem| problem.object.as_deref().is_some_and(|object| object.contains(name(&pack)))),
            "{problem:?}"
        );
        assert!(!problem.affects.is_empty());
        fs::write(&pack, &whole).unwrap();
    }
    // In the middle of the documents, a restore notices too, and names the pack.
    flip(&pack, whole.len() / 2);
    let error = damaged.restore().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CorruptData);
    assert!(error.report().contains(name(&pack)), "{}", error.report());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_or_missing_pack_is_named_and_the_next_backup_heals_it() {
    let damaged = Damaged::new("truncate").await;
    let pack = damaged.objects("packs").pop().unwrap();
    let whole = fs::read(&pack).unwrap();
    for missing in [false, true] {
        if missing {
            fs::remove_file(&pack).unwrap()
        } else {
            fs::write(&pack, &whole[..whole.len() / 2]).unwrap()
        }
        let repository = damaged.open().await.unwrap();
        let report = Verify::new(&repository).run().await.unwrap();
        assert!(report.problems.iter().any(|problem| problem.what.contains(name(&pack))), "{:?}", report.problems);
        let error = damaged.restore().await.unwrap_err();
        assert!(error.kind() == ErrorKind::CorruptData && error.report().contains(name(&pack)), "{}", error.report());

        Backup::builder(&damaged.deployment, &repository).namespaces(&damaged.database).build().unwrap().run().await.unwrap();
        let report = Verify::new(&repository).snapshot(SnapshotChoice::Latest).run().await.unwrap();
        assert!(report.is_sound(), "{:?}", report.problems);
        assert!(damaged.restore().await.unwrap().is_complete());
        // Start again from one pack for the second round.
        for other in damaged.objects("packs") {
            if other != pack {
                fs::remove_file(other).unwrap()
            }
        }
        fs::write(&pack, &whole).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_config_and_manifest_are_named() {
    for (below, opens) in [("config", false), ("snapshots", true)] {
        let damaged = Damaged::new("frames").await;
        let path = if below == "config" { damaged.root().join("config") } else { damaged.objects(below).pop().unwrap() };
        flip(&path, 40);
        match damaged.open().await {
            Ok(repository) => {
                assert!(opens, "{below}");
                let list = repository.snapshots().await.unwrap();
                assert!(list.snapshots.is_empty() && list.damaged[0].0.contains(name(&path)), "{list:?}");
                assert!(!Verify::new(&repository).run().await.unwrap().is_sound());
                let error = damaged.restore().await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::CorruptData, "a damaged newest snapshot is not passed over");
            }
            Err(error) => {
                assert!(!opens && error.kind() == ErrorKind::CorruptData, "{below}: {error}");
                assert!(error.report().contains(name(&path)), "{}", error.report());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_is_named_and_the_directories_of_the_packs_stand_in_for_it() {
    let damaged = Damaged::new("index").await;
    let index = damaged.objects("index").pop().unwrap();
    flip(&index, 40);
    let repository = damaged.open().await.unwrap();
    let report = Verify::new(&repository).run().await.unwrap();
    assert!(
        report.problems.iter().any(|problem| problem.object.as_deref().is_some_and(|object| object.contains(name(&index)))),
        "{report:?}"
    );
    assert!(damaged.restore().await.unwrap().is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_dropped_for_a_damaged_archive() {
    let damaged = Damaged::new("drop").await;
    let pack = damaged.objects("packs").pop().unwrap();
    let size = fs::metadata(&pack).unwrap().len();
    flip(&pack, usize::try_from(size / 2).unwrap());
    let repository = damaged.open().await.unwrap();
    let restore =
        Restore::builder(&repository, SnapshotChoice::Latest).into(&damaged.deployment).drop_existing().build().unwrap();
    let error = restore.run().await.unwrap_err();
    assert!(error.kind() == ErrorKind::CorruptData && error.report().contains(name(&pack)), "{}", error.report());
    let left = damaged
        .deployment
        .database(&damaged.database)
        .collection::<mongo_core::bson::Document>("c")
        .estimated_document_count()
        .await
        .unwrap();
    assert_eq!(left, 5_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn moving_a_damaged_pack_away_lets_the_next_backup_heal() {
    let damaged = Damaged::new("heal").await;
    let pack = damaged.objects("packs").pop().unwrap();
    flip(&pack, 5_000);
    fs::rename(&pack, damaged.folder.path().join("moved away")).unwrap();
    let repository = damaged.open().await.unwrap();
    Backup::builder(&damaged.deployment, &repository).namespaces(&damaged.database).build().unwrap().run().await.unwrap();
    assert!(Verify::new(&repository).snapshot(SnapshotChoice::Latest).run().await.unwrap().is_sound());
    assert!(damaged.restore().await.unwrap().is_complete());
}
