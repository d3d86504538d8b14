//! Without a command: the tool shows itself off on a MongoDB of its own.

use std::process::ExitCode;

use mongo_backup::{Backup, Key, MemoryArchive, Repository, Restore, Verify};
use mongo_core::Result;
use mongo_examples::{Host, print_json, terminal_progress};

use crate::create::print_backup;

/// Without a command: a snapshot of an embedded MongoDB, verified and restored.
pub(crate) async fn show_off(uri: Option<&str>, json: bool) -> Result<ExitCode> {
    use mongo_core::bson::{Document, doc};
    let host = Host::at(uri).await?;
    eprintln!("{}", host.describe());
    if uri.is_none() {
        let orders = host.deployment.database("shop").collection::<Document>("orders");
        orders
            .insert_many((0..10_000).map(|number| doc! { "_id": number, "customer": number % 97, "total": number * 3 }))
            .await?;
    }
    let repository = Repository::open_or_init(MemoryArchive::new(), Key::passphrase("example")).await?;
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
