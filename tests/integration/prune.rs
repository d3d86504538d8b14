//! Retention on a real server: space is freed, and what is kept comes back whole (B11).

use mongo_backup::{Backup, Key, LocalArchive, Prune, Repository, Restore, RetentionPolicy, Verify};
use mongo_core::bson::{Document, doc};

use crate::support::{db_hash, fill, own, run_example, shared};

fn size(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .map(|path| if path.is_dir() { size(&path) } else { path.metadata().unwrap().len() })
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn pruning_frees_space_and_keeps_every_snapshot_that_it_should() {
    let (deployment, name) = shared("retention").await;
    let collection = deployment.database(&name).collection::<Document>("c");
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::open_or_init(LocalArchive::new(folder.path()).unwrap(), Key::host([1; 32])).await.unwrap();
    fill(&deployment, &name, "c", 20_000).await;
    let mut taken = Vec::new();
    for round in 0..4 {
        // Half of the documents change from one snapshot to the next.
        collection.update_many(doc! { "_id": { "$mod": [2, round % 2] } }, doc! { "$set": { "round": round } }).await.unwrap();
        let pattern = format!("{name}.*");
        let tag = if round == 0 { "first" } else { "" };
        let report =
            Backup::builder(&deployment, &repository).namespaces(&pattern).tag(tag).build().unwrap().run().await.unwrap();
        taken.push((report.id, db_hash(&deployment, &name).await));
    }
    let before = size(folder.path());
    let policy = RetentionPolicy { keep_last: 1, keep_tags: ["first".to_owned()].into(), ..RetentionPolicy::default() };
    let report = Prune::new(&repository, policy).max_unused(0.0).run().await.unwrap();
    assert_eq!((report.removed.len(), report.postponed_packs), (2, 0), "{report:?}");
    let after = size(folder.path());
    assert!(after < before * 3 / 4, "{before} bytes before, {after} after");
    assert!(Verify::new(&repository).run().await.unwrap().is_sound());
    let kept = repository.snapshots().await.unwrap().snapshots;
    assert_eq!(kept.iter().map(|snapshot| &snapshot.id).collect::<Vec<_>>(), [&taken[0].0, &taken[3].0]);
    for (id, hash) in [&taken[0], &taken[3]] {
        deployment.database(&name).drop().await.unwrap();
        Restore::builder(&repository, id).into(&deployment).build().unwrap().run().await.unwrap();
        assert_eq!(db_hash(&deployment, &name).await, *hash);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_shows_a_plan_first_and_refuses_to_keep_nothing() {
    let (host, deployment) = own().await;
    fill(&deployment, "shop", "orders", 100).await;
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().to_str().unwrap();
    let backup = |arguments: &[&str]| run_example("backup", &[arguments, &["--archive", archive, "--json"]].concat());
    let json = |output: std::process::Output| serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
    for _ in 0..3 {
        assert!(backup(&["create", "--uri", &host.uri()]).status.success());
    }
    let refused = backup(&["prune"]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("say what is to be kept"));
    let plan = json(backup(&["prune", "--keep-last", "1", "--dry-run"]));
    assert_eq!(plan["removed"], 2);
    assert_eq!(json(backup(&["list"])).as_array().unwrap().len(), 3, "a dry run removes nothing");
    assert_eq!(json(backup(&["prune", "--keep-last", "1"]))["removed"].as_array().unwrap().len(), 2);
    assert_eq!(json(backup(&["list"])).as_array().unwrap().len(), 1);
    assert!(backup(&["verify"]).status.success());
}
