//! `backup prune`: remove snapshots that are not to be kept, and free their space.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use mongo_backup::{Prune, PruneReport, PruneSummary, RetentionPolicy};
use mongo_core::{Error, Result};
use mongo_examples::{Access, cancel_on_interrupt, human_bytes, print_json, terminal_progress};

use crate::place::Place;

#[derive(Args)]
pub(crate) struct Pruning {
    #[command(flatten)]
    place: Place,
    /// Keep so many of the newest
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: u32,
    /// Keep the newest of so many hours
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_hourly: u32,
    /// Keep the newest of so many days
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: u32,
    /// Keep the newest of so many weeks
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: u32,
    /// Keep the newest of so many months
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_monthly: u32,
    /// Keep the newest of so many years
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_yearly: u32,
    /// Keep all that are younger
    #[arg(long, value_name = "DAYS")]
    keep_within: Option<f64>,
    /// Keep all that were made with this tag; may be given several times
    #[arg(long, value_name = "TAG")]
    keep_tag: Vec<String>,
    /// Remove what is older, whatever the counts say; alone, keep everything younger. The newest always stays
    #[arg(long, value_name = "DAYS")]
    max_age: Option<f64>,
    /// Write packs anew when more than this share of what they hold is unused
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    max_unused: f64,
    /// Write so many bytes of packs anew at most
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 30)]
    max_repack: u64,
    /// Remove slices of the oplog that are older, though older snapshots could be rolled forward with them
    #[arg(long, value_name = "DAYS")]
    max_oplog_age: Option<f64>,
    /// Take a backup for dead that has given no sign of life for so long
    #[arg(long, value_name = "HOURS", default_value_t = 24.0)]
    abandoned_after: f64,
    /// Show what would be removed and remove nothing
    #[arg(long)]
    dry_run: bool,
}

impl Pruning {
    pub(crate) async fn run(&self, json: bool) -> Result<ExitCode> {
        let policy = RetentionPolicy {
            keep_last: self.keep_last,
            keep_hourly: self.keep_hourly,
            keep_daily: self.keep_daily,
            keep_weekly: self.keep_weekly,
            keep_monthly: self.keep_monthly,
            keep_yearly: self.keep_yearly,
            keep_within: self.keep_within.map(|days| hours("--keep-within", days * 24.0)).transpose()?,
            keep_tags: self.keep_tag.iter().cloned().collect(),
            max_age: self.max_age.map(|days| hours("--max-age", days * 24.0)).transpose()?,
        };
        let repository = self.place.open(Access::Existing).await?;
        let mut prune = Prune::new(&repository, policy)
            .max_unused(self.max_unused)
            .max_repack_bytes(self.max_repack)
            .abandoned_after(hours("--abandoned-after", self.abandoned_after)?)
            .progress(terminal_progress())
            .cancellation(cancel_on_interrupt());
        if let Some(days) = self.max_oplog_age {
            prune = prune.max_oplog_age(hours("--max-oplog-age", days * 24.0)?);
        }
        let plan = prune.plan().await?;
        if self.dry_run {
            if json {
                print_json(plan.summary())?
            } else {
                print_plan(plan.summary())
            }
            return Ok(ExitCode::SUCCESS);
        }
        let report = plan.execute().await?;
        if json {
            print_json(&report)?
        } else {
            print_report(&report)
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn hours(option: &'static str, hours: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(hours * 3600.0)
        .map_err(|error| Error::invalid("this is no length of time").with_context("option", option).with_source(error))
}

fn print_plan(summary: &PruneSummary) {
    for verdict in &summary.snapshots {
        if verdict.is_kept() {
            println!("keep         {}  {}", verdict.snapshot, verdict.kept_by.join(", "));
        } else {
            println!("remove       {}", verdict.snapshot);
        }
    }
    println!("would free   {} in {} packs", human_bytes(summary.unused_bytes), summary.unused_packs);
    println!("would remove {} slices of the oplog, {}", summary.oplog_slices, human_bytes(summary.oplog_bytes));
    println!("would repack {} in {} packs", human_bytes(summary.repacked_bytes), summary.repacked_packs);
}

fn print_report(report: &PruneReport) {
    for removed in &report.removed {
        println!("removed      {removed}");
    }
    println!(
        "freed        {} in {} packs and {} slices of the oplog; {} packs written anew",
        human_bytes(report.freed_bytes),
        report.deleted_packs,
        report.removed_slices,
        report.repacked_packs
    );
    if report.postponed_packs > 0 {
        println!(
            "postponed    {} packs, which the next prune deletes: a backup that may need them is under way",
            report.postponed_packs
        );
    }
    for revoked in &report.revoked {
        println!("revoked      {revoked}: this backup gave no sign of life");
    }
}
