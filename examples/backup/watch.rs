//! `backup watch`: capture the oplog until interrupted.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use mongo_backup::{Capture, CaptureSettings};
use mongo_core::Result;
use mongo_examples::{Access, cancel_on_interrupt, human_bytes, print_json, terminal_progress};

use crate::place::{Place, deployment};

#[derive(Args)]
pub(crate) struct Watching {
    #[command(flatten)]
    place: Place,
    /// Store what was read at least every so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    every: u64,
}

impl Watching {
    pub(crate) async fn run(&self, uri: Option<&str>, json: bool) -> Result<ExitCode> {
        let deployment = deployment(uri).await?;
        let repository = self.place.open(Access::MayCreate).await?;
        let mut settings = CaptureSettings::default();
        settings.every = Duration::from_secs(self.every);
        let capture = Capture::builder(&deployment, &repository)
            .settings(settings)
            .progress(terminal_progress())
            .cancellation(cancel_on_interrupt())
            .build()?;
        eprintln!("capturing the oplog of {}; interrupt to end", deployment.topology());
        let report = capture.run().await?;
        if json {
            print_json(&report)?;
        } else {
            println!(
                "captured     {}:{} to {}:{}",
                report.from.time, report.from.increment, report.until.time, report.until.increment
            );
            println!("stored       {} entries in {} slices, {}", report.entries, report.slices, human_bytes(report.stored_bytes));
            for gap in &report.gaps {
                println!(
                    "gap          {}:{} to {}:{}: {}",
                    gap.after.time, gap.after.increment, gap.before.time, gap.before.increment, gap.reason
                );
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
