//! The whole story in one minute: a real MongoDB with data in it is backed up, grows, is backed up again, meets with a disaster, and comes back as it
//! was the second before.

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use mongo_backup::{Backup, Capture, Key, LocalArchive, Repository, Restore, RestorePoint, SnapshotChoice, Verify};
use mongo_core::{
    CancellationToken, Deployment, Error, Result,
    bson::{DateTime, Document, doc},
    mongodb::IndexModel,
};
use mongo_examples::{Host, human_bytes, print_json, run};
use serde::Serialize;

/// Backs a MongoDB up, damages it, and brings it back.
#[derive(Parser)]
#[command(name = "quickstart")]
struct Cli {
    /// A replica set to use instead of an embedded one; only the database mongo_quickstart is touched
    #[arg(long, value_name = "URI")]
    uri: Option<String>,
    /// Orders to begin with
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    documents: i32,
    /// Print what happened as one JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Story {
    documents_before: u64,
    first_backup_stored_bytes: u64,
    second_backup_stored_bytes: u64,
    second_backup_documents_read: u64,
    reused_segments: u64,
    captured_entries: u64,
    restored_documents: u64,
    replayed_operations: u64,
    identical: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(tell(cli))
}

async fn tell(cli: Cli) -> Result<ExitCode> {
    let say = |line: String| if cli.json { eprintln!("{line}") } else { println!("{line}") };
    let host = Host::at(cli.uri.as_deref()).await?;
    let deployment = &host.deployment;
    say(format!("1. a real server      {}", host.describe()));

    let shop = deployment.database(DATABASE);
    if !shop.list_collection_names().await?.is_empty() {
        return Err(Error::invalid(format!("the database {DATABASE} exists there: drop it, or use another deployment")));
    }
    let orders = shop.collection::<Document>("orders");
    for start in (0..cli.documents).step_by(5_000) {
        orders.insert_many((start..(start + 5_000).min(cli.documents)).map(order)).await?;
    }
    orders.create_index(IndexModel::builder().keys(doc! { "customer": 1, "placed": -1 }).build()).await?;
    shop.create_collection("views_of_orders")
        .view_on("orders")
        .pipeline(vec![doc! { "$match": { "total": { "$gt": 100 } } }])
        .await?;
    say(format!("2. data               {} orders, an index, a view", cli.documents));

    let folder = tempfile::tempdir().map_err(|error| Error::internal("no temporary folder to be had").with_source(error))?;
    let repository =
        Repository::open_or_init(LocalArchive::new(folder.path().join("backups"))?, Key::passphrase("quickstart")).await?;
    let backup = Backup::builder(deployment, &repository).namespaces(&format!("{DATABASE}.*")).build()?;
    let first = backup.run().await?;
    say(format!("3. backup             {} in {:.2} s, {}", human_bytes(first.bytes), first.seconds, first.consistency));

    let stop = CancellationToken::new();
    let capture = Capture::builder(deployment, &repository).cancellation(stop.clone()).build()?;
    let capturing = tokio::spawn(async move { capture.run().await });

    orders.insert_many((cli.documents..cli.documents + 200).map(order)).await?;
    orders.update_one(doc! { "_id": 7 }, doc! { "$set": { "status": "shipped" } }).await?;
    let second = backup.run().await?;
    say(format!(
        "4. more data, backup  a full snapshot again, but {} of {} documents read and {} stored: the oplog told what had changed",
        second.documents_read,
        second.documents,
        human_bytes(second.stored_bytes)
    ));

    // Business goes on, and no backup knows of it.
    orders.insert_many((cli.documents + 200..cli.documents + 300).map(order)).await?;
    orders.update_many(doc! { "customer": 42 }, doc! { "$push": { "notes": "called" } }).await?;
    let proof = fingerprint(deployment).await?;
    let before = second_of(deployment).await?;
    while second_of(deployment).await? == before {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    orders.delete_many(doc! { "customer": { "$lt": 50 } }).await?;
    orders.update_many(doc! {}, doc! { "$set": { "total": 0 } }).await?;
    orders.drop_indexes().await?;
    say(format!("5. disaster           {} orders left, all with a total of 0, no index", orders.count_documents(doc! {}).await?));

    stop.cancel();
    let captured = capturing.await??;
    let verified = Verify::new(&repository).run().await?;
    if !verified.is_sound() {
        return Err(Error::corrupt("the repository does not verify"));
    }
    let restore = Restore::builder(&repository, SnapshotChoice::Latest).into(deployment).drop_existing();
    let restored = restore.at(RestorePoint::Second(before)).build()?.run().await?;
    say(format!(
        "6. verify, restore    to {}, the second before: {} documents, {} operations of the oplog and {} indexes in {:.2} s",
        DateTime::from_millis(i64::from(before) * 1000).try_to_rfc3339_string().unwrap_or_default(),
        restored.documents,
        restored.replayed,
        restored.indexes,
        restored.seconds
    ));

    let identical = fingerprint(deployment).await? == proof;
    say(format!(
        "7. proof              {}",
        if identical {
            "the server's own hash of the database is what it was: every byte is back"
        } else {
            "the server's hash differs!"
        }
    ));
    shop.drop().await?;
    if cli.json {
        print_json(&Story {
            documents_before: second.documents,
            first_backup_stored_bytes: first.stored_bytes,
            second_backup_stored_bytes: second.stored_bytes,
            second_backup_documents_read: second.documents_read,
            reused_segments: second.reused_segments,
            captured_entries: captured.entries,
            restored_documents: restored.documents,
            replayed_operations: restored.replayed,
            identical,
        })?;
    }
    Ok(if identical && restored.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The second in which the deployment would note an operation now: its own clock, or that of its newest operation if that is ahead.
async fn second_of(deployment: &Deployment) -> Result<u32> {
    let reply = deployment.database("admin").run_command(doc! { "hello": 1 }).await?;
    let written = reply.get_timestamp("operationTime").map_or(0, |at| at.time);
    let clock = reply.get_datetime("localTime").map_or(0, |at| at.timestamp_millis() / 1000);
    Ok(written.max(u32::try_from(clock).unwrap_or(0)))
}

fn order(number: i32) -> Document {
    doc! {
        "_id": number,
        "customer": (number.wrapping_mul(7919)).rem_euclid(500),
        "placed": DateTime::from_millis(1_700_000_000_000 + i64::from(number) * 60_000),
        "items": [{ "sku": format!("sku-{}", number % 300), "count": number % 5 + 1 }],
        "total": f64::from(number % 400) * 1.25,
        "status": "open",
    }
}

/// The server's own hash over every document, and the indexes.
async fn fingerprint(deployment: &Deployment) -> Result<(String, Vec<String>)> {
    let shop = deployment.database(DATABASE);
    let hash = shop.run_command(doc! { "dbHash": 1, "collections": ["orders"] }).await?;
    let mut indexes = shop.collection::<Document>("orders").list_index_names().await?;
    indexes.sort();
    let hash = hash.get_document("collections").and_then(|collections| collections.get_str("orders").map(str::to_owned));
    Ok((hash.map_err(|error| Error::internal("the server gave no hash").with_source(error))?, indexes))
}

const DATABASE: &str = "mongo_quickstart";
