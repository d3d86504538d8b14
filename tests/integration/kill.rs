//! The process is killed with -9 at random moments.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use mongo_backup::{Key, LocalArchive, Repository, Verify};
use mongo_testkit::TestDeployment;

use crate::support::{db_hash, example, fill, open, run_example};

#[tokio::test(flavor = "multi_thread")]
async fn killed_backups_and_restores_leave_nothing_half() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let deployment = open(&server).await;
    fill(&deployment, "shop", "orders", 30_000).await;
    let hash = db_hash(&deployment, "shop").await;
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("r");
    let (archive_path, uri) = (archive.to_str().unwrap(), server.uri());
    let create = ["create", "--uri", &uri, "--archive", archive_path, "--ns", "shop.*"];
    let mut random = fastrand::Rng::with_seed(5);
    for _ in 0..10 {
        kill_after(&create, Duration::from_millis(random.u64(0..600)));
        if !archive.join("config").exists() {
            continue;
        }
        let repository = Repository::open(LocalArchive::new(&archive).unwrap(), Key::unencrypted()).await.unwrap();
        let listed = repository.snapshots().await.unwrap();
        assert!(listed.damaged.is_empty(), "{:?}", listed.damaged);
        let report = Verify::new(&repository).run().await.unwrap();
        assert!(report.is_sound(), "{:?}", report.problems);
    }
    assert!(run_example("backup", &create).status.success(), "a backup after the kills");

    let restore = ["restore", "--uri", &uri, "--archive", archive_path, "--rename", "shop.*=copy.*", "--drop"];
    for _ in 0..6 {
        kill_after(&restore, Duration::from_millis(random.u64(0..800)));
    }
    let last = run_example("backup", &restore);
    assert!(last.status.success(), "{}", String::from_utf8_lossy(&last.stderr));
    assert_eq!(db_hash(&deployment, "copy").await, hash);
}

fn kill_after(arguments: &[&str], delay: Duration) {
    let mut child = Command::new(example("backup")).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(delay);
    // It may have ended by itself: then there is nothing to kill.
    let _ = child.kill();
    child.wait().unwrap();
}
