//! `backup create`: make a snapshot.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::Args;
use mongo_backup::{Backup, BackupReport};
use mongo_core::{
    Error, Result,
    transform::{Redaction, Redactions},
};
use mongo_examples::{Access, cancel_on_interrupt, human_bytes, print_json, terminal_progress};
use serde::{Deserialize, Serialize};

use crate::place::{Place, deployment};

#[derive(Args)]
pub(crate) struct Create {
    #[command(flatten)]
    place: Place,
    /// Take the namespaces that match, as shop.* or shop.orders; may be given several times
    #[arg(long = "ns", value_name = "PATTERN")]
    namespaces: Vec<String>,
    /// Leave out the namespaces that match
    #[arg(long = "exclude-ns", value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Read everything, though the oplog tells what has changed since the newest snapshot
    #[arg(long)]
    full_scan: bool,
    /// On a standalone server, which has no oplog: read only documents whose field says that they have changed, as updated_at; deleted ones stay in
    /// the snapshot
    #[arg(long, value_name = "FIELD")]
    since_field: Option<String>,
    /// zstd's compression level, -7 to 22
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    level: i32,
    /// Mark the snapshot, for prune --keep-tag; may be given several times
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// Name the deployment, where several are backed up into one repository: prune counts each by itself
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Change documents on the way in by the rules of a JSON file: {"secret": "…", "rules": [{"ns": "shop.*", "field": "email",
    /// "action": "hash"}]} with the actions drop, mask and hash
    #[arg(long, value_name = "FILE")]
    sanitize: Option<PathBuf>,
    /// Show what would be backed up and write nothing
    #[arg(long)]
    dry_run: bool,
}

impl Create {
    pub(crate) async fn run(&self, uri: Option<&str>, json: bool) -> Result<ExitCode> {
        let deployment = deployment(uri).await?;
        let repository = self.place.open(Access::MayCreate).await?;
        let mut builder = Backup::builder(&deployment, &repository)
            .compression_level(self.level)
            .progress(terminal_progress())
            .cancellation(cancel_on_interrupt());
        for pattern in &self.namespaces {
            builder = builder.namespaces(pattern);
        }
        for pattern in &self.exclude {
            builder = builder.exclude(pattern);
        }
        if let Some(field) = &self.since_field {
            builder = builder.since_field(field);
        }
        if self.full_scan {
            builder = builder.full_scan();
        }
        if let Some(source) = &self.source {
            builder = builder.source(source);
        }
        if let Some(file) = &self.sanitize {
            builder = builder.transform(Arc::new(redactions(file)?));
        }
        for tag in &self.tags {
            builder = builder.tag(tag);
        }
        let backup = builder.build()?;
        let plan = backup.plan().await?;
        if self.dry_run {
            let planned: Vec<PlannedBackup> = plan
                .namespaces()
                .map(|(namespace, documents, bytes)| PlannedBackup { namespace: namespace.to_string(), documents, bytes })
                .collect();
            if json {
                print_json(&planned)?;
            } else {
                for planned in planned {
                    println!("{:>12} {:>12}  {}", planned.documents, human_bytes(planned.bytes), planned.namespace);
                }
            }
            return Ok(ExitCode::SUCCESS);
        }
        let report = plan.execute().await?;
        if json {
            print_json(&report)?
        } else {
            print_backup(&report)
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What a file of rules says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    /// What makes the hashes; whoever has it can test guesses.
    secret: Option<String>,
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    ns: String,
    field: String,
    action: Redaction,
}

fn redactions(file: &Path) -> Result<Redactions> {
    let wrong = |what: &'static str| Error::invalid(what).with_context("file", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| wrong("the file of rules cannot be read").with_source(error))?;
    let rules: Rules = serde_json::from_str(&text).map_err(|error| {
        let expected = "the file of rules is not as it should be, {\"secret\": \"…\", \"rules\": [{\"ns\": \"shop.*\", \"field\": \"email\", \"action\": \"drop, mask or hash\"}]}";
        wrong(expected).with_source(error)
    })?;
    if rules.rules.is_empty() {
        return Err(wrong("the file holds no rule"));
    }
    let hashes = rules.rules.iter().any(|rule| rule.action == Redaction::Hash);
    let secret = match rules.secret {
        Some(secret) if !secret.is_empty() => secret,
        _ if hashes => return Err(wrong("hashes need a secret: give one, and keep it from those who see the result")),
        _ => String::new(),
    };
    rules.rules.iter().try_fold(Redactions::new(secret), |redactions, rule| redactions.rule(&rule.ns, &rule.field, rule.action))
}

#[derive(Serialize)]
struct PlannedBackup {
    namespace: String,
    documents: u64,
    bytes: u64,
}

pub(crate) fn print_backup(report: &BackupReport) {
    println!("snapshot     {}", report.id);
    println!("consistency  {}", report.consistency);
    println!("documents    {} in {} namespaces, {}", report.documents, report.namespaces.len(), human_bytes(report.bytes));
    match (&report.parent, &report.full_scan) {
        (Some(parent), _) => println!("read         {} documents; the rest as in {parent}", report.documents_read),
        (None, Some(reason)) => println!("read         everything: {reason}"),
        (None, None) => {}
    }
    println!(
        "stored       {} in {} new segments; {} were there already",
        human_bytes(report.stored_bytes),
        report.new_segments,
        report.reused_segments
    );
    println!("took         {:.1} s", report.seconds);
    for left_out in &report.left_out {
        println!("left out     {}: {}", left_out.namespace, left_out.reason);
    }
}
