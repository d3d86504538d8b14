//! `backup verify`: read what snapshots need and check it.

use std::process::ExitCode;

use clap::Args;
use mongo_backup::{SnapshotChoice, Verify};
use mongo_core::Result;
use mongo_examples::{Access, cancel_on_interrupt, human_bytes, print_json, terminal_progress};

use crate::place::Place;

#[derive(Args)]
pub(crate) struct Verification {
    #[command(flatten)]
    place: Place,
    /// Only this snapshot, by id, or latest; without it, all
    #[arg(long, value_name = "ID")]
    snapshot: Option<String>,
}

pub(crate) async fn verify(verification: &Verification, json: bool) -> Result<ExitCode> {
    let repository = verification.place.open(Access::Existing).await?;
    let mut verify = Verify::new(&repository).progress(terminal_progress()).cancellation(cancel_on_interrupt());
    if let Some(snapshot) = &verification.snapshot {
        verify = verify.snapshot(snapshot.parse::<SnapshotChoice>()?);
    }
    let report = verify.run().await?;
    if json {
        print_json(&report)?;
    } else {
        println!(
            "checked {} snapshots: {} packs, {} segments, {} documents, {}",
            report.snapshots.len(),
            report.packs,
            report.segments,
            report.documents,
            human_bytes(report.bytes)
        );
        for problem in &report.problems {
            let snapshots: Vec<_> = problem.affects.keys().cloned().collect();
            println!(
                "damaged: {} {}; affects {}",
                problem.object.as_deref().unwrap_or_default(),
                problem.what,
                snapshots.join(", ")
            );
        }
    }
    if report.is_sound() {
        return Ok(ExitCode::SUCCESS);
    }
    let objects: Vec<&str> = report.problems.iter().filter_map(|problem| problem.object.as_deref()).take(3).collect();
    eprintln!(
        "error: the archive is damaged, {} problem(s) found ({}): put good copies of these objects back, or move them out of the archive and make a new backup, which stores anew what is missing",
        report.problems.len(),
        objects.join(" ")
    );
    Ok(ExitCode::FAILURE)
}
