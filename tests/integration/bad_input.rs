//! Bad input to the `backup` example: one line that names cause and cure, a non-zero exit, nothing written.

use std::{fs, path::Path};

use mongo_core::bson::{Document, doc};
use mongo_testkit::TestDeployment;

use crate::support::{fill, open, run_example};

/// Runs `backup` and gives the one line that it fails with.
fn fails(arguments: &[&str]) -> String {
    let output = run_example("backup", arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(!output.status.success(), "{arguments:?} succeeded: {out}");
    let errors: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {err}");
    errors[0].to_owned()
}

fn says(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "`{word}` is not in: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("r");
    let archive = archive.to_str().unwrap();
    let create = |uri: &str| fails(&["create", "--uri", uri, "--archive", archive]);

    let line = create("mongodb://user:pass/word-secret@host/");
    says(&line, &["password", "percent-encoded"]);
    assert!(!line.contains("word-secret"), "{line}");
    says(&create("mongodb://host:port/"), &["port of host 1"]);
    says(&create("mongodb://h/?replicaSte=x"), &["did you mean replicaset"]);
    says(&fails(&["create", "--archive", archive]), &["--uri"]);
    says(&create("mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=700"), &["127.0.0.1:9", "refused"]);

    let server = TestDeployment::replica_set(1).with_auth().start().await.unwrap();
    let uri = format!(
        "mongodb://nobody:wrong-secret@{}/?serverSelectionTimeoutMS=3000&directConnection=true",
        server.member(0).host_port()
    );
    let line = create(&uri);
    says(&line, &["authentication failed", "check user"]);
    assert!(!line.contains("wrong-secret"), "{line}");
    assert!(!Path::new(archive).exists(), "nothing is written");
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_and_snapshots_that_are_not_there() {
    let server = mongo_testkit::shared().await.unwrap();
    let (uri, folder) = (server.uri(), tempfile::tempdir().unwrap());
    let deployment = open(server).await;
    let database = mongo_testkit::unique_name("bad");
    fill(&deployment, &database, "c", 10).await;
    let pattern = format!("{database}.*");

    let missing = folder.path().join("missing");
    for command in ["list", "show", "diff", "verify"] {
        says(&fails(&[command, "--archive", missing.to_str().unwrap()]), &["no backup repository", "check the path"]);
    }
    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letter.txt"), "dear").unwrap();
    says(&fails(&["list", "--archive", foreign.to_str().unwrap()]), &["no backup repository"]);
    says(
        &fails(&["create", "--uri", &uri, "--ns", &pattern, "--archive", foreign.to_str().unwrap()]),
        &["not empty", "choose an empty one"],
    );
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1, "nothing is written");
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    says(&fails(&["list", "--archive", file.to_str().unwrap()]), &["is a file"]);
    // Below a file nothing can be made, whoever runs the test: root may write in a read-only folder.
    says(
        &fails(&["create", "--uri", &uri, "--ns", &pattern, "--archive", file.join("r").to_str().unwrap()]),
        &["cannot create a folder"],
    );

    let archive = folder.path().join("r");
    let archive = archive.to_str().unwrap();
    says(
        &fails(&["create", "--uri", &uri, "--ns", "nothing_of_this_name.*", "--archive", archive]),
        &["no collection matches", "nothing_of_this_name"],
    );
    assert!(!Path::new(archive).exists(), "nothing is written");
    assert!(run_example("backup", &["create", "--uri", &uri, "--ns", &pattern, "--archive", archive]).status.success());
    says(&fails(&["show", "--archive", archive, "--snapshot", "20200101t000000000z-00000000"]), &["no such snapshot", "list"]);
    says(&fails(&["show", "--archive", archive, "--snapshot", "nonsense"]), &["no snapshot id"]);
    says(&fails(&["diff", "--archive", archive]), &["no older snapshot", "--from"]);
    says(&fails(&["diff", "--archive", archive, "--from", "20200101t000000000z-00000000"]), &["no such snapshot", "list"]);
    says(&fails(&["diff", "--archive", archive, "--from", "latest", "--ns", "typo.*"]), &["matches", "typo"]);
    says(
        &fails(&["restore", "--uri", &uri, "--archive", archive, "--ns", "typo.*"]),
        &["nothing in the snapshot matches", "typo"],
    );
    says(&fails(&["restore", "--uri", &uri, "--archive", archive, "--rename", "typo"]), &["FROM=TO"]);
    let bad_rename = format!("{database}.*=x.y");
    says(&fails(&["restore", "--uri", &uri, "--archive", archive, "--rename", &bad_rename]), &["same number of *"]);
    says(&fails(&["restore", "--uri", &uri, "--archive", archive]), &["has", "already", "drop"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_and_refusals_end_with_a_line_and_a_non_zero_exit() {
    let server = mongo_testkit::shared().await.unwrap();
    let (uri, folder) = (server.uri(), tempfile::tempdir().unwrap());
    let deployment = open(server).await;
    let database = mongo_testkit::unique_name("bad");
    fill(&deployment, &database, "c", 3_000).await;
    let archive = folder.path().join("r");
    let archive_path = archive.to_str().unwrap();
    let pattern = format!("{database}.*");
    assert!(run_example("backup", &["create", "--uri", &uri, "--ns", &pattern, "--archive", archive_path]).status.success());

    deployment.database(&database).run_command(doc! { "collMod": "c", "validator": { "group": { "$lt": 5 } } }).await.unwrap();
    deployment.database(&database).collection::<Document>("c").delete_many(doc! { "_id": { "$lt": 100 } }).await.unwrap();
    says(&fails(&["restore", "--uri", &uri, "--archive", archive_path, "--mode", "upsert"]), &["refused", "validator"]);

    let pack = walk(&archive.join("packs"));
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let name = pack.file_name().unwrap().to_str().unwrap();
    says(&fails(&["verify", "--archive", archive_path]), &["damaged", name]);
    let rename = format!("{database}.*={database}_r.*");
    says(&fails(&["restore", "--uri", &uri, "--archive", archive_path, "--rename", &rename]), &["damaged", name]);
}

/// The one file below a folder.
fn walk(folder: &Path) -> std::path::PathBuf {
    let path = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    if path.is_dir() { walk(&path) } else { path }
}
