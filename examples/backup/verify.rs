//! `backup verify`: read what snapshots need and check it.

use std::process::ExitCode;

use clap::Args;
use mongo_backup::{LiveDiff, LiveDiffReport, SnapshotChoice, Verify, VerifyReport};
use mongo_core::Result;
use mongo_examples::{Access, cancel_on_interrupt, human_bytes, print_json, terminal_progress};

use serde::Serialize;

use crate::{
    diff::print_namespace,
    place::{Place, deployment},
};

#[derive(Args)]
pub(crate) struct Verification {
    #[command(flatten)]
    place: Place,
    /// Only this snapshot, by id, or latest; without it, all
    #[arg(long, value_name = "ID")]
    snapshot: Option<String>,
    /// Only structure and checksums: decode no document
    #[arg(long, conflicts_with_all = ["deep", "against"])]
    quick: bool,
    /// Also compare a snapshot with a deployment, the one given by --against, document by document
    #[arg(long, requires = "against")]
    deep: bool,
    /// The deployment to compare with
    #[arg(long, value_name = "URI", requires = "deep")]
    against: Option<String>,
}

pub(crate) async fn verify(verification: &Verification, json: bool) -> Result<ExitCode> {
    let repository = verification.place.open(Access::Existing).await?;
    let mut verify = Verify::new(&repository).progress(terminal_progress()).cancellation(cancel_on_interrupt());
    if let Some(snapshot) = &verification.snapshot {
        verify = verify.snapshot(snapshot.parse::<SnapshotChoice>()?);
    }
    if verification.quick {
        verify = verify.quick();
    }
    let report = verify.run().await?;
    let live = match &verification.against {
        Some(uri) => {
            let chosen: SnapshotChoice = verification.snapshot.as_deref().unwrap_or("latest").parse()?;
            let deployment = deployment(Some(uri)).await?;
            let diff = LiveDiff::new(&repository, chosen, &deployment).progress(terminal_progress());
            Some(diff.cancellation(cancel_on_interrupt()).run().await?)
        }
        None => None,
    };
    if json {
        print_json(&Verified { report: &report, live: live.as_ref() })?;
    } else {
        println!(
            "checked {} snapshots: {} packs, {} segments, {} documents, {}; {} slices of the oplog",
            report.snapshots.len(),
            report.packs,
            report.segments,
            report.documents,
            human_bytes(report.bytes),
            report.slices
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
        return Ok(live.map_or(ExitCode::SUCCESS, |live| print_live(&live, json)));
    }
    let objects: Vec<&str> = report.problems.iter().filter_map(|problem| problem.object.as_deref()).take(3).collect();
    eprintln!(
        "error: the archive is damaged, {} problem(s) found ({}): put good copies of these objects back, or move them out of the archive and make a new backup, which stores anew what is missing",
        report.problems.len(),
        objects.join(" ")
    );
    Ok(ExitCode::FAILURE)
}

#[derive(Serialize)]
struct Verified<'a> {
    #[serde(flatten)]
    report: &'a VerifyReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    live: Option<&'a LiveDiffReport>,
}

fn print_live(live: &LiveDiffReport, json: bool) -> ExitCode {
    if !json {
        println!("compared     {} documents are as snapshot {} has them", live.alike, live.snapshot);
        live.namespaces.iter().for_each(print_namespace);
    }
    if live.is_empty() {
        return ExitCode::SUCCESS;
    }
    let differences: u64 = live.namespaces.iter().map(|namespace| namespace.added + namespace.removed + namespace.changed).sum();
    eprintln!(
        "error: the deployment differs from snapshot {} in {} namespace(s), {differences} document(s): what was written since then differs too",
        live.snapshot,
        live.namespaces.len()
    );
    ExitCode::FAILURE
}
