//! `backup diff`: what changed from one snapshot to another.

use std::process::ExitCode;

use clap::Args;
use mongo_backup::{Diff, DiffReport, DocumentChange, NamespaceDiff, Presence, SnapshotChoice};
use mongo_core::{Error, NamespaceSelection, Result};
use mongo_examples::{Access, cancel_on_interrupt, print_json, terminal_progress};

use crate::place::Place;

#[derive(Args)]
pub(crate) struct Comparison {
    #[command(flatten)]
    place: Place,
    /// The snapshot from which changes are told; by default the one before --to
    #[arg(long, value_name = "ID")]
    from: Option<String>,
    /// The snapshot to which they lead, by id, or latest
    #[arg(long, value_name = "ID", default_value = "latest")]
    to: String,
    /// Compare the namespaces that match, as shop.* or shop.orders; may be given several times
    #[arg(long = "ns", value_name = "PATTERN")]
    namespaces: Vec<String>,
    /// Leave out the namespaces that match
    #[arg(long = "exclude-ns", value_name = "PATTERN")]
    exclude: Vec<String>,
    /// List so many documents of each namespace; all are counted
    #[arg(long, value_name = "N", default_value_t = 100)]
    list: usize,
}

impl Comparison {
    pub(crate) async fn run(&self, json: bool) -> Result<ExitCode> {
        let repository = self.place.open(Access::Existing).await?;
        let to = repository.snapshot(&self.to.parse()?).await?.id;
        let from: SnapshotChoice = match &self.from {
            Some(from) => from.parse()?,
            None => {
                let mut list = repository.snapshots().await?;
                if let Some((name, error)) = list.damaged.pop() {
                    return Err(error
                        .wrap("a snapshot is damaged: name the one to compare with by --from")
                        .with_context("object", name));
                }
                let before = list.snapshots.iter().map(|snapshot| &snapshot.id).rfind(|id| **id < to);
                before
                    .ok_or_else(|| {
                        Error::invalid("there is no older snapshot to compare with: name one with --from").with_context("to", &to)
                    })?
                    .into()
            }
        };
        let mut selection = NamespaceSelection::all();
        for pattern in &self.namespaces {
            selection = selection.including(pattern)?;
        }
        for pattern in &self.exclude {
            selection = selection.excluding(pattern)?;
        }
        let diff = Diff::new(&repository, from, to).selection(selection).list(self.list);
        let report = diff.progress(terminal_progress()).cancellation(cancel_on_interrupt()).run().await?;
        if json {
            print_json(&report)?
        } else {
            print_diff(&report)
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_diff(report: &DiffReport) {
    println!("from {} to {}", report.older, report.newer);
    if report.is_empty() {
        println!("no difference");
    }
    report.namespaces.iter().for_each(print_namespace);
}

/// How a namespace differs, document by document as far as they are listed.
pub(crate) fn print_namespace(namespace: &NamespaceDiff) {
    let what = match namespace.presence {
        Presence::Added => " (new)",
        Presence::Removed => " (gone)",
        _ if namespace.definition_changed => " (options or indexes changed)",
        _ => "",
    };
    println!(
        "{}{what}: {} added, {} removed, {} changed",
        namespace.namespace, namespace.added, namespace.removed, namespace.changed
    );
    for document in &namespace.listed {
        let mark = match document.change {
            DocumentChange::Added => '+',
            DocumentChange::Removed => '-',
            _ => '~',
        };
        println!("  {mark} {}", document.id);
    }
    let listed = namespace.listed.len() as u64;
    let all = namespace.added + namespace.removed + namespace.changed;
    if namespace.presence == Presence::Both && listed < all {
        println!("  and {} more", all - listed);
    }
}
