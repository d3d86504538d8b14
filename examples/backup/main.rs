//! A small backup tool: create, list, show, compare, verify, restore and prune snapshots, and capture what happens between them.
//!
//! With no arguments it shows itself off on a MongoDB of its own.

mod audit;
mod create;
mod diff;
mod exchange;
mod inspect;
mod keys;
mod place;
mod prune;
mod restore;
mod show_off;
mod verify;
mod watch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mongo_examples::run;

/// Snapshots of a MongoDB: complete, checked, stored once.
#[derive(Parser)]
#[command(
    name = "backup",
    after_help = "Without a command: makes, verifies and restores a snapshot of an embedded MongoDB.\nThe repository is --archive DIR, or s3://bucket/prefix (gs://, az://; AWS_ACCESS_KEY_ID and its siblings\nsay who you are), or mem: for one that ends with the program.\nAll commands take --json: the report as one JSON document on standard output."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Print the report as one JSON document on standard output
    #[arg(long, global = true)]
    json: bool,
    /// The deployment to back up or to restore into
    #[arg(long, global = true, value_name = "URI")]
    uri: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Make a snapshot
    Create(create::Create),
    /// List the snapshots
    List(place::Place),
    /// Show what a snapshot holds
    Show(inspect::Chosen),
    /// Read everything that snapshots need and check it
    Verify(verify::Verification),
    /// Tell what changed from one snapshot to another
    Diff(diff::Comparison),
    /// Bring a snapshot back
    Restore(restore::Restoration),
    /// Capture the oplog until interrupted, so that any second can be restored
    Watch(watch::Watching),
    /// Remove snapshots that are not to be kept, and free their space
    Prune(prune::Pruning),
    /// Write a snapshot as mongodump would have
    Export(exchange::Exporting),
    /// Take in a dump of mongodump or a logical backup of Percona's
    Import(exchange::Importing),
    /// Show who did what, and how it ended: what was done with --actor
    Audit(place::Place),
    /// List, add, remove and rotate the keys of an encrypted repository
    Key(keys::Keys),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let (uri, json) = (cli.uri.as_deref(), cli.json);
        match cli.command {
            None => show_off::show_off(uri, json).await,
            Some(Command::Create(create)) => create.run(uri, json).await,
            Some(Command::List(place)) => inspect::list(&place, json).await,
            Some(Command::Show(chosen)) => inspect::show(&chosen, json).await,
            Some(Command::Verify(verification)) => verify::verify(&verification, json).await,
            Some(Command::Diff(comparison)) => comparison.run(json).await,
            Some(Command::Restore(restoration)) => restoration.run(uri, json).await,
            Some(Command::Watch(watching)) => watching.run(uri, json).await,
            Some(Command::Prune(pruning)) => pruning.run(json).await,
            Some(Command::Export(exporting)) => exporting.run(json).await,
            Some(Command::Import(importing)) => importing.run(json).await,
            Some(Command::Audit(place)) => audit::audit(&place, json).await,
            Some(Command::Key(keys)) => keys.run(json).await,
        }
    })
}
