//! `backup key`: the keys of an encrypted repository.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use mongo_backup::{KeyId, KeyKind, Repository};
use mongo_core::Result;
use mongo_examples::{Access, key, print_json};

use crate::place::Place;

#[derive(Args)]
pub(crate) struct Keys {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List the keys that open the repository
    List(Place),
    /// Add a key that opens it too
    Add(New),
    /// Remove a key; the data is not rewritten
    Remove(Old),
    /// Add a key and remove the one given by --key-file
    Rotate(New),
}

#[derive(Args)]
struct New {
    #[command(flatten)]
    place: Place,
    /// A file whose first line is the new passphrase
    #[arg(long, value_name = "FILE")]
    new_key_file: PathBuf,
    /// What to call it
    #[arg(long, default_value = "")]
    label: String,
}

#[derive(Args)]
struct Old {
    #[command(flatten)]
    place: Place,
    /// The key's id, as listed
    #[arg(long, value_name = "ID")]
    id: String,
}

impl Keys {
    pub(crate) async fn run(&self, json: bool) -> Result<ExitCode> {
        let repository = match &self.action {
            Action::List(place) => place.open(Access::Existing).await?,
            Action::Add(new) => {
                let repository = new.place.open(Access::Existing).await?;
                repository.add_key(&key(Some(&new.new_key_file))?, &new.label).await?;
                repository
            }
            Action::Rotate(new) => {
                let repository = new.place.open(Access::Existing).await?;
                repository.rotate_key(&key(Some(&new.new_key_file))?, &new.label).await?;
                repository
            }
            Action::Remove(old) => {
                let repository = old.place.open(Access::Existing).await?;
                repository.remove_key(&old.id.parse::<KeyId>()?).await?;
                repository
            }
        };
        print(&repository, json).await
    }
}

async fn print(repository: &Repository, json: bool) -> Result<ExitCode> {
    let keys = repository.keys().await?;
    if json {
        print_json(&keys)?;
    } else if keys.is_empty() {
        println!("the repository is not encrypted");
    } else {
        for key in keys {
            let kind = if key.kind == KeyKind::Passphrase { "passphrase" } else { "host key" };
            let in_use = if key.in_use { " (in use)" } else { "" };
            println!("{}  {kind}  {}  {}{in_use}", key.id, key.created.try_to_rfc3339_string().unwrap_or_default(), key.label);
        }
    }
    Ok(ExitCode::SUCCESS)
}
