//! `backup list` and `backup show`: what a repository and a snapshot hold.

use std::process::ExitCode;

use clap::Args;
use mongo_backup::SnapshotManifest;
use mongo_core::{
    Result,
    bson::{DateTime, Timestamp},
};
use mongo_examples::{Access, human_bytes, print_json};
use serde::Serialize;

use crate::place::Place;

#[derive(Args)]
pub(crate) struct Chosen {
    #[command(flatten)]
    pub(crate) place: Place,
    /// A snapshot's id, or latest
    #[arg(long, value_name = "ID", default_value = "latest")]
    pub(crate) snapshot: String,
}

pub(crate) async fn list(place: &Place, json: bool) -> Result<ExitCode> {
    let repository = place.open(Access::Existing).await?;
    let list = repository.snapshots().await?;
    let mut listed = Vec::new();
    for manifest in list.snapshots {
        let reaches_until = repository.reach(&manifest).await?;
        listed.push(Listed { manifest, reaches_until });
    }
    if json {
        print_json(&listed)?;
    } else if listed.is_empty() {
        println!("no snapshots");
    } else {
        for Listed { manifest, reaches_until } in &listed {
            let reach = reaches_until.map_or_else(String::new, |at| {
                let second = DateTime::from_millis(i64::from(at.time) * 1000).try_to_rfc3339_string().unwrap_or_default();
                format!("; any second up to {second} ({}:{})", at.time, at.increment)
            });
            println!(
                "{}  {:>12} documents  {:>12}  {}{reach}",
                manifest.id,
                manifest.documents,
                human_bytes(manifest.bytes),
                manifest.consistency
            );
        }
    }
    if !json {
        for operation in repository.under_way().await? {
            let since = operation.started.try_to_rfc3339_string().unwrap_or_default();
            let last = operation.last_sign.try_to_rfc3339_string().unwrap_or_default();
            println!("in progress: {:?} since {since}, last sign of life {last}", operation.purpose);
        }
    }
    for (name, error) in &list.damaged {
        eprintln!("error: {name}: {}", error.report());
    }
    Ok(if list.damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    manifest: SnapshotManifest,
    /// Up to when it can be rolled forward.
    reaches_until: Option<Timestamp>,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    manifest: SnapshotManifest,
    contents: Vec<ShownNamespace>,
}

#[derive(Serialize)]
struct ShownNamespace {
    namespace: String,
    kind: String,
    documents: u64,
    bytes: u64,
    segments: u64,
    indexes: usize,
}

pub(crate) async fn show(chosen: &Chosen, json: bool) -> Result<ExitCode> {
    let repository = chosen.place.open(Access::Existing).await?;
    let manifest = repository.snapshot(&chosen.snapshot.parse()?).await?;
    let contents: Vec<ShownNamespace> = repository
        .namespaces(&manifest)
        .await?
        .iter()
        .map(|namespace| ShownNamespace {
            namespace: namespace.namespace().to_string(),
            kind: namespace.kind().to_string(),
            documents: namespace.documents(),
            bytes: namespace.bytes(),
            segments: namespace.segments(),
            indexes: namespace.entry().indexes().len(),
        })
        .collect();
    if json {
        print_json(&Shown { manifest, contents })?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("snapshot     {}", manifest.id);
    println!(
        "taken        {} in {:.1} s",
        manifest.started.try_to_rfc3339_string().unwrap_or_default(),
        manifest.duration().as_secs_f64()
    );
    println!("server       MongoDB {}, {}", manifest.server_version, manifest.topology);
    println!("consistency  {}", manifest.consistency);
    println!("documents    {}, {}", manifest.documents, human_bytes(manifest.bytes));
    for namespace in &contents {
        println!(
            "{:>12} {:>12} {:>3} indexes  {} ({})",
            namespace.documents,
            human_bytes(namespace.bytes),
            namespace.indexes,
            namespace.namespace,
            namespace.kind
        );
    }
    for left_out in &manifest.left_out {
        println!("left out     {}: {}", left_out.namespace, left_out.reason);
    }
    Ok(ExitCode::SUCCESS)
}
