//! `backup audit`: who did what, and how it ended.

use std::process::ExitCode;

use mongo_core::Result;
use mongo_examples::{Access, print_json};

use crate::place::Place;

pub(crate) async fn audit(place: &Place, json: bool) -> Result<ExitCode> {
    let records = place.open(Access::Existing).await?.audit_records().await?;
    if json {
        print_json(&records)?;
        return Ok(ExitCode::SUCCESS);
    }
    for record in records {
        let subject: Vec<String> = record.subject.iter().map(|(key, value)| format!("{key}: {value}")).collect();
        println!(
            "{}  {}  {:?} {:?}  {}{}",
            record.at.try_to_rfc3339_string().unwrap_or_default(),
            record.actor,
            record.action,
            record.state,
            subject.join(", "),
            record.reason.map(|reason| format!("; {reason}")).unwrap_or_default()
        );
    }
    Ok(ExitCode::SUCCESS)
}
