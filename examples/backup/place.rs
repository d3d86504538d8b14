//! Where the repository lies, and what is backed up into it.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use mongo_backup::{Repository, RepositoryAudit};
use mongo_core::{ConnectOptions, Deployment, Error, Result, connect};
use mongo_examples::{Access, key, repository};

#[derive(Args)]
pub(crate) struct Place {
    /// The repository: a folder, or a bucket as s3://bucket/prefix, gs://… or az://… with credentials from the environment
    #[arg(long, value_name = "DIR|URL")]
    archive: String,
    /// A file whose first line is the passphrase of an encrypted repository; a new repository made with one is encrypted
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Record what is done, and that it was done by NAME, in the repository
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
}

impl Place {
    pub(crate) async fn open(&self, access: Access) -> Result<Repository> {
        let repository = repository(&self.archive, key(self.key_file.as_deref())?, access).await?;
        Ok(match &self.actor {
            Some(actor) => repository.audited(actor, Arc::new(RepositoryAudit::new(&repository))),
            None => repository,
        })
    }
}

pub(crate) async fn deployment(uri: Option<&str>) -> Result<Deployment> {
    let uri = uri.ok_or_else(|| Error::invalid("no deployment is named: give one with --uri mongodb://…"))?;
    connect(ConnectOptions::from_uri(uri)?.with_app_name("mongo-backup")).await
}
