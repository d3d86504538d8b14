//! The process is killed with -9 at random moments.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use mongo_backup::{Key, LocalArchive, Repository, Verify};
use mongo_core::{
    Deployment,
    bson::{Document, doc},
};
use mongo_testkit::TestDeployment;

use crate::support::{data_hash, example, fill, fingerprints, open, run_example};

/// What a tool can get wrong when it is interrupted: much, ordered, bucketed and derived data.
async fn write(deployment: &Deployment) {
    let shop = deployment.database("shop");
    fill(deployment, "shop", "orders", 20_000).await;
    shop.run_command(doc! { "create": "log", "capped": true, "size": 4 << 20 }).await.unwrap();
    fill(deployment, "shop", "log", 2_000).await;
    shop.run_command(doc! { "create": "weather", "timeseries": { "timeField": "t", "metaField": "m" } }).await.unwrap();
    let measured = (0..2_000_i64)
        .map(|number| doc! { "t": mongo_core::bson::DateTime::from_millis(number * 60_000), "m": number % 7, "v": number });
    shop.collection::<Document>("weather").insert_many(measured).await.unwrap();
    shop.run_command(doc! { "create": "view", "viewOn": "orders", "pipeline": [] }).await.unwrap();
    let index = doc! { "key": { "group": 1, "_id": -1 }, "name": "group", "unique": true };
    shop.run_command(doc! { "createIndexes": "orders", "indexes": [index] }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_backups_and_fifty_restores_that_are_killed_lose_and_double_nothing() {
    let server = TestDeployment::replica_set(1).start().await.unwrap();
    let deployment = open(&server).await;
    write(&deployment).await;
    let hash = data_hash(&deployment, "shop").await;
    let before = fingerprints(&deployment, &["shop"]).await;
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("r");
    let (archive_path, uri) = (archive.to_str().unwrap(), server.uri());
    let create = ["create", "--uri", &uri, "--archive", archive_path, "--ns", "shop.*"];
    let mut random = fastrand::Rng::with_seed(5);
    let measured = folder.path().join("measured");
    let whole = timed(&["create", "--uri", &uri, "--archive", measured.to_str().unwrap(), "--ns", "shop.*"]);
    for round in 0..50 {
        kill_after(&create, whole.mul_f64(random.f64()));
        // The last look is at all of them together.
        if round % 10 != 9 || !archive.join("config").exists() {
            continue;
        }
        let repository = Repository::open(LocalArchive::new(&archive).unwrap(), Key::unencrypted()).await.unwrap();
        let listed = repository.snapshots().await.unwrap();
        assert!(listed.damaged.is_empty(), "{:?}", listed.damaged);
        let report = Verify::new(&repository).run().await.unwrap();
        assert!(report.is_sound(), "{:?}", report.problems);
    }
    assert!(run_example("backup", &create).status.success(), "a backup after the kills");

    let restore = |to: &str| {
        let rename = format!("shop.*={to}.*");
        ["restore", "--uri", &uri, "--archive", archive_path, "--rename", &rename].map(str::to_owned).to_vec()
    };
    let whole = timed(&as_strs(&restore("measured")));
    let (mut kills, mut resumed) = (0, 0);
    for round in 0.. {
        let target = format!("copy_{round}");
        // Every second one drops first: what it drops is never what it has made itself.
        let mut command = restore(&target);
        if round % 2 == 1 {
            deployment.database(&target).collection::<Document>("orders").insert_one(doc! { "_id": "old" }).await.unwrap();
            command.push("--drop".to_owned());
        }
        for _ in 0..random.u32(1..5) {
            kills += u32::from(kill_after(&as_strs(&command), whole.mul_f64(random.f64())));
        }
        let last = run_example("backup", &as_strs(&command));
        let said = String::from_utf8_lossy(&last.stderr).into_owned();
        // One that was through before it was to be killed.
        let was_complete = round % 2 == 0 && said.contains("already");
        assert!(last.status.success() || was_complete, "{said}");
        resumed += u32::from(said.contains("was interrupted"));
        assert_eq!(data_hash(&deployment, &target).await, hash, "round {round}");
        // With indexes, the view, and the order of the capped collection.
        let after = fingerprints(&deployment, &[&target]).await;
        assert_eq!(after.values().collect::<Vec<_>>(), before.values().collect::<Vec<_>>(), "round {round}");
        deployment.database(&target).drop().await.unwrap();
        if kills >= 50 {
            break;
        }
    }
    assert!(resumed >= 5, "of all restores only {resumed} went on with what was begun");
}

fn as_strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// How long it takes when nobody kills it.
fn timed(arguments: &[&str]) -> Duration {
    let begun = Instant::now();
    let output = run_example("backup", arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    begun.elapsed()
}

/// Whether it was still running.
fn kill_after(arguments: &[&str], delay: Duration) -> bool {
    let mut child = Command::new(example("backup")).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(delay);
    let running = child.try_wait().unwrap().is_none();
    // It may have ended by itself: then there is nothing to kill.
    let _ = child.kill();
    child.wait().unwrap();
    running
}
