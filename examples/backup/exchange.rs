//! `backup export` and `backup import`: exchange with mongodump, mongorestore and Percona Backup for MongoDB.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use mongo_backup::{Export, Import, SnapshotChoice};
use mongo_core::{NamespaceSelection, Result};
use mongo_examples::{Access, cancel_on_interrupt, human_bytes, print_json, terminal_progress};

use crate::{inspect::Chosen, place::Place};

#[derive(Args)]
pub(crate) struct Exporting {
    #[command(flatten)]
    chosen: Chosen,
    /// What to write
    #[arg(long, value_enum)]
    format: ExportFormat,
    /// The file or directory to write; must not exist
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Compress, as mongodump --gzip does
    #[arg(long)]
    gzip: bool,
    /// Write the namespaces that match, as shop.* or shop.orders; may be given several times
    #[arg(long = "ns", value_name = "PATTERN")]
    namespaces: Vec<String>,
    /// Leave out the namespaces that match
    #[arg(long = "exclude-ns", value_name = "PATTERN")]
    exclude: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExportFormat {
    /// A directory, for mongorestore --dir
    Dump,
    /// One file, for mongorestore --archive
    Archive,
}

#[derive(Args)]
pub(crate) struct Importing {
    #[command(flatten)]
    place: Place,
    /// What to read
    #[arg(long, value_enum)]
    format: ImportFormat,
    /// The file or directory to read; compressed or not
    #[arg(long = "in", value_name = "PATH")]
    input: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum ImportFormat {
    /// A directory of mongodump
    Dump,
    /// An archive of mongodump
    Archive,
    /// The folder of one replica set in a logical backup of Percona Backup for MongoDB
    Percona,
}

impl Exporting {
    pub(crate) async fn run(&self, json: bool) -> Result<ExitCode> {
        let snapshot: SnapshotChoice = self.chosen.snapshot.parse()?;
        let mut selection = NamespaceSelection::all();
        for pattern in &self.namespaces {
            selection = selection.including(pattern)?;
        }
        for pattern in &self.exclude {
            selection = selection.excluding(pattern)?;
        }
        let repository = self.chosen.place.open(Access::Existing).await?;
        let export = Export::new(&repository, snapshot)
            .selection(selection)
            .gzip(self.gzip)
            .progress(terminal_progress())
            .cancellation(cancel_on_interrupt());
        let report = match self.format {
            ExportFormat::Dump => export.to_directory(&self.out).await?,
            ExportFormat::Archive => export.to_archive_file(&self.out).await?,
        };
        if json {
            print_json(&report)?;
        } else {
            println!(
                "exported     {} documents in {} namespaces, {}, from {}",
                report.documents,
                report.namespaces,
                human_bytes(report.bytes),
                report.snapshot
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Importing {
    pub(crate) async fn run(&self, json: bool) -> Result<ExitCode> {
        let repository = self.place.open(Access::MayCreate).await?;
        let import = Import::new(&repository).progress(terminal_progress()).cancellation(cancel_on_interrupt());
        let report = match self.format {
            ImportFormat::Dump => import.from_directory(&self.input).await?,
            ImportFormat::Archive => import.from_archive_file(&self.input).await?,
            ImportFormat::Percona => import.from_percona(&self.input).await?,
        };
        if json {
            print_json(&report)?;
        } else {
            println!("snapshot     {}", report.id);
            println!(
                "imported     {} documents in {} namespaces, {}, of MongoDB {}",
                report.documents,
                report.namespaces,
                human_bytes(report.bytes),
                report.server_version
            );
            for left_out in &report.left_out {
                println!("left out     {}: {}", left_out.namespace, left_out.reason);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
