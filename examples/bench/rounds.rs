//! What the next backup costs after a part of the documents has changed.

use std::path::Path;

use mongo_backup::{Backup, LocalArchive, Repository};
use mongo_core::{
    Error, Result,
    bson::{Document, RawDocumentBuf, doc},
    clock::Clock as _,
};
use serde::Serialize;

use crate::{Bench, DATABASE, orders::Orders, remove, size_of};

/// One round: a full backup, a change, and the backup after it.
#[derive(Serialize)]
pub(crate) struct Round {
    pub(crate) what: String,
    pub(crate) changed_documents: u64,
    pub(crate) first_seconds: f64,
    pub(crate) next_seconds: f64,
    pub(crate) first_bytes: u64,
    /// By how much the archive grew.
    pub(crate) grown_bytes: u64,
    /// The same as a share of what the first backup stored.
    pub(crate) grown_share: f64,
}

/// Where changes lie.
#[derive(Clone, Copy)]
enum Spread {
    Scattered,
    /// A tenth of the documents gets nine tenths of the changes.
    Skewed,
    Appended,
}

impl Bench {
    pub(crate) async fn rounds(&self, folder: &Path) -> Result<Vec<Round>> {
        let mut rounds = Vec::new();
        let mut orders = Orders::new();
        for _ in 0..self.settings.documents {
            orders.next();
        }
        let mut random = fastrand::Rng::with_seed(5);
        let archive = folder.join("rounds");
        let plan = [("unchanged", Spread::Scattered, 0.0)].into_iter().chain([0.001, 0.01, 0.1].into_iter().flat_map(|share| {
            [("scattered", Spread::Scattered, share), ("skewed", Spread::Skewed, share), ("appended", Spread::Appended, share)]
        }));
        for (what, spread, share) in plan {
            let repository = Repository::open_or_init(LocalArchive::new(&archive)?, self.key()).await?;
            self.rest().await?;
            let first_seconds = self.one(&repository).await?;
            let first_bytes = size_of(&archive)?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "a share of a count"
            )]
            let count = (self.settings.documents as f64 * share) as u64;
            match spread {
                Spread::Appended => self.append(&mut orders, count).await?,
                _ => self.change(&mut random, spread, count).await?,
            }
            self.rest().await?;
            let next_seconds = self.one(&repository).await?;
            let grown_bytes = size_of(&archive)? - first_bytes;
            #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
            let grown_share = grown_bytes as f64 / first_bytes as f64;
            let what = if share > 0.0 { format!("{:.1} % {what}", share * 100.0) } else { what.to_owned() };
            rounds.push(Round {
                what,
                changed_documents: count,
                first_seconds,
                next_seconds,
                first_bytes,
                grown_bytes,
                grown_share,
            });
            remove(&archive)?;
        }
        Ok(rounds)
    }

    async fn one(&self, repository: &Repository) -> Result<f64> {
        let started = self.clock.monotonic();
        let backup = Backup::builder(&self.deployment, repository).compression_level(self.settings.level);
        backup.namespaces(&format!("{DATABASE}.*")).build()?.run().await?;
        Ok(self.since(started))
    }

    async fn change(&self, random: &mut fastrand::Rng, spread: Spread, count: u64) -> Result<()> {
        let collection = self.deployment.database(DATABASE).collection::<Document>("orders");
        let all =
            i64::try_from(self.settings.documents).map_err(|error| Error::invalid("too many documents").with_source(error))?;
        let mut ids: Vec<i64> = (0..count)
            .map(|number| match spread {
                Spread::Skewed if number % 10 > 0 => random.i64(0..(all / 10).max(1)) + 1,
                _ => random.i64(0..all) + 1,
            })
            .collect();
        ids.sort_unstable();
        for ids in ids.chunks(1000) {
            let update = doc! { "$set": { "status": "returned", "session": format!("{:016x}", random.u64(..)) } };
            collection.update_many(doc! { "_id": { "$in": ids } }, update).await?;
        }
        Ok(())
    }

    async fn append(&self, orders: &mut Orders, count: u64) -> Result<()> {
        let collection = self.deployment.database(DATABASE).collection::<RawDocumentBuf>("orders");
        let mut left = count;
        while left > 0 {
            let batch = left.min(2000);
            collection.insert_many((0..batch).map(|_| orders.next()).collect::<Vec<_>>()).await?;
            left -= batch;
        }
        Ok(())
    }
}
