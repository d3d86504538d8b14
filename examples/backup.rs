//! A small backup tool: create, list, show, compare, verify and restore snapshots.
//!
//! With no arguments it shows itself off on a MongoDB of its own.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mongo_backup::{
    Backup, BackupReport, Diff, DiffReport, DocumentChange, Presence, Repository, Restore, RestoreMode, SnapshotChoice,
    SnapshotManifest, Verify,
};
use mongo_core::{ConnectOptions, Deployment, Error, NamespaceSelection, Result, connect};
use mongo_examples::{Access, Host, cancel_on_interrupt, human_bytes, print_json, repository, run, terminal_progress};
use serde::Serialize;

/// Snapshots of a MongoDB: complete, checked, stored once.
#[derive(Parser)]
#[command(
    name = "backup",
    after_help = "Without a command: makes, verifies and restores a snapshot of an embedded MongoDB.\nThe repository is --archive DIR, or mem: for one that ends with the program.\nAll commands take --json: the report as one JSON document on standard output."
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
    Create(Create),
    /// List the snapshots
    List(Archive),
    /// Show what a snapshot holds
    Show(Chosen),
    /// Read everything that snapshots need and check it
    Verify(Verification),
    /// Tell what changed from one snapshot to another
    Diff(Comparison),
    /// Bring a snapshot back
    Restore(Restoration),
}

#[derive(Args)]
struct Archive {
    /// The repository: a folder
    #[arg(long, value_name = "DIR")]
    archive: String,
}

#[derive(Args)]
struct Create {
    #[command(flatten)]
    archive: Archive,
    /// Take the namespaces that match, as shop.* or shop.orders; may be given several times
    #[arg(long = "ns", value_name = "PATTERN")]
    namespaces: Vec<String>,
    /// Leave out the namespaces that match
    #[arg(long = "exclude-ns", value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Read everything, whatever is known from earlier snapshots (today every backup does)
    #[arg(long)]
    full_scan: bool,
    /// zstd's compression level, -7 to 22
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    level: i32,
    /// Show what would be backed up and write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args)]
struct Chosen {
    #[command(flatten)]
    archive: Archive,
    /// A snapshot's id, or latest
    #[arg(long, value_name = "ID", default_value = "latest")]
    snapshot: String,
}

#[derive(Args)]
struct Verification {
    #[command(flatten)]
    archive: Archive,
    /// Only this snapshot, by id, or latest; without it, all
    #[arg(long, value_name = "ID")]
    snapshot: Option<String>,
}

#[derive(Args)]
struct Comparison {
    #[command(flatten)]
    archive: Archive,
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

#[derive(Args)]
struct Restoration {
    #[command(flatten)]
    chosen: Chosen,
    /// Restore the namespaces that match, by their names in the snapshot
    #[arg(long = "ns", value_name = "PATTERN")]
    namespaces: Vec<String>,
    /// Leave out the namespaces that match
    #[arg(long = "exclude-ns", value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Restore under another name, as shop.*=shop_copy.*
    #[arg(long, value_name = "FROM=TO")]
    rename: Vec<String>,
    /// Merge into collections that exist: insert adds what is missing, upsert replaces too, replace overrules the validator
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Drop each target collection before it is made anew
    #[arg(long)]
    drop: bool,
    /// Show what would be done and write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    Insert,
    Upsert,
    Replace,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(async move {
        let json = cli.json;
        match cli.command {
            None => show_off(cli.uri.as_deref(), json).await,
            Some(Command::Create(create)) => create.run(cli.uri.as_deref(), json).await,
            Some(Command::List(archive)) => list(&archive, json).await,
            Some(Command::Show(chosen)) => show(&chosen, json).await,
            Some(Command::Verify(verification)) => verify(&verification, json).await,
            Some(Command::Diff(comparison)) => comparison.run(json).await,
            Some(Command::Restore(restoration)) => restoration.run(cli.uri.as_deref(), json).await,
        }
    })
}

async fn deployment(uri: Option<&str>) -> Result<Deployment> {
    let uri = uri.ok_or_else(|| Error::invalid("no deployment is named: give one with --uri mongodb://…"))?;
    connect(ConnectOptions::from_uri(uri)?.with_app_name("mongo-backup")).await
}

impl Create {
    async fn run(&self, uri: Option<&str>, json: bool) -> Result<ExitCode> {
        let deployment = deployment(uri).await?;
        let repository = repository(&self.archive.archive, Access::MayCreate).await?;
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

#[derive(Serialize)]
struct PlannedBackup {
    namespace: String,
    documents: u64,
    bytes: u64,
}

fn print_backup(report: &BackupReport) {
    println!("snapshot     {}", report.id);
    println!("consistency  {}", report.consistency);
    println!("documents    {} in {} namespaces, {}", report.documents, report.namespaces.len(), human_bytes(report.bytes));
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

async fn list(archive: &Archive, json: bool) -> Result<ExitCode> {
    let repository = repository(&archive.archive, Access::Existing).await?;
    let list = repository.snapshots().await?;
    if json {
        print_json(&list.snapshots)?;
    } else if list.snapshots.is_empty() {
        println!("no snapshots");
    } else {
        for snapshot in &list.snapshots {
            println!(
                "{}  {:>12} documents  {:>12}  {}",
                snapshot.id,
                snapshot.documents,
                human_bytes(snapshot.bytes),
                snapshot.consistency
            );
        }
    }
    for (name, error) in &list.damaged {
        eprintln!("error: {name}: {}", error.report());
    }
    Ok(if list.damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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

async fn show(chosen: &Chosen, json: bool) -> Result<ExitCode> {
    let repository = repository(&chosen.archive.archive, Access::Existing).await?;
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

async fn verify(verification: &Verification, json: bool) -> Result<ExitCode> {
    let repository = repository(&verification.archive.archive, Access::Existing).await?;
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

impl Comparison {
    async fn run(&self, json: bool) -> Result<ExitCode> {
        let repository = repository(&self.archive.archive, Access::Existing).await?;
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
    for namespace in &report.namespaces {
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
}

impl Restoration {
    async fn run(&self, uri: Option<&str>, json: bool) -> Result<ExitCode> {
        let snapshot: SnapshotChoice = self.chosen.snapshot.parse()?;
        // The archive first: a wrong path is found without waiting for a server.
        let repository = repository(&self.chosen.archive.archive, Access::Existing).await?;
        let deployment = deployment(uri).await?;
        let mut builder = Restore::builder(&repository, snapshot)
            .into(&deployment)
            .progress(terminal_progress())
            .cancellation(cancel_on_interrupt());
        for pattern in &self.namespaces {
            builder = builder.namespaces(pattern);
        }
        for pattern in &self.exclude {
            builder = builder.exclude(pattern);
        }
        for rename in &self.rename {
            let (from, to) = rename
                .split_once('=')
                .ok_or_else(|| Error::invalid("a rename is written FROM=TO").with_context("got", rename))?;
            builder = builder.rename(from, to);
        }
        if let Some(mode) = self.mode {
            builder = builder.mode(match mode {
                Mode::Insert => RestoreMode::Insert,
                Mode::Upsert => RestoreMode::Upsert,
                Mode::Replace => RestoreMode::Replace,
            });
        }
        if self.drop {
            builder = builder.drop_existing();
        }
        let restore = builder.build()?;
        let plan = restore.plan().await?;
        if self.dry_run {
            let summary = plan.summary();
            if json {
                print_json(&summary)?;
            } else {
                println!("snapshot     {} ({})", summary.snapshot, summary.consistency);
                for namespace in &summary.namespaces {
                    println!(
                        "{:>12} {:>12}  {} -> {} ({:?})",
                        namespace.documents,
                        human_bytes(namespace.bytes),
                        namespace.from,
                        namespace.to,
                        namespace.action
                    );
                }
            }
            return Ok(ExitCode::SUCCESS);
        }
        let report = plan.execute().await?;
        if json {
            print_json(&report)?;
        } else {
            println!(
                "restored     {} documents in {} namespaces, {}, and {} indexes in {:.1} s",
                report.documents,
                report.namespaces,
                human_bytes(report.bytes),
                report.indexes,
                report.seconds
            );
            for refused in &report.refused_documents {
                println!("refused      {} {}: {}", refused.namespace, refused.id, refused.reason);
            }
            for failure in &report.failures {
                println!(
                    "failed       {} {}: {}",
                    failure.namespace,
                    failure.index.as_deref().unwrap_or_default(),
                    failure.reason
                );
            }
        }
        if report.is_complete() {
            return Ok(ExitCode::SUCCESS);
        }
        let first = report
            .refused_documents
            .first()
            .map(|refused| format!("{} {}: {}", refused.namespace, refused.id, refused.reason))
            .or_else(|| {
                report.failures.first().map(|failure| {
                    format!("{} {}: {}", failure.namespace, failure.index.as_deref().unwrap_or_default(), failure.reason)
                })
            });
        eprintln!(
            "error: the target refused {} document(s) and {} definition(s), first {}: correct the target or choose another mode, and restore again",
            report.refused,
            report.failures.len(),
            first.unwrap_or_default()
        );
        Ok(ExitCode::FAILURE)
    }
}

/// Without a command: a snapshot of an embedded MongoDB, verified and restored.
async fn show_off(uri: Option<&str>, json: bool) -> Result<ExitCode> {
    use mongo_core::bson::{Document, doc};
    let host = Host::at(uri).await?;
    eprintln!("{}", host.describe());
    if uri.is_none() {
        let orders = host.deployment.database("shop").collection::<Document>("orders");
        orders
            .insert_many((0..10_000).map(|number| doc! { "_id": number, "customer": number % 97, "total": number * 3 }))
            .await?;
    }
    let repository: Repository = repository("mem:", Access::MayCreate).await?;
    let report = Backup::builder(&host.deployment, &repository).progress(terminal_progress()).build()?.run().await?;
    let verified = Verify::new(&repository).run().await?;
    if json {
        return print_json(&report).map(|()| ExitCode::SUCCESS);
    }
    print_backup(&report);
    println!("verified     {} segments, {} problems", verified.segments, verified.problems.len());
    if uri.is_none() {
        let restored = Restore::builder(&repository, report.id)
            .into(&host.deployment)
            .rename("shop.*", "shop_copy.*")
            .build()?
            .run()
            .await?;
        println!("restored     {} documents as shop_copy.* in {:.1} s", restored.documents, restored.seconds);
    }
    println!("next         backup create --uri mongodb://… --archive /backups");
    Ok(ExitCode::SUCCESS)
}
